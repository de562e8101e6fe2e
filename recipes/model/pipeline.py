"""A diffusers text-to-image pipeline, taken apart for training: text, latents, timesteps.

    model = TextToImage.load("stabilityai/stable-diffusion-3-medium-diffusers", torch.bfloat16)
    conditioning = model.encode_prompts(captions)      # what TokenDenoiser takes
    latents = model.encode_images(pixels)              # (B, C, h, w)

Everything is frozen. What differs by pipeline is in `model.families`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import (
    cast_training_params,
    compute_density_for_timestep_sampling,
)
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from agsm_loss.integrations.noise import prediction_type
from agsm_loss.integrations.prompts import (
    Row,
    caption_ids,
    encoded_rows,
    family_of,
    image_conditioning,
    joined,
    with_empty,
)
from agsm_loss.integrations.tokens.pipelines import Sampling, denoiser_of, load_soft_tokens
from data.sources import loading
from model.families import (
    call_of,
    decode_latents,
    encode_image,
    hold_in_float32,
    image_side,
    levels_of,
    scale_latents,
)
from run.log import say

# Projections of the image stream and, in joint attention, of the text stream.
_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "to_qkv_mlp_proj",  # of FLUX.2's single-stream blocks, one with their feed-forward
)
_LORA = "lora"
"""The adapter's name in the pipeline."""

Encoder = Callable[[Sequence[Any]], list[Row]]
"""Items -> a row each."""


def _bytes_of(encoded: Row) -> int:
    return sum(value.nbytes for value in encoded.values())


def add_lora(denoiser: Any, rank: int) -> None:
    """A trainable LoRA (arXiv 2106.09685) in float32 on every attention projection."""
    # A bare "to_out" is a linear layer in FLUX.2's single-stream blocks alone.
    out = [name for name, part in denoiser.named_modules()
           if name.endswith(".to_out") and isinstance(part, nn.Linear)]  # fmt: skip
    targets = [*_ATTENTION, *out]
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    cast_training_params(denoiser, torch.float32)


def chosen_device(device: str | None) -> str:
    """The one that is named; left out: the accelerator where there is one, else the CPU."""
    if device is None and torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return device or "cpu"


def _stored(name: str, dtype: torch.dtype) -> Any:
    """The pipeline of a folder or a hub id; where all its files are of a variant, of that one."""
    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        for variant in ("fp16", "bf16"):
            try:
                return DiffusionPipeline.from_pretrained(name, dtype=dtype, variant=variant)
            except (OSError, ValueError):
                continue
        raise error from None


def _without_values(pipe: Any) -> list[str]:
    """Names of weights that are in none of its files."""
    parts = {n: one for n, one in pipe.components.items() if isinstance(one, nn.Module)}
    return [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, value in part.named_parameters()
        if value.is_meta
    ]


def _check_tokenizers(pipe: Any) -> None:
    """Any error where one cannot be used; ValueError where it has more than its encoder embeds."""
    caption_ids(pipe, [""], **call_of(pipe))
    for name, part in pipe.components.items():
        encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        if isinstance(part, PreTrainedTokenizerBase) and encoder is not None:
            last, rows = max(part.get_vocab().values()), len(encoder.get_input_embeddings().weight)
            if last >= rows:
                raise ValueError(f"{name} has a token {last}, its text encoder {rows} tokens")


def _changes(part: Any) -> bool:
    """Whether a part of a pipeline has a LoRA that changes a layer.

    Raises:
        ValueError: a weight of it is not finite.
    """
    layers = part.modules() if isinstance(part, nn.Module) else ()
    changed = [_changed(one) for one in layers if isinstance(one, BaseTunerLayer)]
    return any(changed)


def _changed(layer: Any) -> bool:
    """Whether a layer's LoRA is not zero: of B A alpha / rank, or of DoRA's lengths of columns."""
    groups = {name: getattr(layer, name) for name in layer.adapter_layer_names}
    held = {name: group[_LORA] for name, group in groups.items() if _LORA in group}
    tensors = {name: one for name, one in held.items() if isinstance(one, Tensor)}
    tensors |= {name: one.weight for name, one in held.items() if hasattr(one, "weight")}
    if not all(one.isfinite().all() for one in tensors.values()):
        raise ValueError("lora: expected finite weights, got NaN or inf. Take an earlier one.")
    lengths = tensors.pop("lora_magnitude_vector", None)
    if lengths is not None:
        weight = layer.get_base_layer().weight
        plain = weight.float().flatten(1).norm(dim=1).to(lengths)
        if not torch.allclose(lengths.flatten(), plain, rtol=1e-3):
            return True
    scaled = bool(tensors) and bool(layer.scaling[_LORA])
    return scaled and all(bool(one.any()) for one in tensors.values())


class TextToImage:
    """A frozen pipeline.

    Args:
        pipe: the pipeline.
        cached_bytes: so much of the latest prompts' encodings is kept, on the CPU.

    Attributes:
        guidance: the distilled guidance scale that is an input of Flux.1-dev and FLUX.2-dev.
        text_rows: prompts -> their conditioning, on the CPU.
        arguments: what its prompts are encoded and its images sampled with, besides the prompts.
        image_rows: images (3, H, W) -> "mean", and "std" where the VAE has one, of their latents.
    """

    guidance = 3.5

    def __init__(self, pipe: Any, *, cached_bytes: int = 2**30) -> None:
        self.pipe = pipe
        family_of(pipe)
        self.cached_bytes = cached_bytes
        self.arguments = call_of(pipe)
        self.text_rows: Encoder = self._text_rows
        self.image_rows: Encoder = self._image_rows
        self._cache: OrderedDict[str, Row] = OrderedDict()
        self._cached = 0
        self._offloaded = False
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    @classmethod
    def load(
        cls, model: str, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> TextToImage:
        """From a saved folder or a hub id; the VAE in float32: SDXL's is not finite in fp16."""
        if Path(model).expanduser().is_file():
            raise ValueError(
                f"model: expected a folder or a hub id, got the file {model}. Convert it once: "
                "StableDiffusionXLPipeline (or the class that it is of).from_single_file(FILE)"
                ".save_pretrained(FOLDER)."
            )
        with loading("model", model, Exception) as name:
            pipe = _stored(name, dtype)
            if lost := _without_values(pipe):
                raise ValueError(f"its files lack {len(lost)} weights, such as {lost[0]}")
            _check_tokenizers(pipe)
        if getattr(pipe, "safety_checker", None) is not None:
            pipe.safety_checker = None
            pipe.register_to_config(requires_safety_checker=False)
            say("The pipeline's safety checker is off: it would make images black.")
        pipe.to(device)
        if pipe.dtype != dtype:  # earlier diffusers know the argument by another name
            pipe.to(dtype)
        if hasattr(pipe, "unet"):
            pipe.unet.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        if dtype is not torch.float32:
            hold_in_float32(pipe.vae)
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe)

    def add_lora(self, rank: int) -> None:
        """A trainable LoRA (arXiv 2106.09685) in float32 on every attention projection."""
        add_lora(self.denoiser, rank)

    def save_lora(self, folder: Path) -> None:
        """The LoRA as `pipe.load_lora_weights(folder)` takes it, with its alpha."""
        part = "unet" if hasattr(self.pipe, "unet") else "transformer"
        layers = get_peft_model_state_dict(self.denoiser)
        metadata = self.denoiser.peft_config["default"].to_dict()
        parts = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
        self.pipe.save_lora_weights(folder, **parts)

    def merge_lora(self, lora: str) -> None:
        """Adds a LoRA, from a folder or a hub id, to the weights that it is for, for good."""
        self.load_extras("", lora)
        self.pipe.fuse_lora(components=self.pipe._lora_loadable_modules)
        self.pipe.unload_lora_weights()
        self.denoiser.requires_grad_(False)

    def load_extras(
        self, tokens: str, lora: str, sampling: Sampling = Sampling.BOTH, pipe: Any = None
    ) -> None:
        """Soft tokens and a LoRA onto the denoiser, each from a folder or a hub id; "" for none.

        pipe: the pipeline that is called, where it is another one around the same parts.

        Raises:
            ValueError: they cannot be loaded, or the LoRA changes nothing.
        """
        if lora:
            with loading("lora", lora, Exception) as name:
                self.pipe.load_lora_weights(name, adapter_name=_LORA)
            if not any(map(_changes, self.pipe.components.values())):
                raise ValueError(
                    f"lora: expected one that changes a {type(self.pipe).__name__}, got {lora}: "
                    "none of its layers is in this model, or all are zero. Take the model that it "
                    "was trained on."
                )
        if tokens:
            with loading("tokens", tokens) as name:
                load_soft_tokens(pipe or self.pipe, name, sampling)

    def set_lora_scale(self, scale: float) -> None:
        """The strength of the LoRA of `load_extras`: 0 is the model without it.

        Raises:
            ValueError: a strength between, of a DoRA: it does not scale the lengths of its weights.
        """
        for part in self.pipe.components.values():
            for layer in part.modules() if isinstance(part, nn.Module) else ():
                if isinstance(layer, BaseTunerLayer):
                    if scale not in (0, 1) and getattr(layer, "use_dora", {}).get(_LORA):
                        raise ValueError(f"lora_scale: expected 0 or 1 for a DoRA, got {scale:g}.")
                    layer.enable_adapters(scale != 0)
                    layer.set_scale(_LORA, scale)

    def check_side(self, side: int) -> None:
        """ValueError where the model takes no images of `side` pixels."""
        config = self.denoiser.config
        listed = hasattr(config, "all_patch_size")
        patch = (
            2 if hasattr(self.pipe, "_pack_latents") or listed else config.get("patch_size") or 1
        )
        step, most = self.pipe.vae_scale_factor * patch, config.get("pos_embed_max_size")
        if side % step or (most and side > most * step):
            limit = f" up to {most * step}" if most else ""
            raise ValueError(
                f"resolution: expected a multiple of {step}{limit} for this "
                f"{type(self.pipe).__name__}, got {side}. Its own is {self.side}."
            )

    @property
    def side(self) -> int:
        """Pixels along a side of its images (`image_side`)."""
        return image_side(self.pipe)

    def levels(self, latents: Sequence[int], steps: int) -> dict[str, Any]:
        """What a rollout of latents (C, h, w) is called with for its noise levels (`levels_of`)."""
        return levels_of(self.pipe, latents, steps)

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        return denoiser_of(self.pipe)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def offload(self) -> None:
        """Moves all but the denoiser to the CPU; `loaded` brings it back for a while."""
        self._move_encoders("cpu")
        self._offloaded = True

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """What runs inside has the whole pipeline on the denoiser's device."""
        if not self._offloaded:
            yield
            return
        self._move_encoders(self.device)
        self._offloaded = False
        try:
            yield
        finally:
            self.offload()

    def _move_encoders(self, device: torch.device | str) -> None:
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module) and part is not self.denoiser:
                part.to(device)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """One row a prompt in every tensor, as `TokenDenoiser` names them.

        The empty prompt is what the pipeline guides away from: zeros for SDXL, where its config
        has `force_zeros_for_empty_prompt`.
        """
        return with_empty(self.pipe, prompts, self.encode_text(prompts))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoders make of the prompts, the empty one too."""
        missing = [text for text in dict.fromkeys(prompts) if text not in self._cache]
        for text, row in zip(missing, self.text_rows(missing), strict=True):
            self._cache[text] = row
            self._cached += _bytes_of(row)
        rows = [self._cache[text] for text in prompts]
        for text in prompts:
            self._cache.move_to_end(text)
        while self._cached > self.cached_bytes:
            self._cached -= _bytes_of(self._cache.popitem(last=False)[1])
        return {name: value.to(self.device) for name, value in joined(rows).items()}

    @torch.no_grad()
    def _text_rows(self, prompts: Sequence[str]) -> list[Row]:
        # In the encoders' own precision: a row is kept, whoever asks for it first.
        with self.loaded(), torch.autocast(self.device.type, enabled=False):
            given = {"device": self.device, **self.arguments}
            rows = encoded_rows(self.pipe, prompts, given)
            return [{name: value.cpu() for name, value in row.items()} for row in rows]

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w) in float32."""
        rows = self.image_rows(pixels)
        spread = {n: torch.stack([row[n] for row in rows]).to(self.device) for n in rows[0]}
        latents = spread["mean"]
        if "std" in spread:
            # The generator lives on the CPU, so that any device draws alike.
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            latents = latents + spread["std"] * noise
        return scale_latents(self.pipe.vae, latents)

    @torch.no_grad()
    def _image_rows(self, images: Sequence[Tensor]) -> list[Row]:
        """An image a pass, always: the last bits of a latent depend on what shares its pass."""
        if len(images):
            self.check_side(images[0].shape[-1])
        with self.loaded():
            return [encode_image(self.pipe.vae, image) for image in images]

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> (B, 3, H, W) around [-1, 1], in float32."""
        return decode_latents(self.pipe.vae, latents)

    def image_conditioning(self, pixels: Tensor) -> dict[str, Tensor]:
        """SDXL's time ids (uncropped, at full size) and Flux's guidance, one row an image."""
        number, _, height, width = pixels.shape
        given = image_conditioning(self.pipe, number, height, width, guidance=self.guidance)
        return {name: value.to(self.device) for name, value in given.items()}

    def timesteps(
        self, number: int, density: str, generator: torch.Generator, low: float = 0.0
    ) -> Tensor:
        """(number,) training timesteps: whole ones for a DDPM schedule, real ones for flows.

        density: "uniform", or "logit_normal" (SD3's, flows only), over the timesteps from the share
        `low` of the schedule on (0: no noise).
        """
        if not 0 <= low < 1:
            raise ValueError(f"timestep_low: expected a share in [0, 1), got {low}.")
        steps = self.pipe.scheduler.config.num_train_timesteps
        flow = prediction_type(self.pipe.scheduler) == "flow"
        if density == "logit_normal" and not flow:
            raise ValueError(
                "timestep_density: logit_normal is defined for flow matching; expected uniform for "
                f"{type(self.pipe.scheduler).__name__}."
            )
        if not flow:
            first = int(low * steps)
            return torch.randint(first, steps, (number,), generator=generator).to(self.device)
        share = compute_density_for_timestep_sampling(
            density.replace("uniform", "none"),
            number,
            logit_mean=0.0,
            logit_std=1.0,
            generator=generator,
        )
        return ((low + (1 - low) * share) * steps).to(self.device)
