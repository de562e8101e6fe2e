"""Specs, captions, scenes, prompts and exports."""

import io
import json
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from data.batches import to_model
from lab.world.captions import caption, corrupt, hard_negatives, metadata, vocabulary
from lab.world.detect import detect
from lab.world.prompts import FOLDS, SHARED_BELOW, rows, scenes, specs
from lab.world.render import MASKS, render
from lab.world.scene import IMAGE_SIDE, SHAPE_SIDE, TAGS, Group, Spec, Thing, place
from lab.world.score import judge

THREE = Spec("counting", (Group("circle", 3, "red"),))
LEFT = Spec("position", (Group("circle", 1, "red"), Group("square", 1, "blue")), "left of")


def test_captions_read_as_stated():
    assert caption(THREE) == "three red circles"
    assert caption(LEFT) == "a red circle left of a blue square"
    assert (
        caption(Spec("two_object", (Group("square"), Group("circle")))) == "a square and a circle"
    )


def test_metadata_is_a_geneval_row():
    assert metadata(THREE) == {
        "tag": "counting",
        "include": [{"class": "circle", "count": 3, "color": "red"}],
        "exclude": [
            {"class": "circle", "count": 4},
            {"class": "square", "count": 1},
            {"class": "triangle", "count": 1},
            {"class": "blob", "count": 1},
        ],
        "prompt": "three red circles",
    }
    assert metadata(LEFT)["include"] == [
        {"class": "square", "count": 1, "color": "blue"},
        {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
    ]


def test_the_stream_is_deterministic_and_seeded():
    one, same, other = (list(islice(scenes(seed), 50)) for seed in (7, 7, 8))
    assert one == same
    assert one != other


def test_every_scene_keeps_its_objects_apart_and_inside():
    for _, scene in islice(scenes(1), 500):
        covered = np.zeros((IMAGE_SIDE + 2, IMAGE_SIDE + 2), dtype=int)
        for thing in scene:
            x, y = thing.x, thing.y
            assert 0 <= x <= IMAGE_SIDE - SHAPE_SIDE and 0 <= y <= IMAGE_SIDE - SHAPE_SIDE
            # A box and one pixel right and below may not be shared: one pixel of ground between.
            covered[y : y + SHAPE_SIDE + 1, x : x + SHAPE_SIDE + 1] += 1
        assert covered.max() == 1


def test_vocabulary_holds_every_word_of_every_caption():
    words = set(vocabulary())
    for spec, _ in islice(scenes(2), 500):
        for told in (spec, *hard_negatives(spec)):
            assert set(caption(told).split()) <= words


def test_folds_are_disjoint_and_cover():
    for tag in TAGS:
        every = set(specs(tag))
        parts = [set(specs(tag, fold)) for fold in FOLDS]
        assert set().union(*parts) == every
        if len(every) >= SHARED_BELOW:
            assert sum(map(len, parts)) == len(every)
            assert all(parts)


def test_rows_are_balanced():
    got = rows("heldout", 20, seed=3)
    assert [row["tag"] for row in got] == [tag for tag in TAGS for _ in range(20)]
    counts = {prompt: 0 for prompt in (row["prompt"] for row in got if row["tag"] == "counting")}
    for row in got:
        if row["prompt"] in counts:
            counts[row["prompt"]] += 1
    assert max(counts.values()) - min(counts.values()) <= 1


def test_hard_negatives_are_never_true_of_the_image():
    for spec, scene in islice(scenes(4), 300):
        found = detect(render(scene))
        edits = hard_negatives(spec)
        assert edits
        for edit in edits:
            assert not judge(found, metadata(edit)).correct, (caption(spec), caption(edit))


def test_hard_negatives_hold_every_kind_of_edit():
    told = {caption(edit) for edit in hard_negatives(THREE)}
    assert {
        "two red circles",
        "four red circles",
        "three blue circles",
        "three red squares",
    } <= told
    assert "a red circle right of a blue square" in {caption(edit) for edit in hard_negatives(LEFT)}


def test_corruption_happens_at_its_stated_share():
    rng = np.random.default_rng(0)
    wrong = sum(corrupt(THREE, {"count": 0.4}, rng) != THREE for _ in range(2000))
    assert wrong / 2000 == pytest.approx(0.4, abs=0.04)
    assert corrupt(LEFT, {}, rng) == LEFT
    missing = corrupt(LEFT, {"missing": 1.0}, rng)
    assert len(missing.groups) == 1 and missing.relation is None
    recoloured = corrupt(THREE, {"colour": 1.0}, rng)
    assert recoloured.groups[0].colour not in (None, "red") and recoloured.groups[0].count == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group("hexagon"), "shape"),
        (lambda: Group("circle", 9), "count"),
        (lambda: Group("circle", 1, "pink"), "colour"),
        (lambda: Spec("counting", ()), "groups"),
        (lambda: Spec("colour", (Group("circle"),)), "tag"),
        (lambda: Spec("position", (Group("circle"),), "left of"), "relation"),
        (lambda: specs("counting", "test"), "fold"),
        (lambda: specs("count"), "tag"),
        (lambda: rows("heldout", 0), "per_category"),
        (lambda: corrupt(THREE, {"shape": 0.1}, np.random.default_rng(0)), "shares"),
        (lambda: render((Thing("circle", "red", 20, 0),)), "inside"),
        (lambda: to_model(np.zeros((24, 24, 3), np.uint8)), "images"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shapes_differ_clearly():
    names = list(MASKS)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            common = (MASKS[one] & MASKS[other]).sum()
            assert common / (MASKS[one] | MASKS[other]).sum() <= 0.67


def test_model_range():
    image = render(place(THREE, np.random.default_rng(0)))
    tensor = to_model(image[None])
    assert tensor.shape == (1, 3, 24, 24) and tensor.dtype == np.float32
    assert tensor.min() == -1.0 and tensor.max() == 1.0


def test_exports(tmp_path):
    datasets = pytest.importorskip("datasets")
    from lab.world.export import captioned, imagefolder, preferences

    pairs = preferences(40, seed=5)
    assert pairs.column_names == ["jpg_0", "jpg_1", "label_0", "caption"]
    assert pairs.to_list() == preferences(40, seed=5).to_list()
    assert {row["label_0"] for row in pairs} == {0, 1}
    by_caption = {caption(spec): metadata(spec) for tag in TAGS for spec in specs(tag)}
    for row in pairs:
        right, wrong = ("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0")
        told = by_caption[row["caption"]]
        pictures = {key: np.asarray(Image.open(io.BytesIO(row[key]))) for key in (right, wrong)}
        assert judge(detect(pictures[right]), told).correct
        assert not judge(detect(pictures[wrong]), told).correct

    data = captioned(12, seed=5)
    imagefolder(data, tmp_path / "folder")
    data.to_parquet(str(tmp_path / "lab.world.parquet"))
    for source in (
        datasets.load_dataset(
            "imagefolder",
            data_dir=str(tmp_path / "folder"),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        ),
        datasets.Dataset.from_parquet(
            str(tmp_path / "lab.world.parquet"), cache_dir=str(tmp_path / "cache")
        ),
    ):
        for row, original in zip(source, data, strict=True):
            assert row["caption"] == original["caption"]
            image = np.asarray(row["image"].convert("RGB"))
            assert judge(detect(image), json.loads(row["metadata"])).correct
    with pytest.raises(ValueError, match="n: expected"):
        captioned(0, seed=0)
