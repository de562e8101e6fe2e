"""Rewards by models: CLIP-like ones of transformers, and those that packages bring.

All are called with pixels (N, 3, H, W) in [-1, 1] and N prompts, and return (N,) on the CPU. What
a package is needed for is imported when the reward is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.pictures import to_images, to_uint8

PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP = "openai/clip-vit-large-patch14"
HPS = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
HPS_BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Configuration and processor of the CLIP model that HPSv2's weights are for."""


class PreferenceModel:
    """PickScore (arXiv 2305.01569), or any CLIP model like it: its logit of image and prompt."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel, AutoProcessor  # slow, and it warns of torchvision

        self.processor: Any = AutoProcessor.from_pretrained(name)
        self.model: Any = AutoModel.from_pretrained(name).to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        inputs = self.processor(
            images=list(to_uint8(pixels).cpu()),
            text=list(prompts),
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        logits: Tensor = self.model(**inputs).logits_per_image.diagonal().cpu()
        return logits

    def cosine(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of the features, without the logit's scale."""
        return PreferenceModel.__call__(self, pixels, prompts) / self.model.logit_scale.exp().cpu()


class CLIPScore(PreferenceModel):
    """max(100 cos, 0), as torchmetrics has it (arXiv 2104.08718 has 2.5 in place of 100)."""

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return (100 * self.cosine(pixels, prompts)).clamp(min=0)


class HPSv2(PreferenceModel):
    """HPSv2.1 (arXiv 2306.09341): the cosine of a CLIP ViT-H/14 that was trained on preferences.

    Its weights have open_clip's names; they are loaded into transformers' model. Pictures are
    cropped to a square, where the package pads them.

    Args:
        base: a CLIP model of transformers for configuration and processor.
        weights: a file of open_clip's names; "": HPSv2.1's, from the hub.
    """

    def __init__(
        self, device: torch.device | str = "cpu", base: str = HPS_BASE, weights: str = ""
    ) -> None:
        from huggingface_hub import hf_hub_download
        from transformers import AutoConfig, AutoProcessor, CLIPModel

        state = torch.load(weights or hf_hub_download(*HPS), map_location="cpu", weights_only=True)
        model = CLIPModel(AutoConfig.from_pretrained(base))
        model.load_state_dict(from_open_clip(state["state_dict"]))
        self.processor = AutoProcessor.from_pretrained(base)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.cosine(pixels, prompts)


_NAMES = {
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj": "visual_projection.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection": "text_projection.weight",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of open_clip's CLIP by the names of transformers' `CLIPModel`."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, ours in _NAMES.items():
            name = re.sub(pattern, ours, name)
        if name in ("visual_projection.weight", "text_projection.weight"):
            value = value.T.contiguous()
        if ".in_proj_" in name:  # query, key and value in one
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(".in_proj_", f".{letter}_proj.")] = part
        elif not name.endswith("attn_mask"):
            found[name] = value
    return found


class ImageReward:
    """ImageReward-v1.0 (arXiv 2304.05977), by its package.

    Raises:
        ImportError: the package, or what it needs, cannot be imported.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            import ImageReward as package  # noqa: N813
        except (ImportError, AttributeError, RuntimeError) as error:
            raise ImportError(
                f"imagereward: its package cannot be imported ({error}). It is of 2023 and needs "
                "an environment of its own: pip install image-reward==1.5 timm==0.6.13 openai-clip "
                "transformers==4.45.2 diffusers==0.31.0 'setuptools<81'. Score saved folders there "
                "with recipes/score_images.py."
            ) from error
        self.model = package.load("ImageReward-v1.0", device=device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs = zip(prompts, to_images(pixels), strict=True)
        return torch.tensor([float(self.model.score(prompt, image)) for prompt, image in pairs])


class OCR:
    """How well the quoted text of a prompt can be read: 1 - edit distance / its length, at least 0.

    The rule is Flow-GRPO's (arXiv 2505.05470): without spaces and capitals, and 1 where the text is
    part of what is read. PaddleOCR's models read, by rapidocr, whose package contains them.

    Raises:
        ImportError: rapidocr or onnxruntime is not installed.
    """

    def __init__(self) -> None:
        try:
            import onnxruntime  # noqa: F401
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                "ocr: expected rapidocr and onnxruntime to be installed. pip install rapidocr "
                "onnxruntime, or '.[eval]' from a clone."
            ) from error
        self.read: Any = RapidOCR(params={"Global.log_level": "error"})
        self.check = quoted

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        wanted = [quoted(prompt) for prompt in prompts]
        texts = ["".join(self.read(image).txts or ()) for image in to_images(pixels)]
        return torch.tensor([readable(*pair) for pair in zip(texts, wanted, strict=True)])


def quoted(prompt: str) -> str:
    """The first text in double quotes, straight or curly; ValueError where there is none."""
    found = re.search(r'["“]([^"“”]*\w[^"“”]*)["”]', prompt)
    if found is None:
        raise ValueError(f"ocr: expected a prompt with a text in double quotes, got {prompt!r}.")
    return found[1]


def readable(text: str, wanted: str) -> float:
    """The score of a text that was read."""
    text, wanted = ("".join(one.lower().split()) for one in (text, wanted))
    if wanted in text:
        return 1.0
    return max(0.0, 1 - edit_distance(text, wanted) / len(wanted))


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: letters to insert, delete or replace."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, against in enumerate(other, 1):
            best = min(diagonal + (letter != against), row[j] + 1, row[j - 1] + 1)
            diagonal, row[j] = row[j], best
    return row[-1]
