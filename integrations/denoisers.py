"""A diffusers denoiser as one module that `AGSMRegularizer` calls: with soft tokens, or without.

A *denoiser* is the UNet or transformer of a pipeline. *Soft tokens* are trained vectors that
join the text inside it: ψ⁺ with matching captions, ψ⁻ with the others. A *bank* (`agsm_loss.Bank`)
says which of the two a sample gets, or that it gets none.

>>> import torch
>>> from diffusers import DDPMScheduler, UNet2DConditionModel
>>> from agsm_loss import EMA, AGSMLoss, AGSMRegularizer
>>> from agsm_loss.integrations.denoisers import TokenDenoiser
>>> from agsm_loss.integrations.noise import add_noise, regression_target
>>> unet = UNet2DConditionModel(  # yours: pipe.unet
...     sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
...     cross_attention_dim=16, attention_head_dim=4,
...     down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
... ).requires_grad_(False)
>>> denoiser = TokenDenoiser(unet, num_tokens=4)
>>> agsm = AGSMRegularizer(denoiser, EMA(denoiser.parameters()), AGSMLoss(neg_scale=1.0))

A training step, and what it leaves in the gradients:

>>> latents, noise = torch.randn(2, 3, 4, 8, 8)
>>> timesteps, text = torch.tensor([10, 400, 900]), torch.randn(3, 6, 16)
>>> scheduler = DDPMScheduler()
>>> noisy = add_noise(scheduler, latents, noise, timesteps)
>>> target = regression_target(scheduler, latents, noise, timesteps)
>>> captions = ["two cats", "a red cube", "a blue cube"]
>>> agsm(noisy, timesteps, target, {"prompt_embeds": text}, captions).loss.backward()
>>> denoiser.tokens.tokens.grad.shape  # (banks, n, d)
torch.Size([2, 4, 16])

`denoiser.save_pretrained("tokens")` saves the tokens. Detached, the model is as it was:

>>> denoiser.detach()

The model is frozen here. Where a LoRA or the model itself is trained too, the same EMA follows it.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from agsm_loss import SoftTokens
from agsm_loss.integrations.tokens.attach import (
    AttachedTokens,
    BankChoice,
    attach_soft_tokens,
    backbone_of,
    make_soft_tokens,
    move_to,
)
from agsm_loss.integrations.tokens.hooks import Backbone, parameter_names, unwrap
from agsm_loss.integrations.tokens.saved import SavedTokens
from agsm_loss.soft_tokens import Banks


class TokenDenoiser(nn.Module):
    """A denoiser with soft tokens attached, as one module (an `agsm_loss.Denoiser`).

    Making it attaches the tokens: until `detach()`, every call of the model uses them, a pipeline's
    too; ψ⁺ by default. Give this module to DDP or `accelerator.prepare`, so that the tokens'
    gradients are averaged over the processes.

    A script that gives the bare denoiser to DDP makes the tokens a part of it first:
    `unet.soft_tokens = make_soft_tokens(unet)`, then the optimizer and `accelerator.prepare`, then
    `TokenDenoiser(unet, tokens=accelerator.unwrap_model(unet).soft_tokens)`. If the denoiser has
    buffers (SD3), use DDP's `broadcast_buffers=False`: ranks may differ in their number of calls,
    and an exchange of buffers would wait for ever.

    Args:
        model: a stock denoiser (`attach_soft_tokens` lists them), or one that DDP, torch.compile or
            PEFT has wrapped; what is given is what is called.
        num_tokens: n, tokens a layer.
        num_layers: L, how many of the first blocks have tokens of their own: 5 by default (or all
            blocks, where there are fewer), -1 for all. None for a UNet, whose blocks use one set.
        banks: "dual", ψ⁺ and ψ⁻; or an ablation of `SoftTokens`.
        time_buckets: number of time tokens, None for none.
        init: first values of the tokens, by default drawn: any shape that broadcasts to
            (2, L, n, d), or (2, n, d) for a UNet. A UNet's tokens start, as published, from the
            start-of-text (BOS) vector of the empty prompt: `init=bos_embedding(embeds)`, where
            `embeds` is what the text encoder makes of "".
        blocks: for a UNet, which of "down", "mid" and "up" get the tokens; default down and mid.
        tokens: existing tokens instead of new ones. `SoftTokens` are attached here and moved to the
            model's device. `AttachedTokens` are attached to this model already: by
            `saved.attach(unet)`, say, or by `attach_soft_tokens(..., backbone=...)` where the
            architecture is one of your own.

    Attributes:
        model: the denoiser, as it was given.
        tokens: its `SoftTokens`, the parameters to train.
        attached: the `AttachedTokens`, e.g. for `set_sampling`.

    forward:
        noisy: x_t (N, C, H, W); Flux, FLUX.2 and Qwen-Image latents are packed here. FLUX.2's are
            2x2 patches, scaled, as its pipeline's `latents`.
        timesteps: (N,) in 0..1000.
        conditioning: what the pipeline's `encode_prompt` returns, by its names:
            prompt_embeds (N, S, d); pooled_prompt_embeds (N, d) for SDXL, SD3 and Flux;
            prompt_attention_mask (N, S) for Sana; prompt_embeds_mask (N, S) for Qwen-Image, and for
            Z-Image, whose pipeline has lists of texts instead.
        bank: (N,) of `agsm_loss.Bank`, or one for all.
        image: add_time_ids (N, 6) for SDXL, guidance (N,) for Flux and FLUX.2-dev.

    Raises:
        TypeError: no adapter for the model; tokens of another type.
        ValueError: settings or tokens that do not fit the model, or settings of new tokens together
            with existing ones; in a call, inputs that do not, or a model that takes the guidance
            scale otherwise than as `guidance` (LCM).
        RuntimeError: the model has tokens attached already; a call after `detach()`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_tokens: int = 4,
        num_layers: int | None = None,
        banks: Banks = "dual",
        time_buckets: int | None = 100,
        init: Tensor | None = None,
        blocks: Sequence[str] | None = None,
        tokens: SoftTokens | AttachedTokens | None = None,
    ) -> None:
        super().__init__()
        if tokens is None:
            tokens = make_soft_tokens(
                model,
                num_tokens=num_tokens,
                num_layers=num_layers,
                banks=banks,
                time_buckets=time_buckets,
                init=init,
            )
            _warn_of_ddp(model)
        else:
            changed = {
                "num_tokens": num_tokens != 4,
                "num_layers": num_layers is not None,
                "banks": banks != "dual",
                "time_buckets": time_buckets != 100,
                "init": init is not None,
            }
            if any(changed.values()):
                raise ValueError(
                    "tokens: expected existing tokens alone, or none and the settings of new ones, "
                    f"got both ({', '.join(name for name in changed if changed[name])})."
                )
        self.attached = _attach(model, tokens, blocks)
        self.model = model
        self.tokens = self.attached.tokens
        _keep_buffers(self)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: dict[str, Tensor],
        bank: Tensor | int,
        **image: Tensor,
    ) -> Tensor:
        if not self.attached.is_attached:
            raise RuntimeError(
                "the soft tokens of this denoiser were detached. To use them again: "
                "TokenDenoiser(model, tokens=denoiser.tokens)."
            )
        _check_names(self.attached.backbone, self.model, conditioning, image)
        inputs = _in_dtype_of(self.model, (noisy, dict(conditioning), image))
        with self.attached.using(bank):
            return self.attached.backbone.denoise(self.model, timesteps, *inputs)

    def using(self, bank: BankChoice) -> AbstractContextManager[None]:
        """`bank` for the calls of `model` inside, e.g. a script's own; ψ⁺ otherwise.

        `Bank.OFF` gives the model without tokens; one bank for all samples, or one each.
        """
        return self.attached.using(bank)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        base_model: str | None = None,
        training: dict[str, Any] | None = None,
    ) -> None:
        """Save the tokens, with what is needed to attach them again, as `SavedTokens` does.

        `load_soft_tokens(pipe, folder)` reads them for sampling. To train them further:
        `TokenDenoiser(unet, tokens=SavedTokens.from_pretrained(folder).attach(unet))`.

        Args:
            folder: where to, made if there is none.
            base_model: hub id or path of the model that they were trained on, for the model card.
            training: settings worth keeping (JSON values).
        """
        saved = SavedTokens.of(self.attached, base_model=base_model, training=training)
        saved.save_pretrained(folder)

    def detach(self) -> None:
        """Remove the tokens from the model, which is then as it was. They remain in `tokens`."""
        self.attached.detach()


def _attach(
    model: nn.Module, tokens: SoftTokens | AttachedTokens, blocks: Sequence[str] | None
) -> AttachedTokens:
    """The tokens on the model; those that are attached already are checked."""
    if isinstance(tokens, SoftTokens):
        attached = attach_soft_tokens(model, tokens, blocks=blocks)
        move_to(tokens, attached.model)
        return attached
    if not isinstance(tokens, AttachedTokens):
        raise TypeError(
            f"tokens: expected SoftTokens or AttachedTokens, got {type(tokens).__name__}. For "
            "saved ones pass tokens=SavedTokens.from_pretrained(folder).attach(model)."
        )
    if blocks is not None:
        raise ValueError(
            f"blocks: expected None with tokens that are attached already, got {blocks!r}. Choose "
            "them in attach_soft_tokens."
        )
    if unwrap(model) is not tokens.model:
        raise ValueError(
            f"model: expected the attached denoiser, a {type(tokens.model).__name__}, bare or "
            f"wrapped, got another one, a {type(unwrap(model)).__name__}."
        )
    if not tokens.is_attached:
        raise ValueError(
            "tokens: expected attached tokens, got detached ones. Attach them again: "
            "tokens=attached.tokens."
        )
    return tokens


def _warn_of_ddp(model: nn.Module) -> None:
    """New tokens are not among the parameters of a model that DDP wraps already."""
    if any(isinstance(part, DistributedDataParallel) for part in model.modules()):
        warnings.warn(
            "the gradients of these new soft tokens will not be averaged over the processes: DDP "
            "wraps the model already. Give the TokenDenoiser to DDP instead, or make the tokens "
            "a part of the model before: unet.soft_tokens = make_soft_tokens(unet).",
            stacklevel=3,
        )


CALLABLE = """\
def denoiser(noisy, timesteps, conditioning, bank, **image):
    return -transformer(  # the prediction of the target: its pipeline turns time and sign round
        hidden_states=noisy,  # (N, C, H, W), in rows where its pipeline packs latents
        timestep=1 - timesteps / 1000,
        encoder_hidden_states=conditioning["prompt_embeds"],
        encoder_attention_mask=conditioning["prompt_attention_mask"],
        return_dict=False,
    )[0]


agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3))
"""
"""What to write for a transformer that has no adapter here."""


class PlainDenoiser(nn.Module):
    """A denoiser without soft tokens as the same kind of module. `bank` changes nothing.

    For a LoRA or full fine-tuning alone, with `AGSMLoss(guidance_scale=s)`.

    Args:
        model: a stock denoiser, or one that DDP, torch.compile or PEFT has wrapped.

    forward: as `TokenDenoiser`'s.

    Raises:
        TypeError: a model of another class; the message is the callable to write in its place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        try:
            self._backbone = backbone_of(unwrap(model))
        except TypeError:
            takes = ", ".join(parameter_names(unwrap(model)))
            raise TypeError(
                f"model: expected a denoiser of a known class, got {type(unwrap(model)).__name__}. "
                "Give AGSMRegularizer a callable in its place, which calls the model as its "
                f"pipeline does. For Lumina2:\n\n{CALLABLE}\nThis one's forward takes: {takes}."
            ) from None
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
    kind, config = type(unwrap(model)).__name__, getattr(unwrap(model), "config", None)
    for name in ("time_cond_proj_dim", "guidance_embeds"):  # LCM's, Sana-Sprint's
        if getattr(config, name, None) and "guidance" not in names.image:
            raise ValueError(
                f"model: expected a {kind} that does not take the guidance scale, got {name}="
                f"{getattr(config, name)} in its config. Write a callable of your own that passes "
                "the scale as its pipeline does (`agsm_loss.Denoiser`)."
            )
    if not isinstance(conditioning, Mapping):
        raise TypeError(
            f"conditioning: expected a dict with {', '.join(names.required)} for {kind}, got "
            f"{type(conditioning).__name__}."
        )
    for what, given, required, optional in (
        ("conditioning", conditioning, names.required, names.optional),
        ("image_conditioning", image, names.image, ()),
    ):
        if what == "conditioning" and (stray := set(names.image) & set(given)):
            raise ValueError(
                f"conditioning: expected {sorted(required)} for {kind}, got {sorted(stray)} in it, "
                f"which belongs to the image. Pass image_conditioning={{{min(stray)!r}: ...}}."
            )
        if not set(required) <= set(given) <= {*required, *optional}:
            raise ValueError(
                f"{what}: expected {sorted(required)} for {kind}"
                + (f", with or without {sorted(optional)}" if optional else "")
                + f", got {sorted(given)}. For a denoiser that takes more (ControlNet, say), write "
                "a callable of your own (`agsm_loss.Denoiser`)."
            )


def _keep_buffers(module: nn.Module) -> None:
    """Keep DDP around `module` from exchanging its buffers, all constants, in every forward."""
    names = [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


@contextmanager
def no_grad_pass() -> Iterator[None]:
    """`torch.no_grad` for a pass of a model in training, also inside autocast; a decorator as well.

    In older PyTorch, autocast keeps the weights that it cast in a pass without gradient, and the
    passes after it get no gradient (pytorch issue 112583, fixed by 165068). They are dropped here.
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
    """The dtype of a denoiser's inputs.

    Its first parameter's, unless that is for storage only (float8, 4-bit).
    """

    def known() -> Iterator[torch.dtype]:
        yield next(model.parameters()).dtype
        yield getattr(unwrap(model), "dtype", torch.uint8)  # diffusers' knows of layerwise casting
        yield from (p.dtype for p in model.parameters())
        yield torch.get_default_dtype()

    return next(dtype for dtype in known() if dtype.is_floating_point and dtype.itemsize > 1)
