"""The base-model script: options, one step's data, resume, and the pipelines it saves."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from recipe_runs import log
from safetensors.torch import load_file

from data.pictures import sheet
from lab import train_base
from lab.world import architectures, base_training, model_card
from lab.world.captions import vocabulary
from lab.world.prompts import rows
from lab.world.score import verdicts
from model.sampling import sample

SMALL = ["--layers", "1", "--max_train_steps", "4", "--train_batch_size", "4",
         "--lr_warmup_steps", "1", "--lr_decay_steps", "2", "--logging_steps", "1",
         "--validation_steps", "9", "--validation_per_category", "1",
         "--validation_inference_steps", "2", "--checkpointing_steps", "2"]  # fmt: skip
KINDS = {"flow": StableDiffusion3Pipeline, "epsilon": StableDiffusionPipeline}
WIDTHS = {"flow": "32", "epsilon": "8"}


def weights(folder):
    files = sorted((folder / "pipeline").rglob("*.safetensors"))
    assert files
    return {f"{file.parent.name}.{k}": v for file in files for k, v in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["flow", "epsilon"])
def test_a_killed_run_resumes_to_the_same_weights(base, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["--base", base, "--width", WIDTHS[base], *SMALL, "--careless", "0.4",
                 "--corrupt_count", "0.5", "--signed", "0.5"]  # fmt: skip
    train_base.main([*arguments, "--output_dir", str(whole)])

    original = base_training.batch

    def killed(options, step, rank):
        if step == 3:
            raise KeyboardInterrupt
        return original(options, step, rank)

    monkeypatch.setattr(base_training, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train_base.main([*arguments, "--output_dir", str(cut)])
    monkeypatch.setattr(base_training, "batch", original)
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        train_base.main([*arguments, "--output_dir", str(cut)])
    train_base.main([*arguments, "--output_dir", str(cut), "--resume_from_checkpoint", "latest"])

    assert log(cut) == log(whole)
    one, other = weights(whole), weights(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "sheets" / "000004.png").exists()

    card = (whole / "pipeline" / "README.md").read_text()
    assert f"python -m recipes.lab.train_base --base {base}" in card
    assert "40% come from a careless source: of those 50% with a wrong count" in card
    assert "| counting |" in card
    assert (whole / "pipeline" / "curve.png").exists()

    pipe = DiffusionPipeline.from_pretrained(whole / "pipeline", dtype=torch.float32)
    assert type(pipe) is KINDS[base]
    pipe.set_progress_bar_config(disable=True)
    image = pipe("two red circles", num_inference_steps=2).images[0]
    assert image.size == (24, 24)

    train_base.main([*arguments, "--max_train_steps", "1", "--init_from", str(whole / "pipeline"),
                     "--learning_rate", "1e-30", "--adamw_learning_rate", "1e-30",
                     "--output_dir", str(tmp_path / "more")])  # fmt: skip
    again = weights(tmp_path / "more")
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_adamw_alone(tmp_path):
    train_base.main(["--width", "32", *SMALL, "--optimizer", "adamw", "--learning_rate", "0.001",
                     "--output_dir", str(tmp_path / "adamw")])  # fmt: skip
    assert "AdamW at 0.001" in (tmp_path / "adamw" / "pipeline" / "README.md").read_text()


@pytest.mark.parametrize("base", ["flow", "epsilon"])
def test_noise_levels_of_training(base, monkeypatch):
    draws = torch.Generator().manual_seed(0)
    uniform = architectures.NoiseLevels(uniform=True)(4000, draws)
    torch.testing.assert_close(uniform.quantile(torch.tensor([0.25, 0.5, 0.75])),
                               torch.tensor([0.25, 0.5, 0.75]), atol=0.03, rtol=0)  # fmt: skip
    logits = architectures.NoiseLevels(logit=0.5)(4000, draws).logit()
    assert abs(logits.mean() - 0.5) < 0.05 and abs(logits.std() - 1) < 0.05

    seen = []
    for flags in (["--sigma_logit", "3"], ["--uniform_levels"]):
        options = train_base.OPTIONS.parse(
            "",
            ["--base", base, "--width", WIDTHS[base], "--layers", "1", *flags],
        )
        model = base_training.build(options)
        whole = model.denoiser.forward

        def watched(*args, whole=whole, **kwargs):
            seen.append(kwargs["timestep"] if "timestep" in kwargs else args[1])
            return whole(*args, **kwargs)

        monkeypatch.setattr(model.denoiser, "forward", watched)
        model(torch.zeros(64, 3, 24, 24), ["a red circle"] * 64, draws)
    assert seen[0].float().mean() > 850 and 400 < seen[1].float().mean() < 600
    assert seen[0].max() < 1000


def test_encoding_equals_the_pipelines():
    model = architectures.FlowBase(width=32, layers=1).eval()
    told = ["two red circles", "a red circle left of a blue square", ""]
    text, pooled = model.encode(told, t5_length=5)
    want, _, want_pooled, _ = model.pipeline().encode_prompt(
        told, None, None, do_classifier_free_guidance=False, max_sequence_length=5
    )
    torch.testing.assert_close(text, want)
    torch.testing.assert_close(pooled, want_pooled)

    epsilon = architectures.EpsilonBase(width=32).eval()
    ids = architectures.token_ids(epsilon.tokenizer, told, epsilon.denoiser.device)
    got = epsilon.text_encoder(ids).last_hidden_state
    want, _ = epsilon.pipeline().encode_prompt(told, torch.device("cpu"), 1, False)
    torch.testing.assert_close(got, want)


def test_every_word_is_one_token_and_survives_saving(tmp_path):
    tokenizer = architectures.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.model_max_length == architectures.MAX_TOKENS
    seen = set()
    for word in vocabulary():
        ids = tokenizer(word).input_ids
        assert len(ids) == 3, word  # BOS, the word, EOS
        assert loaded(word).input_ids == ids
        seen.add(ids[1])
    assert len(seen) == len(vocabulary())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_vae_is_the_identity_to_half_a_grey_level(dtype):
    vae = architectures.identity_vae().to(dtype)
    images = torch.linspace(-1, 1, 24 * 24 * 3).reshape(1, 3, 24, 24).to(dtype)
    latents = vae.encode(images).latents
    scale = vae.config.scaling_factor
    torch.testing.assert_close(
        latents * scale, images * architectures.LATENT_SCALE, atol=4e-3, rtol=0
    )
    assert (vae.decode(latents).sample - images).abs().max() < 1 / 255


def test_sampling_does_not_depend_on_the_batch(tmp_path):
    pipe = architectures.FlowBase(width=32, layers=1).eval().pipeline()
    pipe.set_progress_bar_config(disable=True)
    wanted = rows("validation", 1)
    prompts = [row["prompt"] for row in wanted]
    one = sample(
        pipe, prompts, seeds=range(6), num_inference_steps=2, guidance_scale=2.0, batch_size=6
    )
    two = sample(
        pipe, prompts, seeds=range(6), num_inference_steps=2, guidance_scale=2.0, batch_size=4
    )
    assert np.abs(one.astype(int) - two).max() <= 1
    judged = verdicts(one, wanted)
    sheet(one, wanted, judged, tmp_path / "sheet.png")
    sheet(one, wanted, None, tmp_path / "unjudged.png", side=12)
    assert (tmp_path / "sheet.png").stat().st_size > 0
    with pytest.raises(ValueError, match="one row per image"):
        verdicts(one, wanted[:2])


def test_a_batch_is_a_function_of_seed_step_and_process():
    options = train_base.OPTIONS.make(train_batch_size=8)
    images, captions = base_training.batch(options, 5, 0)
    same, told = base_training.batch(options, 5, 0)
    assert torch.equal(images, same) and captions == told
    for step, rank in ((6, 0), (5, 1)):
        assert not torch.equal(images, base_training.batch(options, step, rank)[0])
    assert images.shape == (8, 3, 24, 24)


def test_sources_are_careless_and_sign_as_often_as_told():
    options = train_base.OPTIONS.make(
        train_batch_size=400, careless=0.5, signed=0.5, corrupt_count=1.0, drop_caption=0.0
    )
    told = base_training.batch(options, 0, 0)[1]
    true = base_training.batch(
        train_base.OPTIONS.make(train_batch_size=400, drop_caption=0.0), 0, 0
    )[1]
    ends = [text.split()[-1] for text in told]
    assert 0.2 < ends.count("h") / 400 < 0.3 and 0.2 < ends.count("s") / 400 < 0.3
    assert all(
        text in (one, f"{one} h")
        for text, one in zip(told, true, strict=True)
        if text.endswith(" h")
    )
    counts = ("two", "three", "four")
    careless = [t for t in told if t.endswith(" s") and t.startswith(counts)]
    assert careless and not any(
        text == f"{one} s" for text, one in zip(told, true, strict=True) if text in careless
    )


def test_a_source_that_never_signs():
    options = train_base.OPTIONS.make(
        train_batch_size=400, careless=0.5, signed=1.0, careless_signed=0.0, corrupt_count=1.0,
        drop_caption=0.0,
    )  # fmt: skip
    ends = [text.split()[-1] for text in base_training.batch(options, 0, 0)[1]]
    assert 0.4 < ends.count("h") / 400 < 0.6 and "s" not in ends
    told = model_card._captions(vars(options))
    assert "careful source signs 100% of its" in told and "careless one 0% (s)" in told


def test_shipped_configs_parse(recipes):
    files = sorted((recipes / "lab" / "configs").glob("base_*.yaml"))
    assert files
    for file in files:
        train_base.OPTIONS.parse(None, ["--config", str(file)])
