"""Stock pipelines of every known kind, taken apart for training and trained on."""

import json
import shutil
from pathlib import Path

import fresh
import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler
from peft import LoraConfig, get_peft_model_state_dict
from pipelines_tiny import speaking_pipeline
from safetensors.torch import load_file, save_file
from torch import nn

import train_agsm
from data import sources
from data.sources import given_model
from lab.world.export import captioned
from model import trained as model_trained
from model.pipeline import TextToImage
from model.sampling import sample

FIRST = ("unet", "unet_sdxl", "sd3", "flux")
KINDS = (*FIRST, "qwen", "sana", "flux2", "z_image")  # the latter: see also test_families.py
SMALL = {"height": 16, "width": 16}
TOLD = ["a red circle", "two blue circles"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return speaking_pipeline(request.param, tmp_path_factory.mktemp(request.param) / "p")


@pytest.mark.parametrize("folder", FIRST, indirect=True)
def test_prompts_are_encoded_as_the_pipeline_would(folder):
    model = TextToImage.load(str(folder), torch.float32)
    got = model.encode_prompts(TOLD)
    pipe, kind = model.pipe, type(model.pipe).__name__
    if kind == "StableDiffusionPipeline":
        want = {"prompt_embeds": pipe.encode_prompt(TOLD, "cpu", 1, False)[0]}
    elif kind == "FluxPipeline":
        embeds, pooled, _ = pipe.encode_prompt(TOLD, None)
        want = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    else:
        others = (None,) * (2 if kind == "StableDiffusion3Pipeline" else 1)
        embeds, _, pooled, _ = pipe.encode_prompt(TOLD, *others, do_classifier_free_guidance=False)
        want = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert not torch.equal(value[0], value[1])
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("folder", FIRST, indirect=True)
def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(folder):
    """SDXL's is zeros by its config; the text encoders' own is there as well."""
    model = TextToImage.load(str(folder), torch.float32)
    got = model.encode_prompts(["a red circle", ""])
    pipe, kind = model.pipe, type(model.pipe).__name__
    if kind == "FluxPipeline":  # it guides by a second call, with the empty prompt
        want = dict(zip(got, pipe.encode_prompt("", None)[:2], strict=True))
    else:
        others = {"unet": (), "StableDiffusionXLPipeline": (None,)}.get(kind, (None, None))
        found = pipe.encode_prompt(
            "a red circle",
            *(() if kind == "StableDiffusionPipeline" else others),
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        want = dict(zip(got, (found[1], found[-1]), strict=False))
    for name, value in want.items():
        torch.testing.assert_close(got[name][1:], value)
        assert not torch.equal(got[name][0], got[name][1])
    zeros = kind == "StableDiffusionXLPipeline"
    assert all((value[1] == 0).all() == zeros for value in got.values())
    assert all((value != 0).any() for value in model.encode_text([""]).values())


@pytest.mark.parametrize("folder", FIRST, indirect=True)
def test_latents_decode_to_what_the_vae_would_give(folder):
    model = TextToImage.load(str(folder), torch.float32)
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = model.encode_images(pixels, torch.Generator().manual_seed(0))
    again = model.encode_images(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(latents, again)
    vae = model.pipe.vae
    spread = vae.encode(pixels).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    unscaled = latents / vae.config.scaling_factor + shift
    far = (unscaled - spread.mean).abs() / spread.std
    assert 0 < far.mean() < 2  # a draw of the posterior
    assert not any(p.requires_grad for p in model.denoiser.parameters())


STOCK = """
import sys, torch
from diffusers import DiffusionPipeline

for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(folder + "/lora")
    assert "agsm_loss" not in sys.modules
    torch.manual_seed(0)
    size = {"height": 16, "width": 16}
    if "Sana" in type(pipe).__name__:
        size = {"height": 32, "width": 32, "use_resolution_binning": False}
    images = pipe(prompt="a red circle", num_inference_steps=2, output_type="np", **size)
    torch.save(torch.from_numpy(images.images), folder + "/stock.pt")
"""


def test_a_stock_pipeline_loads_a_lora(tmp_path):
    """In a new process, without this package: it gives the trained model's images."""
    drawn = {}
    for kind in KINDS:
        folder = speaking_pipeline(kind, tmp_path / kind)
        model = TextToImage.load(str(folder), torch.float32)
        model.pipe.set_progress_bar_config(disable=True)

        def draw(model):
            torch.manual_seed(0)
            call = {**SMALL, **model.arguments, "num_inference_steps": 2, "output_type": "np"}
            return torch.from_numpy(model.pipe(prompt="a red circle", **call).images)

        before = draw(model)
        model.add_lora(2)
        for name, one in model.denoiser.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(one)
        drawn[folder] = draw(model)
        assert not torch.allclose(drawn[folder], before, atol=0.01)
        model.save_lora(folder / "lora")
    fresh.run(fresh.code, STOCK, *drawn)
    for folder, wanted in drawn.items():
        torch.testing.assert_close(torch.load(folder / "stock.pt"), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_in_half_precision_samples(folder, dtype):
    """Its VAE is held in float32, and the stock pipelines don't cast the latents."""
    model = TextToImage.load(str(folder), dtype)
    images = sample(
        model.pipe, ["a red circle"], seeds=[0], num_inference_steps=2, guidance_scale=2.0,
        arguments={**SMALL, **model.arguments},
    )  # fmt: skip
    assert images.dtype == "uint8" and images.shape[0] == 1 and images.std() > 0
    assert model.pipe.vae.dtype == torch.float32


def test_a_run_on_a_table_saves_tokens(folder, tmp_path):
    captioned(6, seed=0).to_parquet(tmp_path / "w.parquet")
    flags = ["--model", str(folder), "--data", str(tmp_path / "w.parquet"), "--resolution", "8",
             "--max_train_steps", "2", "--train_batch_size", "3", "--candidates", "in_batch:2",
             "--logging_steps", "1", "--output_dir", str(tmp_path / "run"),
             "--num_tokens", "1"]  # fmt: skip
    train_agsm.main(flags)
    from agsm_loss.integrations.tokens.saved import SavedTokens

    saved = SavedTokens.from_pretrained(tmp_path / "run" / "tokens")
    assert saved.backbone == type(TextToImage.load(str(folder), torch.float32).denoiser).__name__
    assert all(bool(torch.isfinite(p).all()) for p in saved.tokens.parameters())


def test_unets_run_channels_last_and_transformers_as_they_were(epsilon_base, flow_base):
    def layouts(base):
        denoiser = TextToImage.load(str(base), torch.float32).denoiser
        kernels = [p for p in denoiser.parameters() if p.ndim == 4 and p.shape[-1] > 1]
        assert kernels
        return {p.is_contiguous(memory_format=torch.channels_last) for p in kernels}

    assert layouts(epsilon_base) == {True} and layouts(flow_base) == {False}


def picture(model, prompt="two red circles"):
    return sample(
        model.pipe, [prompt], seeds=[0], num_inference_steps=2, guidance_scale=1.0,
        arguments=model.arguments,
    )  # fmt: skip


def test_a_folder_with_files_of_one_variant_alone_is_found(flow_base, tmp_path, monkeypatch):
    """And ~ is the home folder, also in a call."""
    DiffusionPipeline.from_pretrained(flow_base).save_pretrained(tmp_path / "v", variant="fp16")
    assert not list(tmp_path.glob("v/*/diffusion_pytorch_model.safetensors"))
    monkeypatch.setenv("HOME", str(tmp_path))
    model = TextToImage.load("~/v", torch.float32)
    assert (picture(model) == picture(TextToImage.load(str(flow_base), torch.float32))).all()


def test_what_is_no_pipeline_is_one_line(flow_base, tmp_path):
    def fails(path, told):
        with pytest.raises(ValueError, match=f"^model: expected a folder.*{told}") as caught:
            TextToImage.load(str(path), torch.float32)
        assert "\n" not in str(caught.value)

    file = tmp_path / "one.safetensors"
    file.touch()
    fails(file, "from_single_file")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "model_index.json")
    folder = tmp_path / "custom"
    folder.mkdir()
    index = json.loads((flow_base / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "MyPipeline"}))
    fails(folder, "AttributeError: .*MyPipeline")
    shutil.copytree(flow_base, tmp_path / "cut")
    weights = tmp_path / "cut" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    fails(tmp_path / "cut", "cut: ")


def test_the_worlds_models_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "recipes/lab/models/flow"
    for found in (given_model("", "world", name), given_model(name, "a.csv", "")):
        assert (Path(found) / "model_index.json").exists()
    monkeypatch.chdir(Path(__file__).parents[3])
    assert given_model("", "world", name) == name


def lora(pipe, folder, **layers):
    """Saves one with random weights; layers: the modules of each part that it is for."""
    saved = {}
    for part, names in layers.items():
        module = getattr(pipe, part)
        module.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
    pipe.save_lora_weights(folder, **saved)
    return str(folder)


def test_a_lora_that_changes_nothing_is_refused(epsilon_base, flow_base, tmp_path):
    """diffusers warns of another model's, and of zeros it says nothing."""
    other = DiffusionPipeline.from_pretrained(flow_base)
    lora(other, tmp_path / "other", transformer=["to_q"])
    model = TextToImage.load(str(epsilon_base), torch.float32)
    with pytest.raises(ValueError, match="expected one that changes a StableDiffusionPi"):
        model.merge_lora(str(tmp_path / "other"))
    model = TextToImage.load(str(epsilon_base), torch.float32)
    model.add_lora(2)
    model.save_lora(tmp_path / "zero")
    model = TextToImage.load(str(epsilon_base), torch.float32)
    with pytest.raises(ValueError, match="or all are zero"):
        model.load_extras("", str(tmp_path / "zero"))


@pytest.mark.parametrize("kind", ["A", "alpha", "dora", "nan"])
def test_a_lora_of_zero_by_any_of_its_parts_is_refused(kind, epsilon_base, tmp_path):
    """Only B was looked at: a zero A or alpha, and an untrained DoRA, passed."""
    model, zero = TextToImage.load(str(epsilon_base), torch.float32), kind == "dora"
    model.pipe.unet.add_adapter(
        LoraConfig(r=2, lora_alpha=0 if kind == "alpha" else 2, target_modules=["to_q"],
                   use_dora=zero, init_lora_weights=zero),
        "default",
    )  # fmt: skip
    for name, one in model.pipe.unet.named_parameters():
        if "lora_A" in name and kind in ("A", "nan"):
            one.data.fill_(0.0 if kind == "A" else torch.nan)
    model.save_lora(tmp_path)
    for use in (TextToImage.merge_lora, lambda model, file: model.load_extras("", file)):
        fresh = TextToImage.load(str(epsilon_base), torch.float32)
        with pytest.raises(ValueError, match=r"expected (one that changes|finite weights)"):
            use(fresh, str(tmp_path))


def test_a_dora_at_strength_0_is_the_model_without_it(epsilon_base, tmp_path):
    loaded = TextToImage.load(str(epsilon_base), torch.float32)
    bare = picture(loaded)
    loaded.denoiser.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=["to_q"]))
    for name, one in loaded.denoiser.named_parameters():
        if "magnitude" in name:
            one.data.mul_(1.5)
    loaded.save_lora(tmp_path)
    loaded = TextToImage.load(str(epsilon_base), torch.float32)
    loaded.load_extras("", str(tmp_path))
    strong = picture(loaded)
    loaded.set_lora_scale(0)
    assert (picture(loaded) == bare).all() and not (strong == bare).all()
    loaded.set_lora_scale(1)
    assert (picture(loaded) == strong).all()
    with pytest.raises(ValueError, match=r"expected 0 or 1 for a DoRA, got 0\.5"):
        loaded.set_lora_scale(0.5)


def test_a_merged_lora_of_the_text_encoder_is_in_the_saved_pipeline(epsilon_base, tmp_path):
    file = lora(
        DiffusionPipeline.from_pretrained(epsilon_base), tmp_path / "lora",
        unet=["to_q"], text_encoder=["q_proj"],
    )  # fmt: skip
    loaded, merged = (TextToImage.load(str(epsilon_base), torch.float32) for _ in range(2))
    bare, text = picture(loaded), loaded.encode_text(["two red circles"])["prompt_embeds"]
    loaded = TextToImage.load(str(epsilon_base), torch.float32)
    loaded.load_extras("", file)
    wanted = loaded.encode_text(["two red circles"])["prompt_embeds"]
    assert not torch.allclose(text, wanted, atol=1e-3)
    strong = picture(loaded)
    loaded.set_lora_scale(0)
    assert (picture(loaded) == bare).all() and not (strong == bare).all()
    merged.merge_lora(file)
    assert not [name for name, _ in merged.pipe.text_encoder.named_parameters() if "lora" in name]
    merged.pipe.save_pretrained(tmp_path / "pipeline")
    again = TextToImage.load(str(tmp_path / "pipeline"), torch.float32)
    torch.testing.assert_close(again.encode_text(["two red circles"])["prompt_embeds"], wanted)
    assert abs(picture(again).astype(int) - strong).max() <= 1


class Blackens(nn.Module):
    def forward(self, clip_input, images):
        return images * 0, [True] * len(images)


def test_a_safety_checker_makes_no_image_black(epsilon_base, monkeypatch, capsys):
    def checked(*args, **settings):
        pipe = load(*args, **settings)
        pipe.register_modules(safety_checker=Blackens(), feature_extractor=None)
        return pipe

    load = DiffusionPipeline.from_pretrained
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", checked)
    model = TextToImage.load(str(epsilon_base), torch.float32)
    assert picture(model).any() and "safety checker is off" in capsys.readouterr().out
    assert not model.pipe.config.requires_safety_checker


def test_nan_is_no_picture(flow_base):
    model = TextToImage.load(str(flow_base), torch.float32)
    model.denoiser.proj_out.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN in 1 of 1 images, first of the prompt 'two"):
        picture(model)


@pytest.mark.parametrize(
    ("folder", "side", "told"),
    [
        ("flux", 9, "multiple of 2 for"),
        ("sana", 12, "multiple of 8 for"),
        ("sd3", 64, "up to"),
        ("flux2", 9, "multiple of 2 for"),
        ("z_image", 9, "multiple of 2 for"),
    ],
    indirect=["folder"],
)
def test_a_side_that_the_model_does_not_take_is_one_line(folder, side, told):
    model = TextToImage.load(str(folder), torch.float32)
    with pytest.raises(ValueError, match=f"^resolution: .*{told}.*, got {side}"):
        model.encode_images(torch.zeros(1, 3, side, side))


def test_unknown_noise_is_refused_before_training(epsilon_base, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(epsilon_base)
    pipe.scheduler = EDMEulerScheduler()  # Playground v2.5's
    pipe.save_pretrained(tmp_path / "edm")
    with pytest.raises(ValueError, match="got EDMEulerScheduler with other noise"):
        train_agsm.main(["--model", str(tmp_path / "edm"), "--output_dir", str(tmp_path / "run")])


def test_a_merged_lora_of_the_hub_is_known_by_its_content(tmp_path, monkeypatch):
    def here(name, **_):
        assert name == "owner/lora"
        return str(tmp_path)

    monkeypatch.setattr(sources, "snapshot_download", here)
    file, seen = tmp_path / "pytorch_lora_weights.safetensors", []
    for content in (b"one", b"two", b"one"):
        file.write_bytes(content)
        seen.append(model_trained._content("owner/lora"))
    assert seen[0] == seen[2] != seen[1]
    assert model_trained._content(str(file)) == model_trained._content(str(tmp_path)) == seen[0]


def test_a_tokenizer_that_cannot_be_used_is_found_when_the_model_is_loaded(flow_base, tmp_path):
    broken = shutil.copytree(flow_base, tmp_path / "p")
    config = broken / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 10**30}))
    with pytest.raises(ValueError, match=r"model: expected a folder.*OverflowError"):
        TextToImage.load(str(broken), torch.float32)
    config.write_bytes((flow_base / "tokenizer" / "tokenizer_config.json").read_bytes())
    table = json.loads((broken / "tokenizer" / "tokenizer.json").read_text())
    table["model"]["vocab"]["red"] = 10**4
    (broken / "tokenizer" / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"tokenizer has a token 10000, its text encoder \d+"):
        TextToImage.load(str(broken), torch.float32)


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_weights_that_are_in_no_file_are_told(part, flow_base, tmp_path):
    broken = shutil.copytree(flow_base, tmp_path / "p")
    (file,) = (broken / part).glob("*.safetensors")
    weights = load_file(file)
    del weights[max(weights)]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model: expected a folder.*(lack 1 weights|missing)"):
        TextToImage.load(str(broken), torch.float32)
