"""The world as data sets: captioned images, and preference pairs in Pick-a-Pic's columns.

    captioned(1000, seed=0)                        columns image, caption, metadata (JSON text)
    preferences(1000, seed=0)                      columns jpg_0, jpg_1, label_0, caption
    captioned(...).to_parquet("lab.world.parquet")     or imagefolder(captioned(...), "world")

Both are `datasets.Dataset`s. A preference pair shows its caption in one image and a hard negative
of it (one edit away) in the other; label_0 is 1 where jpg_0 is the right one. As in Pick-a-Pic,
jpg_0 and jpg_1 are the bytes of an image file; ours are lossless (PNG).
"""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from .captions import caption, metadata
from .prompts import ALL, pair_of_scenes, scenes
from .render import render
from .scene import Scene, Spec


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, format="PNG")
    return buffer.getvalue()


def preference_pair(spec: Spec, scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    """One Pick-a-Pic row for a caption, its right image and a wrong one drawn with `rng`."""
    right, wrong = pair_of_scenes(spec, scene, rng)
    images, label = [_png(right), _png(wrong)], int(rng.integers(2))
    return {
        "jpg_0": images[1 - label],
        "jpg_1": images[label],
        "label_0": label,
        "caption": caption(spec),
    }


def captioned(n: int, *, seed: int, fold: str = ALL) -> Dataset:
    """n images with caption and GenEval row (as JSON text), the same for the same arguments."""
    _check(n)
    rows = [
        {
            "image": Image.fromarray(render(scene)),
            "caption": caption(spec),
            "metadata": json.dumps(metadata(spec)),
        }
        for spec, scene in islice(scenes(seed, fold), n)
    ]
    features = Features(image=ImageFeature(), caption=Value("string"), metadata=Value("string"))
    return Dataset.from_list(rows, features=features)


def preferences(n: int, *, seed: int, fold: str = ALL) -> Dataset:
    """n preference pairs, the same for the same arguments."""
    _check(n)
    rng = np.random.default_rng([seed, 2])
    pairs = [preference_pair(spec, scene, rng) for spec, scene in islice(scenes(seed, fold), n)]
    features = Features(
        jpg_0=Value("binary"),
        jpg_1=Value("binary"),
        label_0=Value("int64"),
        caption=Value("string"),
    )
    return Dataset.from_list(pairs, features=features)


def imagefolder(dataset: Dataset, folder: str | Path) -> None:
    """Writes a captioned data set as a folder that `load_dataset("imagefolder")` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as file:
        for index, row in enumerate(dataset):
            name = f"{index:06d}.png"
            row["image"].save(folder / name)
            text = {"file_name": name, "caption": row["caption"], "metadata": row["metadata"]}
            file.write(json.dumps(text) + "\n")


def _check(n: int) -> None:
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
