"""Scores images in GenEval's layout: a table with 95 % intervals, JSON, and a sheet of pictures.

    python recipes/score_images.py --images runs/a                 by the embedded world's detector
    python recipes/score_images.py --images runs/a --results results.jsonl    by GenEval's evaluator

The second form reads what GenEval's own `evaluate_images.py` writes for real models (one row an
image: filename, tag, correct, reason). Writes scores.json, scores.md and sheet.png into --images;
by the detector also how far the pixels are from the world's colours, which no verdict shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from common.options import Checked, option, parse
from common.stop import command


@dataclass(frozen=True)
class Options(Checked):
    """Every option, its default and its meaning."""

    images: str = option("runs/images", "Folder that generate.py wrote.")
    results: str = option(
        "", "File of results of GenEval's evaluator, in place of the world's detector."
    )
    sheet: int = option(48, "Images to show on the sheet.", at_least=1)


def main(arguments: list[str] | None = None) -> None:
    """Scores and writes."""
    options = parse(Options, __doc__, arguments)

    import numpy as np

    from common.sheet import sheet
    from world.detect import palette_error
    from world.geneval_folder import pixels, read_images, read_results
    from world.score import verdicts
    from world.summary import summarize_with_intervals, table

    folder = Path(options.images)
    files, rows = read_images(folder)
    dirt: dict[str, float] = {}
    if options.results:
        judged = read_results(Path(options.results), files, folder)
    else:
        images = np.stack([pixels(file) for file in files])
        judged = verdicts(images, rows)
        dirt["palette_error"] = float(palette_error(images).mean())
    summary = summarize_with_intervals(judged) | dirt
    text = table({folder.name: summary})
    for value in dirt.values():
        text += f"\n\nPalette error (of 255; a rendered scene has 0): {value:.2f}"
    (folder / "scores.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "scores.md").write_text(text + "\n")
    shown = np.linspace(0, len(files) - 1, min(options.sheet, len(files))).astype(int)
    sheet(
        np.stack([pixels(files[i]) for i in shown]),
        [rows[i] for i in shown],
        [judged[i] for i in shown],
        folder / "sheet.png",
    )
    print(text)
    print(f"scores.json, scores.md and sheet.png are in {folder}")


if __name__ == "__main__":
    command(main)
