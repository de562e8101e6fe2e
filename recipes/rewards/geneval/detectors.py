"""Images -> objects, by transformers' models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .rules import Detected, Rules

BATCH = 8
"""Images per forward pass."""
# Other names of COCO's classes in models' configs.
_ALIASES = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv",
    "pottedplant": "potted plant", "diningtable": "dining table", "mouse": "computer mouse",
    "remote": "tv remote", "keyboard": "computer keyboard", "hair dryer": "hair drier",
}  # fmt: skip


def load(name: str, device: torch.device | str = "cpu") -> InstanceDetector | OpenDetector:
    """A detector of transformers, a folder or a hub id.

    Raises:
        ValueError: a model of another kind.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES as SEGMENTS,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES as BOXES,
    )

    config: Any = AutoConfig.from_pretrained(name)
    if config.model_type in BOXES:
        return OpenDetector(name, device)
    if config.model_type in SEGMENTS:
        return InstanceDetector(name, device)
    raise ValueError(
        f"detector: expected an instance segmentation model such as Mask2Former, or a zero-shot "
        f"object detector such as OWLv2 or Grounding DINO, got {config.model_type} in {name}."
    )


class InstanceDetector:
    """Mask2Former or MaskFormer, with masks, and the rules' own thresholds."""

    rules = Rules()

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

        self.processor: Any = AutoImageProcessor.from_pretrained(name)
        model = AutoModelForUniversalSegmentation.from_pretrained(name)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.device = device
        labels = self.model.config.id2label
        self.labels = [_ALIASES.get(labels[i], labels[i]) for i in range(len(labels))]

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """ValueError where a row asks for a class that the model was not trained on."""
        asked = {name for row in rows for name in classes_of(row)}
        if unknown := sorted(asked - set(self.labels)):
            raise ValueError(
                f"detector: expected one that knows {unknown[:3]}; its classes are "
                f"{', '.join(self.labels[:5])}, ... An open-vocabulary detector finds any class."
            )

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], rows: Sequence[Mapping[str, Any]]
    ) -> list[list[Detected]]:
        found = []
        size = BATCH if len({image.size for image in images}) == 1 else 1  # none is padded then
        for start in range(0, len(images), size):
            part = list(images[start : start + size])
            outputs = self.model(**self.processor(part, return_tensors="pt").to(self.device))
            results = self.processor.post_process_instance_segmentation(
                outputs,
                threshold=min(self.rules.threshold, self.rules.counting_threshold),
                target_sizes=[(image.height, image.width) for image in part],
                return_binary_maps=True,
            )
            found += [self._objects(result) for result in results]
        return found

    def _objects(self, result: Mapping[str, Any]) -> list[Detected]:
        objects: list[Detected] = []
        if not result["segments_info"]:  # there are no maps then
            return objects
        for info, map_ in zip(result["segments_info"], result["segmentation"], strict=True):
            mask = np.asarray(map_.cpu(), dtype=bool)
            box: Any = Image.fromarray(mask).getbbox()
            objects.append(Detected(self.labels[info["label_id"]], info["score"], box, mask))
        return objects


class OpenDetector:
    """OWLv2, Grounding DINO or another zero-shot object detector: boxes of any class, no masks.

    Its scores are lower than a trained class's and it may box an object twice, so that the rules
    have one threshold and drop boxes that overlap. Nobody has compared them with people's verdicts.
    """

    rules = Rules(counting_threshold=0.3, max_overlap=0.5)

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import pipeline

        self.pipe: Any = pipeline("zero-shot-object-detection", model=name, device=device)
        owl = self.pipe.model.config.model_type.startswith("owl")
        self.template = "a photo of a {}" if owl else "a {}."

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Any class will do."""

    def __call__(
        self, images: Sequence[Image.Image], rows: Sequence[Mapping[str, Any]]
    ) -> list[list[Detected]]:
        return [self._objects(image, row) for image, row in zip(images, rows, strict=True)]

    def _objects(self, image: Image.Image, row: Mapping[str, Any]) -> list[Detected]:
        asked = {self.template.format(name): name for name in classes_of(row)}
        found = self.pipe(image, candidate_labels=list(asked), threshold=self.rules.threshold)
        sides = ("xmin", "ymin", "xmax", "ymax")
        return [
            Detected(asked[one["label"]], one["score"], tuple(one["box"][side] for side in sides))
            for one in found
        ]


def classes_of(row: Mapping[str, Any]) -> list[str]:
    """What a row is about, each class once."""
    entries = [*row.get("include", []), *row.get("exclude", [])]
    return list(dict.fromkeys(entry["class"] for entry in entries))
