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
branch knows the branches by the texts that one pipeline encodes: give `load_soft_tokens` or
`set_sampling` the one that you call. Calls on other texts are refused.
"""

import inspect
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    if isinstance(attached.bank, _Branches):
        attached.bank.remove()
    if sampling is Sampling.BOTH:
        attached.bank = Bank.POSITIVE
    elif sampling is Sampling.OFF:
        attached.bank = Bank.OFF
    else:
        bare = sampling is Sampling.CONDITIONAL_ONLY
        attached.bank = _Branches(pipe, attached, Bank.OFF if bare else Bank.NEGATIVE)


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
    """Banks by each row's text: the pipeline's prompt, or what it guides away from.

    Pipelines call their denoiser with both, in either order, with more of one (perturbed branches),
    or with one alone (skip-layer guidance).
    """

    def __init__(self, pipe: Any, attached: AttachedTokens, unconditional: Bank) -> None:
        self.pipe = pipe
        self.attached = attached
        self.unconditional = int(unconditional)
        self.prompts: Tensor | list[Tensor] | None = None
        self.negative: Tensor | list[Tensor] | None = None
        self.found: list[tuple[Any, list[int]]] = []
        pipe.encode_prompt = self.encode_prompt
        attached._handles.append(self)

    def remove(self) -> None:
        """The pipeline is as it was; `AttachedTokens.detach` calls it too."""
        self.pipe.__dict__.pop("encode_prompt", None)
        self.attached._handles = [one for one in self.attached._handles if one is not self]

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's; every one returns the prompts' embeddings, then the negative ones."""
        encoded = type(self.pipe).encode_prompt(self.pipe, *args, **kwargs)
        # Z-Image's are lists.
        texts = [one for one in encoded if isinstance(one, list) or getattr(one, "ndim", 0) == 3]
        self.prompts, self.negative = (*texts, None)[:2]
        self.found = []
        return encoded

    @torch.compiler.disable
    def __call__(self, batch: int) -> list[int]:
        if getattr(self.pipe, "do_perturbed_attention_guidance", False):
            raise ValueError(
                "sampling: perturbed-attention guidance has a third branch; only Sampling.BOTH "
                "and Sampling.OFF are defined for it."
            )
        text = self.attached.text
        for seen, banks in self.found:  # a pipeline's steps share their texts
            if seen is text:
                return banks
        banks = self._banks(text)
        self.found.append((text, banks))
        return banks

    def _banks(self, text: Any) -> list[int]:
        prompts, negative = self.prompts, self.negative
        if prompts is None or not isinstance(text, (Tensor, list)):
            raise self._unknown()
        if negative is None or not self.pipe.do_classifier_free_guidance:
            negative = prompts[:0]
        halves = [self.unconditional] * len(negative) + [int(Bank.POSITIVE)] * len(prompts)
        rows = [*negative, *prompts]
        if len(text) == len(rows) and all(map(_same, text, rows)):
            return halves
        given, without = (
            [any(_same(row, one) for one in known) for row in text] for known in (prompts, negative)
        )
        if any(one == other for one, other in zip(given, without, strict=True)):
            raise self._unknown()
        return [int(Bank.POSITIVE) if one else self.unconditional for one in given]

    def _unknown(self) -> ValueError:
        return ValueError(
            f"sampling: expected texts of the prompts of this {type(self.pipe).__name__}, and "
            "prompts that are not the negative ones, got other texts, so that nobody knows which "
            "branch each is. Give set_sampling the pipeline that you call, or call the denoiser "
            "with attached.using(bank)."
        )


def _same(row: Tensor, known: Tensor) -> bool:
    """Whether a text (S, d) is a known one."""
    return row.shape == known.shape and torch.equal(row, known.to(row))


def _check_branches(pipe: Any, sampling: Sampling) -> None:
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling: expected a Sampling, got {sampling!r}.")
    uniform = sampling in (Sampling.BOTH, Sampling.OFF)
    # Asked of the class: on a pipeline that has not run yet the property itself fails.
    encode = getattr(type(pipe), "encode_prompt", None)
    at_once = encode is not None and "negative_prompt" in inspect.signature(encode).parameters
    if not uniform and not (at_once and hasattr(type(pipe), "do_classifier_free_guidance")):
        raise ValueError(
            f"sampling: {type(pipe).__name__} calls its denoiser separately for each branch of "
            "guidance, and the calls look alike; or it has no encode_prompt. Use Sampling.BOTH, or "
            "write the loop with attached.using(bank) around each call."
        )
