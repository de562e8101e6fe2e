"""Noised samples, regression targets and noise levels, as a diffusers scheduler's config says.

The model predicts ε, v or x_0, or the velocity of flow matching. In all of them the noised sample
is αx_0 + σε.

>>> import torch
>>> from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
>>> from agsm_loss.integrations.noise import add_noise, prediction_type, regression_target
>>> latents, noise = torch.randn(2, 3, 4, 8, 8)
>>> timesteps = torch.tensor([10, 400, 900])
>>> ddpm = DDPMScheduler(prediction_type="v_prediction")
>>> add_noise(ddpm, latents, noise, timesteps).shape
torch.Size([3, 4, 8, 8])
>>> v = regression_target(ddpm, latents, noise, timesteps)
>>> torch.allclose(v, ddpm.get_velocity(latents, noise, timesteps), atol=1e-5)
True
>>> flow = FlowMatchEulerDiscreteScheduler()
>>> prediction_type(flow)
'flow'
>>> torch.equal(regression_target(flow, latents, noise, timesteps), noise - latents)
True
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def prediction_type(scheduler: Any) -> str:
    """ "epsilon", "v_prediction", "sample" or "flow", by the scheduler's config.

    Raises:
        ValueError: another kind, or noise levels other than those of DDPM or of a flow.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if "FlowMatch" in name:
        return "flow"
    kind = config.get("prediction_type")
    if kind == "flow_prediction":
        return "flow"
    if kind not in ("epsilon", "v_prediction", "sample", "flow"):
        raise ValueError(
            f"scheduler: expected prediction_type epsilon, v_prediction, sample or flow matching, "
            f"got {kind!r} of {name}."
        )
    # Those of EDM (Karras et al.) scale the model's input and output in a way of their own.
    other = config.get("timestep_type") == "continuous" or config.get("use_flow_sigmas")
    if kind != "flow" and (other or not hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(
            f"scheduler: expected the noise of DDPM (alphas_cumprod) or of flow matching, got "
            f"{name} with other noise levels. Models that were trained with it cannot be trained "
            "here; for others set the pipeline's scheduler to a DDPMScheduler."
        )
    return str(kind)


def add_noise(scheduler: Any, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = αx_0 + σε, (B, *D); for flow matching α = 1 − σ and σ = t/1000, t need not be whole.

    Raises:
        ValueError: a timestep that the scheduler does not have.
    """
    last = scheduler.config.num_train_timesteps - (prediction_type(scheduler) != "flow")
    if not torch.compiler.is_compiling() and bool(((timesteps < 0) | (timesteps > last)).any()):
        raise ValueError(
            f"timesteps: expected 0..{last}, as the scheduler counts its training timesteps, got "
            f"{timesteps.min().item():g} to {timesteps.max().item():g}."
        )
    alpha, sigma = noise_levels(scheduler, timesteps, x_0)
    return (alpha * x_0 + sigma * noise).to(x_0.dtype)


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
    return (alpha * noise - sigma * x_0).to(noise.dtype)


def reward_weight(scheduler: Any) -> Callable[[Tensor], Tensor]:
    """A(t), the factor from a prediction's squared error to that of ε: (B,) to (B,).

    1 for ε; α² for v; (α/σ)² for x_0; (1 − σ)² for flow matching (x_t given, an error δ in ε − x_0
    is an error (1 − σ)δ in ε). With `AGSMLoss(reward_weight=reward_weight(scheduler))` captions get
    the same weights whatever the model predicts.
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
    """The (x_0, ε) that a prediction (B, *D) at x_t stands for.

    timesteps: those of x_t (B,). None where x_t is a clean image; then not for x_0-prediction,
    which says nothing of ε there.
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
    """DDIM's σ at η = 1 from t to the less noisy `previous` (arXiv 2010.02502, eq. 16).

    Shaped to multiply `like` (B, *D).
    """
    alpha, sigma = noise_levels(scheduler, timesteps, like)
    alpha_0, sigma_0 = noise_levels(scheduler, previous, like)
    return sigma_0 / sigma * (1 - (alpha / alpha_0) ** 2).clamp(min=0).sqrt()


def noise_levels(scheduler: Any, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(α, σ) of each timestep, shaped to multiply `like` (B, *D); in float32 at least.

    In bfloat16 σ would be 0 at the cleanest timesteps of Stable Diffusion.
    """
    steps = scheduler.config.num_train_timesteps
    dtype = torch.promote_types(like.dtype, torch.float32)
    if prediction_type(scheduler) == "flow":
        sigma = timesteps.to(like.device, dtype) / steps
        alpha = 1 - sigma
    else:
        if timesteps.is_floating_point() and not bool((timesteps == timesteps.round()).all()):
            raise ValueError(
                f"timesteps: expected whole numbers in 0..{steps - 1} for "
                f"{prediction_type(scheduler)} prediction, got {timesteps.tolist()}."
            )
        squared = scheduler.alphas_cumprod.to(like.device)[timesteps.long()].to(dtype)
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
    shape = alpha.shape + (1,) * (like.ndim - alpha.ndim)
    return alpha.reshape(shape), sigma.reshape(shape)
