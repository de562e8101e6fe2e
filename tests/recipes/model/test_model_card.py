"""Cards of what recipes save: they tell how it was made, and their code runs as it stands."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image, ImageChops
from pipelines_tiny import speaking_pipeline

import train_agsm
import train_dpo
from agsm_loss.integrations.cards import quoted
from lab.world.export import captioned
from lab.world.prompts import rows
from model.card import Trained, write_cards
from model.pipeline import TextToImage
from run.log import lines_of

FEW = ["--max_train_steps", "1", "--train_batch_size", "3", "--validation_per_category", "1",
       "--validation_inference_steps", "2", "--num_tokens", "2", "--candidates", "in_batch:1",
       "--learning_rate", "0.1"]  # fmt: skip


def card(folder):
    """Its metadata and text, and what its code leaves behind, drawn from noise 0."""
    found = ModelCard.load(folder / "README.md")
    names = {}
    for source in re.findall(r"^```python\n(.*?)^```$", found.text, re.DOTALL | re.MULTILINE):
        source = source.replace("image = pipe(", "torch.manual_seed(0)\nimage = pipe(")
        exec(compile(source, str(folder), "exec"), names)  # noqa: S102 (our own text)
    return found.data.to_dict(), found.text, names


def drawn(model, tokens="", lora="", merged="", guidance=1.0):
    """The card's image, by the recipes' own code; without guidance, where it is trained in."""
    loaded = TextToImage.load(str(model), torch.float32)
    if merged:
        loaded.merge_lora(str(merged))
    loaded.load_extras(str(tokens), str(lora))
    torch.manual_seed(0)
    call = {"num_inference_steps": 2, "guidance_scale": guidance, **loaded.arguments}
    return loaded.pipe(rows("validation", 1)[0]["prompt"], **call).images[0]


def near(one, other):
    """Alike but for the order of the sums: a UNet here runs channels last."""
    most = max(high for _, high in ImageChops.difference(one, other).getextrema())
    return most <= 2


@pytest.mark.parametrize(
    ("kind", "given"),
    [("qwen", {"true_cfg_scale": 3.0, "negative_prompt": " "}), ("sana", {"guidance_scale": 3.0})],
)
def test_guidance_has_the_pipelines_own_name(kind, given, tmp_path, monkeypatch):
    if kind == "qwen":  # its own size is 128 pixels here
        monkeypatch.setattr("model.pipeline.call_of", lambda pipe: {"height": 16, "width": 16})
    model, run = speaking_pipeline(kind, tmp_path / kind), tmp_path / "run"
    captioned(6, seed=0).to_parquet(tmp_path / "w.parquet")
    flags = ["--model", str(model), "--data", str(tmp_path / "w.parquet"), "--resolution", "32"]
    train_agsm.main([*flags, "--output_dir", str(run), *FEW])
    _, _, names = card(run / "tokens")
    loaded = TextToImage.load(str(model), torch.float32)
    loaded.load_extras(str(run / "tokens"), "")
    torch.manual_seed(0)
    call = {"num_inference_steps": 2, **given, **loaded.arguments}
    wanted = loaded.pipe("two red circles", **call).images[0]
    assert near(wanted, names["image"])


@pytest.fixture(scope="module")
def lora_run(epsilon_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    flags = ["--model", str(epsilon_base), "--output_dir", str(folder), "--rank", "2"]
    train_dpo.main([*flags, *FEW, "--agsm_weight", "2", "--beta", "50"])
    return folder


def test_a_lora_and_the_tokens_beside_it(lora_run, epsilon_base):
    tokens, lora = lora_run / "tokens", lora_run / "lora"
    wanted = drawn(epsilon_base, tokens, lora)
    assert not near(wanted, drawn(epsilon_base))
    for folder, tag in ((tokens, "soft-tokens"), (lora, "lora")):
        data, text, names = card(folder)
        assert near(names["image"], wanted)
        assert tag in data["tags"] and data["pipeline_tag"] == "text-to-image"
        assert "base_model" not in data  # a folder
        for told in (
            "trained by Diffusion-DPO with AGSM (lambda 2)",
            f"together with `{lora if folder == tokens else tokens}`",
            "recipes/train_dpo.py",
            "| beta | `50.0` |",
            "| overall | ",
            "| dpo/accuracy | ",
        ):
            assert told in text
        with Image.open(folder / "sheet.png") as sheet:
            assert sheet.size[0] > 100


def test_a_lora_by_kohyas_names_gives_the_same_picture(lora_run, epsilon_base):
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    card(lora_run / "lora")
    file = lora_run / "lora_kohya.safetensors"
    assert all(name.startswith("lora_unet_") for name in load_file(file))

    def image(lora):
        pipe = DiffusionPipeline.from_pretrained(epsilon_base)
        pipe.load_lora_weights(lora)
        torch.manual_seed(0)
        return pipe("a circle", num_inference_steps=2).images[0]

    assert near(image(lora_run / "lora"), image(file))


def test_a_pipeline_and_the_tokens_beside_it(flow_base, tmp_path, monkeypatch):
    monkeypatch.setattr("model.trained.EMA", None)  # without a reference no weights are copied
    train_agsm.main(["--model", str(flow_base), "--output_dir", str(tmp_path), *FEW, "--full"])
    wanted = drawn(tmp_path / "pipeline", tmp_path / "tokens")
    for name in ("pipeline", "tokens"):
        _, text, names = card(tmp_path / name)
        assert near(names["image"], wanted) and "trained by AGSM" in text


def test_a_merged_lora_is_part_of_the_code(epsilon_base, lora_run, tmp_path, capsys):
    flags = ["--model", str(epsilon_base), "--merge_lora", str(lora_run / "lora")]
    flags += ["--ema_decay", "0.25"]
    train_agsm.main([*flags, "--output_dir", str(tmp_path), *FEW, "--objective", "denoising"])
    wanted = drawn(epsilon_base, tmp_path / "tokens", merged=lora_run / "lora")
    data, text, names = card(tmp_path / "tokens")
    assert near(names["image"], wanted) and "trained by plain denoising" in text
    assert data["tags"] == ["text-to-image", "soft-tokens"]
    # What plain denoising does not read is told, and is no setting of it.
    said = "not used   candidates in_batch:1, ema_decay 0.25 (because of --objective denoising)"
    assert said in capsys.readouterr().out
    table = text.split("| option | value |")[1]
    assert "num_tokens" in table and not re.search("ema_decay|candidates|agsm|neg_scale", table)


def written(folder, prompt="two red circles", names=("tokens",), **options):
    """The cards' text for these options and the log in `folder`."""
    pipe = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    chosen = train_agsm.OPTIONS.make(output_dir=str(folder), **options)
    saved = {name: folder / name for name in names}
    for one in saved.values():
        one.mkdir(parents=True)
    write_cards(saved, Trained(chosen, "", pipe, 1, 1, prompt, {}))
    return "".join((one / "README.md").read_text() for one in saved.values())


def test_what_the_run_used_is_no_score(tmp_path):
    line = {"step": 1, "seconds": 2.5, "gpu_memory": 3.5, "loss": 0.25}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    told = written(tmp_path)
    assert "`0.25`" in told and "gpu_memory" not in told and "seconds" not in told


@pytest.mark.parametrize(
    "damaged", ["7", "null", "[]", '"a"', '{"step', pytest.param("[" * 200000, id="deep")]
)
def test_a_damaged_line_of_the_log_is_left_out(damaged, tmp_path):
    line = json.dumps({"step": 1, "loss": 0.25})
    (tmp_path / "log.jsonl").write_text(f"{damaged}\n{line}\n")
    assert lines_of(tmp_path / "log.jsonl") == [line]
    assert "`0.25`" in written(tmp_path)


def test_any_path_is_a_string_of_python(tmp_path):
    for text in ('a "b".png', "a\\n'b\\", "a\nb", "\u2028\U0001f600", "caf\xe9", "\udcff", "{x}"):
        assert ast.literal_eval(quoted(Path(text))) == text
    folder, given = tmp_path / '"it\'s"\\n\n', {"model": 'm"\\', "merge_lora": 'l"\n{{ name }}'}
    folder.mkdir()
    (folder / "log.jsonl").write_text("")
    text = written(folder, 'a "red"\ncircle', ("lora", "tokens"), **given)
    code = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for one in code:
        texts = {one.value for one in ast.walk(ast.parse(one)) if isinstance(one, ast.Constant)}
        own = {str(folder / "lora"), str(folder / "tokens")}
        assert texts >= {*given.values(), *own, 'a "red"\ncircle'}
    assert len(code) == 2
