"""GenEval's rules on hand-made detections, its prompts, and detectors of tiny random models."""

import json
from types import SimpleNamespace

import measures_tiny
import numpy as np
import pytest
import torch
from PIL import Image

import score_images
from rewards.geneval import detectors
from rewards.geneval.colours import ColourClassifier, cropped, pooled
from rewards.geneval.evaluator import Credit, Evaluator, result
from rewards.geneval.rules import (
    CLASSES,
    COLOURS,
    Detected,
    Rules,
    judge,
    overlap,
    reason_kind,
    relations,
    row_of,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measures")
    kinds = (measures_tiny.clip, measures_tiny.mask2former, measures_tiny.owlv2)
    return SimpleNamespace(**{kind.__name__: kind(folder / kind.__name__) for kind in kinds})


def seen(*things):
    """Class -> objects of (class, left, top), 10 pixels a side, the first the surest."""
    kept = {}
    for index, (label, left, top) in enumerate(things):
        one = Detected(label, 1 - index / 100, (left, top, left + 10, top + 10))
        kept.setdefault(label, []).append(one)
    return kept


def coloured(**colours):
    """Classes whose objects have these colours, in order."""
    return lambda objects, label: colours[label][: len(objects)]


DOG, CAT = ("dog", 0, 0), ("cat", 50, 0)
TWO_DOGS = row_of("a photo of two dogs")
RED_DOG = row_of("a photo of a red dog")
BOTH = row_of("a photo of a red dog and a blue cat")
LEFT = row_of("a photo of a dog left of a cat")
TWO_RED = {"tag": "", "include": [{"class": "dog", "count": 2, "color": "red"}]}
NONE = {"tag": "", "include": [{"class": "cat", "count": 1}],
        "exclude": [{"class": "dog", "count": 1}]}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "things", "colours", "reason", "credit"),
    [
        (TWO_DOGS, [DOG, ("dog", 20, 0)], {}, "", 1),
        (TWO_DOGS, [DOG], {}, "expected dog>=2, found 1", 0.5),
        (TWO_DOGS, [CAT], {}, "expected dog>=2, found 0", 0),
        (TWO_DOGS, [DOG] * 3, {}, "expected dog<3, found 3", 0.5),
        (TWO_DOGS, [DOG] * 5, {}, "expected dog<3, found 5", 0),
        (NONE, [DOG, CAT], {}, "expected dog<1, found 1", 0),
        (RED_DOG, [DOG], {"dog": ["red"]}, "", 1),
        # only the surest dog's colour counts
        (RED_DOG, [DOG, DOG], {"dog": ["blue", "red"]},
         "expected red dog>=1, found 0 red; and 1 blue", 0.5),
        (TWO_RED, [DOG, DOG], {"dog": ["red", "blue"]},
         "expected red dog>=2, found 1 red; and 1 red, 1 blue", 0.5),
        (BOTH, [DOG, CAT], {"dog": ["red"], "cat": ["blue"]}, "", 1),
        (BOTH, [DOG], {"dog": ["blue"]},
         "expected red dog>=1, found 0 red; and 1 blue\nexpected cat>=1, found 0", 0.25),
        (LEFT, [DOG, CAT], {}, "", 1),
        (LEFT, [("dog", 100, 0), CAT], {}, "expected dog left of target, found right of target",
         0.75),
        (LEFT, [("dog", 50, 0), CAT], {}, "expected dog left of target, found  target", 0.75),
        (LEFT, [DOG], {},
         "expected cat>=1, found 0\nno target for dog to be left of", 0.25),
        (LEFT, [CAT], {}, "expected dog>=1, found 0", 0.5),
        # the surest dog is on the wrong side
        (LEFT, [("dog", 100, 0), DOG, CAT], {},
         "expected dog left of target, found right of target", 0.75),
    ],
)  # fmt: skip
def test_every_rule(row, things, colours, reason, credit):
    judged = judge(seen(*things), row, coloured(**colours))
    assert (judged.correct, judged.reason) == (reason == "", reason)
    assert judged.credit == pytest.approx(credit)


def test_reasons_have_a_kind():
    told = {
        "": "",
        "expected dog>=2, found 1\nexpected cat<1, found 3": "missing",
        "expected red dog>=1, found 0 red; and 1 blue": "wrong_colour",
        "expected dog left of target, found  target": "wrong_place",
        "no target for dog to be above": "wrong_place",
        "expected dog<3, found 4": "extra",
        "another evaluator's words": "another evaluator's words",
    }
    assert {text: reason_kind(text) for text in told} == told


def test_all_of_several_must_be_placed():
    row = {"include": [{"class": "cat", "count": 2},
                       {"class": "dog", "count": 1, "position": ["above", 0]}]}  # fmt: skip
    cats = [("cat", 0, 50), ("cat", 20, 50)]
    assert judge(seen(*cats, ("dog", 10, 0)), row, coloured()).correct
    below = judge(seen(cats[0], ("cat", 0, 0), ("dog", 0, 25)), row, coloured())
    assert below.reason == "expected dog above target, found below target"
    with pytest.raises(ValueError, match="expected a GenEval row"):
        judge({}, {"prompt": "a cat"}, coloured())


def test_which_detections_count():
    found = [Detected("dog", score, (10 * i, 0, 10 * i + 9, 9))
             for i, score in enumerate((0.2, 0.3, 0.91, 0.5, 0.95))]  # fmt: skip
    assert [one.score for one in Rules().keep(found, "colors")["dog"]] == [0.95, 0.91, 0.5]
    assert [one.score for one in Rules().keep(found, "counting")["dog"]] == [0.95, 0.91]
    assert Rules().keep(found[:2], "colors") == {}
    many = [Detected("dog", (50 + i) / 100, (0, 0, 9, 9)) for i in range(20)]
    assert [round(100 * one.score) for one in Rules().keep(many, "")["dog"]] == [*range(69, 53, -1)]
    assert len(Rules(max_overlap=0.5).keep(many, "")["dog"]) == 1
    shifted = [Detected("dog", 0.9, (0, 0, 9, 9)), Detected("dog", 0.8, (5, 0, 14, 9))]
    assert overlap(shifted[0].box, shifted[1].box) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0
    assert len(Rules(max_overlap=0.5).keep(shifted, "")["dog"]) == 2
    assert len(Rules(max_overlap=0.3).keep(shifted, "")["dog"]) == 1


def test_an_offset_must_exceed_a_tenth_of_both_sizes():
    box = (0, 0, 10, 10)
    assert relations(box, (2, 0, 12, 10)) == set() == relations(box, box)
    assert relations(box, (5, 0, 15, 10)) == {"left of"}
    assert relations(box, (-30, -30, -20, -20)) == {"right of", "below"}
    assert relations(box, (10, 40, 20, 50)) == {"above"}


@pytest.mark.parametrize(
    ("prompt", "tag", "include"),
    [
        ("a photo of an orange", "single_object", [("orange", 1)]),
        ("a photo of an orange orange", "colors", [("orange", 1, "orange")]),
        ("a photo of a skis and a hot dog", "two_object", [("skis", 1), ("hot dog", 1)]),
        ("a photo of four skises", "counting", [("skis", 4)]),
        ("a photo of a black cat and a white tv remote", "color_attr",
         [("cat", 1, "black"), ("tv remote", 1, "white")]),
        ("a photo of a cup above a bed", "position", [("bed", 1), ("cup", 1, ["above", 0])]),
    ],
)  # fmt: skip
def test_prompts_are_read(prompt, tag, include):
    row = row_of(prompt)
    key = "position" if tag == "position" else "color"
    entries = [dict(zip(("class", "count", key), one, strict=False)) for one in include]
    assert (row["tag"], row["include"], row["prompt"]) == (tag, entries, prompt)
    assert row.get("exclude", []) == ([{"class": "skis", "count": 5}] if tag == "counting" else [])


@pytest.mark.parametrize(
    "prompt", ["a circle", "a photo of a dogs", "a photo of a red dog and a cat",
               "a photo of a dog and a cat and a cup", "a photo of dog", "a photo of two unicorns",
               "a photo of a dog left of a cat above a cup"],
)  # fmt: skip
def test_other_prompts_are_named(prompt):
    with pytest.raises(ValueError, match=prompt):
        row_of(prompt)


def test_names_of_other_detectors_are_cocos():
    assert len(set(CLASSES)) == 80 and set(detectors._ALIASES.values()) <= set(CLASSES)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))


def test_masks_become_objects(tiny, monkeypatch):
    """Hand-made queries in the model's place: a dog at the left, a couch below, and no object."""
    found = detectors.load(tiny.mask2former)
    assert found.labels == ["couch", "dog", "computer mouse"]
    masks = torch.full((1, 5, 8, 12), -20.0)
    masks[0, 0, :, :3] = masks[0, 1, 6:, :] = 20.0
    kinds = torch.full((1, 5, 4), -9.0)
    kinds[0, 0, 1] = kinds[0, 1, 0] = kinds[0, 2:, 3] = 9.0
    monkeypatch.setattr(found, "model", lambda **inputs: SimpleNamespace(
        class_queries_logits=kinds, masks_queries_logits=masks))  # fmt: skip
    (objects,) = found([PICTURE], [TWO_DOGS])
    told = {one.label: one for one in objects}
    assert set(told) == {"dog", "couch"} and all(one.score > 0.99 for one in objects)
    assert np.allclose(told["dog"].box, (0, 0, 15, 40), atol=1)
    assert np.allclose(told["couch"].box, (0, 30, 60, 40), atol=1)
    left, top, right, bottom = told["dog"].box
    assert told["dog"].mask.sum() == (right - left) * (bottom - top)
    kinds[...] = torch.tensor([-9.0, -9.0, -9.0, 9.0])
    assert found([PICTURE], [TWO_DOGS]) == [[]]
    with pytest.raises(ValueError, match=r"knows \['zebra'\]"):
        found.check([row_of("a photo of a zebra")])


def test_pictures_of_several_sizes_are_not_padded(tiny, monkeypatch):
    found = detectors.load(tiny.mask2former)
    monkeypatch.setattr(found, "rules", Rules(threshold=0.0))
    wide = PICTURE.resize((90, 30))
    together = found([PICTURE, wide], [TWO_DOGS] * 2)
    alone = [*found([PICTURE], [TWO_DOGS]), *found([wide], [TWO_DOGS])]
    assert [[one.box for one in group] for group in together] == [
        [one.box for one in group] for group in alone
    ]
    assert all(group[0].mask.shape == shape for group, shape in
               zip(together, [(40, 60), (30, 90)], strict=True))  # fmt: skip


def test_an_open_vocabulary_is_asked_for_the_rows_classes(tiny):
    found = detectors.load(tiny.owlv2)
    found.check([row_of("a photo of a zebra")])
    objects, others = found([PICTURE, PICTURE], [BOTH, row_of("a photo of a zebra")])
    assert {one.label for one in objects} == {"dog", "cat"}
    assert {one.label for one in others} == {"zebra"}
    assert all(one.mask is None and one.score > 0.3 for one in [*objects, *others])
    asked = []
    found.pipe = lambda image, candidate_labels, threshold: asked.append(candidate_labels) or []
    assert found([PICTURE], [TWO_DOGS]) == [[]] and asked == [["a photo of a dog"]]


def test_another_kind_of_model_is_named(tiny):
    with pytest.raises(ValueError, match=r"instance segmentation model .* got clip"):
        detectors.load(tiny.clip)


def test_colours_are_of_the_object_alone(tiny):
    mask = np.zeros((40, 60), bool)
    mask[10:20, 10:20] = True
    crop = np.asarray(cropped(PICTURE, Detected("dog", 1, (5, 10, 20, 20), mask)))
    assert crop.shape == (10, 15, 3) and (crop[:, :5] == 0x99).all()
    assert (crop[:, 5:] == np.asarray(PICTURE)[10:20, 10:20]).all()
    assert cropped(PICTURE, Detected("dog", 1, (-9.0, 50.0, -5.0, 60.0))).size == (1, 21)
    classifier = ColourClassifier(tiny.clip)
    crops = [cropped(PICTURE, Detected("dog", 1, (i, 0, i + 9, 20))) for i in range(6)]
    told = classifier(PICTURE, [Detected("dog", 1, (i, 0, i + 9, 20)) for i in range(6)], "dog")
    for crop, colour in zip(crops, told, strict=True):
        assert colour == slow_colour(classifier, crop, "dog")


def slow_colour(classifier, crop, label):
    """One template and one picture at a time."""

    def unit(kind, **inputs):
        output = getattr(classifier.model, f"get_{kind}_features")(**inputs)
        features = pooled(output)[0].double()
        return features / features.norm()

    image = unit("image", **classifier.processor.image_processor(crop, return_tensors="pt"))
    scores = {}
    for colour in COLOURS:
        texts = (f"a photo of a {colour} {label}", f"a photo of a {colour}-colored {label}",
                 f"a photo of a {colour} object")  # fmt: skip
        mean = sum(
            unit("text", **classifier.processor.tokenizer(text, return_tensors="pt"))
            for text in texts
        )
        scores[colour] = float(image @ mean / mean.norm())
    return max(scores, key=scores.get)


def test_rewards_are_the_credit(tiny, monkeypatch):
    evaluator = Evaluator(tiny.mask2former, tiny.clip)
    dog = Detected("dog", 0.99, (0, 0, 9, 9))
    monkeypatch.setattr(evaluator.detector, "model", None)
    monkeypatch.setattr(type(evaluator.detector), "__call__", lambda self, images, rows: [
        [dog] * int(np.asarray(image)[0, 0, 0] / 50) for image in images])  # fmt: skip
    pixels = torch.tensor([50.0, 100.0, 150.0, 200.0]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    rewards = Credit(evaluator)(pixels / 127.5 - 1, ["a photo of two dogs"] * 4)
    assert rewards.tolist() == [0.5, 1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="a circle"):
        Credit(evaluator)(pixels, ["a circle"] * 4)


def test_a_folder_is_judged_and_its_results_make_the_same_table(tiny, tmp_path, capsys):
    rows = [row_of(f"a photo of {what}") for what in ("a dog", "two dogs", "a red couch")]
    for i, row in enumerate(rows):
        (tmp_path / "a" / f"{i:05d}" / "samples").mkdir(parents=True)
        (tmp_path / "a" / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(row))
        PICTURE.save(tmp_path / "a" / f"{i:05d}" / "samples" / "0000.png")
    flags = ["--images", str(tmp_path / "a")]
    score_images.main([*flags, "--detector", tiny.mask2former, "--clip", tiny.clip])
    first = capsys.readouterr().out
    written = tmp_path / "a" / "detector_results.jsonl"
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [json.loads(line["metadata"]) for line in lines] == rows
    assert list(lines[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata",
                              "details"]  # fmt: skip
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())
    assert scores["categories"]["counting"]["under"] == 1.0  # a random model is sure of nothing
    assert scores["categories"]["counting"]["reasons"]["missing"] == 1
    score_images.main([*flags, "--results", str(written)])
    assert capsys.readouterr().out == first
    assert json.loads((tmp_path / "a" / "scores.json").read_text()) == scores
    with pytest.raises(SystemExit):
        score_images.main([*flags, str(tmp_path), "--results", str(written)])
    assert "one file for each folder" in capsys.readouterr().err
    (tmp_path / "a" / "00001" / "metadata.jsonl").write_text('{"prompt": "a dog"}')
    with pytest.raises(ValueError, match="no include and no tag"):
        score_images.main([*flags, "--detector", tiny.mask2former, "--clip", tiny.clip])


def test_a_line_has_the_boxes_with_their_scores():
    kept = {"dog": [Detected("dog", 0.5, (1, 2, 3, 4))]}
    line = result("x.png", TWO_DOGS, judge(kept, TWO_DOGS, coloured()), kept)
    assert json.loads(line["details"]) == {"dog": [[1.0, 2.0, 3.0, 4.0, 0.5]]}
    assert line["reason"] == "expected dog>=2, found 1" and line["correct"] is False
