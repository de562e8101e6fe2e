"""Which captions compete for each image.

A *pool* is the list of captions that a step has encoded: first the batch's own captions (row i
belongs to image i), then any hard negatives, image by image (`caption_pool`). `Candidates.index`
says which row of the pool is in each column; column 0 is the image's own caption (in the grid,
column i). The empty caption is in no pool: it competes, in one more column, where
`AGSMRegularizer` gets it as `null`.

`InBatch`, `Hard`, `Mixed` and `Grid` are rules: called on a batch's captions they choose.

False negatives never compete: a caption with the same text as one of the image's own, or one that
belongs to another row of the same image id (COCO has five captions an image). A dropped caption,
"", fits every image: it competes for none, and an image under it has no negatives. Two candidates
of an image never have the same text. Where there are fewer than asked for, columns are masked.

Each kind of competitor teaches another thing. The empty caption moves the target away from what
the model draws without a prompt, as classifier-free guidance (arXiv 2207.12598) does in the
sampler. Captions of other images tell what sets this one apart from the rest. Edited captions tell
what they edit: which colour belongs to which object, how many there are.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

EMPTY = ""

Captions = Sequence[Hashable] | Int[Tensor, " B"]
"""A text or an id an image."""

HardNegatives = Sequence[Sequence[Hashable]] | None
"""Each image's edited captions."""


@dataclass(frozen=True)
class Candidates:
    """B images, K columns, P captions in the pool. Tensors stay on the CPU until they are used.

    A choice of your own: two images, each with the caption of the other as a negative.

    >>> import torch
    >>> from agsm_loss import Candidates
    >>> index = torch.tensor([[0, 1], [1, 0]])
    >>> mask = torch.ones(2, 2, dtype=torch.bool)
    >>> Candidates(index, positives=torch.zeros(2, dtype=torch.long), mask=mask, pool_size=2).index
    tensor([[0, 1],
            [1, 0]])
    """

    index: Int[Tensor, "B K"]
    """Row of the pool in each column; masked columns point at the image's own caption."""
    positives: Int[Tensor, " B"]
    """Column of the matching caption."""
    mask: Bool[Tensor, "B K"]
    """False where a column is not a candidate."""
    pool_size: int

    def __post_init__(self) -> None:
        if self.index.ndim != 2 or self.index.is_floating_point():
            raise ValueError(
                f"index: expected an integer tensor (B, K), got {self.index.dtype} "
                f"{tuple(self.index.shape)}."
            )
        if self.mask.shape != self.index.shape or self.positives.shape != self.index.shape[:1]:
            raise ValueError(
                f"expected mask (B, K) and positives (B,) for index {tuple(self.index.shape)}, got "
                f"{tuple(self.mask.shape)} and {tuple(self.positives.shape)}."
            )
        if self.index.numel() and not 0 <= int(self.index.min()) <= int(self.index.max()) < (
            self.pool_size
        ):
            raise ValueError(
                f"index: expected rows of a pool of {self.pool_size}, got values from "
                f"{int(self.index.min())} to {int(self.index.max())}."
            )
        number = self.index.shape[1]
        if self.positives.numel() and not (
            0 <= int(self.positives.min()) <= int(self.positives.max()) < number
        ):
            raise ValueError(
                f"positives: expected columns of {number} candidates, got values from "
                f"{int(self.positives.min())} to {int(self.positives.max())}."
            )


@runtime_checkable
class Rule(Protocol):
    """Chooses who competes in a batch: `InBatch`, `Hard`, `Mixed`, `Grid`, or your own.

    A rule is any function with this signature. Each image against the caption of the next one:

    >>> import torch
    >>> from agsm_loss import Candidates, Rule
    >>> def next_caption(captions, *, hard_negatives=None, image_ids=None, generator=None):
    ...     own = torch.arange(len(captions))
    ...     index = torch.stack([own, own.roll(-1)], dim=1)
    ...     mask = torch.ones_like(index, dtype=torch.bool)
    ...     return Candidates(index, torch.zeros_like(own), mask, pool_size=len(captions))
    >>> isinstance(next_caption, Rule)  # give it as AGSMRegularizer(..., candidates=next_caption)
    True
    >>> next_caption(["a dog", "a cat", "a fox"]).index
    tensor([[0, 1],
            [1, 2],
            [2, 0]])

    The rule itself masks false negatives; `index` counts the captions of `caption_pool`.

    Args:
        captions: one caption an image, as text or as ids; equal values are the same caption.
            Dropped captions are known by their text, "": ids of them would compete.
        hard_negatives: `hard_negatives[i]` are image i's edited captions, any number of them.
        image_ids: rows with the same id show the same image, and their captions don't compete.
        generator: a CPU generator; the same state gives the same candidates.

    Raises:
        ValueError: no image has a negative (unless the rule was made with `allow_empty`), or hard
            negatives that the rule needs and did not get, or the reverse.
    """

    def __call__(
        self,
        captions: Captions,
        *,
        hard_negatives: HardNegatives = None,
        image_ids: Captions | None = None,
        generator: torch.Generator | None = None,
    ) -> Candidates: ...


@dataclass(frozen=True)
class _Competitors:
    """What `InBatch`, `Hard` and `Mixed` share: they differ in where captions may come from."""

    _takes_hard: ClassVar[bool] = True
    num_negatives: int = 0
    allow_empty: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        fewest = 0 if self._takes_hard else 1
        if self.num_negatives < fewest:
            raise ValueError(
                f"num_negatives: expected at least {fewest}, got {self.num_negatives}."
            )

    def __call__(
        self,
        captions: Captions,
        *,
        hard_negatives: HardNegatives = None,
        image_ids: Captions | None = None,
        generator: torch.Generator | None = None,
    ) -> Candidates:
        captions = as_list(captions)
        if not self._takes_hard:
            _refuse_hard("InBatch", hard_negatives)
            hard_negatives = [()] * len(captions)
        return _compete(
            captions,
            hard_negatives,
            self.num_negatives,
            image_ids,
            generator,
            allow_empty=self.allow_empty,
        )


@dataclass(frozen=True)
class InBatch(_Competitors):
    """Each image's own caption and some others of the batch, drawn without replacement.

    >>> candidates = InBatch(2)(["a dog", "a cat", "a dog", "a fox"])
    >>> candidates.mask.sum(1)  # two captions are the same, and don't compete with each other
    tensor([3, 3, 3, 3])

    Args:
        num_negatives: n ≥ 1 negatives an image, so K = 1 + n; the published number is 3.
        allow_empty: accept a batch in which no image has a negative; all of them are masked then.
    """

    _takes_hard = False
    num_negatives: int = 3


@dataclass(frozen=True)
class Hard(_Competitors):
    """Each image's own caption and its own hard negatives, edited captions for example.

    The pool is the captions followed by the edited ones, image by image (`caption_pool`).

    >>> candidates = Hard()(["a dog", "a cat"], hard_negatives=[["two dogs", "a fox"], ["a rat"]])
    >>> candidates.index
    tensor([[0, 2, 3],
            [1, 4, 1]])
    >>> candidates.mask
    tensor([[ True,  True,  True],
            [ True,  True, False]])

    Args:
        allow_empty: as of `InBatch`.
    """

    num_negatives: int = field(default=0, init=False, repr=False)


@dataclass(frozen=True)
class Mixed(_Competitors):
    """Own caption, then the image's hard negatives, then `num_negatives` others of the batch.

    >>> candidates = Mixed(1)(["a dog", "a cat"], hard_negatives=[["two dogs"], []])
    >>> candidates.index
    tensor([[0, 2, 1],
            [1, 1, 0]])
    >>> candidates.mask
    tensor([[ True,  True,  True],
            [ True, False,  True]])

    Args:
        num_negatives: n ≥ 0 captions of the batch an image, besides its hard negatives.
        allow_empty: as of `InBatch`.
    """

    num_negatives: int


@dataclass(frozen=True)
class Grid:
    """The full B×B grid of SoftREPA: every caption of the batch, the own one in column i.

    >>> candidates = Grid()(["a dog", "a cat", "a dog"])
    >>> candidates.positives
    tensor([0, 1, 2])
    >>> candidates.mask
    tensor([[ True,  True, False],
            [ True,  True, False],
            [False,  True,  True]])

    Args:
        allow_empty: as of `InBatch`.
    """

    allow_empty: bool = field(default=False, kw_only=True)

    def __call__(
        self,
        captions: Captions,
        *,
        hard_negatives: HardNegatives = None,
        image_ids: Captions | None = None,
        generator: torch.Generator | None = None,
    ) -> Candidates:
        _refuse_hard("Grid", hard_negatives)
        texts = as_list(captions)
        batch, ids = len(texts), _image_ids(texts, image_ids)
        own = _captions_of_images(texts, ids)
        mask = torch.eye(batch, dtype=torch.bool)
        for i in range(batch):
            taken = set(own[ids[i]])
            if texts[i] != EMPTY:
                mask[i, _distinct(enumerate(texts), taken)] = True
        if int(mask.sum()) == batch and not self.allow_empty:
            raise ValueError(_no_negatives(texts, ids))
        own_rows = torch.arange(batch)
        index = torch.where(mask, own_rows.expand(batch, batch), own_rows.unsqueeze(1))
        return Candidates(index=index, positives=own_rows, mask=mask, pool_size=batch)


def caption_pool(
    captions: Sequence[Hashable], hard_negatives: Sequence[Sequence[Hashable]] = ()
) -> list[Hashable]:
    """The captions to encode, in the order that `Candidates.index` counts them.

    >>> caption_pool(["a dog", "a cat"], [["two dogs"], ["a rat", "two cats"]])
    ['a dog', 'a cat', 'two dogs', 'a rat', 'two cats']
    """
    return [*captions, *chain.from_iterable(hard_negatives)]


def own_alone(captions: Captions, hard_negatives: HardNegatives = None) -> Candidates:
    """Each image's own caption and no other: what `with_null` is added to.

    >>> with_null(own_alone(["a dog", ""]), [False, True]).mask
    tensor([[ True,  True],
            [ True, False]])
    """
    if hard_negatives is not None:
        raise ValueError(
            "hard_negatives: expected None where the empty caption alone competes. Take "
            "candidates=Hard() or Mixed(n)."
        )
    own = torch.arange(len(as_list(captions)))
    mask = torch.ones(len(own), 1, dtype=torch.bool)
    return Candidates(own.unsqueeze(1), torch.zeros_like(own), mask, pool_size=len(own))


def with_null(candidates: Candidates, empty: Sequence[bool] = ()) -> Candidates:
    """The candidates, and in one more column the empty caption, in B rows after the pool's.

    empty: which images have the empty caption themselves; it does not compete with itself.
    """
    batch = len(candidates.positives)
    competes = ~torch.tensor(empty or [False] * batch, dtype=torch.bool)
    own = candidates.index.gather(1, candidates.positives.unsqueeze(1)).squeeze(1)
    row = torch.where(competes, candidates.pool_size + torch.arange(batch), own)
    return Candidates(
        index=torch.cat([candidates.index, row.unsqueeze(1)], dim=1),
        positives=candidates.positives,
        mask=torch.cat([candidates.mask, competes.unsqueeze(1)], dim=1),
        pool_size=candidates.pool_size + batch,
    )


def _compete(
    captions: list[Hashable],
    hard_negatives: HardNegatives,
    num_negatives: int,
    image_ids: Captions | None,
    generator: torch.Generator | None,
    *,
    allow_empty: bool,
) -> Candidates:
    """Own caption, the hard negatives, `num_negatives` others of the batch."""
    image_ids = _image_ids(captions, image_ids)
    batch = len(captions)
    if hard_negatives is None:
        raise ValueError(
            "hard_negatives: expected a sequence of captions an image, got None. For captions of "
            "the batch alone take InBatch."
        )
    if len(hard_negatives) != batch:
        raise ValueError(
            f"hard_negatives: expected one sequence of captions for each of the {batch} images, "
            f"got {len(hard_negatives)}."
        )
    if any(isinstance(hard, str) for hard in hard_negatives):
        raise TypeError(
            "hard_negatives: expected a sequence of captions an image, got a single text. "
            "Wrap it: [text]."
        )
    hard_negatives = [_ids(hard) for hard in hard_negatives]
    num_hard = max(map(len, hard_negatives), default=0)
    own = _captions_of_images(captions, image_ids)
    starts = accumulate(map(len, hard_negatives), initial=batch)
    last = batch + sum(map(len, hard_negatives))
    rows: list[list[int]] = []
    for i, (hard, start) in enumerate(zip(hard_negatives, starts, strict=False)):
        taken = set(own[image_ids[i]])
        order = torch.randperm(batch, generator=generator).tolist() if num_negatives else []
        if captions[i] == EMPTY:
            hard, order = (), []
        hard_rows = _distinct(((start + h, text) for h, text in enumerate(hard)), taken)
        others = _distinct(((j, captions[j]) for j in order), taken)
        rows.append(_pad(hard_rows, num_hard) + _pad(others[:num_negatives], num_negatives))
    columns = torch.tensor(rows, dtype=torch.long).reshape(batch, num_hard + num_negatives)
    mask = columns >= 0
    if not mask.any() and not allow_empty:
        raise ValueError(_no_negatives(captions, image_ids))
    own_rows = torch.arange(batch).unsqueeze(1)
    return Candidates(
        index=torch.cat([own_rows, torch.where(mask, columns, own_rows)], dim=1),
        positives=torch.zeros(batch, dtype=torch.long),
        mask=torch.cat([torch.ones(batch, 1, dtype=torch.bool), mask], dim=1),
        pool_size=last,
    )


def _refuse_hard(rule: str, hard_negatives: HardNegatives) -> None:
    if hard_negatives is not None:
        raise ValueError(
            f"hard_negatives: {rule} chooses among the batch's own captions; expected None. Take "
            "Hard() or Mixed(n)."
        )


def as_list(values: Sequence[Hashable] | Tensor) -> list[Hashable]:
    """Texts or ids that are compared by their value; one text, None and NaN are refused."""
    if values is None:
        raise TypeError("captions: expected a text or an id for each image, got None.")
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise ValueError(f"expected ids of shape (B,), got {tuple(values.shape)}.")
        values = values.tolist()
    if isinstance(values, str):
        raise TypeError("captions: expected a sequence of texts, got one text. Wrap it: [text].")
    return _ids(values)


def _ids(values: Iterable[Any]) -> list[Hashable]:
    ids = list(map(_id, values))
    if None in ids:
        raise TypeError(
            "captions, image_ids: expected a text or an id, got None for one. A dropped caption is "
            '"".'
        )
    return ids


def _id(value: Any) -> Hashable:
    """A text or an id as what equals its like: arrays, which are compared by place, by value."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(_id, value))
    if value != value:  # noqa: PLR0124  # NaN
        raise ValueError("captions: expected ids that equal themselves, got NaN.")
    return value


def _image_ids(captions: list[Hashable], image_ids: object) -> list[Hashable]:
    """Given ids, or a different one for every row."""
    if image_ids is None:
        return list(range(len(captions)))
    ids = as_list(image_ids)  # type: ignore[arg-type]
    if len(ids) != len(captions):
        raise ValueError(
            f"image_ids: expected one for each of the {len(captions)} captions, got {len(ids)}."
        )
    return ids


def _captions_of_images(
    captions: list[Hashable], image_ids: list[Hashable]
) -> dict[Hashable, set[Hashable]]:
    own: dict[Hashable, set[Hashable]] = {}
    for image, caption in zip(image_ids, captions, strict=True):
        own.setdefault(image, {EMPTY}).add(caption)
    return own


def _distinct(rows: Iterable[tuple[int, Hashable]], taken: set[Hashable]) -> list[int]:
    """Rows whose text is not `taken` yet, in order; their texts are taken from then on."""
    kept = []
    for row, text in rows:
        if text not in taken:
            taken.add(text)
            kept.append(row)
    return kept


def _pad(rows: list[int], length: int) -> list[int]:
    return rows + [-1] * (length - len(rows))


def _no_negatives(captions: list[Hashable], image_ids: list[Hashable]) -> str:
    return (
        f"no image of this batch has a negative caption: {len(captions)} image(s) with "
        f"{len(set(captions) - {EMPTY})} distinct caption(s) besides the empty one and "
        f"{len(set(image_ids))} distinct image id(s). "
        "Use a larger batch, add hard negatives, or make the rule with allow_empty=True to train "
        "such a batch on plain score matching."
    )
