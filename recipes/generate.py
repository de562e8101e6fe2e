"""Prompts -> images, in the folder layout that GenEval's evaluator reads.

    python recipes/generate.py --model recipes/models/flow --prompts world:heldout:20 --output runs/a
    python recipes/generate.py --model <folder or hub id> --tokens <folder or hub id> \
        --prompts evaluation_metadata.jsonl --images-per-prompt 4 --cfg 4 --steps 28

Writes NNNNN/metadata.jsonl and NNNNN/samples/0000.png, 0001.png, ... A second call goes on where
the first was stopped. Each image has a noise of its own, given by (seed, prompt, sample): it is
the same for any batch size, and for any tokens, so that methods are compared on the same noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.options import option, parse

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SAMPLINGS = ("both", "negative_unconditional", "conditional_only", "off")


@dataclass(frozen=True)
class Options:
    """Every option, its default and its meaning."""

    model: str = option("recipes/models/flow", "pipeline folder or hub id")
    tokens: str = option("", "folder or hub id of soft tokens; none for the model alone")
    lora: str = option("", "folder or hub id of a LoRA trained beside them")
    sampling: str = option("both", "who wears which tokens under guidance", SAMPLINGS)
    prompts: str = option(
        "world:heldout:20", "world:FOLD:PER_CATEGORY, a GenEval jsonl, or a text file of lines"
    )
    output: str = option("runs/images", "folder of the images")
    images_per_prompt: int = option(1, "GenEval: 4")
    steps: int = option(20, "sampling steps")
    cfg: float = option(3.0, "guidance scale")
    seed: int = option(0, "of the noise")
    batch_size: int = option(0, "images a call; 0: 64 of the world's size, 4 of any larger")
    dtype: str = option("float32", "of the weights", ("float32", "bfloat16", "float16"))
    device: str = option("cpu", "cpu, cuda, ...")
    threads: int = option(0, "CPU threads; 0 leaves torch's choice")


def read_prompts(source: str) -> list[dict[str, Any]]:
    """GenEval rows, or rows with a prompt alone."""
    if source.startswith("world:"):
        from world.prompts import rows

        parts = source.split(":")
        if len(parts) != 3 or not parts[2].isdigit():
            raise ValueError(f"prompts: expected world:FOLD:PER_CATEGORY, got {source!r}")
        return rows(parts[1], int(parts[2]))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file {source!r}")
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return [{"prompt": line.strip()} for line in lines]
    found = [json.loads(line) for line in lines]
    if any("prompt" not in row for row in found):
        raise ValueError(f"{source}: expected a prompt in every row")
    return found


def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[Any],
    steps: int,
    cfg: float,
    batch_size: int = 0,
) -> npt.NDArray[np.uint8]:
    """One image a prompt, (N, H, W, 3) uint8. Image i's noise is `loop.draws(seeds[i])`.

    batch_size: images a call of the pipeline; 0: 64 of the world's size, 4 of any larger.
    """
    import numpy as np

    calls = _calls(pipe, prompts, seeds, steps=steps, cfg=cfg, batch_size=batch_size)
    return np.concatenate(list(calls))


def _calls(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[Any],
    *,
    steps: int,
    cfg: float,
    batch_size: int,
) -> Iterator[npt.NDArray[np.uint8]]:
    """The images of one call of the pipeline after the other."""
    import numpy as np

    from agsm_loss.integrations.tokens.pipelines import denoiser_of
    from common.loop import draws
    from world.models import pipeline_arguments

    if batch_size == 0:
        size = getattr(pipe, "default_sample_size", None) or denoiser_of(pipe).config.sample_size
        batch_size = 64 if np.max(size) * pipe.vae_scale_factor <= 128 else 4
    for start in range(0, len(prompts), batch_size):
        images = pipe(
            list(prompts[start : start + batch_size]),
            num_inference_steps=steps,
            guidance_scale=cfg,
            generator=[draws(seed) for seed in seeds[start : start + batch_size]],
            output_type="np",
            **pipeline_arguments(pipe),
        ).images
        yield (images * 255).round().astype("uint8")


def main(arguments: list[str] | None = None) -> None:
    """Generates what is not there yet."""
    options = parse(Options, __doc__, arguments)

    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from agsm_loss.integrations.tokens.pipelines import Sampling
    from common.pipeline import TextToImage

    if options.threads:
        torch.set_num_threads(options.threads)
    output, rows = Path(options.output), read_prompts(options.prompts)
    _same_settings(output, options)
    for index, row in enumerate(rows):
        (output / f"{index:05d}" / "samples").mkdir(parents=True, exist_ok=True)
        (output / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    every = [(i, k) for i in range(len(rows)) for k in range(options.images_per_prompt)]
    todo = [place for place in every if not _file(output, place).exists()]
    if not todo:
        return
    model = TextToImage.load(options.model, getattr(torch, options.dtype), options.device)
    model.load_extras(options.tokens, options.lora, Sampling(options.sampling))
    calls = _calls(
        model.pipe,
        [rows[index]["prompt"] for index, _ in todo],
        [(options.seed, *place) for place in todo],
        steps=options.steps,
        cfg=options.cfg,
        batch_size=options.batch_size,
    )
    left = iter(todo)
    with tqdm(total=len(every), initial=len(every) - len(todo), unit="image") as bar:
        for images in calls:
            for image, place in zip(images, left, strict=False):
                file = _file(output, place)
                part = file.with_suffix(".part")  # a killed run leaves no half image
                Image.fromarray(image).save(part, format="PNG")
                part.rename(file)
                bar.update()


def _file(output: Path, place: tuple[int, int]) -> Path:
    return output / f"{place[0]:05d}" / "samples" / f"{place[1]:04d}.png"


def _same_settings(output: Path, options: Options) -> None:
    """A folder holds the images of one setting; the speed of making them may differ."""
    free = {"output", "batch_size", "device", "threads"}
    settings = {name: value for name, value in vars(options).items() if name not in free}
    file = output / "generate.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = sorted(name for name in settings if settings[name] != before.get(name))
        if changed:
            raise ValueError(
                f"{output} holds images made with other {changed}; choose another --output"
            )
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n")


if __name__ == "__main__":
    main()
