"""From a diffusers model and scheduler to what `AGSMRegularizer` needs.

    denoiser = TokenDenoiser(attached)
    agsm = AGSMRegularizer(denoiser, EMA(denoiser.parameters()), AGSMLoss(...))
    noisy = add_noise(scheduler, latents, noise, timesteps)
    target = regression_target(scheduler, latents, noise, timesteps)
    loss = loss + agsm(noisy, timesteps, target, {"prompt_embeds": ...}, captions=captions).loss

Freeze the backbone first (`model.requires_grad_(False)`). With a LoRA on it, the EMA follows the
adapter as well as the tokens, and the reference model is the same network with adapters off.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from agsm_loss.integrations.tokens.attach import AttachedTokens, backbone_of
from agsm_loss.integrations.tokens.hooks import Backbone, unwrap


class TokenDenoiser(nn.Module):
    """A denoiser wearing soft tokens as one module: `agsm_loss.Denoiser` for any backbone.

    Wrap this in DDP or `accelerator.prepare`, so that the tokens' gradients are synchronised. A script
    that prepares its denoiser itself makes the tokens part of that (`unet.soft_tokens = tokens`, before
    its optimizer), and gives the prepared one here; a denoiser with buffers (SD3) then wants DDP's
    `broadcast_buffers=False`, as AGSM's calls may be more on one rank than on another, which would wait.

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
        _keep_buffers(self)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: dict[str, Tensor],
        bank: Tensor | int,
        **image: Tensor,
    ) -> Tensor:
        _check_names(self.attached.backbone, self.model, conditioning, image)
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
        _keep_buffers(self)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: dict[str, Tensor],
        bank: Tensor | int,
        **image: Tensor,
    ) -> Tensor:
        _check_names(self._backbone, self.model, conditioning, image)
        inputs = _in_dtype_of(self.model, (noisy, dict(conditioning), image))
        return self._backbone.denoise(self.model, timesteps, *inputs)


def _check_names(backbone: Backbone, model: nn.Module, conditioning: Any, image: Any) -> None:
    """ValueError where something that the denoiser needs is missing, or would not be read."""
    names = backbone.names(model)
    if names is None:
        return
    kind = type(unwrap(model)).__name__
    if not isinstance(conditioning, Mapping):
        raise TypeError(
            f"conditioning: expected a dict with {', '.join(names.required)} for {kind}, got "
            f"{type(conditioning).__name__}."
        )
    for what, given, required, optional in (
        ("conditioning", conditioning, names.required, names.optional),
        ("image_conditioning", image, names.image, ()),
    ):
        if not set(required) <= set(given) <= {*required, *optional}:
            raise ValueError(
                f"{what}: expected {sorted(required)} for {kind}"
                + (f", with or without {sorted(optional)}" if optional else "")
                + f", got {sorted(given)}. A denoiser that takes more (ControlNet, say) is a callable of "
                "your own (`agsm_loss.Denoiser`)."
            )


def _keep_buffers(module: nn.Module) -> None:
    """Tells DDP around `module` not to exchange its buffers, constants all, in every forward."""
    names = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


@contextmanager
def no_grad_pass() -> Iterator[None]:
    """`torch.no_grad` for a pass of what is trained, also inside autocast; a decorator as well.

    In older PyTorch autocast keeps the cast weights of a pass without gradient, and the passes after it
    have none (pytorch issue 112583, mended by 165068); they are dropped here.
    """
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()


def _in_dtype_of(model: nn.Module, tree: Any) -> Any:
    dtype = compute_dtype(model)

    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floating else leaf

    return tree_map(cast, tree)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a denoiser's inputs: its first parameter's, but where that is for storage (float8, 4-bit)."""

    def known() -> Iterator[torch.dtype]:
        yield next(model.parameters()).dtype
        yield getattr(unwrap(model), "dtype", torch.uint8)  # diffusers' knows of layerwise casting
        yield from (p.dtype for p in model.parameters())
        yield torch.get_default_dtype()

    return next(dtype for dtype in known() if dtype.is_floating_point and dtype.itemsize > 1)
