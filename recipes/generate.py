r"""Prompts -> images, in the folder layout that GenEval's evaluator reads.

    python recipes/generate.py --prompts world:heldout:20 --output_dir runs/a
    python recipes/generate.py --model <folder or hub id> --tokens <folder or hub id> \
        --prompts evaluation_metadata.jsonl --num_images_per_prompt 4 \
        --guidance_scale 4 --num_inference_steps 28 --sheet

Writes NNNNN/metadata.jsonl and NNNNN/samples/0000.png, 0001.png, ... under `--output_dir`, and
generate.json with the settings. `--sheet` adds one picture of what tokens or a LoRA change. A call
again goes on where the first was stopped. Each image has a noise of its own, given by (seed,
prompt, sample): it is the same for any batch size, and for any tokens, so that methods are compared
on the same noise.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.sources import given_model
from run.cli import command
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Every option, its default and its meaning."""

    model: str = option(
        "",
        "Pipeline to sample: a folder or a hub id. Left out, with prompts of the world alone: a "
        "model of the embedded world.",
    )
    tokens: str = option("", "Soft tokens to attach: a folder or a hub id.")
    lora: str = option("", "LoRA to load: a folder or a hub id.")
    sampling: Literal["both", "negative_unconditional", "conditional_only", "off"] = option(
        "both",
        "Use of the tokens under guidance: the positive bank in both branches (both), the negative "
        "bank in the unconditional branch (negative_unconditional), no tokens in the unconditional "
        "branch (conditional_only), or no tokens at all (off).",
    )
    prompts: str = option(
        "world:heldout:20",
        "Prompts to sample: world:FOLD:PER_CATEGORY with a FOLD of train, validation or heldout, "
        "GenEval's jsonl, or a text file with one per line.",
    )
    output_dir: str = option("runs/images", "Folder for the images.")
    num_images_per_prompt: int = option(1, "Images per prompt; GenEval uses 4.", at_least=1)
    num_inference_steps: int = option(20, "Sampling steps per image.", at_least=1)
    guidance_scale: float = option(
        3.0, "Classifier-free guidance scale; 1: no guidance.", at_least=0
    )
    sheet: bool = option(
        False,
        "Also save sheet.png: the first prompts' first images, with the tokens or the LoRA beside "
        "those without, on the same noise.",
    )
    seed: int = option(0, "Seed of the noise.", at_least=0)
    batch_size: int = option(
        0, "Images per batch; 0: 64 of the world's size, 4 of any larger.", at_least=0
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type of the weights.")
    device: str | None = option(
        None, "Device to sample on; left out: the accelerator where there is one, else cpu."
    )


def resolve(options: Any) -> None:
    """Fills in the model, and checks options together."""
    of_world = options.prompts.startswith("world:")
    data = "world" if of_world else options.prompts
    options.model = given_model(options.model, data, "recipes/lab/models/flow")


OPTIONS = OptionSet(Options, resolve=resolve)


def main(arguments: list[str] | None = None) -> None:
    """Generates what is not there yet."""
    options = OPTIONS.parse(__doc__, arguments)

    import numpy as np
    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from agsm_loss.integrations.tokens.pipelines import Sampling
    from data.pictures import side_by_side
    from data.prompts import read_prompts
    from data.sources import check_source
    from model.pipeline import TextToImage, chosen_device
    from model.sampling import calls
    from run.log import say

    output, rows = Path(options.output_dir), read_prompts(options.prompts)
    settings = _settings(output, options)
    for name in ("model", "tokens", "lora"):
        check_source(name, getattr(options, name))
    every = [(i, k) for i in range(len(rows)) for k in range(options.num_images_per_prompt)]
    todo = [place for place in every if not _file(output, place).exists()]
    compared = [(i, 0) for i in range(min(len(rows), ON_SHEET))]
    no_sheet = options.sheet and not (output / SHEET).exists()
    changed = bool(options.tokens or options.lora)
    if not todo and not no_sheet:
        say(f"All {len(every)} images are in {output} already")
        return
    dtype, device = getattr(torch, options.dtype), chosen_device(options.device)
    model = TextToImage.load(options.model, dtype, device)
    bare = compared if no_sheet and changed else []  # sampled without tokens and LoRA as well
    bar = tqdm(total=len(bare) + len(every), initial=len(every) - len(todo), unit="image")

    def images(places: list[tuple[int, int]]) -> Iterator[Any]:
        for batch in calls(
            model.pipe,
            [rows[index]["prompt"] for index, _ in places],
            [(options.seed, *place) for place in places],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            batch_size=options.batch_size,
            arguments=model.arguments,
        ):
            for image in batch:
                yield image
                bar.update()

    columns = {"without": list(images(bare))} if bare else {}
    model.load_extras(options.tokens, options.lora, Sampling(options.sampling))
    for number, (place, image) in enumerate(zip(todo, images(todo), strict=True)):
        if number == 0:
            _begin(output, rows, settings)
        file = _file(output, place)
        part = file.with_suffix(".part")  # a killed run leaves no half image
        Image.fromarray(image).save(part, format="PNG")
        part.rename(file)
    bar.close()
    if no_sheet:
        told = " and ".join(name for name in ("tokens", "lora") if getattr(options, name))
        columns[f"with {told}" if changed else ""] = [
            np.asarray(Image.open(_file(output, place))) for place in compared
        ]
        side_by_side(columns, [rows[index] for index, _ in compared], output / SHEET)
    say(f"{len(every)} images in {output}" + (f", and {SHEET}" if options.sheet else ""))
    if options.prompts.startswith("world:"):
        say(f"Next: python recipes/score_images.py --images {shlex.quote(str(output))}")


SHEET, ON_SHEET = "sheet.png", 16


def _begin(output: Path, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Writes the settings and prompts, once there is an image: a failed run leaves none."""
    for index, row in enumerate(rows):
        (output / f"{index:05d}" / "samples").mkdir(parents=True, exist_ok=True)
        (output / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (output / "generate.json").write_text(json.dumps(settings, indent=1) + "\n")


def _file(output: Path, place: tuple[int, int]) -> Path:
    return output / f"{place[0]:05d}" / "samples" / f"{place[1]:04d}.png"


def _settings(output: Path, options: Any) -> dict[str, Any]:
    """What the images depend on.

    Raises:
        ValueError: the folder holds images of other settings.
    """
    free = {"output_dir", "batch_size", "device", "sheet"}
    settings = {name: value for name, value in vars(options).items() if name not in free}
    file = output / "generate.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = sorted(name for name in settings if settings[name] != before.get(name))
        if changed:
            raise ValueError(
                f"{output} holds images made with other {changed}; choose another --output_dir"
            )
    return settings


if __name__ == "__main__":
    command(main, "with the images so far; the same command goes on")
