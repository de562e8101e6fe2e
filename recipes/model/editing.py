"""An image and a new caption -> the image changed: img2img, or inversion and sampling.

    changes = read_changes("edits.jsonl", size=512, number=100)
    images = change(model, image_to_image(model), changes, strength=0.7, seed=0, ...)
    images = change(model, model.pipe, changes, strength=None, seed=0, ...)     inversion

Both run stock pipelines; the second calls the text-to-image one with a scheduler that goes from the
image to noise, then with the one that comes back. Images are (N, H, W, 3) uint8. `sampled`:
num_inference_steps and guidance_scale.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMInverseScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor

from agsm_loss._random import draws
from agsm_loss.integrations.noise import prediction_type
from agsm_loss.integrations.prompts import Flux2, family_of
from data.batches import read_image, to_model
from data.prompts import texts_of
from data.tables import as_images, open_table
from model.families import guidance
from model.pipeline import TextToImage
from model.sampling import images_per_call, sample

Images = npt.NDArray[np.uint8]
LEAST_OF_IMAGE = 1e-12
"""Of its variance, at the noisiest level; the cosine schedule has 2e-9."""
COLUMNS = ("image", "caption", "new_caption")


@dataclass(frozen=True)
class Changes:
    """Images (N, H, W, 3), their captions, and the prompts that they are to be changed to."""

    images: Images
    captions: list[str]
    prompts: list[str]


def read_changes(data: str, *, size: int, number: int) -> Changes:
    """The first rows of a table with the COLUMNS, its images `size` pixels a side.

    Raises:
        ValueError: a column is missing, an image or a text cannot be read.
    """
    table = open_table(data, "train", columns=COLUMNS, text="caption")
    if not set(COLUMNS) <= set(table.column_names):
        raise ValueError(
            f"data: expected rows with the columns {list(COLUMNS)}, got {len(table)} rows with "
            f"{table.column_names}."
        )
    images, texts = [], []
    for index, row in enumerate(as_images(table.select(range(min(number, len(table)))), ["image"])):
        try:
            images.append(read_image(row["image"], size))
            texts.append([texts_of(row[name])[0] for name in COLUMNS[1:]])
        except ValueError as error:
            raise ValueError(
                f"data: row {index} cannot be read: {error}. Paths are taken from the folder that "
                "the command runs in."
            ) from error
    return Changes(np.stack(images), *map(list, zip(*texts, strict=True)))


class FlowInverseScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow matching's Euler steps from the image to noise, over the levels that sampling has.

    The model is given the noisier of a step's two levels, as by `DDIMInverseScheduler`: sampling
    asks it at that level too.
    """

    @wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)  # pipelines ask which arguments it has
    def set_timesteps(self, *args: Any, **settings: Any) -> None:
        super().set_timesteps(*args, **settings)
        self.sigmas = self.sigmas.flip(0)
        self.timesteps = self.timesteps.flip(0)


def there_and_back(scheduler: Any) -> tuple[Any, Any]:
    """The schedulers from images to noise and from noise to images, over the same noise levels.

    Raises:
        ValueError: no noise leads to an image, as the noisiest level has nothing of it.
    """
    config, kind = scheduler.config, prediction_type(scheduler)
    if kind == "flow":
        same = {"stochastic_sampling": False}
        if "flow_shift" in config:  # a DPM-Solver, which knows it by this name
            config = {"shift": config.flow_shift}
        flows = FlowInverseScheduler, FlowMatchEulerDiscreteScheduler
        return flows[0].from_config(config, **same), flows[1].from_config(config, **same)
    # "trailing" begins at the noisiest level. A clipped x_0 could not be inverted, and a model that
    # predicts x_0 says nothing of a clean image's noise.
    same = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
    same |= {"set_alpha_to_one": False} if kind == "sample" else {}
    there = DDIMInverseScheduler.from_config(config, **same)
    if there.alphas_cumprod[-1] < LEAST_OF_IMAGE:
        raise ValueError(
            f"method: inversion needs some of the image at the noisiest level, and the model's "
            f"{type(scheduler).__name__} has none there: rescale_betas_zero_snr, or trained_betas "
            "that end in 1. Take --method img2img."
        )
    return there, DDIMScheduler.from_config(config, **same)


def image_to_image(model: TextToImage) -> Any:
    """diffusers' img2img pipeline around the model's parts.

    Load soft tokens into this one: what each branch of guidance gets is asked of the pipeline that
    they were loaded into (`set_sampling` changes it).

    Raises:
        ValueError: diffusers has none for the model.
    """
    try:
        pipe = AutoPipelineForImage2Image.from_pipe(model.pipe)
    except ValueError as error:
        raise ValueError(
            f"method: diffusers has no img2img pipeline for a {type(model.pipe).__name__}. Take "
            "--method inversion."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def change(
    model: TextToImage,
    pipe: Any,
    changes: Changes,
    *,
    strength: float | None,
    seed: int,
    batch_size: int = 0,
    **sampled: Any,
) -> Images:
    """All images changed, a batch a call: by `img2img`, or with a strength of None by `inversion`.

    Image i's noise is `draws((seed, i))`. batch_size 0: as `images_per_call`.
    """
    found, size = [], batch_size or images_per_call(pipe)
    for start in range(0, len(changes.prompts), size):
        part = slice(start, start + size)
        images, prompts = changes.images[part], changes.prompts[part]
        if strength is None:
            found.append(inversion(model, images, changes.captions[part], prompts, **sampled))
        else:
            sampled["seeds"] = [(seed, start + i) for i in range(len(prompts))]
            found.append(img2img(model, pipe, images, prompts, strength=strength, **sampled))
    return np.concatenate(found)


def img2img(
    model: TextToImage,
    pipe: Any,
    images: Images,
    prompts: Sequence[str],
    *,
    strength: float,
    **sampled: Any,
) -> Images:
    """SDEdit (arXiv 2108.01073): noise on the images, then the last steps of sampling.

    pipe: of `image_to_image`. strength: the share of the steps that is taken, in (0, 1].
    sampled: also seeds; image i's noise is `draws(seeds[i])`.

    Raises:
        ValueError: a strength outside (0, 1], or so small that no step is left.
    """
    steps = sampled["num_inference_steps"]
    if not 0 < strength <= 1 or int(strength * steps) == 0:
        raise ValueError(
            f"strength: expected a share in (0, 1] that leaves at least one of {steps} steps, got "
            f"{strength:g}."
        )
    given: Any = encode(model, images)
    if given.shape[1] != pipe.image_processor.config.vae_latent_channels:
        if model.denoiser.dtype != torch.float32:
            raise ValueError(
                f"dtype: expected float32 for img2img of this {type(pipe).__name__}, got "
                f"{model.denoiser.dtype}: it knows no latents of {given.shape[1]} channels."
            )
        given = [Image.fromarray(image) for image in images]
    arguments = {**_arguments(model, pipe, images), "image": given, "strength": strength}
    return sample(pipe, prompts, batch_size=len(prompts), arguments=arguments, **sampled)


def inversion(
    model: TextToImage,
    images: Images,
    captions: Sequence[str],
    prompts: Sequence[str],
    **sampled: Any,
) -> Images:
    """DDIM inversion (arXiv 2010.02502), or a flow's Euler steps backwards; then sampling.

    captions: of the images; the way to noise is taken under them without guidance, the way back
    under `prompts` with it.

    Raises:
        ValueError: FLUX.2, whose pipeline gives out other latents than it takes.
    """
    pipe, latents = model.pipe, encode(model, images)
    if isinstance(family_of(pipe), Flux2):
        raise ValueError(
            f"model: expected one whose pipeline takes the latents that it gives, got a "
            f"{type(pipe).__name__}, which edits images itself: pipe(image=..., prompt=...)."
        )
    if hasattr(pipe, "_pack_latents"):  # Flux, Qwen-Image
        latents = pipe._pack_latents(latents, *latents.shape)
    arguments, own = _arguments(model, pipe, images), pipe.scheduler
    there, back = there_and_back(own)
    try:
        pipe.scheduler = there
        arguments["latents"] = pipe(
            prompt=list(captions),
            latents=latents.to(model.denoiser.dtype),
            num_inference_steps=sampled["num_inference_steps"],
            **guidance(pipe, 1.0, len(captions)),
            output_type="latent",
            **arguments,
        ).images
        pipe.scheduler = back
        settings = {"seeds": range(len(prompts)), "batch_size": len(prompts)}  # nothing is drawn
        return sample(pipe, prompts, arguments=arguments, **settings, **sampled)
    finally:
        pipe.scheduler = own


def _arguments(model: TextToImage, pipe: Any, images: Images) -> dict[str, Any]:
    """Those of the model, and the images' size where the pipeline takes one."""
    size = {"height": images.shape[1], "width": images.shape[2]}
    known = inspect.signature(pipe.__call__).parameters
    return {**model.arguments, **{name: value for name, value in size.items() if name in known}}


def encode(model: TextToImage, images: Images) -> Tensor:
    """Scaled latents (N, C, h, w); what a VAE draws is the same for the same number of images."""
    return model.encode_images(torch.from_numpy(to_model(images)), draws("vae"))
