r"""Scores folders of images in GenEval's layout: one table with 95 % intervals for all of them.

    python recipes/score_images.py --images runs/a runs/b            by the world's detector
    python recipes/score_images.py --images runs/a --results results.jsonl    by GenEval's evaluator
    python recipes/score_images.py --images runs/a \
        --detector facebook/mask2former-swin-small-coco-instance    by GenEval's rules, no mmdet

`--detector` applies GenEval's rules to what a detector of transformers finds, and writes
detector_results.jsonl into each folder, in the columns of GenEval's evaluator. Such scores are not
GenEval's own: say which detector they are by. `--results` reads what GenEval's `evaluate_images.py`
wrote (one row an image: filename, tag, correct, reason), or detector_results.jsonl.

`--vqa MODEL` adds VQAScore by a chat model of transformers that reads images. Of prompts from a
.jsonl with questions, such as GenEval 2's, it adds Soft-TIFA: am, gm, and each skill's. It writes
vqa_results.jsonl into each folder.

`--metrics clipscore pickscore fid --reference photos` adds columns; without one of the above the
table has them alone. Intervals of a reward's mean are over the prompts, those of fid and kid by the
jackknife over the images.

Writes scores.json, scores.md and scores.png into each folder; by the world's detector also how far
the pixels are from the world's colours (of 255; a rendered scene has 0), which no verdict shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run.cli import command
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Every option, its default and its meaning."""

    images: list[str] = option(["runs/images"], "Folders that generate.py wrote.")
    detector: str = option(
        "",
        "Detector to judge by, in place of the world's: a folder or a hub id of an instance "
        "segmentation model (Mask2Former) or of an open-vocabulary one (OWLv2, Grounding DINO).",
    )
    clip: str = option(
        "openai/clip-vit-large-patch14",
        "CLIP model that names the objects' colours (for --detector) and of clipscore: a folder or "
        "a hub id.",
    )
    results: list[str] = option(
        [],
        "Files of results of GenEval's evaluator, one for each folder, in place of a detector.",
    )
    vqa: str = option(
        "",
        "Model that answers questions about the images, for the columns vqascore and, for prompts "
        "with questions, soft_tifa: a folder or a hub id, such as Qwen/Qwen3-VL-8B-Instruct.",
    )
    metrics: list[str] = option(
        [],
        "Further columns: fid, kid (images against --reference), or rewards of the training "
        "commands by name, such as clipscore, pickscore, hpsv2, imagereward, ocr.",
    )
    reference: str = option("", "Folder of real images (for fid and kid).")
    sheet: int = option(48, "Images to show on a sheet.", at_least=1)


def resolve(options: Any) -> None:
    """Checks options together."""
    if options.results and (options.detector or len(options.results) != len(options.images)):
        raise ValueError(
            f"results: expected one file for each folder and no --detector, got "
            f"{len(options.results)} files, {len(options.images)} folders and --detector "
            f"{options.detector!r}."
        )
    if bool(options.reference) != bool({"fid", "kid"} & set(options.metrics)):
        raise ValueError(
            "reference: expected a folder of real images where --metrics has fid or kid, and "
            f"only there, got {options.reference!r} and --metrics {' '.join(options.metrics)!r}."
        )


OPTIONS = OptionSet(Options, resolve=resolve)


def main(arguments: list[str] | None = None) -> None:
    """Scores and writes."""
    options = OPTIONS.parse(__doc__, arguments)

    import numpy as np

    from data.pictures import sheet
    from data.sources import loading
    from lab.world.detect import palette_error
    from lab.world.geneval_folder import (
        judge_folder,
        of_world,
        pixels,
        read_images,
        read_results,
        world_pixels,
    )
    from lab.world.score import verdicts
    from lab.world.summary import summarize_with_intervals, table
    from model.pipeline import chosen_device
    from rewards import soft_tifa
    from rewards.geneval.evaluator import Evaluator
    from rewards.metrics import Metrics, mean_with_interval
    from rewards.vqascore import VQAScore
    from run.log import writing

    folders = [Path(path) for path in options.images]
    contents = [read_images(folder) for folder in folders]
    for folder, (_, rows) in zip(folders, contents, strict=True):
        others = options.results or options.detector or options.vqa or options.metrics
        if not (others or of_world(rows)):
            raise ValueError(
                f"{folder}: expected the embedded world's prompts, or --detector, --results, --vqa "
                "or --metrics, got none of them."
            )
    results = [
        read_results(Path(file), files, folder)
        for file, folder, (files, _) in zip(options.results, folders, contents, strict=False)
    ]
    questions = [soft_tifa.questions_of(rows) if options.vqa else [] for _, rows in contents]
    device = chosen_device(None)
    evaluator = Evaluator(options.detector, options.clip, device) if options.detector else None
    judge = None
    if options.vqa:
        with loading("vqa", options.vqa) as source:
            judge = VQAScore(source, device)
    metrics = Metrics(options.metrics, options.clip, options.reference, device)
    summaries = {}
    for index, (folder, (files, rows)) in enumerate(zip(folders, contents, strict=True)):
        prompts = [row["prompt"] for row in rows]
        judged, found = None, {}
        if results:
            judged = results[index]
        elif evaluator is not None:
            judged = judge_folder(evaluator, files, rows, folder / "detector_results.jsonl")
        elif of_world(rows):
            images = world_pixels(files)
            judged = verdicts(images, rows)
            found["palette_error"] = mean_with_interval(palette_error(images), prompts)
        if judge is not None:
            told = folder / "vqa_results.jsonl"
            found |= soft_tifa.scores(files, prompts, questions[index], judge, told)
        summary = {} if judged is None else summarize_with_intervals(judged)
        summary["metrics"] = found | metrics(files, rows)
        with writing(folder / "scores.json") as file:
            file.write_text(json.dumps(summary, indent=1) + "\n")
        with writing(folder / "scores.md") as file:
            file.write_text(table({folder.name: summary}) + "\n")
        shown = np.linspace(0, len(files) - 1, min(options.sheet, len(files))).astype(int)
        with writing(folder / "scores.png") as file:
            sheet(
                [pixels(files[i]) for i in shown],
                [rows[i] for i in shown],
                None if judged is None else [judged[i] for i in shown],
                file,
            )
        summaries[str(folder)] = summary
    print(table(summaries))
    print(f"scores.json, scores.md and scores.png are in {', '.join(options.images)}")


if __name__ == "__main__":
    command(main)
