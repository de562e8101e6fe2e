"""Soft tokens in stock diffusers pipelines: load once, then `pipe(prompt)` as ever.

>>> import torch
>>> from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
>>> from diffusers import StableDiffusion3Pipeline
>>> from agsm_loss.integrations.tokens.attach import make_soft_tokens
>>> from agsm_loss.integrations.tokens.pipelines import Sampling, load_soft_tokens, set_sampling
>>> transformer = SD3Transformer2DModel(
...     sample_size=8, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
...     attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=16,
...     pooled_projection_dim=12, pos_embed_max_size=8,
... )
>>> pipe = StableDiffusion3Pipeline(  # yours: from_pretrained(...)
...     transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
...     text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
...     text_encoder_3=None, tokenizer_3=None,
... )
>>> pipe.set_progress_bar_config(disable=True)
>>> tokens = make_soft_tokens(transformer)  # yours: a folder or hub id
>>> attached = load_soft_tokens(pipe, tokens)
>>> def latents():  # yours: pipe(prompt).images
...     text, pooled = torch.ones(1, 6, 16), torch.ones(1, 12)
...     return pipe(
...         prompt_embeds=text, pooled_prompt_embeds=pooled, negative_prompt_embeds=-text,
...         negative_pooled_prompt_embeds=-pooled, num_inference_steps=2, output_type="latent",
...         generator=torch.Generator().manual_seed(0),
...     ).images
>>> with_tokens = latents()
>>> set_sampling(pipe, attached, Sampling.OFF)  # other choices: see Sampling
>>> torch.equal(latents(), with_tokens)
False
>>> attached.detach()

The tokens are attached to the denoiser, so the img2img, inpaint and ControlNet variants that share
it use them too, whether they were made before or after (`from_pipe`). A choice that differs by
branch asks one pipeline whether it is guided: give `load_soft_tokens` or `set_sampling` the one
that you call.
"""

from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from agsm_loss import Bank, SoftTokens
from agsm_loss.integrations.tokens.attach import AttachedTokens, attach_soft_tokens, move_to
from agsm_loss.integrations.tokens.saved import SavedTokens


class Sampling(Enum):
    """Which tokens each branch of classifier-free guidance gets."""

    BOTH = "both"
    """ψ⁺ in both branches: the paper's choice for SD1.5 and SD3."""
    NEGATIVE_UNCONDITIONAL = "negative_unconditional"
    """ψ⁻ in the unconditional branch, ψ⁺ in the other: the released SDXL sampling."""
    CONDITIONAL_ONLY = "conditional_only"
    """ψ⁺ in the conditional branch, none in the other. The denoiser is called once for each."""
    OFF = "off"
    """No tokens: the pipeline as it was, bit for bit."""


def load_soft_tokens(
    pipe: Any, source: str | Path | SavedTokens | SoftTokens, sampling: Sampling = Sampling.BOTH
) -> AttachedTokens:
    """Attach tokens to a pipeline's denoiser (`pipe.unet` or `pipe.transformer`).

    Args:
        pipe: a diffusers pipeline.
        source: a folder or hub id of saved tokens, or the tokens themselves.
        sampling: which tokens each branch gets; change it later with `set_sampling`.

    Returns:
        The attached tokens; `detach()` removes them. On an error the pipeline is as it was.
    """
    _check_branches(pipe, sampling)
    model = denoiser_of(pipe)
    if isinstance(source, SoftTokens):
        attached = attach_soft_tokens(model, source)
        move_to(source, model)
    else:
        saved = source if isinstance(source, SavedTokens) else SavedTokens.from_pretrained(source)
        attached = saved.attach(model)
    set_sampling(pipe, attached, sampling)
    return attached


def set_sampling(pipe: Any, attached: AttachedTokens, sampling: Sampling) -> None:
    """Choose which tokens each branch gets in the pipeline's next calls.

    Args:
        pipe: the pipeline.
        attached: what `load_soft_tokens` returned, or `denoiser.attached` of a `TokenDenoiser`.
        sampling: the choice.
    """
    _check_branches(pipe, sampling)
    if sampling is Sampling.BOTH:
        attached.bank = Bank.POSITIVE
    elif sampling is Sampling.OFF:
        attached.bank = Bank.OFF
    else:
        bare = sampling is Sampling.CONDITIONAL_ONLY
        attached.bank = _Branches(pipe, Bank.OFF if bare else Bank.NEGATIVE)


def denoiser_of(pipe: Any) -> nn.Module:
    """The pipeline's denoiser."""
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            return model
    raise TypeError(
        f"pipe: expected a pipeline with a unet or a transformer, got {type(pipe).__name__}. "
        "Attach the tokens to its denoiser with attach_soft_tokens."
    )


class _Branches:
    """Banks of the doubled batch [unconditional, conditional] that guided pipelines run."""

    def __init__(self, pipe: Any, unconditional: Bank) -> None:
        self.pipe = pipe
        self.unconditional = int(unconditional)

    def __call__(self, batch: int) -> list[int]:
        if getattr(self.pipe, "do_perturbed_attention_guidance", False):
            raise ValueError(
                "sampling: perturbed-attention guidance has a third branch; only Sampling.BOTH "
                "and Sampling.OFF are defined for it."
            )
        if not self.pipe.do_classifier_free_guidance:
            return [int(Bank.POSITIVE)] * batch
        half = batch // 2
        return [self.unconditional] * half + [int(Bank.POSITIVE)] * half


def _check_branches(pipe: Any, sampling: Sampling) -> None:
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling: expected a Sampling, got {sampling!r}.")
    uniform = sampling in (Sampling.BOTH, Sampling.OFF)
    # Asked of the class: on a pipeline that has not run yet the property itself fails.
    if not uniform and not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise ValueError(
            f"sampling: {type(pipe).__name__} calls its denoiser separately for each branch of "
            "guidance, and the calls look alike. Use Sampling.BOTH, or write the loop with "
            "attached.using(bank) around each call."
        )
