"""Tells before any training whether AGSM can help a model on a data set, and with which options.

    python recipes/diagnose.py --model recipes/lab/models/flow --output_dir runs/diagnose
    python recipes/train_agsm.py --config runs/diagnose/config.yaml
    python recipes/diagnose.py --model <folder or hub id> --data <parquet, folder or hub id>

Every image is noised at ten noise levels and denoised under its own caption, two edits of it, two
captions of its batch and the empty one: about 60 forward passes an image, and no training.

Under `--output_dir`:
    verdict.txt              what is printed: where captions decide, and what to train
    config.yaml              the options that follow, for train_agsm.py --config
    diagnosis.png, .json     the numbers by noise level
    suspects.png             images that a caption of another image seems to fit better
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from data.sources import given_model
from data.task import DataOptions, ImageOptions
from run.cli import command
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Every option, its default and its meaning."""

    model: str = option(
        "",
        "Pipeline to diagnose: a folder or a hub id. Left out, with --data world alone: a model of "
        "the embedded world.",
    )
    num_images: int = option(256, "Images to measure, rounded up to whole batches.", at_least=16)
    batch_size: int = option(16, "Images per forward pass.", at_least=1)
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type of the weights.")
    seed: int = option(0, "Seed of data, noise and competitors.", at_least=0)
    output_dir: str = option("runs/diagnose", "Folder for the verdict, config, numbers and plot.")


def resolve(options: Any) -> None:
    """Fills in the model."""
    options.model = given_model(options.model, options.data, "recipes/lab/models/flow")


OPTIONS = OptionSet(Options, DataOptions, ImageOptions, resolve=resolve)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    options = OPTIONS.parse(__doc__, arguments)

    import torch
    from accelerate import PartialState

    from data.task import open_task
    from diagnosis.measure import EDITS, measure
    from diagnosis.report import report
    from model.pipeline import TextToImage

    state = PartialState()
    task = open_task(options, state)
    model = TextToImage.load(options.model, getattr(torch, options.dtype), state.device)
    task.size = task.size or model.side
    images = task.images(options.batch_size, EDITS, options.image_column)
    batches = -(-options.num_images // options.batch_size)
    measured = measure(model, images, batches=batches, seed=options.seed)
    print("\n".join(report(measured, images, options)))


if __name__ == "__main__":
    command(main)
