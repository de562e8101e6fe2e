"""Verdicts and their reasons on hand-made images."""

from itertools import islice

import pytest

from lab.world.captions import metadata
from lab.world.detect import detect
from lab.world.prompts import scenes
from lab.world.render import render
from lab.world.scene import TAGS, Group, Spec, Thing
from lab.world.score import judge, summarize
from rewards.geneval.rules import relations

SPOTS = ((1, 1), (9, 1), (17, 1), (1, 9), (9, 9))


def image_of(*things):
    """Detections of (shape, colour) things, left to right, top to bottom."""
    return detect(
        render(tuple(Thing(s, c, *at) for (s, c), at in zip(things, SPOTS, strict=False)))
    )


TWO_RED = metadata(Spec("counting", (Group("circle", 2, "red"),)))
ATTRIBUTES = metadata(Spec("color_attr", (Group("circle", 1, "red"), Group("square", 1, "blue"))))
RC, BC, RS, BS, GT = (
    ("circle", "red"),
    ("circle", "blue"),
    ("square", "red"),
    ("square", "blue"),
    ("triangle", "green"),
)


@pytest.mark.parametrize(
    ("things", "row", "reason"),
    [
        ((RC, RC), TWO_RED, None),
        ((RC,), TWO_RED, "missing"),
        ((RC, RC, RC), TWO_RED, "extra"),
        ((RC, BC), TWO_RED, "wrong_colour"),
        ((RC, RC, GT), TWO_RED, "extra"),
        ((), TWO_RED, "missing"),
        ((RC, BS), ATTRIBUTES, None),
        ((BC, RS), ATTRIBUTES, "wrong_colour"),
        ((RC, RC), ATTRIBUTES, "missing"),
    ],
)
def test_reasons(things, row, reason):
    verdict = judge(image_of(*things), row)
    assert verdict.reason == reason
    assert verdict.correct == (reason is None)


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_positions(relation):
    row = metadata(Spec("position", (Group("circle"), Group("square")), relation))
    centre = Thing("square", "blue", 9, 9)
    around = {"left of": (1, 9), "right of": (17, 9), "above": (9, 1), "below": (9, 17)}
    for place, spot in around.items():
        found = detect(render((centre, Thing("circle", "red", *spot))))
        assert judge(found, row).reason == (None if place == relation else "wrong_place")


def test_a_diagonal_is_in_both_relations():
    one, other = detect(render((Thing("circle", "red", 1, 1), Thing("square", "red", 9, 9))))
    assert relations(one.box, other.box) == {"left of", "above"}
    assert relations(other.box, one.box) == {"right of", "below"}


def test_a_blob_is_extra():
    image = render((Thing("circle", "red", 1, 1), Thing("circle", "red", 9, 1)))
    image[20, :10] = (0, 255, 0)
    assert judge(detect(image), TWO_RED).reason == "extra"


def test_scenes_are_right_by_their_own_row():
    verdicts = [judge(detect(render(s)), metadata(spec)) for spec, s in islice(scenes(3), 1000)]
    summary = summarize(verdicts)
    assert summary["overall"] == 1.0 and summary["n"] == 1000
    assert set(summary["categories"]) == set(TAGS)


def test_summary_separates_over_and_under_counting():
    images = [image_of(RC), image_of(RC, RC), image_of(RC, RC, RC), image_of(RC, RC, RC, RC)]
    category = summarize(judge(one, TWO_RED) for one in images)["categories"]["counting"]
    assert category["score"] == 0.25
    assert category["under"] == 0.25 and category["over"] == 0.5
    assert category["count_error"] == 1.0
    assert category["reasons"] == {"missing": 1, "wrong_colour": 0, "wrong_place": 0, "extra": 2}


def test_overall_is_the_mean_of_categories():
    verdicts = [judge(image_of(RC), TWO_RED), *(judge(image_of(RC, BS), ATTRIBUTES),) * 3]
    assert summarize(verdicts)["overall"] == 0.5


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="include"):
        judge([], {"tag": "counting"})
    with pytest.raises(ValueError, match="at least one"):
        summarize([])
