"""Guidance away from wrong captions in the sampler itself, and what the detector says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agsm_loss import draws
from agsm_loss.integrations.denoisers import PlainDenoiser
from common.pipeline import TextToImage
from world.architectures import pipeline_arguments
from world.captions import caption, hard_negatives, metadata
from world.prompts import deal
from world.scene import MAX_COUNT, TAGS, Spec
from world.score import verdicts


def wrong_captions(
    specs: Sequence[Spec], against: str, rng: np.random.Generator
) -> list[list[str]]:
    """The captions to steer away from, as many for every spec (one is taken twice if need be)."""
    if against == "null":
        return [[""] for _ in specs]
    if against == "in_batch":
        told = [caption(spec) for spec in specs]
        others = [[text for text in told if text != own] for own in told]
        if not all(others):
            raise ValueError("against in_batch: expected at least two different prompts, got one")
        return [[texts[int(rng.integers(len(texts)))]] for texts in others]
    chosen = []
    for spec in specs:
        edits = hard_negatives(spec)
        if against == "swapped" and len(spec.groups) == 2:
            edits = edits[-1:]  # the exchange, or for a relation its reverse
        if against in ("hard", "swapped"):
            chosen.append([caption(edits[int(rng.integers(len(edits)))])])
            continue
        fewest = 2 if against == "neighbours" else 1
        counts = [one for one in edits if _counts(one) != _counts(spec)]
        counts = [one for one in counts if min(_counts(one)) >= fewest]
        if not counts:
            raise ValueError(f"against {against}: {caption(spec)!r} has no such edit; use hard")
        chosen.append([caption(counts[0]), caption(counts[-1])])
    return chosen


def _counts(spec: Spec) -> list[int]:
    return [group.count for group in spec.groups]


def guided_samples(
    model: Any,
    prompts: Sequence[str],
    wrong: Sequence[Sequence[str]],
    *,
    scale: float,
    num_inference_steps: int,
    seeds: Sequence[Any],
    guidance_scale: float = 1.0,
) -> npt.NDArray[np.uint8]:
    """Images (N, H, W, 3), by the pipeline's own scheduler, from `draws(seeds[i])`.

    model: a `TextToImage`. wrong: as many captions for every prompt.
    """
    denoiser, scheduler = PlainDenoiser(model.denoiser), model.pipe.scheduler
    scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)  # flow schedules have none
    side = model.denoiser.config.sample_size
    shape = (model.denoiser.config.in_channels, side, side)
    away = [(text, scale / len(wrong[0])) for text in zip(*wrong, strict=True)] if scale else []
    if guidance_scale > 1:
        away.append(([""] * len(prompts), guidance_scale - 1))
    encoded = [model.encode_prompts(text) for text in (prompts, *(text for text, _ in away))]
    with torch.no_grad():
        x = torch.stack([torch.randn(shape, generator=draws(seed)) for seed in seeds])
        scheduler.set_timesteps(num_inference_steps)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        for time in scheduler.timesteps:
            at = time.expand(len(x))
            found: list[Tensor] = [denoiser(scaled(x, time), at, text, 0) for text in encoded]
            guided = found[0].clone()
            for (_, share), wrongly in zip(away, found[1:], strict=True):
                guided += share * (found[0] - wrongly)
            x = scheduler.step(guided, time, x, return_dict=False)[0]
        pixels = model.decode_latents(x).clamp(-1, 1) / 2 + 0.5
    return (pixels.permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")


def run(options: Any, say: Callable[[str], Any] = print) -> list[str]:
    """The table's lines, each said as soon as it is known."""
    tags = list(TAGS) if options.categories == "all" else options.categories.split(",")
    asked = deal(options.fold, options.per_category, options.seed, tags)
    wrong = wrong_captions(asked, options.against, np.random.default_rng(options.seed))
    model = TextToImage.load(options.model, torch.float32, arguments=pipeline_arguments)
    kinds = np.array([spec.tag for spec in asked])
    numbers = [spec.groups[0].count if spec.tag == "counting" else 0 for spec in asked]
    several = [n for n in range(2, MAX_COUNT + 1) if n in numbers]
    heads = ["scale", "right", "too many", "too few", *(f"right of {n}" for n in several)]
    heads += [tag.replace("_", " ") for tag in tags if len(tags) > 1]
    table: list[str] = []

    def add(cells: Sequence[str]) -> None:
        table.append(f"| {' | '.join(cells)} |")
        say(table[-1])

    add(heads)
    add(["---"] * len(heads))
    for scale in map(float, options.scales.split(",")):
        images = []
        for start in range(0, len(asked), options.batch_size):
            part = slice(start, start + options.batch_size)
            images.append(
                guided_samples(
                    model,
                    [caption(spec) for spec in asked[part]],
                    wrong[part],
                    scale=scale,
                    guidance_scale=options.guidance_scale,
                    num_inference_steps=options.num_inference_steps,
                    seeds=[(options.seed, start + i) for i in range(len(asked[part]))],
                )
            )
        judged = verdicts(np.concatenate(images), [metadata(spec) for spec in asked])
        right = np.array([one.correct for one in judged])
        error = np.array([(one.found or 0) - one.expected for one in judged])
        shares = [right.mean(), (error > 0).mean(), (error < 0).mean()]
        shares += [right[np.array(numbers) == n].mean() for n in several]
        shares += [right[kinds == tag].mean() for tag in tags if len(tags) > 1]
        add([f"{scale:g}", *(f"{share:.3f}" for share in shares)])
    return table
