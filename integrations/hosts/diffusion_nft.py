r"""DiffusionNFT (arXiv 2509.16117), alone or with AGSM as a term.

Reward-driven training on the forward process: an old policy samples images of each prompt as a
group; the model is then trained on them by their denoising errors, at timesteps and noise of its
own, towards those with a high reward and away from those with a low one. No likelihoods, no
guidance, any solver; ε-, v- and x_0-prediction and flow matching.

>>> import torch
>>> from diffusers import FlowMatchEulerDiscreteScheduler
>>> from torch import nn
>>> from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, Bank
>>> from agsm_loss.integrations.hosts.base import AGSMBatch
>>> from agsm_loss.integrations.hosts.diffusion_nft import DiffusionNFT
>>> from agsm_loss.integrations.hosts.rollouts import group_advantages, sample_latents
>>> layer = nn.Linear(4 + 3, 4)
>>> def denoiser(noisy, timesteps, text, bank):  # yours: TokenDenoiser or PlainDenoiser
...     return layer(torch.cat([noisy, text], dim=1))
>>> old, start = EMA(layer.parameters()), EMA(layer.parameters(), decay=1.0)
>>> agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3))
>>> scheduler = FlowMatchEulerDiscreteScheduler()
>>> step = DiffusionNFT(denoiser, scheduler, old=old, reference=start.applied, agsm=agsm)

A rollout of four images of one prompt; the reward is yours:

>>> text = torch.randn(1, 3).expand(4, 3)
>>> with old.applied():
...     latents = sample_latents(
...         lambda x, t: denoiser(x, t, text, Bank.POSITIVE), scheduler, torch.randn(4, 4)
...     )
>>> advantages = group_advantages(latents.mean(1), group=4, global_std=True)

A step on it, with captioned images for AGSM; it can be repeated at other timesteps and noise:

>>> images = AGSMBatch(
...     torch.randn(2, 4), torch.tensor([100.0, 900.0]), torch.randn(2, 4),
...     torch.randn(2, 3), ["a dog", "a cat"], null=torch.zeros(1, 3),  # the empty caption
... )
>>> timesteps, noise = 1000 * torch.rand(4), torch.randn(4, 4)
>>> loss, metrics = step(latents, advantages, text, timesteps, noise, agsm_batch=images)
>>> loss.backward()  # then optimizer.step() and
>>> step.update_ema()
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from agsm_loss import EMA, AGSMRegularizer, Bank, Denoiser, StepOutput
from agsm_loss.integrations.denoisers import no_grad_pass
from agsm_loss.integrations.hosts.base import AGSMBatch, Host, bank_of
from agsm_loss.integrations.noise import add_noise, clean_and_noise


class NFTTerms(NamedTuple):
    """The result of `diffusion_nft_loss` for B images; all but `loss` are detached.

    Attributes:
        loss: mean over the images, a scalar.
        positive, negative: e⁺ and e⁻, the normalised errors (B,).
    """

    loss: Float[Tensor, ""]
    positive: Float[Tensor, " B"]
    negative: Float[Tensor, " B"]


def diffusion_nft_loss(
    clean: Float[Tensor, "B *D"],
    old_clean: Float[Tensor, "B *D"],
    latents: Float[Tensor, "B *D"],
    advantages: Float[Tensor, " B"],
    beta: float = 1.0,
    clip: float = 5.0,
) -> NFTTerms:
    """DiffusionNFT's policy loss on B images (arXiv 2509.16117).

    With x = `clean`, the model's prediction of x_0, and x_old = `old_clean`, the loss compares an
    implicit positive and negative policy,

        x⁺ = βx + (1 − β)x_old,    x⁻ = (1 + β)x_old − βx,

    with the sampled image x_0 = `latents`:

        L = c·mean(r·e⁺/β + (1 − r)·e⁻/β),    r = ½ + clip(A, −c, c)/(2c),
        e± = mean((x± − x_0)²)/sg(max(mean|x± − x_0|, 1e-5)),

    where the inner means are over an image's dimensions. The paper mixes velocities. x_0 is affine
    in any prediction, and the factors of a mix sum to 1, so that it is the same in x_0.

    Where the model is the old policy, x⁺ = x⁻ = x_old, so that e⁺ and e⁻ have one normaliser m. As
    dx⁺ = βdx and dx⁻ = −βdx, the gradient there is that of the image's own error times its clipped
    advantage, whatever β is:

        dL = c·mean((r − (1 − r))·d mean((x − x_0)²)/m) = mean(clip(A, −c, c)·d mean((x − x_0)²)/m).

    With A = 0 for all images (r = ½) it is zero.

    >>> latents = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    >>> clean = torch.zeros(2, 2, requires_grad=True)
    >>> advantages = torch.tensor([1.0, -1.0])
    >>> diffusion_nft_loss(clean, clean.detach(), latents, advantages).loss.backward()
    >>> clean.grad  # a step against it moves both towards the better image
    tensor([[-0.5000, -0.5000],
            [-0.5000, -0.5000]])

    Args:
        clean: the model's predictions of x_0, (B, *D).
        old_clean: the old policy's, (B, *D); no gradient reaches them.
        latents: the sampled images x_0, (B, *D).
        advantages: A of each image (B,) (`rollouts.group_advantages`).
        beta: β > 0. Published: 1; 0.1 for OCR and for several rewards.
        clip: c > 0. Published: 5.

    Computed in float32 at least.

    Raises:
        ValueError: shapes that differ, or β or c not above 0.
    """
    if not clean.shape == old_clean.shape == latents.shape or advantages.shape != clean.shape[:1]:
        raise ValueError(
            "expected clean, old_clean and latents of one shape (B, ...) and advantages (B,), got "
            f"{tuple(clean.shape)}, {tuple(old_clean.shape)}, {tuple(latents.shape)} and "
            f"{tuple(advantages.shape)}."
        )
    if not (beta > 0 and clip > 0):
        raise ValueError(f"expected beta and clip above 0, got {beta} and {clip}.")
    dtype = torch.promote_types(clean.dtype, torch.float32)
    clean, old_clean, latents = clean.to(dtype), old_clean.detach().to(dtype), latents.to(dtype)
    positive = _normalised_error(beta * clean + (1 - beta) * old_clean - latents)
    negative = _normalised_error((1 + beta) * old_clean - beta * clean - latents)
    r = 0.5 + advantages.to(positive).clamp(-clip, clip) / (2 * clip)
    loss = clip * ((r * positive + (1 - r) * negative) / beta).mean()
    return NFTTerms(loss, positive.detach(), negative.detach())


def _normalised_error(error: Tensor) -> Tensor:
    """The mean square of an image's error (B, *D) over its mean size, a constant; (B,)."""
    error = error.flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)


def rising_decay(slope: float = 0.001, most: float = 0.5, start: int = 0) -> Callable[[int], float]:
    """η of the optimizer step i: min(slope·max(0, i − start), most).

    Published: the default; `rising_decay(0.0075, 0.999, start=75)` for OCR. `rising_decay(0.0)` is
    always 0: the old policy is the model as each epoch begins.

    >>> [rising_decay()(i) for i in (0, 100, 900)]
    [0.0, 0.1, 0.5]
    """
    return lambda step: min(slope * max(0, step - start), most)


class DiffusionNFT(Host):
    """DiffusionNFT's training step: images that the old policy sampled to loss and metrics.

    An *epoch* is a rollout of the old policy, `with step.old.applied()`, and the optimizer steps on
    it. After it the old policy follows the model: old ← η·old + (1 − η)·θ.

    Args:
        denoiser: the model in training, e.g. `TokenDenoiser`. Its predictions use ψ⁺.
        scheduler: the training scheduler, for the noise levels and what is predicted.
        old: the old policy: an `EMA` of all that is trained, of its own. Its decay is set here.
        reference: as in `DiffusionDPO`: returns a context in which the denoiser is the reference.
        reference_bank: the reference's tokens: none, or ψ⁺ where the model began with its tokens.
        beta, clip: of `diffusion_nft_loss`.
        kl_weight: weight of the mean squared difference of the model's prediction to the
            reference's. Published: 1e-4; 0: the reference is not run.
        old_decay: η, a function of the number of optimizer steps (`rising_decay`).
        steps_per_epoch: optimizer steps an epoch, after which the old policy moves.
        agsm: the regularizer on the same denoiser; its `weight` is λ. None, or λ = 0: DiffusionNFT
            alone, bit for bit.
        autocast: returns a context for the forward passes, e.g. `accelerator.autocast`.

    Raises:
        ValueError: kl_weight below 0, or steps_per_epoch below 1; AGSM's EMA as the old policy.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        *,
        old: EMA,
        reference: Callable[[], AbstractContextManager[Any]],
        reference_bank: Bank = Bank.OFF,
        beta: float = 1.0,
        clip: float = 5.0,
        kl_weight: float = 1e-4,
        old_decay: Callable[[int], float] = rising_decay(),  # noqa: B008 (it has no state)
        steps_per_epoch: int = 1,
        agsm: AGSMRegularizer | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(denoiser, scheduler, agsm)
        if kl_weight < 0 or steps_per_epoch < 1:
            raise ValueError(
                "expected kl_weight of 0 at least and steps_per_epoch of 1 at least, got "
                f"{kl_weight} and {steps_per_epoch}."
            )
        if agsm is not None and agsm.ema is old:
            raise ValueError(
                "old: expected an EMA of its own, got AGSM's: the two follow the model at "
                "different rates. Make a second one: EMA(denoiser)."
            )
        self.old = old
        self.reference = reference
        self.reference_bank = reference_bank
        self.beta = beta
        self.clip = clip
        self.kl_weight = kl_weight
        self.old_decay = old_decay
        self.steps_per_epoch = steps_per_epoch
        self.autocast = autocast
        self.step = 0

    def __call__(
        self,
        latents: Float[Tensor, "B *D"],
        advantages: Float[Tensor, " B"],
        conditioning: Any,
        timesteps: Tensor,
        noise: Float[Tensor, "B *D"],
        *,
        image_conditioning: Mapping[str, Tensor] | None = None,
        agsm_batch: AGSMBatch | None = None,
    ) -> StepOutput:
        """One step on B images of the old policy.

        Args:
            latents: clean latents x_0 (B, *D), e.g. of `sample_latents`.
            advantages: of each image (B,) (`group_advantages` of the whole rollout).
            conditioning: the encoded prompts: a tensor, or dicts, lists and tuples of tensors, with
                a row an image.
            timesteps: t (B,) of each image, as the scheduler counts them; fresh ones in each step.
            noise: ε (B, *D) of each image; fresh too.
            image_conditioning: what belongs to the image (SDXL's time ids): tensors with B rows.
            agsm_batch: images for AGSM; required with `agsm`.

        Returns:
            The loss, a scalar, and metrics: nft/loss, nft/positive and nft/negative (the means of
            `NFTTerms`), nft/old_distance (the mean squared difference of the prediction to the old
            policy's), kl (to the reference, unweighted; where it is run); agsm/... of the
            regularizer.

        Raises:
            ValueError: shapes that don't fit, AGSM without images, or images without AGSM.
        """
        self._check_batch(agsm_batch)
        noisy = add_noise(self.scheduler, latents, noise, timesteps)
        given, image = (noisy, timesteps, conditioning), dict(image_conditioning or {})
        own = bank_of(Bank.POSITIVE, len(latents))
        wide = torch.promote_types(latents.dtype, torch.float32)
        with no_grad_pass(), self.old.applied(), self.autocast():
            old_pred = self.denoiser(*given, own, **image).to(wide)
        with self.autocast():
            pred = self.denoiser(*given, own, **image).to(wide)
        clean, old_clean = (
            clean_and_noise(self.scheduler, noisy, one, timesteps)[0] for one in (pred, old_pred)
        )
        terms = diffusion_nft_loss(clean, old_clean, latents, advantages, self.beta, self.clip)
        metrics = {
            "nft/loss": terms.loss.detach(),
            "nft/positive": terms.positive.mean(),
            "nft/negative": terms.negative.mean(),
            "nft/old_distance": (pred.detach() - old_pred).square().mean(),
        }
        loss = terms.loss
        if self.kl_weight:
            with no_grad_pass(), self.reference(), self.autocast():
                ref = self.denoiser(*given, bank_of(self.reference_bank, len(latents)), **image)
            kl = (pred - ref.to(wide)).square().mean()
            loss = loss + self.kl_weight * kl
            metrics["kl"] = kl.detach()
        with self.autocast():
            return self._with_agsm(StepOutput(loss, metrics), agsm_batch)

    def update_ema(self) -> None:
        """After each `optimizer.step()`: moves AGSM's EMA, and the old policy once an epoch."""
        super().update_ema()
        self.step += 1
        if self.step % self.steps_per_epoch == 0:
            self.old.decay = self.old_decay(self.step)
            self.old.update()

    def state_dict(self) -> dict[str, Any]:
        """The step, the old policy and AGSM's state; for `register_for_checkpointing`."""
        return {"step": self.step, "old": self.old.state_dict(), "agsm": super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["agsm"])
        self.old.load_state_dict(state["old"])
        self.step = int(state["step"])
