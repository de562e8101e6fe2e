"""The verdict, the recommended config, the numbers and the plot of one measurement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.data import Dataset

from data.batches import Batch
from data.pictures import sheet, to_uint8
from diagnosis.levels import Numbers, Suspect, against, summarize
from diagnosis.measure import Measured
from diagnosis.plot import draw
from diagnosis.verdict import Finding, columns_of, competitors, cost, options_of, verdict

SHOWN = 6
"""Suspected false negatives that are listed and shown; diagnosis.json has all of them."""


def report(measured: Measured, images: Dataset[Batch], options: Any) -> list[str]:
    """Writes what diagnose.py names under its `output_dir`; returns the lines of verdict.txt.

    images: that were measured, for pictures. options: of diagnose.py.
    """
    folder = Path(options.output_dir)
    numbers, findings = conclude(measured, options.target_entropy)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{options.model} on {numbers.images} images of {options.data}:"]
    for finding in findings:
        lines.append(f"- {finding.text}")
        if finding.name == "false_negatives":
            shown = numbers.suspects[:SHOWN]
            _pictures(shown, images, options.batch_size, folder / "suspects.png")
            lines += [f"  row {one.row}: {one.other!r} beats {one.own!r}" for one in shown]
    config = folder / "config.yaml"
    lines.append(f"Train with: python recipes/train_agsm.py --config {config} --full, or --rank 16")
    (folder / "verdict.txt").write_text("\n".join(lines) + "\n")
    config.write_text(
        "# Recommended by diagnose.py; what is trained (--full, --rank, --num_tokens), the steps\n"
        "# and the learning rate are for you to choose.\n"
        + yaml.safe_dump(_config(findings, options), sort_keys=False)
    )
    (folder / "diagnosis.json").write_text(json.dumps(_table(numbers), indent=1) + "\n")
    draw(numbers, lines[0].rstrip(":"), folder / "diagnosis.png")
    return lines


def conclude(measured: Measured, entropy: float) -> tuple[Numbers, list[Finding]]:
    """The numbers and all findings."""
    numbers = summarize(measured, entropy=entropy)
    findings = competitors(numbers)
    options = options_of(findings)
    if options["objective"] != "agsm":
        return numbers, findings
    first = round(options.get("timestep_low", 0) * len(numbers.decides))
    chosen = against(measured, columns_of(options), entropy=entropy, first=first)
    findings += verdict(numbers, findings, chosen, entropy)
    return numbers, [*findings, cost(measured, options_of(findings))]


def _pictures(shown: Sequence[Suspect], images: Any, batch_size: int, file: Path) -> None:
    pixels = [images[one.image // batch_size].pixels[one.image % batch_size] for one in shown]
    told = [{"prompt": f"own: {one.own}; other: {one.other}"} for one in shown]
    grid = to_uint8(torch.stack(pixels)).permute(0, 2, 3, 1).cpu().numpy()
    sheet(grid, told, None, file, columns=len(shown), side=240)


def _config(findings: list[Finding], options: Any) -> dict[str, Any]:
    table = {"model": options.model, "data": options.data}
    if options.data != "world":
        names = ("split", "caption_column", "image_column", "resolution")
        table |= {name: getattr(options, name) for name in names}
    return table | options_of(findings) | {"train_batch_size": options.batch_size}


def _table(numbers: Numbers) -> dict[str, Any]:
    kinds = {
        name: {key: _plain(value) for key, value in vars(levels).items()}
        for name, levels in numbers.kinds.items()
    }
    suspects = [asdict(one) for one in numbers.suspects]
    decides = numbers.decides.tolist()
    return {"images": numbers.images, "decides": decides, "kinds": kinds, "suspects": suspects}


def _plain(value: Any) -> Any:
    """A JSON value; null for nan."""
    array = np.asarray(value, dtype=float)
    return np.where(np.isfinite(array), array, None).tolist()
