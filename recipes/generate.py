r"""Prompts -> images, in the folder layout that GenEval's evaluator reads.

    python recipes/generate.py --prompts world:heldout:20 --output_dir runs/a
    python recipes/generate.py --model <folder or hub id> --tokens <folder or hub id> \
        --prompts evaluation_metadata.jsonl --num_images_per_prompt 4 \
        --guidance_scale 4 --num_inference_steps 28 --sheet

Writes NNNNN/metadata.jsonl and NNNNN/samples/0000.png, 0001.png, ... under `--output_dir`, and
generate.json with the settings. `--sheet` adds one picture of what tokens or a LoRA change. A call
again goes on where the first was stopped, if prompts, model, tokens and LoRA are what they were.
Each image has a noise of its own, given by (seed, prompt, sample): it is the same for any batch
size, and for any tokens, so that methods are compared on the same noise.

    python recipes/generate.py --lora runs/lora/lora --lora_scale 0 0.5 1 1.5 --prompts prompts.txt

shows a LoRA at several strengths, the columns of sheet.png; the images of each are in a folder of
its own, lora_scale_0.5. A LoRA trained with guidance moves the model along the guidance scale.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from agsm_loss.integrations.tokens.pipelines import Sampling
from data.pictures import side_by_side
from data.prompts import read_prompts, rows_of
from data.sources import content_of, given_model
from model.sampling import SOURCES, SamplingOptions, calls, check_sources, load
from run.cli import command
from run.log import check_writable, replace_text, say, writing
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Prompts, and where their images go."""

    lora_scale: list[float] = option(
        [1.0], "Strength of the LoRA, or several; 0 is the model without it."
    )
    prompts: str = option(
        "world:heldout:20",
        "Prompts to sample: world:FOLD:PER_CATEGORY with a FOLD of train, validation or heldout, "
        "GenEval's jsonl, or a text file with one per line.",
    )
    output_dir: str = option("runs/images", "Folder for the images.")
    num_images_per_prompt: int = option(1, "Images per prompt; GenEval uses 4.", at_least=1)
    sheet: bool = option(
        False,
        "Also save sheet.png: the first prompts' first images, with the tokens or the LoRA beside "
        "those without, on the same noise.",
    )


def resolve(options: Any) -> None:
    """Fills in the model, and checks options together."""
    of_world = options.prompts.startswith("world:")
    data = "world" if of_world else options.prompts
    options.model = given_model(options.model, data, "recipes/lab/models/flow")
    if not options.lora_scale or (options.lora_scale != [1.0] and not options.lora):
        raise ValueError(
            f"lora_scale: expected strengths of a LoRA, got {options.lora_scale} with --lora "
            f"{options.lora!r}. Give both, or neither."
        )
    names = list(map(_name_of, options.lora_scale))
    if not all(map(math.isfinite, options.lora_scale)) or len(set(names)) < len(names):
        raise ValueError(
            "lora_scale: expected finite strengths that differ in their first six digits, which "
            f"name the folders, got {options.lora_scale}."
        )


def _name_of(scale: float) -> str:
    """The folder of a strength."""
    return f"lora_scale_{scale:g}"


OPTIONS = OptionSet(Options, SamplingOptions, resolve=resolve)


def main(arguments: list[str] | None = None) -> None:
    """Generates what is not there yet."""
    options = OPTIONS.parse(__doc__, arguments)

    check_sources(options)
    given = {name: getattr(options, name) for name in SOURCES}
    output, rows = Path(options.output_dir), read_prompts(options.prompts)
    several = len(options.lora_scale) > 1
    folders = {
        scale: output / _name_of(scale) if several else output for scale in options.lora_scale
    }
    contents = {name: content_of(source) for name, source in given.items()}
    _check_kept(output, _settings(options, contents), folders.values(), rows)
    every = [(i, k) for i in range(len(rows)) for k in range(options.num_images_per_prompt)]
    todo = {
        scale: [place for place in every if not _file(folder, place).exists()]
        for scale, folder in folders.items()
    }
    left, number = sum(map(len, todo.values())), len(every) * len(folders)
    compared = [(i, 0) for i in range(min(len(rows), ON_SHEET))]
    sheet = options.sheet or several
    no_sheet = sheet and (left > 0 or not (output / SHEET).exists())
    changed = " and ".join(name for name in ("tokens", "lora") if given[name])
    if not left and not no_sheet:
        say(f"All {number} images are in {output} already")
        return
    for folder in folders.values():
        for index in range(len(rows)):
            check_writable(output, _file(folder, (index, 0)).parent)
    model = load(options)
    # Sampled without tokens and LoRA as well.
    bare = compared if no_sheet and changed and not several else []
    bar = tqdm(total=len(bare) + number, initial=number - left, unit="image")

    def images(places: list[tuple[int, int]]) -> Iterator[Any]:
        for batch in calls(
            model.pipe,
            [rows[index]["prompt"] for index, _ in places],
            seeds=[(options.seed, *place) for place in places],
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
    # What the hub has is known only now.
    contents |= {n: content_of(one) for n, one in given.items() if not Path(one).exists()}
    settings = _settings(options, contents)
    _check_kept(output, settings, folders.values(), rows)
    for scale, folder in folders.items():
        if options.lora:
            model.set_lora_scale(scale)
        for place, image in zip(todo[scale], images(todo[scale]), strict=True):
            if place == todo[scale][0]:
                _begin(output, folder, rows, settings)
            file = _file(folder, place)
            with writing(file):
                part = file.with_suffix(".part")  # a killed run leaves no half image
                Image.fromarray(image).save(part, format="PNG")
                part.rename(file)
        if no_sheet:
            title = f"lora {scale:g}" if several else f"with {changed}" if changed else ""
            columns[title] = [np.asarray(Image.open(_file(folder, place))) for place in compared]
    bar.close()
    if no_sheet:
        told = [rows[index] for index, _ in compared]
        with writing(output / SHEET) as file:
            side_by_side(columns, told, file, prompts_a_line=1 if several else None)
    say(f"{number} images in {output}" + (f", and {SHEET}" if sheet else ""))
    if options.prompts.startswith("world:"):
        flags = shlex.join(["--images", *map(str, folders.values())])
        say(f"Next: python recipes/score_images.py {flags}")


SHEET, ON_SHEET = "sheet.png", 16


def _begin(
    output: Path, folder: Path, rows: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """Writes the settings and prompts, once there is an image: a failed run leaves none."""
    for index, row in enumerate(rows):
        with writing(folder / f"{index:05d}" / "metadata.jsonl") as file:
            (file.parent / "samples").mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row) + "\n")
    with writing(output / "generate.json") as file:
        replace_text(file, json.dumps(settings, indent=1) + "\n")


def _file(folder: Path, place: tuple[int, int]) -> Path:
    return folder / f"{place[0]:05d}" / "samples" / f"{place[1]:04d}.png"


def _settings(options: Any, contents: dict[str, str | None]) -> dict[str, Any]:
    """What the images depend on."""
    free = {"output_dir", "batch_size", "device", "sheet"}
    settings = {name: value for name, value in vars(options).items() if name not in free}
    return {**settings, "contents": contents}


def _check_kept(
    output: Path, settings: dict[str, Any], folders: Iterable[Path], rows: list[dict[str, Any]]
) -> None:
    """ValueError where there are images of other settings, models or prompts, or of unknown ones.

    Models and prompts are compared by what they hold, not by name.
    """
    images = (file for folder in folders for file in folder.glob("*/samples/*.png"))
    kept = sorted({file.parents[1] for file in images})
    file = output / "generate.json"
    if kept and not file.exists():
        raise ValueError(
            f"{output} holds images, first {kept[0]}'s, and no generate.json that tells what made "
            "them; choose another --output_dir, or delete the images"
        )
    before = _settings_kept(file) if file.exists() else settings
    now, then = settings["contents"], before.get("contents", {})
    known = {name for name in now if now[name] is not None}
    changed = [name for name in known if now[name] != then.get(name)]
    others = set(settings) - known - {"contents", "prompts"}
    changed += [name for name in others if settings[name] != before.get(name)]
    if changed:
        raise ValueError(
            f"{output} holds images made with other {sorted(changed)}; choose another --output_dir"
        )
    wanted = {f"{index:05d}": row for index, row in enumerate(rows)}
    for one in kept:
        found = _rows_kept(one / "metadata.jsonl")
        if found != [wanted.get(one.name)]:
            first = found[0] if found else None
            told = first.get("prompt") if isinstance(first, dict) else first
            raise ValueError(
                f"{one} holds images of {told!r}, which is not prompt {one.name} of the "
                f"{len(rows)} that are given; choose another --output_dir"
            )


def _rows_kept(file: Path) -> list[Any]:
    """What a file tells of the images that are there."""
    try:
        return [row for _, row in rows_of(file)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{error} Choose another --output_dir, or delete the images.") from error


def _settings_kept(file: Path) -> dict[str, Any]:
    """The settings of the images that are there."""
    found = _rows_kept(file)
    settings = found[0] if len(found) == 1 else None
    if not isinstance(settings, dict) or not isinstance(settings.get("contents", {}), dict):
        raise ValueError(
            f"{file}: expected the settings that images were made with, got {found!r:.200}. Choose "
            "another --output_dir, or delete the images."
        )
    return settings


if __name__ == "__main__":
    command(main, "with the images so far; the same command goes on")
