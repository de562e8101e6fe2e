"""Trains soft tokens, a LoRA or all weights of a pipeline by AGSM, SoftREPA or plain denoising.

    python recipes/train_agsm.py --model recipes/lab/models/flow
    accelerate launch recipes/train_agsm.py --config recipes/configs/agsm_sd3.yaml
    python recipes/train_agsm.py --model <folder or hub id> --data <parquet, folder or hub id>

`--model` is any Stable Diffusion, SDXL, SD3, Flux.1, FLUX.2, Qwen-Image, Sana or Z-Image pipeline,
a preference-tuned one too (`--merge_lora` for a tuned LoRA). `--data world` (the default) renders
the embedded world and scores validation prompts exactly. With other data, `--validation_prompts
FILE` are sampled.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from agsm_loss import AGSMRegularizer, Bank, Candidates, Rule, SoftREPALoss
from agsm_loss import functional as AF
from agsm_loss.integrations.noise import add_noise, regression_target
from data.batches import Batch
from data.task import DataOptions, ImageOptions, PromptFileOptions, open_task
from model.agsm import AGSMOptions, Competitors, check_competitors
from model.precompute import PrecomputeOptions, precompute
from model.session import Session, ValidationOptions
from model.trained import ModelOptions, TimestepOptions, resolve
from run.cli import command
from run.loop import LoopOptions, Run, RunOptions
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """The objective."""

    objective: Literal["agsm", "softrepa", "denoising"] = option("agsm", "Loss to minimize.")


def resolve_own(options: Any) -> None:
    """As all recipes; SoftREPA contrasts captions of the batch, plain denoising is scale 1."""
    if options.objective == "softrepa" and not options.candidates:
        options.candidates = "in_batch:3"
    given = options.agsm_guidance_scale, options.pos_scale, options.neg_scale
    if options.objective == "denoising" and given == (None, None, None):
        options.agsm_guidance_scale = 1.0
    resolve(options)


OPTIONS = OptionSet(
    Options,
    ModelOptions,
    DataOptions,
    ImageOptions,
    PrecomputeOptions,
    AGSMOptions,
    TimestepOptions,
    LoopOptions,
    RunOptions,
    ValidationOptions,
    PromptFileOptions,
    title="objective",
    resolve=resolve_own,
    output_dir="runs/agsm",
)
METHODS = {"agsm": "AGSM", "softrepa": "SoftREPA", "denoising": "plain denoising"}


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = OPTIONS.parse(__doc__, arguments)
    with Run(options, sharding=True) as run:
        task = open_task(options, run.accelerator)
        hard = 0 if options.objective == "denoising" else check_competitors(options, task)
        method = METHODS[options.objective]
        model = Session(options, run.accelerator, task, method=method)
        model.prepare(run.accelerator, reference=False)
        objective = make_objective(options, model)
        batches = task.images(options.train_batch_size, hard, options.image_column)
        fill = precompute(options.precompute, model.pipeline, run.accelerator)
        for index, batch in run.steps(model, batches, objective, fill=fill):
            inputs = prepare(options, model, batch, run.draws(index))
            with run.accelerator.autocast():
                loss, metrics = objective(inputs)
            run.backward(loss, metrics)
        model.save()


class Inputs(NamedTuple):
    """One noised batch of B images, its encoded captions, and what AGSM takes of them."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    conditioning: dict[str, Tensor]
    image: dict[str, Tensor]
    captions: dict[str, Any]


Result = tuple[Tensor, Mapping[str, Tensor]]


class Objective:
    """What `Run.steps` asks of a loss; this one has no averages."""

    def update_ema(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AGSM(Objective):
    """`AGSMRegularizer` alone."""

    def __init__(self, regularizer: AGSMRegularizer) -> None:
        self.regularizer = regularizer

    def __call__(self, inputs: Inputs) -> Result:
        output = self.regularizer(
            inputs.noisy,
            inputs.timesteps,
            inputs.target,
            inputs.conditioning,
            image_conditioning=inputs.image,
            **inputs.captions,
        )
        return output.loss, output.metrics

    def update_ema(self) -> None:
        self.regularizer.update_ema()

    def state_dict(self) -> dict[str, Any]:
        return self.regularizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.regularizer.load_state_dict(state)


class SoftREPA(Objective):
    """SoftREPA's contrast over the captions that would compete; every one uses the one bank."""

    def __init__(self, denoiser: nn.Module, loss: SoftREPALoss, candidates: Rule) -> None:
        self.denoiser, self.loss, self.rule = denoiser, loss, candidates

    def __call__(self, inputs: Inputs) -> Result:
        candidates = self.rule(**inputs.captions)
        pred = _every_candidate(self.denoiser, inputs, candidates)
        positives = candidates.positives.to(pred.device)
        mask = candidates.mask.to(pred.device)
        loss = self.loss(pred, inputs.target, positives, mask)
        return loss, _ranking(pred, inputs.target, candidates, self.loss.temperature)


class Denoising(Objective):
    """Plain score matching of each image under its own caption, which uses ψ⁺."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser

    def __call__(self, inputs: Inputs) -> Result:
        batch = len(inputs.noisy)
        bank = torch.full((batch,), int(Bank.POSITIVE))
        given = inputs.noisy, inputs.timesteps, inputs.conditioning, bank
        pred = self.denoiser(*given, **inputs.image)
        return AF.denoising_error(pred.unsqueeze(1), inputs.target).mean(), {}


def _every_candidate(denoiser: nn.Module, inputs: Inputs, candidates: Candidates) -> Tensor:
    """(B, K, *D): one forward pass over all B·K pairs."""
    batch, number = candidates.index.shape
    images = torch.arange(batch).repeat_interleave(number).to(inputs.noisy.device)
    pool = candidates.index.flatten().to(inputs.noisy.device)
    pred = denoiser(
        inputs.noisy[images],
        inputs.timesteps[images],
        {name: value[pool] for name, value in inputs.conditioning.items()},
        torch.full((batch * number,), int(Bank.POSITIVE)),
        **{name: value[images] for name, value in inputs.image.items()},
    )
    return pred.unflatten(0, (batch, number))


def _ranking(
    pred: Tensor, target: Tensor, candidates: Candidates, temperature: float
) -> dict[str, Tensor]:
    """How often, and by how much, the matching caption has the smallest error."""
    pred = pred.detach()
    masks = candidates.positives.to(pred.device), candidates.mask.to(pred.device)
    guidance = AF.guide(pred, target, *masks, neg_scale=1.0, temperature=temperature)
    terms = AF.agsm_terms(pred, guidance)
    wanted = ("win_rate", "score_margin", "positive_weight", "chance_weight", "weight_entropy")
    return {f"agsm/{name}": getattr(terms, name) for name in wanted}


def make_objective(options: Any, model: Session) -> Any:
    """The objective that `--objective` names, over the (prepared) denoiser."""
    if options.objective == "agsm":
        return AGSM(model.agsm(options.train_batch_size))
    if options.objective == "softrepa":
        if options.num_tokens and options.banks != "shared":
            raise ValueError(
                f"banks: SoftREPA has one bank; expected shared, got {options.banks}. AGSM's "
                "ablation with two banks is --objective agsm."
            )
        competitors = Competitors.read(options.candidates)
        if competitors.empty or competitors.rule is None:
            raise ValueError(
                f"candidates: SoftREPA contrasts captions; expected in_batch:N or hard:N, got "
                f"{options.candidates}."
            )
        return SoftREPA(model.denoiser, SoftREPALoss(), competitors.rule)
    return Denoising(model.denoiser)


def prepare(options: Any, model: Session, batch: Batch, generator: Generator) -> Inputs:
    """Noises a batch and encodes its captions; the draws are the generator's alone."""
    pipeline = model.pipeline
    latents = pipeline.encode_images(batch.pixels, generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = model.timesteps(len(latents), generator)
    conditioning, captions = model.captions(batch, options.objective != "denoising")
    if options.objective == "softrepa":
        captions = {**captions, "generator": generator}
        del captions["null"]
    scheduler = model.scheduler
    return Inputs(
        add_noise(scheduler, latents, noise, timesteps),
        timesteps,
        regression_target(scheduler, latents, noise, timesteps),
        conditioning,
        pipeline.image_conditioning(batch.pixels),
        captions,
    )


if __name__ == "__main__":
    command(main)
