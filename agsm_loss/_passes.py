"""What a step runs its denoiser on: cells of the grid of images and captions, some at a time."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import (
    MappingKey,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_structure,
)

from agsm_loss._storage import several_ranks
from agsm_loss.candidates import Candidates
from agsm_loss.soft_tokens import Bank


class Cells(NamedTuple):
    """(image, candidate) cells to run, flat: CPU indices (N,)."""

    rows: Tensor
    columns: Tensor
    counts: bool = True
    """False for a pass that only keeps other ranks company: its predictions weigh nothing."""

    @staticmethod
    def where(grid: Tensor) -> "Cells":
        rows, columns = grid.nonzero(as_tuple=True)
        return Cells(rows, columns)

    def split(self, size: int | None) -> list["Cells"]:
        if size is None or len(self.rows) == 0:
            return [self] if len(self.rows) else []
        return [
            Cells(r, c)
            for r, c in zip(self.rows.split(size), self.columns.split(size), strict=True)
        ]


def split_alike(
    grids: Sequence[tuple[Tensor, int | None]], spare: Cells, device: torch.device
) -> list[list[Cells]]:
    """The passes over each grid's cells, so many of them at a time; as many on every rank.

    Engines that shard gather the weights in each pass, so a rank must not wait for a pass that
    another doesn't make: who has fewer cells runs the `spare` ones, which count for nothing.
    """
    passes = [Cells.where(grid).split(size) for grid, size in grids]
    if not several_ranks():
        return passes
    numbers = torch.tensor([len(one) for one in passes], device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    padding = spare._replace(counts=False)
    return [
        one + [padding] * (number - len(one))
        for one, number in zip(passes, numbers.tolist(), strict=True)
    ]


class NoisedBatch(NamedTuple):
    """B noised images, the pool's captions, and who competes."""

    noisy: Tensor
    timesteps: Tensor
    conditioning: Any
    image_conditioning: Mapping[str, Any]
    candidates: Candidates

    def check(self) -> None:
        """ValueError for rows that are not the images' or the pool's."""
        batch = self.noisy.shape[0]
        if self.timesteps.shape != (batch,):
            raise ValueError(
                f"timesteps: expected ({batch},) or a scalar, got {tuple(self.timesteps.shape)}."
            )
        _check_rows("conditioning", self.conditioning, self.candidates.pool_size)
        _check_rows("image_conditioning", dict(self.image_conditioning), batch)

    def of(self, cells: Cells) -> tuple[Tensor, Tensor, Any, Tensor]:
        """noisy, timesteps, conditioning and bank of the cells."""
        candidates = self.candidates
        pool_rows = candidates.index[cells.rows, cells.columns]
        matching = cells.columns == candidates.positives[cells.rows]
        bank = torch.where(matching, int(Bank.POSITIVE), int(Bank.NEGATIVE))
        return (
            _rows(self.noisy, cells.rows),
            _rows(self.timesteps, cells.rows),
            _rows(self.conditioning, pool_rows),
            bank,
        )

    def image(self, cells: Cells) -> dict[str, Any]:
        """image_conditioning of the cells, as keywords."""
        return _rows(dict(self.image_conditioning), cells.rows)


def with_rows_of(null: Any, conditioning: Any, pool_size: int, batch: int) -> Any:
    """`conditioning` of the pool, and after it a row an image of the empty caption.

    null: the structure of `conditioning`, with 1 or `batch` rows in every tensor.
    """
    _check_rows("conditioning", conditioning, pool_size)
    structures = tree_structure(null), tree_structure(conditioning)
    if structures[0] != structures[1]:
        raise ValueError(
            f"null: expected the structure of conditioning, {structures[1]}, got {structures[0]}. "
            "Encode the empty caption as the others are."
        )

    def join(leaf: Any, row: Any) -> Any:
        if not (isinstance(leaf, Tensor) and isinstance(row, Tensor)):
            if isinstance(leaf, Tensor) or isinstance(row, Tensor) or leaf != row:
                raise ValueError(
                    f"null: expected what conditioning has beside tensors, {leaf!r:.60}, got "
                    f"{row!r:.60}."
                )
            return leaf
        if row.ndim == 0 or row.shape[0] not in (1, batch) or row.shape[1:] != leaf.shape[1:]:
            raise ValueError(
                f"null: expected one row, or one an image, like conditioning's: "
                f"{(1, *leaf.shape[1:])}, got {tuple(row.shape)}. Pad both to one length."
            )
        return torch.cat([leaf, row.to(leaf).expand(batch, *leaf.shape[1:])])

    return tree_map(join, conditioning, null)


def own_is_null(conditioning: Any, candidates: Candidates) -> list[bool]:
    """Which images' own captions are encoded as the empty one is.

    conditioning: of `with_rows_of`. candidates: without the empty caption.
    """
    own = candidates.index.gather(1, candidates.positives.unsqueeze(1)).squeeze(1)
    null = candidates.pool_size + torch.arange(len(own))
    same = torch.ones(len(own), dtype=torch.bool)
    for leaf in tree_leaves(conditioning):
        if isinstance(leaf, Tensor):
            alike = leaf[own.to(leaf.device)] == leaf[null.to(leaf.device)]
            same &= alike.flatten(1).all(1).cpu()
    return list(same.tolist())


def _rows(tree: Any, index: Tensor) -> Any:
    """Rows `index` of every tensor in the tree; other leaves as they are."""
    return tree_map(
        lambda leaf: leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, tree
    )


def _check_rows(name: str, tree: Any, expected: int) -> None:
    """TypeError for a leaf whose rows cannot be taken, ValueError for other rows.

    A constant in a dict (None, a text, a number) is passed on; in a list it would be a row.
    """
    leaves, _ = tree_flatten_with_path(tree)
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0 or leaf.shape[0] != expected:
                raise ValueError(
                    f"{name}: expected {expected} rows in every tensor, got one of shape "
                    f"{tuple(leaf.shape)}. conditioning has a row for each caption of the pool: "
                    "the batch's, then the hard negatives (the empty caption is null=). "
                    "image_conditioning has one for each image; pass what is neither in the "
                    "denoiser."
                )
        elif leaf is not None and not (
            isinstance(leaf, str | int | float) and path and isinstance(path[-1], MappingKey)
        ):
            raise TypeError(
                f"{name}: expected a tensor, or dicts, lists and tuples of tensors, got a "
                f"{type(leaf).__name__} in it. Convert it (torch.as_tensor, dict(encoding))."
            )
    if name == "conditioning" and not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise TypeError(
            "conditioning: expected the encoded captions, one row each, got no tensor in a "
            f"{type(tree).__name__}. Pass what the denoiser takes: prompt_embeds, or a dict of it."
        )


def checked(pred: Tensor, noisy: Tensor, chunk: Cells) -> Tensor:
    """`pred`, if it has the shape of the cells' noisy samples."""
    expected = (len(chunk.rows), *noisy.shape[1:])
    if not isinstance(pred, Tensor) or pred.shape != expected:
        got = tuple(pred.shape) if isinstance(pred, Tensor) else type(pred).__name__
        raise ValueError(
            f"denoiser: expected a prediction of shape {expected}, got {got}. A diffusers model "
            "returns it as .sample; predicted variances have to be cut off."
        )
    return pred
