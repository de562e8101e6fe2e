"""The verdict, the recommended config, the numbers and the plot of one measurement."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.diagnosis.levels import Numbers, against, summarize
from common.diagnosis.measure import Measured
from common.diagnosis.plot import draw
from common.diagnosis.verdict import Finding, columns_of, competitors, cost, options_of, verdict

SHOWN = 5
"""Suspected false negatives that the verdict lists; diagnosis.json has all of them."""


def report(measured: Measured, options: Any, folder: Path) -> list[str]:
    """Writes verdict.txt, config.yaml, diagnosis.json and diagnosis.png.

    Returns the lines of verdict.txt.

    options: of diagnose.py.
    """
    numbers, findings = conclude(measured, options.target_entropy)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{options.model} on {numbers.images} images of {options.data}:"]
    lines += [f"- {one.text}" for one in findings]
    if any(one.name == "false_negatives" for one in findings):
        for one in numbers.suspects[:SHOWN]:
            lines.append(f"  row {one.row}: {one.other!r} beats {one.own!r}")
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
    return numbers, [*findings, cost(measured, options)]


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
