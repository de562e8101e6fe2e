r"""Changes images to new captions and keeps the rest, with and without soft tokens or a LoRA.

    python recipes/edit.py --output_dir runs/edits
    python recipes/edit.py --tokens <folder or hub id> --strength 0.6,0.7,0.8
    python recipes/edit.py --method inversion --num_inference_steps 50
    python recipes/edit.py --model <folder or hub id> --data edits.jsonl --strength 0.6

By default, scenes of the embedded world's held-out prompts get a new caption with another count or
another colour, and the detector says what was changed and what was kept. Other data are a table
with the columns image, caption and new_caption.

img2img puts noise on the image and takes the last steps of sampling; inversion samples from the
noise that leads to the image under its own caption. Both run stock pipelines.

Writes sheet.png and, for each setting, NNNNN/metadata.jsonl and NNNNN/samples/0000.png; for the
world also scores.json and scores.md. An image's noise is given by (seed, its number): it is the
same with and without tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from agsm_loss.integrations.tokens.pipelines import Sampling
from data.pictures import side_by_side
from data.sources import check_source, given_model
from model.sampling import SamplingOptions, check_sources, load
from run.cli import command
from run.log import say
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Images, and how they are edited."""

    data: str = option(
        "world",
        "Images to edit: world, or a table as of train_agsm.py (a .jsonl or .csv file, a folder "
        "of images with metadata, a hub id) with the columns image, caption and new_caption.",
    )
    method: Literal["img2img", "inversion"] = option("img2img", "How images are edited.")
    strength: str = option(
        "",
        "Shares of the sampling steps that img2img takes, in (0, 1], separated by commas: near 0 "
        "the image stays, at 1 little or nothing of it is left. Left out: 0.6,0.7,0.8.",
    )
    num_images: int = option(
        100, "Images of the world per kind of edit, or of the table.", at_least=1
    )
    output_dir: str = option("runs/edits", "Folder for the images.")


def resolve(options: Any) -> None:
    """Fills in the model and the strengths, and checks options together."""
    if options.method == "inversion" and options.strength:
        raise ValueError("strength: it is img2img's; inversion has none. Leave it out.")
    try:
        found = [float(one) for one in (options.strength or "0.6,0.7,0.8").split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < one <= 1 for one in found):
        raise ValueError(
            "strength: expected shares in (0, 1] separated by commas, such as 0.6,0.8, got "
            f"{options.strength}."
        )
    options.strength = found if options.method == "img2img" else [None]
    options.model = given_model(options.model, options.data, "recipes/lab/models/flow_clean")


OPTIONS = OptionSet(Options, SamplingOptions, resolve=resolve)


def main(arguments: list[str] | None = None) -> None:
    """Edits, scores and writes."""
    options = OPTIONS.parse(__doc__, arguments)

    # Not before `parse`, which turns off what transformers prints while diffusers imports these.
    from lab.world.edits import changes_of, world_edits
    from model.editing import change, image_to_image, read_changes

    output, of_world = Path(options.output_dir), options.data == "world"
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another --output_dir")
    check_source("data", "" if of_world else options.data)
    check_sources(options)
    model = load(options)
    if of_world:
        edits = world_edits(options.num_images, seed=options.seed)
        asked = changes_of(edits)
    else:
        edits, side = [], model.side
        asked = read_changes(options.data, size=side, number=options.num_images)
    pipe = image_to_image(model) if options.method == "img2img" else model.pipe
    extras = " and ".join(name for name in ("tokens", "lora") if getattr(options, name))
    names = ("seed", "batch_size", "num_inference_steps", "guidance_scale")
    sampled = {name: getattr(options, name) for name in names}
    results: dict[str, Any] = {}
    for added in ["", f", with {extras}"] if extras else [""]:
        if added:
            model.load_extras(options.tokens, options.lora, Sampling(options.sampling), pipe)
        for strength in options.strength:
            name = ("inversion" if strength is None else f"strength {strength:g}") + added
            results[name] = change(model, pipe, asked, strength=strength, **sampled)
            say(f"{name}: {len(results[name])} images")
    _write(output, asked, edits, results)
    scores = ", scores.json, scores.md" if edits else ""
    say(f"The images{scores} and sheet.png are in {output}")


def _write(output: Path, asked: Any, edits: list[Any], results: dict[str, Any]) -> None:
    """The images in GenEval's layout, a sheet of some, and for the world's edits their scores."""
    from lab.world.captions import metadata
    from lab.world.edits import edit_summary, edit_table, judge_edit
    from lab.world.score import verdicts

    rows = [metadata(edit.wanted) for edit in edits]
    rows = rows or [{"prompt": prompt} for prompt in asked.prompts]
    for name, images in results.items():
        for index, (image, row) in enumerate(zip(images, rows, strict=True)):
            folder = output / name.replace(",", "").replace(" ", "_") / f"{index:05d}"
            (folder / "samples").mkdir(parents=True)
            (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
            Image.fromarray(image).save(folder / "samples" / "0000.png")
    shown = np.linspace(0, len(rows) - 1, min(ON_SHEET, len(rows))).astype(int)
    judged: dict[str, Any] = {}
    if edits:
        judged = {name: list(map(judge_edit, edits, images)) for name, images in results.items()}
        summaries = {name: edit_summary(one) for name, one in judged.items()}
        (output / "scores.json").write_text(json.dumps(summaries, indent=1) + "\n")
        (output / "scores.md").write_text(edit_table(summaries) + "\n")
        print(edit_table(summaries))
        judged["source"] = verdicts(asked.images, [metadata(edit.source) for edit in edits])
    side_by_side(
        {name: images[shown] for name, images in {"source": asked.images, **results}.items()},
        [{"prompt": f"{asked.captions[i]} -> {asked.prompts[i]}"} for i in shown],
        output / "sheet.png",
        judged={name: [one[i] for i in shown] for name, one in judged.items()},
        prompts_a_line=1,
    )


ON_SHEET = 16

if __name__ == "__main__":
    command(main)
