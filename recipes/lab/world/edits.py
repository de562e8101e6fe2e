"""Edits of the world's images: the new caption, and what the detector says of the result.

    for edit in world_edits(100, seed=0):          "two red circles" -> "two green circles", ...
        judge_edit(edit, image)                    changed, kept, error

*Changed*: the new caption is right of the result. *Kept*: every object of the source that the edit
leaves alone is found at its place with its shape and colour. A recoloured object has to be at its
place with its shape; of a group that loses objects, any may go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lab.world.captions import caption, hard_negatives, metadata
from lab.world.detect import Detection, detect
from lab.world.prompts import row_by_prompt, specs
from lab.world.render import Image, render
from lab.world.scene import SHAPE_SIDE, TAGS, Scene, Spec, Thing, place
from lab.world.score import judge
from lab.world.summary import markdown_table, wilson
from model.editing import Changes

KINDS = ("count", "colour")
NEAR = 2.0  # pixels along x and along y; two objects are 7 apart at least


@dataclass(frozen=True)
class Edit:
    """A scene of `source`, and the caption that its image is to have."""

    source: Spec
    scene: Scene
    wanted: Spec

    @property
    def kind(self) -> str:
        """ "count" or "colour"."""
        found = _kind(self.source, self.wanted)
        assert found is not None
        return found

    @property
    def touched(self) -> int:
        """The index of the group that the edit is about."""
        pairs = zip(self.source.groups, self.wanted.groups, strict=True)
        return next(index for index, (old, new) in enumerate(pairs) if old != new)

    @property
    def image(self) -> Image:
        return render(self.scene)


@dataclass(frozen=True)
class EditVerdict:
    """error: RMS distance of the pixels that were to stay, 0 to 255 (`pixel_error`)."""

    kind: str
    changed: bool
    kept: bool
    error: float

    @property
    def correct(self) -> bool:
        return self.changed and self.kept

    @property
    def reason(self) -> str | None:
        told = [name for name in ("changed", "kept") if not getattr(self, name)]
        return f"not {' nor '.join(told)}" if told else None


def edits_of(spec: Spec, kind: str) -> list[Spec]:
    """The hard negatives with one count or one colour changed that are prompts of the world."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    found = [one for one in hard_negatives(spec) if _kind(spec, one) == kind]
    # "two circles and a square" is no prompt of the world, and no model has seen it.
    return [one for one in found if caption(one) in row_by_prompt()]


def _kind(spec: Spec, edit: Spec) -> str | None:
    pairs = [(old, new) for old, new in zip(spec.groups, edit.groups, strict=True) if old != new]
    if len(pairs) != 1 or pairs[0][0].shape != pairs[0][1].shape:
        return None
    return "colour" if pairs[0][0].count == pairs[0][1].count else "count"


def world_edits(number: int, *, seed: int, fold: str = "heldout") -> list[Edit]:
    """`number` edits of each kind, of scenes of a fold's prompts, categories in turn."""
    found = []
    for kind in KINDS:
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        able = [[spec for spec in specs(tag, fold) if edits_of(spec, kind)] for tag in TAGS]
        pools = [pool for pool in able if pool]
        for index in range(number):
            pool = pools[index % len(pools)]
            spec = pool[int(rng.integers(len(pool)))]
            edits = edits_of(spec, kind)
            found.append(Edit(spec, place(spec, rng), edits[int(rng.integers(len(edits)))]))
    return found


def changes_of(edits: Sequence[Edit]) -> Changes:
    """What the edits ask for."""
    return Changes(
        np.stack([edit.image for edit in edits]),
        [caption(edit.source) for edit in edits],
        [caption(edit.wanted) for edit in edits],
    )


def judge_edit(edit: Edit, image: Image) -> EditVerdict:
    """The verdict on the image (24, 24, 3) uint8 that an edit was answered with."""
    found = detect(image)
    return EditVerdict(
        edit.kind,
        judge(found, metadata(edit.wanted)).correct,
        _kept(edit, found),
        pixel_error(edit, image),
    )


def _kept(edit: Edit, found: Sequence[Detection]) -> bool:
    recoloured = edit.kind == "colour"
    lost = 0
    for group, thing in _things(edit):
        touched = group == edit.touched
        if not any(_is(thing, one, any_colour=touched and recoloured) for one in found):
            if not touched:
                return False
            lost += 1
    old, new = (spec.groups[edit.touched].count for spec in (edit.source, edit.wanted))
    return lost <= max(old - new, 0)


def _things(edit: Edit) -> list[tuple[int, Thing]]:
    """Every object of the scene with the index of its group."""
    owners = [i for i, group in enumerate(edit.source.groups) for _ in range(group.count)]
    return list(zip(owners, edit.scene, strict=True))


def _is(thing: Thing, found: Detection, *, any_colour: bool) -> bool:
    """Whether a detection is an object of the scene, at its place."""
    centre = np.array([thing.x, thing.y]) + SHAPE_SIDE / 2
    near = bool((np.abs(centre - found.position) <= NEAR).all())
    return near and found.shape == thing.shape and (any_colour or found.colour == thing.colour)


def pixel_error(edit: Edit, image: Image) -> float:
    """RMS distance in RGB of the pixels that were to stay, 0 to 255 a channel.

    Left out are the boxes of the objects to be recoloured; where an object is to come or to go, the
    one box of an object's size that changed most.
    """
    squares = ((image.astype(float) - edit.image) ** 2).mean(axis=-1)
    stays = np.ones(squares.shape, dtype=bool)
    if edit.kind == "colour":
        corners = [(one.y, one.x) for group, one in _things(edit) if group == edit.touched]
    else:
        corners = [_most_changed(squares)]
    for top, left in corners:
        stays[top : top + SHAPE_SIDE, left : left + SHAPE_SIDE] = False
    return float(np.sqrt(squares[stays].mean()))


def _most_changed(squares: npt.NDArray[np.float64]) -> tuple[int, int]:
    windows = np.lib.stride_tricks.sliding_window_view(squares, (SHAPE_SIDE, SHAPE_SIDE))
    sums = windows.sum(axis=(2, 3))
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(top), int(left)


def edit_summary(verdicts: Sequence[EditVerdict]) -> dict[str, dict[str, float]]:
    """By kind of edit: n, the mean error, and the shares changed, kept and both with 95 % bounds.

    A share `changed` has `changed_low` and `changed_high` beside it (Wilson's interval).
    """
    summary: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(one.kind for one in verdicts):
        group = [one for one in verdicts if one.kind == kind]
        told: dict[str, float] = {"n": len(group)}
        for name, attribute in (("changed", "changed"), ("kept", "kept"), ("both", "correct")):
            right = sum(getattr(one, attribute) for one in group)
            low, high = wilson(right, len(group))
            told |= {name: right / len(group), f"{name}_low": low, f"{name}_high": high}
        summary[kind] = told | {"pixel_error": float(np.mean([one.error for one in group]))}
    return summary


def edit_table(summaries: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A Markdown table: one row a setting and kind of edit, 95 % intervals in brackets."""
    rows = []
    for name, summary in summaries.items():
        for kind, told in summary.items():
            shares = [
                f"{told[one]:.2f} [{told[f'{one}_low']:.2f}, {told[f'{one}_high']:.2f}]"
                for one in ("changed", "kept", "both")
            ]
            rows.append([name, kind, f"{told['n']:.0f}", *shares, f"{told['pixel_error']:.1f}"])
    return markdown_table(["", "edit", "n", "changed", "kept", "both", "pixel error"], rows)
