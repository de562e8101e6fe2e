"""Preference pairs: the world's, and any table's."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from data.batches import TablePairs
from data.task import Task
from lab.studies.accuracy import implicit_accuracy
from lab.world.data import WorldPairs
from lab.world.detect import detect
from lab.world.export import preferences
from lab.world.prompts import rows as prompt_rows
from lab.world.score import judge
from model.pipeline import TextToImage


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, format="PNG")
    return file.getvalue()


def table(labels, damaged=()):
    return Dataset.from_list(
        [
            {
                "jpg_0": b"no image" if i in damaged else png(10 * i),
                "jpg_1": png(10 * i + 5),
                "label_0": label,
                "caption": f"two red cats {i}",
            }
            for i, label in enumerate(labels)
        ]
    )


def values(pixels):
    return [round(255 * (one.mean().item() + 1) / 2) for one in pixels]


def test_the_worlds_winner_shows_the_caption_and_the_loser_does_not():
    pairs = WorldPairs(64, 2, seed=0)
    batch = pairs[3]
    wanted = {row["prompt"]: row for row in prompt_rows("train", 400)}
    for i, text in enumerate(batch.captions):
        shown = [
            judge(detect(to_uint8(one[i])), wanted[text]).correct
            for one in (batch.winner, batch.loser)
        ]
        assert shown == [True, False], text
        assert len(batch.hard[i]) <= 2 and text not in batch.hard[i]
    again = WorldPairs(64, 2, seed=0)[3]
    assert torch.equal(batch.loser, again.loser) and batch.hard == again.hard
    assert not torch.equal(batch.winner, WorldPairs(64, 2, seed=0, rank=1)[3].winner)


def to_uint8(pixels):
    return ((pixels.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def test_pick_a_pics_winner_is_the_labelled_one_and_ties_are_dropped():
    pairs = TablePairs(table([1.0, 0.0, 0.5, 1.0]), 3, 1, seed=0, size=8)
    assert pairs.ties == 1
    batch = pairs[0]
    assert sorted(batch.captions) == ["two red cats 0", "two red cats 1", "two red cats 3"]
    for text, winner, loser in zip(
        batch.captions, values(batch.winner), values(batch.loser), strict=True
    ):
        row = int(text[-1])
        ends = [10 * row, 10 * row + 5]
        assert [winner, loser] == (ends[::-1] if row == 1 else ends)
    assert all(len(one) == 1 for one in batch.hard)


def test_pairs_without_a_label_are_no_ties():
    pairs = TablePairs(table([1.0, None, 0.5, float("nan"), 0.0, 0.5]), 3, 1, seed=0, size=8)
    assert (pairs.ties, pairs.unlabelled) == (2, 2)
    assert pairs.about() == "2 pairs, 2 ties left out, 2 without a label left out"


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([1, -1], r"row 1: expected numbers in label_0, 1 where .*got '-1'"),
        ([1, 0, 2], r"row 2: .*got '2'"),
        ([0.7], r"row 0: .*got '0.7'"),
        (["1", "jpg_0"], r"row 1: .*got 'jpg_0'. Write these"),
        ([0.5, 0.5, None], r"got 2 ties and 1 without a label: all of the 3 rows"),
    ],
)
def test_other_labels_are_an_error_of_their_row(labels, told):
    with pytest.raises(ValueError, match=told):
        TablePairs(table(labels), 1, 0, seed=0, size=8)


def test_damaged_pairs_are_skipped_and_counted():
    pairs = TablePairs(table([1, 1, 1, 1], damaged=(2,)), 4, 0, seed=0, size=8)
    seen = {text for i in range(2) for text in pairs[i].captions}
    assert pairs.rows.unreadable == {2} and "two red cats 2" not in seen
    with pytest.raises(ValueError, match="none of the 2 rows"):
        TablePairs(table([1, 0], damaged=(0, 1)), 1, 0, seed=0, size=8)[0]


def test_winner_and_loser_columns_are_read_too(tmp_path):
    cells = [{"bytes": png(20), "path": None}], [{"bytes": png(40), "path": None}]
    data = Dataset.from_dict({"image_w": cells[0], "image_l": cells[1], "caption": [["a", "b"]]})
    data = data.cast_column("image_w", ImageFeature()).cast_column("image_l", ImageFeature())
    batch = TablePairs(data, 1, 0, seed=0, size=8)[0]
    assert values(batch.winner) == [20] and values(batch.loser) == [40]
    assert batch.captions[0] in ("a", "b")
    with pytest.raises(ValueError, match="image_w and image_l"):
        TablePairs(data.rename_column("image_l", "other"), 1, 0, seed=0, size=8)


def test_the_worlds_export_reads_back(tmp_path):
    preferences(6, seed=1).to_parquet(str(tmp_path / "pairs.parquet"))
    found = Task(str(tmp_path / "pairs.parquet"), size=24).pairs(6, 0)[0]
    assert found.winner.shape == (6, 3, 24, 24)


def test_implicit_accuracy_of_models_made_worse_on_one_of_each_pair(flow_base):
    base = TextToImage.load(str(flow_base), torch.float32)
    tuned = TextToImage.load(str(flow_base), torch.float32)
    settings = {"seed": 3, "low": 0.3, "batch_size": 4}

    def accuracy():
        return implicit_accuracy(tuned, base, 6, **settings)

    assert accuracy() == 0  # a model equal to its reference prefers nothing
    forward = tuned.denoiser.forward

    def worse(first):  # on the winners, or on the losers, behind them in a batch
        def call(*args, **kwargs):
            pred = forward(*args, **kwargs)[0].clone()
            half = len(pred) // 2
            pred[:half] += 5.0 * first
            pred[half:] += 5.0 * (not first)
            return (pred,)

        return call

    for first, expected in ((False, 1.0), (True, 0.0)):
        tuned.denoiser.forward = worse(first)
        assert accuracy() == expected
    tuned.denoiser.forward = forward
    torch.nn.init.normal_(tuned.denoiser.proj_out.weight)
    drawn = accuracy()
    assert 0 < drawn < 1 and accuracy() == drawn
