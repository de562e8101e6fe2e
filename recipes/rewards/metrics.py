"""Scores of image files: by rewards, or how far they are from real ones (FID, KID).

metrics = Metrics(["clipscore", "fid"], reference="photos")
metrics(files, rows)       {"clipscore": {"score": 31.2, "low": 30.8, "high": 31.6}, "fid": {...}}

The intervals of FID and KID, by the jackknife, say how much a score would change with other images
of the same model; the reference is held as it is. FID of few images is too large, also with its
interval: compare it at the same number of images only. KID has no such bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import sem, t  # type: ignore[import-untyped]
from torch import Tensor
from tqdm.auto import tqdm

from data import pictures
from data.pictures import read_picture
from rewards.models import CLIP, CLIPScore
from rewards.rewards import load

BLOCKS = 20
"""Parts of the images, each left out in turn for an interval."""
AT_ONCE = 32
"""Images in a batch."""

Features = Callable[[Tensor], Tensor]
"""(N, 3, H, W) uint8 -> (N, features)."""


class Metrics:
    """Metrics by name: fid, kid, or a reward of `rewards.rewards`, whose mean is the score.

    Args:
        names: of the metrics.
        clip: the CLIP model of clipscore, a folder or a hub id.
        reference: folder of the real images that fid and kid compare with.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: no images in the reference's folder.
        ImportError: a package that a metric needs is missing.
    """

    def __init__(
        self,
        names: Sequence[str],
        clip: str = CLIP,
        reference: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.distances = {
            name: distance for name, distance in (("fid", fid), ("kid", kid)) if name in names
        }
        if self.distances:
            self.features = Inception(device)
            self.reference = features_of(image_files(Path(reference)), self.features)
        self.rewards = {
            name: CLIPScore(clip, device) if name == "clipscore" else load(name, device)
            for name in names
            if name not in self.distances
        }

    def __call__(
        self, files: Sequence[Path], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, float]]:
        """Name -> score, low and high. rows: a prompt for each file."""
        prompts = [row["prompt"] for row in rows]
        found = {
            name: mean_with_interval(rewards_of(files, prompts, score), prompts)
            for name, score in self.rewards.items()
        }
        features = features_of(files, self.features) if self.distances else torch.empty(0)
        return found | {
            name: distance(features, self.reference) for name, distance in self.distances.items()
        }


def mean_with_interval(
    values: Sequence[float] | npt.NDArray[np.floating], prompts: Sequence[str]
) -> dict[str, float]:
    """Mean of a metric's values, one an image, with a t interval over the prompts' means.

    prompts: each image's; images of a prompt are alike. A single prompt has no interval.
    """
    means = np.array([np.mean(group) for group in _by_prompt(values, prompts)])
    return _ratio(means, np.ones(len(means)))


def pooled_with_interval(values: Sequence[float], prompts: Sequence[str]) -> dict[str, float]:
    """Mean of all values, of which a prompt may have more than another, with such an interval."""
    groups = _by_prompt(values, prompts)
    return _ratio(np.array([sum(one) for one in groups]), np.array([len(one) for one in groups]))


def _by_prompt(
    values: Sequence[float] | npt.NDArray[np.floating], prompts: Sequence[str]
) -> list[list[float]]:
    found: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        found.setdefault(prompt, []).append(float(value))
    return list(found.values())


def _ratio(sums: npt.NDArray[Any], numbers: npt.NDArray[Any]) -> dict[str, float]:
    """Σ sums / Σ numbers, one of each a prompt; the interval is that of the linearised ratio."""
    score = float(sums.sum() / numbers.sum())
    if len(sums) == 1:
        return {"score": score}
    reach = float(sem((sums - score * numbers) / numbers.mean()) * t.ppf(0.975, len(sums) - 1))
    return {"score": score, "low": score - reach, "high": score + reach}


class Inception:
    """The pool features of FID's Inception-v3, by torch-fidelity, which downloads the weights.

    Raises:
        ImportError: torch-fidelity, or the torchvision that it needs, cannot be imported.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:
            raise ImportError(
                f"fid, kid: torch-fidelity cannot be imported ({error}). pip install "
                "torch-fidelity, or '.[eval]' from a clone, with the torchvision of your torch."
            ) from error
        self.model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        features: Tensor = self.model(images.to(self.device))[0]
        return features


@torch.no_grad()
def features_of(files: Sequence[Path], features: Features) -> Tensor:
    """(N, features) float64 of image files."""
    found = [features(images).double().cpu() for images, _ in _batches(files, files)]
    return torch.cat(found)


def rewards_of(
    files: Sequence[Path],
    prompts: Sequence[Any],
    score: Callable[[Tensor, Sequence[Any]], Tensor],
) -> list[float]:
    """A reward of each image and its prompt, or what else the score is of."""
    found: list[float] = []
    for images, texts in _batches(files, prompts):
        found += score(images / 127.5 - 1, texts).tolist()
    return found


def _batches(files: Sequence[Path], others: Sequence[Any]) -> Iterator[tuple[Tensor, list[Any]]]:
    """Images (N, 3, H, W) uint8 of one size, and what comes with each."""
    for start in tqdm(range(0, len(files), AT_ONCE), desc="scoring", leave=False):
        images = [read(file) for file in files[start : start + AT_ONCE]]
        told = list(others[start : start + AT_ONCE])
        if len({image.shape for image in images}) == 1:
            yield torch.stack(images), told
        else:
            yield from ((image[None], [one]) for image, one in zip(images, told, strict=True))


def read(file: Path) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(read_picture(file))).permute(2, 0, 1)


def image_files(folder: Path) -> list[Path]:
    """All images under a folder but our sheets; FileNotFoundError where there is none."""
    every = pictures.image_files(folder)
    found = [one for one in every if one.name not in ("sheet.png", "scores.png")]
    if not found:
        kinds = ", ".join(sorted(pictures.SUFFIXES))
        raise FileNotFoundError(f"{folder}: expected images ({kinds}), got none.")
    return found


def fid(images: Tensor, reference: Tensor) -> dict[str, float]:
    """Fréchet inception distance (arXiv 1706.08500) of features (N, F) and (M, F)."""
    part = _parts(images, reference)
    mean, root = reference.mean(0), _root(torch.cov(reference.T))
    spread = root.square().sum()

    def distance(kept: Tensor) -> float:
        features = images[kept[part]]
        covariance = torch.cov(features.T)
        both = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        gap = (features.mean(0) - mean).square().sum()
        return float(gap + covariance.trace() + spread - 2 * both)

    return _jackknife(distance, int(part.max()) + 1)


def _root(matrix: Tensor) -> Tensor:
    """The square root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kid(images: Tensor, reference: Tensor) -> dict[str, float]:
    """Kernel inception distance (arXiv 1801.01401) of features (N, F) and (M, F).

    The unbiased MMD² of the kernel (x·y / F + 1)³ over all pairs, where others draw subsets.
    """
    part = _parts(images, reference)
    blocks = [images[part == block] for block in range(int(part.max()) + 1)]
    sizes = torch.tensor([len(block) for block in blocks])
    # Sums of the kernel over pairs of blocks: leaving one out then costs nothing.
    own = torch.stack([torch.stack([_kernel(a, b).sum() for b in blocks]) for a in blocks])
    same = torch.stack([_kernel(block, block).trace() for block in blocks])
    across = torch.stack([_kernel(block, reference).sum() for block in blocks])
    others = reference.split(1000)
    theirs = sum(float(_kernel(a, b).sum()) for a in others for b in others)
    theirs -= sum(float(_kernel(a, a).trace()) for a in others)
    m = len(reference)

    def distance(kept: Tensor) -> float:
        n = int(sizes[kept].sum())
        within = float(own[kept][:, kept].sum() - same[kept].sum()) / (n * (n - 1))
        return within + theirs / (m * (m - 1)) - 2 * float(across[kept].sum()) / (n * m)

    return _jackknife(distance, len(blocks))


def _kernel(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other.T / one.shape[1] + 1) ** 3


def _parts(images: Tensor, reference: Tensor) -> Tensor:
    """The part that each image is in, of at most BLOCKS."""
    if min(len(images), len(reference)) < 3:
        raise ValueError(
            f"fid, kid: expected three images and three of the reference at least, got "
            f"{len(images)} and {len(reference)}."
        )
    return torch.arange(len(images)) % min(BLOCKS, len(images))


def _jackknife(distance: Callable[[Tensor], float], parts: int) -> dict[str, float]:
    """The score of all parts, and a 95 % interval by the scores without each of them."""
    score = distance(torch.ones(parts, dtype=torch.bool))
    without = np.array([distance(torch.arange(parts) != part) for part in range(parts)])
    error = float(np.sqrt((parts - 1) * without.var()))
    reach = error * float(t.ppf(0.975, parts - 1))
    return {"score": score, "low": score - reach, "high": score + reach}
