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

from data.sources import given_model
from run.cli import command
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Every option, its default and its meaning."""

    model: str = option(
        "",
        "Pipeline to edit with: a folder or a hub id. Left out, with --data world alone: a model "
        "of the embedded world.",
    )
    tokens: str = option("", "Soft tokens to compare with none: a folder or a hub id.")
    lora: str = option("", "LoRA to compare with none: a folder or a hub id.")
    sampling: Literal["both", "negative_unconditional", "conditional_only"] = option(
        "both", "Use of the tokens under guidance, as in generate.py."
    )
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
    num_inference_steps: int = option(20, "Sampling steps of a whole image.", at_least=1)
    guidance_scale: float = option(
        3.0, "Classifier-free guidance scale under the new caption; 1: no guidance.", at_least=0
    )
    seed: int = option(0, "Seed of the noise and of the world's edits.", at_least=0)
    batch_size: int = option(
        0, "Images per batch; 0: 64 of the world's size, 4 of any larger.", at_least=0
    )
    output_dir: str = option("runs/edits", "Folder for the images.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type of the weights.")
    device: str | None = option(
        None, "Device to sample on; left out: the accelerator where there is one, else cpu."
    )


def resolve(options: Any) -> None:
    """Fills in the model, and checks options together."""
    if options.method == "inversion" and options.strength:
        raise ValueError("strength: it is img2img's; inversion has none. Leave it out.")
    strengths(options.strength)
    options.model = given_model(options.model, options.data, "recipes/lab/models/flow_clean")


OPTIONS = OptionSet(Options, resolve=resolve)


def main(arguments: list[str] | None = None) -> None:
    """Edits, scores and writes."""
    options = OPTIONS.parse(__doc__, arguments)

    import torch

    from agsm_loss.integrations.tokens.pipelines import Sampling, load_soft_tokens
    from data.sources import check_source, loading
    from lab.world.edits import changes_of, world_edits
    from model.editing import change, image_to_image, read_changes
    from model.pipeline import TextToImage, chosen_device
    from model.sampling import image_side
    from run.log import say

    output = Path(options.output_dir)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another --output_dir")
    for name in ("model", "tokens", "lora", *(["data"] if options.data != "world" else [])):
        check_source(name, getattr(options, name))
    dtype, device = getattr(torch, options.dtype), chosen_device(options.device)
    model = TextToImage.load(options.model, dtype, device)
    edits = world_edits(options.num_images, seed=options.seed) if options.data == "world" else []
    asked = changes_of(edits) if edits else read_changes(
        options.data, size=image_side(model.pipe), number=options.num_images
    )  # fmt: skip
    pipe = image_to_image(model) if options.method == "img2img" else model.pipe
    extras = " and ".join(name for name in ("tokens", "lora") if getattr(options, name))
    results: dict[str, Any] = {}
    for with_extras in [False, True] if extras else [False]:
        if with_extras:
            model.load_extras("", options.lora)
            if options.tokens:  # into the pipeline that runs: see `image_to_image`
                with loading("tokens", options.tokens):
                    load_soft_tokens(pipe, options.tokens, Sampling(options.sampling))
        for strength in strengths(options.strength) if options.method == "img2img" else [None]:
            name = "inversion" if strength is None else f"strength {strength:g}"
            name += f", with {extras}" if with_extras else ""
            results[name] = change(
                model,
                pipe,
                asked,
                strength=strength,
                seed=options.seed,
                batch_size=options.batch_size,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
            )
            say(f"{name}: {len(results[name])} images")
    _write(output, asked, edits, results)
    scores = ", scores.json, scores.md" if edits else ""
    say(f"The images{scores} and sheet.png are in {output}")


def strengths(text: str) -> list[float]:
    """The numbers of `--strength`."""
    try:
        found = [float(one) for one in (text or "0.6,0.7,0.8").split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < one <= 1 for one in found):
        raise ValueError(
            f"strength: expected shares in (0, 1] separated by commas, such as 0.6,0.8, got {text}."
        )
    return found


def _write(output: Path, asked: Any, edits: list[Any], results: dict[str, Any]) -> None:
    """The images in GenEval's layout, a sheet of some, and for the world's edits their scores."""
    import numpy as np
    from PIL import Image

    from data.pictures import sheet
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
    judged: dict[str, Any] = {}
    if edits:
        judged["source"] = verdicts(asked.images, [metadata(edit.source) for edit in edits])
        for name, images in results.items():
            judged[name] = [judge_edit(*both) for both in zip(edits, images, strict=True)]
    shown = np.linspace(0, len(rows) - 1, min(ON_SHEET, len(rows))).astype(int)
    columns = {"source": asked.images, **results}
    sheet(
        np.stack([images[i] for i in shown for images in columns.values()]),
        [
            {"prompt": asked.captions[i]} if name == "source" else rows[i]
            for i in shown
            for name in columns
        ],
        [judged[name][i] for i in shown for name in columns] if edits else None,
        output / "sheet.png",
        columns=len(columns),
        side=144 if max(asked.images.shape[1:3]) <= 144 else 256,
        titles=list(columns),
    )
    if edits:
        summaries = {name: edit_summary(judged[name]) for name in results}
        (output / "scores.json").write_text(json.dumps(summaries, indent=1) + "\n")
        (output / "scores.md").write_text(edit_table(summaries) + "\n")
        print(edit_table(summaries))


ON_SHEET = 16

if __name__ == "__main__":
    command(main)
