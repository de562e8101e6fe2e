"""What differs between families of pipelines: how texts are encoded, and how guidance is asked for.

    family = family_of(pipe)
    encoded = family.encode(pipe, prompts, arguments)    # by `encode_prompt`, as in `pipe(prompt)`
    images = pipe(prompts, **family.call(pipe), **guidance(pipe, 4.0, len(prompts))).images

Known: Stable Diffusion 1.x and 2.x, SDXL, SD3 and SD3.5, Flux.1, Qwen-Image, Sana. Latents depend
on the VAE alone: see `model.latents`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from agsm_loss.integrations.tokens.pipelines import denoiser_of

Row = dict[str, Tensor]
"""What one item is encoded as."""

# Prompts a pass of the text encoders, always: the last bits of a row depend on how many share its
# pass, and in a resumed run, whose cache is empty, others would.
ENCODED = 8


class Family:
    """Stable Diffusion, and what the others have in common with it.

    outputs: which outputs of `encode_prompt` are which conditioning.
    prompts_a_pass: of the text encoders.
    """

    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0}
    prompts_a_pass = ENCODED

    def call(self, pipe: Any) -> dict[str, Any]:
        """What `pipe` is called with besides the prompts, for images of the model's own size."""
        return {}

    def encode(self, pipe: Any, prompts: list[str], arguments: Mapping[str, Any]) -> Row:
        """One row a prompt in every tensor. arguments: of `encode_prompt`; others are left out."""
        known = inspect.signature(pipe.encode_prompt).parameters
        wanted = {
            "prompt": prompts,
            "prompt_2": None,
            "prompt_3": None,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
            **arguments,
        }
        given = {name: value for name, value in wanted.items() if name in known}
        encoded = pipe.encode_prompt(**given)
        return {name: encoded[place] for name, place in self.outputs.items()}

    def image_conditioning(self, pipe: Any, pixels: Tensor, guidance: float) -> Row:
        """What belongs to the images (B, 3, H, W), one row an image.

        guidance: the scale for a model that takes it as an input.
        """
        return {}


class SDXL(Family):
    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

    def image_conditioning(self, pipe: Any, pixels: Tensor, guidance: float) -> Row:
        """Time ids: uncropped, at full size."""
        batch, _, height, width = pixels.shape
        ids = torch.tensor([[height, width, 0, 0, height, width]])
        return {"add_time_ids": ids.repeat(batch, 1).float()}


SILENT_WORDS = 3
"""Vocabulary of a T5 that says nothing: padding, the end, and what is unknown."""


class SD3(Family):
    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}

    def call(self, pipe: Any) -> dict[str, Any]:
        """One token of a T5 that says nothing, in place of 256 that cost time."""
        third = getattr(pipe, "text_encoder_3", None)
        if third is None or third.config.vocab_size != SILENT_WORDS:
            return {}
        name = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"
        for pipeline in (name, f"{name}_img2img"):
            logging.getLogger(pipeline).addFilter(_not_of_one_token)
        return {"max_sequence_length": 1}


def _not_of_one_token(record: logging.LogRecord) -> bool:
    """Leaves out the warning that a silent T5's tokens were cut off."""
    return "`max_sequence_length` is set to  1 tokens" not in record.getMessage()


class Flux(Family):
    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "pooled_prompt_embeds": 1}

    def image_conditioning(self, pipe: Any, pixels: Tensor, guidance: float) -> Row:
        """The guidance scale that Flux.1-dev takes as an input; Flux.1-schnell has none."""
        if not pipe.transformer.config.guidance_embeds:
            return {}
        return {"guidance": torch.full((len(pixels),), guidance)}


class QwenImage(Family):
    """A row is as long as its text. Each is encoded alone: others would change its padding."""

    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "prompt_embeds_mask": 1}
    prompts_a_pass = 1
    EMPTY = " "
    """What its authors guide away from."""

    def encode(self, pipe: Any, prompts: list[str], arguments: Mapping[str, Any]) -> Row:
        encoded = super().encode(pipe, [text or self.EMPTY for text in prompts], arguments)
        if encoded["prompt_embeds_mask"] is None:  # diffusers leaves out one that masks nothing
            embeds = encoded["prompt_embeds"]
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            encoded["prompt_embeds_mask"] = mask
        return encoded


class Sana(Family):
    """Prompts follow an instruction to the text encoder, but for the empty one."""

    outputs: ClassVar[Mapping[str, int]] = {"prompt_embeds": 0, "prompt_attention_mask": 1}

    def call(self, pipe: Any) -> dict[str, Any]:
        """Its own default is 1024 pixels a side, whatever the model was made for."""
        side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        return {"height": side, "width": side, "use_resolution_binning": False}

    def encode(self, pipe: Any, prompts: list[str], arguments: Mapping[str, Any]) -> Row:
        known = inspect.signature(pipe.__call__).parameters
        names = ("clean_caption", "max_sequence_length", "complex_human_instruction")
        given = {**{name: known[name].default for name in names}, **arguments}
        encoded = super().encode(pipe, prompts, given)
        if "" in prompts:
            empty = torch.tensor([text == "" for text in prompts])
            bare = super().encode(pipe, prompts, {**given, "complex_human_instruction": None})
            for name, value in encoded.items():
                value[empty] = bare[name][empty]
        return encoded


_FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(),
    "StableDiffusionXLPipeline": SDXL(),
    "StableDiffusion3Pipeline": SD3(),
    "FluxPipeline": Flux(),
    "QwenImagePipeline": QwenImage(),
    "SanaPipeline": Sana(),
}


def family_of(pipe: Any) -> Family:
    """The pipeline's family.

    Raises:
        TypeError: none of the known ones.
    """
    names = [kind.__name__ for kind in type(pipe).__mro__]
    found = next((_FAMILIES[name] for name in names if name in _FAMILIES), None)
    if found is None:
        raise TypeError(
            f"model: expected one of {sorted(_FAMILIES)}, got {type(pipe).__name__}. For "
            "another pipeline write the step with agsm_loss.integrations.denoisers."
        )
    return found


def guidance(pipe: Any, scale: float, prompts: int | None = None) -> dict[str, Any]:
    """What a pipeline, or its img2img variant, is called with for guidance of this scale.

    Flux.1-dev takes the scale as an input of the model. Qwen-Image and Flux.1-schnell have no such
    input, and are guided by a second pass that has a name of its own: `true_cfg_scale`.

    prompts: how many a call has, in a list; None: one prompt, as a string.
    """
    by_name = "true_cfg_scale" in inspect.signature(pipe.__call__).parameters
    if not by_name or denoiser_of(pipe).config.guidance_embeds:
        return {"guidance_scale": scale}
    if scale <= 1:
        return {"true_cfg_scale": 1.0}
    empty = QwenImage.EMPTY if type(pipe).__name__.startswith("QwenImage") else ""
    away = empty if prompts is None else [empty] * prompts
    return {"true_cfg_scale": scale, "negative_prompt": away}
