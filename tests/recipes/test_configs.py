"""The shipped configs of real models: each builds its training on a tiny model of its class.

And takes a step.
"""

import importlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from pipelines_tiny import WORDS, speaking_pipeline
from recipe_runs import log

from model.families import call_of, image_side
from model.pipeline import TextToImage

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
CLASSES = {
    "sd15": "unet", "sdxl": "unet_sdxl", "sd3": "sd3", "sd35": "sd3", "flux": "flux",
    "qwen_image": "qwen", "sana": "sana", "flux2": "klein", "z_image": "z_image",
}  # fmt: skip


def model_of(config):
    """How its name ends, where that is a real model's; None for the embedded world's."""
    return next((name for name in CLASSES if config.stem.endswith(f"_{name}")), None)


REAL = [one for one in sorted(CONFIGS.glob("*_*.yaml")) if model_of(one)]
# What is smaller than in the files: sizes, and models of rewards.
SMALL = {
    "resolution": "8", "train_batch_size": "2", "gradient_accumulation_steps": "1",
    "max_train_steps": "1", "num_epochs": "1", "lr_decay_steps": "0", "lr_warmup_steps": "0",
    "validation_inference_steps": "2", "num_inference_steps": "4", "first_step": "1",
    "inversion_steps": "2", "group_size": "2", "sample_batch_size": "2",
    "sample_num_batches_per_epoch": "1", "logging_steps": "1", "train_timesteps": "2",
    "reward": "redness", "mixed_precision": "no", "agsm_batch": "2", "max_pairs": "2",
    "agsm_every": "1", "threshold": "0",
}  # fmt: skip


def recipe_of(config):
    name = config.stem.removesuffix(f"_{model_of(config)}").replace("lora", "agsm")
    return importlib.import_module(f"train_{name}")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: speaking_pipeline(name, folder / name) for name in set(CLASSES.values())}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images with captions, pairs, and prompts, each in a file."""
    folder = tmp_path_factory.mktemp("data")
    captions = [f"a {WORDS[i % 2 + 2]} {WORDS[4 + i // 2]}" for i in range(4)]
    images = []
    for i in range(4):
        images.append(folder / f"{i}.png")
        Image.new("RGB", (8, 8), (60 * i, 20, 200 - 50 * i)).save(images[-1])
    shown, others = [str(one) for one in images], [str(one) for one in images[::-1]]
    photos = Dataset.from_dict({"image": shown, "caption": captions})
    photos.cast_column("image", ImageFeature()).to_parquet(folder / "photos.parquet")
    pairs = Dataset.from_dict({"image_w": shown, "image_l": others, "caption": captions})
    for column in ("image_w", "image_l"):
        pairs = pairs.cast_column(column, ImageFeature())
    pairs.to_parquet(folder / "pairs.parquet")
    (folder / "prompts.txt").write_text("\n".join(captions[:2]))
    return folder


@pytest.mark.parametrize("config", REAL, ids=lambda one: one.stem)
def test_its_options_are_valid(config):
    options = recipe_of(config).OPTIONS.parse("", ["--config", str(config)])
    assert options.data.endswith(".parquet") and options.mixed_precision != "no"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:DDPOTrainer is deprecated")
@pytest.mark.filterwarnings("ignore:.*_encode_prompt.* is deprecated")
@pytest.mark.parametrize("config", REAL, ids=lambda one: one.stem)
def test_it_builds_its_training_and_takes_a_step(config, models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(  # the own size of some is large, and texts are padded
        "model.pipeline.call_of",
        lambda pipe: (
            {"height": 16, "width": 16, "max_sequence_length": 32}
            if image_side(pipe) >= 128
            else call_of(pipe)
        ),
    )
    inputs, plain = set(), TextToImage.image_conditioning

    def conditioning(self, pixels):
        found = plain(self, pixels)
        inputs.update(found.get("guidance", torch.empty(0)).tolist())
        return found

    monkeypatch.setattr(TextToImage, "image_conditioning", conditioning)
    recipe, kind = recipe_of(config), CLASSES[model_of(config)]
    known = vars(recipe.OPTIONS.parse("", ["--config", str(config)]))
    pairs = recipe.__name__ in ("train_dpo", "train_inpo")
    given = {
        **{name: value for name, value in SMALL.items() if name in known},
        "model": models[kind],
        "data": data / ("pairs.parquet" if pairs else "photos.parquet"),
        "validation_prompts": data / "prompts.txt",
        "output_dir": tmp_path / "run",
        **({"sampling_prompts": data / "prompts.txt"} if "sampling_prompts" in known else {}),
        **({"agsm_weight": 1} if "agsm_weight" in known else {}),
    }
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    recipe.main(["--config", str(config), *flags])
    lines = [line for line in log(tmp_path / "run") if "loss" in line]
    assert lines and all(torch.tensor(line["loss"]).isfinite() for line in lines)
    assert any("agsm/loss" in line for line in log(tmp_path / "run"))
    # Where guidance is an input, images are drawn with what was trained.
    assert inputs == ({known["validation_guidance_scale"]} if kind == "flux" else set())
