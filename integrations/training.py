"""From a diffusers model and scheduler to what `AGSMRegularizer` needs.

    denoiser = TokenDenoiser(attached)
    agsm = AGSMRegularizer(denoiser, EMA(denoiser.parameters()), AGSMLoss(...))
    noisy = add_noise(scheduler, latents, noise, timesteps)
    target = regression_target(scheduler, latents, noise, timesteps)
    loss = loss + agsm(noisy, timesteps, target, {"prompt_embeds": ...}, captions=captions).loss

Freeze the backbone first (`model.requires_grad_(False)`). With a LoRA on it, the EMA follows the
adapter as well as the tokens, and the reference model is the same network with adapters off.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from agsm_loss.integrations.attach import AttachedTokens, backbone_of, unwrap


class TokenDenoiser(nn.Module):
    """A denoiser wearing soft tokens as one module: `agsm_loss.Denoiser` for any backbone.

    Wrap this in DDP or `accelerator.prepare`, so that the tokens' gradients are synchronised. A script
    that prepares its denoiser itself makes the tokens part of that (`unet.soft_tokens = tokens`, before
    its optimizer), and gives the prepared one here.

    Args:
        attached: of `attach_soft_tokens`.
        model: the attached denoiser as DDP or torch.compile have wrapped it; default: itself.

    forward:
        noisy: x_t (N, C, H, W); Flux and Qwen-Image latents are packed here.
        timesteps: (N,) in 0..1000.
        conditioning: what the pipeline's `encode_prompt` returns, by its names:
            prompt_embeds (N, S, d); pooled_prompt_embeds (N, d) for SDXL, SD3 and Flux;
            prompt_attention_mask (N, S) for Sana; prompt_embeds_mask (N, S) for Qwen-Image.
        bank: (N,) of `agsm_loss.Bank`.
        image: add_time_ids (N, 6) for SDXL, guidance (N,) for Flux.
    """

    def __init__(self, attached: AttachedTokens, model: nn.Module | None = None) -> None:
        super().__init__()
        if model is not None and unwrap(model) is not attached.model:
            raise ValueError("model: expected the attached denoiser, wrapped, got another one.")
        self.model = attached.model if model is None else model
        self.tokens = attached.tokens
        self.attached = attached

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: dict[str, Tensor],
        bank: Tensor | int,
        **image: Tensor,
    ) -> Tensor:
        inputs = _in_dtype_of(self.model, (noisy, dict(conditioning), image))
        with self.attached.using(bank):
            return self.attached.backbone.denoise(self.model, timesteps, *inputs)


class PlainDenoiser(nn.Module):
    """A denoiser without soft tokens as the same kind of module: every bank is the same to it.

    For a LoRA or full fine-tuning alone. Positives and negatives then share their weights: take γ⁻ = 0
    (`AGSMLoss`). The model may be wrapped already (DDP, torch.compile), as a host's script has it after
    `accelerator.prepare`.

    forward: as `TokenDenoiser`'s.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._backbone = backbone_of(unwrap(model))

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: dict[str, Tensor],
        bank: Tensor | int,
        **image: Tensor,
    ) -> Tensor:
        inputs = _in_dtype_of(self.model, (noisy, dict(conditioning), image))
        return self._backbone.denoise(self.model, timesteps, *inputs)


def _in_dtype_of(model: nn.Module, tree: Any) -> Any:
    dtype = next(model.parameters()).dtype

    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floating else leaf

    return tree_map(cast, tree)


def prediction_type(scheduler: Any) -> str:
    """ "epsilon", "v_prediction", "sample" or "flow", by the scheduler's config."""
    if "FlowMatch" in type(scheduler).__name__:
        return "flow"
    kind = scheduler.config.get("prediction_type")
    kind = "flow" if kind == "flow_prediction" else kind
    if kind not in ("epsilon", "v_prediction", "sample", "flow"):
        raise ValueError(
            f"scheduler: expected prediction_type epsilon, v_prediction, sample or flow matching, "
            f"got {kind!r} of {type(scheduler).__name__}."
        )
    return str(kind)


def add_noise(scheduler: Any, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = αx_0 + σε, (B, *D); for flow matching α = 1 − σ and σ = t/1000, t need not be whole."""
    alpha, sigma = noise_levels(scheduler, timesteps, x_0)
    return alpha * x_0 + sigma * noise


def regression_target(scheduler: Any, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """τ (B, *D): ε, v = αε − σx_0, x_0, or ε − x_0 for flow matching."""
    kind = prediction_type(scheduler)
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x_0
    if kind == "flow":
        return noise - x_0
    alpha, sigma = noise_levels(scheduler, timesteps, x_0)
    return alpha * noise - sigma * x_0


def reward_weight(scheduler: Any) -> Callable[[Tensor], Tensor]:
    """A(t) that turns each parametrisation's squared error into that of ε: (B,) to (B,).

    1 for ε; α² for v; (α/σ)² for x_0; (1 − σ)² for flow matching (x_t given, an error δ in ε − x_0
    is an error (1 − σ)δ in ε). `AGSMLoss(reward_weight=...)` then weighs captions alike in all.
    """
    kind = prediction_type(scheduler)

    def weight(timesteps: Tensor) -> Tensor:
        alpha, sigma = noise_levels(scheduler, timesteps, timesteps.float())
        if kind == "epsilon":
            return torch.ones_like(alpha)
        if kind == "sample":
            return (alpha / sigma) ** 2
        return alpha**2

    return weight


def clean_and_noise(
    scheduler: Any, x_t: Tensor, pred: Tensor, timesteps: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The (x_0, ε) that a prediction (B, *D) at x_t means.

    timesteps: those of x_t (B,); None where x_t is a clean image (not for x_0-prediction, which
    says nothing of ε there).
    """
    if timesteps is None:
        alpha, sigma = torch.ones_like(x_t), torch.zeros_like(x_t)
    else:
        alpha, sigma = noise_levels(scheduler, timesteps, x_t)
    kind = prediction_type(scheduler)
    if kind == "epsilon":
        return (x_t - sigma * pred) / alpha, pred
    if kind == "v_prediction":
        return alpha * x_t - sigma * pred, alpha * pred + sigma * x_t
    if kind == "flow":
        return x_t - sigma * pred, x_t + alpha * pred
    return pred, (x_t - alpha * pred) / sigma


def ddim_sigma(scheduler: Any, timesteps: Tensor, previous: Tensor, like: Tensor) -> Tensor:
    """DDIM's σ at η = 1 between t and the less noisy t − 1 (arXiv 2010.02502, eq. 16), to multiply `like`."""
    alpha, sigma = noise_levels(scheduler, timesteps, like)
    alpha_0, sigma_0 = noise_levels(scheduler, previous, like)
    return sigma_0 / sigma * (1 - (alpha / alpha_0) ** 2).clamp(min=0).sqrt()


def noise_levels(scheduler: Any, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(α, σ) of each timestep, shaped to multiply `like` (B, *D)."""
    steps = scheduler.config.num_train_timesteps
    if prediction_type(scheduler) == "flow":
        sigma = timesteps.to(like) / steps
        alpha = 1 - sigma
    else:
        if timesteps.is_floating_point() and not bool((timesteps == timesteps.round()).all()):
            raise ValueError(
                f"timesteps: expected whole numbers in 0..{steps - 1} for {prediction_type(scheduler)} "
                f"prediction, got {timesteps.tolist()}."
            )
        squared = scheduler.alphas_cumprod.to(like.device)[timesteps.long()].to(like.dtype)
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    shape = alpha.shape + (1,) * (like.ndim - alpha.ndim)
    return alpha.reshape(shape), sigma.reshape(shape)
