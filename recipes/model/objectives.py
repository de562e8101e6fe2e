"""What `train_agsm.py` minimises: AGSM, SoftREPA, or plain denoising, all with one face.

    objective(noisy, timesteps, target, conditioning, candidates, image) -> (loss, metrics)
    objective.update_ema()                 after each optimizer step
    objective.state_dict(), load_state_dict()

`conditioning` has one row per caption of the candidates' pool; `candidates` says who competes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agsm_loss import AGSMRegularizer, Bank, Candidates, SoftREPALoss
from agsm_loss import functional as AF
from agsm_loss.integrations.noise import add_noise, regression_target
from data.image_data import Batch
from model.agsm import competitors
from model.trained_pipeline import TrainedPipeline
from run.settings import hard_per_image


class Inputs(NamedTuple):
    """One noised batch of B images and P captions."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    conditioning: dict[str, Tensor]
    image: dict[str, Tensor]
    candidates: Candidates


Result = tuple[Tensor, Mapping[str, Tensor]]


class AGSM:
    """`AGSMRegularizer` alone."""

    def __init__(self, regularizer: AGSMRegularizer) -> None:
        self.regularizer = regularizer

    def __call__(self, inputs: Inputs) -> Result:
        output = self.regularizer(
            inputs.noisy,
            inputs.timesteps,
            inputs.target,
            inputs.conditioning,
            inputs.candidates,
            image_conditioning=inputs.image,
        )
        return output.loss, output.metrics

    def update_ema(self) -> None:
        self.regularizer.update_ema()

    def state_dict(self) -> dict[str, Any]:
        return self.regularizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.regularizer.load_state_dict(state)


class SoftREPA:
    """SoftREPA's contrast over the same candidates; every caption uses the one bank."""

    def __init__(self, denoiser: nn.Module, loss: SoftREPALoss) -> None:
        self.denoiser, self.loss = denoiser, loss

    def __call__(self, inputs: Inputs) -> Result:
        candidates = inputs.candidates
        pred = _every_candidate(self.denoiser, inputs)
        positives = candidates.positives.to(pred.device)
        mask = candidates.mask.to(pred.device)
        loss = self.loss(pred, inputs.target, positives, mask)
        return loss, _ranking(pred, inputs.target, candidates, self.loss.temperature)

    def update_ema(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Denoising:
    """Plain score matching of each image under its own caption, which uses ψ⁺."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser

    def __call__(self, inputs: Inputs) -> Result:
        batch = len(inputs.noisy)
        own = {name: value[:batch] for name, value in inputs.conditioning.items()}
        bank = torch.full((batch,), int(Bank.POSITIVE))
        pred = self.denoiser(inputs.noisy, inputs.timesteps, own, bank, **inputs.image)
        return AF.denoising_error(pred.unsqueeze(1), inputs.target).mean(), {}

    def update_ema(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _every_candidate(denoiser: nn.Module, inputs: Inputs) -> Tensor:
    """(B, K, *D): one forward pass over all B·K pairs."""
    batch, number = inputs.candidates.index.shape
    images = torch.arange(batch).repeat_interleave(number).to(inputs.noisy.device)
    pool = inputs.candidates.index.flatten().to(inputs.noisy.device)
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


def make_objective(options: Any, trained: TrainedPipeline) -> Any:
    """The chosen objective over the (prepared) denoiser."""
    if options.objective == "agsm":
        return AGSM(trained.agsm(options.train_batch_size))
    if options.objective == "softrepa":
        if options.banks != "shared":
            raise ValueError(
                f"banks: SoftREPA has one bank; expected shared, got {options.banks}. AGSM's "
                "ablation with two banks is --objective agsm."
            )
        loss = SoftREPALoss(
            logit_scale=options.softrepa_scale,
            temperature=options.softrepa_temperature,
            denoising_weight=options.denoising_weight,
        )
        return SoftREPA(trained.denoiser, loss)
    return Denoising(trained.denoiser)


def prepare(
    options: Any, trained: TrainedPipeline, batch: Batch, generator: torch.Generator
) -> Inputs:
    """Noises a batch and chooses who competes; the draws are the generator's alone."""
    model = trained.model
    latents = model.encode_images(batch.pixels, generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = trained.timesteps(len(latents), generator)
    pool, candidates = competitors(options, batch, generator)
    scheduler = model.pipe.scheduler
    return Inputs(
        add_noise(scheduler, latents, noise, timesteps),
        timesteps,
        regression_target(scheduler, latents, noise, timesteps),
        model.encode_prompts(pool),
        model.image_conditioning(batch.pixels),
        candidates,
    )


def hard_of(options: Any) -> int:
    """Edited captions per image; plain denoising has no use for any."""
    return 0 if options.objective == "denoising" else hard_per_image(options)
