"""Batches for post-training, functions of their index: the world's, a table's; edited captions."""

import io
import json
import tarfile
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from data.batches import TableBatches
from data.prompts import COLOUR_WORDS, edited, edits
from data.tables import open_table
from data.task import Task
from lab.world.captions import caption, hard_negatives
from lab.world.data import WorldBatches
from lab.world.export import captioned, imagefolder
from lab.world.prompts import specs


def png(colour, size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_the_worlds_batches_are_functions_of_seed_index_and_process():
    first = WorldBatches(6, 2, seed=1)[5]
    again = WorldBatches(6, 2, seed=1)[5]
    assert torch.equal(first.pixels, again.pixels)
    assert (first.captions, first.hard) == (again.captions, again.hard)
    for other in (WorldBatches(6, 2, seed=2)[5], WorldBatches(6, 2, seed=1, rank=1)[5]):
        assert not torch.equal(first.pixels, other.pixels)
    assert first.pixels.shape == (6, 3, 24, 24)
    assert len(set(first.image_ids) | set(WorldBatches(6, 2, seed=1)[6].image_ids)) == 12


def test_the_worlds_hard_negatives_are_edits_of_train_prompts():
    told = {
        caption(spec): {caption(edit) for edit in hard_negatives(spec)}
        for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr")
        for spec in specs(tag, "train")
    }
    for index in range(20):
        batch = WorldBatches(8, 3, seed=0)[index]
        for text, hard in zip(batch.captions, batch.hard, strict=True):
            assert text in told  # none of the held-out prompts is trained on
            assert len(set(hard)) == len(hard) == 3
            assert set(hard) <= told[text]


def test_edits_change_one_word():
    assert edits("two red cats left of a box") == [
        "three red cats left of a box",
        *(
            f"two {c} cats left of a box"
            for c in [
                "green",
                "blue",
                "yellow",
                "orange",
                "purple",
                "pink",
                "brown",
                "black",
                "white",
                "gray",
            ]
        ),
        "two red cats right of a box",
    ]
    assert edits("a photo of a dog") == []
    assert edits("Ten birds") == ["nine birds"]
    assert edits("a cat in front of a tree") == ["a cat behind a tree"]
    drawn = edited("two red cats", 3, np.random.default_rng(0))
    assert len(set(drawn)) == 3 and set(drawn) <= set(edits("two red cats"))
    assert edited("two red cats", 0, np.random.default_rng(0)) == []


def test_edits_of_a_long_caption_take_no_more_than_their_share():
    text = "red " * 250_000  # a million characters, with 2.5 million edits
    began = time.perf_counter()
    changed = edits(text)
    assert time.perf_counter() - began < 5
    assert len(changed) == 10 and changed[0] == "green" + text[3:]
    assert (
        edits(text[:4] * 20)
        == [  # ordinary captions have all of theirs
            "red " * i + f"{colour} " + "red " * (19 - i)
            for i in range(20)
            for colour in COLOUR_WORDS[1:]
        ]
    )
    assert edits("ſix cats inſide") == []  # matches without regard to case, and is no word of ours


def test_a_table_gives_every_row_once_an_epoch_on_every_process():
    rows = [{"image": png((i, 0, 0)), "caption": f"picture {i}"} for i in range(12)]
    table = Dataset.from_list(rows)
    for epoch in range(2):
        seen = []
        for index in range(2):
            for rank in range(2):
                one = TableBatches(table, 3, 0, seed=0, size=8, rank=rank, processes=2)
                batch = one[2 * epoch + index]
                assert batch.pixels.shape == (3, 3, 8, 8)
                seen += batch.image_ids
                for row, text, pixels in zip(
                    batch.image_ids, batch.captions, batch.pixels, strict=True
                ):
                    assert text == f"picture {row}"
                    assert pixels[0].mean().item() == pytest.approx(row / 127.5 - 1, abs=1e-4)
        assert sorted(seen) == list(range(12))


def test_a_damaged_image_is_passed_over_and_counted():
    rows = [{"image": png((i, 0, 0)), "caption": f"picture {i}"} for i in range(4)]
    rows[2]["image"] = {"bytes": b"not an image", "path": None}
    batches = TableBatches(Dataset.from_list(rows), 4, 0, seed=0, size=8)
    batch = batches[0]
    assert batches.rows.unreadable == {2}
    assert 2 not in batch.image_ids and len(batch.image_ids) == 4
    nothing = Dataset.from_list([{**row, "image": rows[2]["image"]} for row in rows])
    with pytest.raises(ValueError, match="none of the 4 rows"):
        TableBatches(nothing, 2, 0, seed=0, size=8)[0]


def broken_png():
    """Its first chunks can be read, a later one cannot."""
    whole = png("red", (300, 300))["bytes"]
    return {"bytes": whole[:60] + b"\x00" * 8 + whole[68:], "path": None}


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("caption", None),
        ("caption", " \n"),
        ("caption", "\ufeff"),
        ("caption", []),
        ("caption", ["", " "]),
        ("image", None),
        ("image", {"bytes": png("red")["bytes"][:40], "path": None}),
        ("image", {"bytes": b"II*\x00" + b"\xff" * 40, "path": None}),
        ("image", broken_png()),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_one_bad_row_is_passed_over_and_told(column, cell, caplog):
    lists = isinstance(cell, list)
    rows = [{"image": png((i, 0, 0)), "caption": ["a"] if lists else "a"} for i in range(4)]
    rows[1][column] = cell
    batches = TableBatches(Dataset.from_list(rows), 4, 0, seed=0, size=8)
    with caplog.at_level("WARNING"):
        for index in range(3):
            assert 1 not in batches[index].image_ids
    assert batches.rows.unreadable == {1}
    assert caplog.text.count("row 1 cannot be read") == 1


def test_columns_that_are_not_asked_for_are_not_read():
    rows = [{"image": png("red"), "caption": "a", "mask": {"bytes": b"junk", "path": None}}] * 2
    table = Dataset.from_list(rows).cast_column("mask", ImageFeature())
    assert TableBatches(table, 2, 0, seed=0, size=8)[0].captions == ["a", "a"]


def test_pictures_are_turned_as_their_exif_says():
    """Left of red is blue; the file holds it turned by a quarter."""
    picture = Image.new("RGB", (8, 8), "red")
    picture.paste("blue", (0, 0, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.transpose(Image.Transpose.ROTATE_90).save(buffer, format="PNG", exif=exif)
    table = Dataset.from_list(
        [{"image": {"bytes": buffer.getvalue(), "path": None}, "caption": "a"}]
    )
    red, _, blue = TableBatches(table, 1, 0, seed=0, size=8)[0].pixels[0]
    assert (red[:, 4:] > 0).all() and (blue[:, :4] > 0).all() and (red[:, :4] < 0).all()


def saved_as(kind, values, dtype):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values, dtype=dtype)).save(buffer, format=kind)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("kind", "top", "dtype"),
    [("TIFF", 1, np.float32), ("TIFF", 65535, np.uint16), ("PNG", 65535, np.uint16)],
)
def test_grey_of_floats_and_of_16_bits_keeps_its_shades(kind, top, dtype):
    shades = np.array([[0.0, 0.25], [0.5, 1.0]])
    row = {"image": saved_as(kind, shades * top, dtype), "caption": "shades"}
    pixels = TableBatches(Dataset.from_list([row]), 1, 0, seed=0, size=2)[0].pixels[0]
    for channel in pixels:
        np.testing.assert_allclose((channel.numpy() + 1) / 2, shades, atol=0.6 / 255)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([[0, 255]], np.float32), ([[-1, 1]], np.float32), ([[0, np.nan]], np.float32),
     ([[0, np.inf]], np.float32), ([[0, 70000]], np.int32)],
)  # fmt: skip
def test_shades_without_a_known_white_are_not_read(values, dtype, caplog):
    rows = [{"image": png("red"), "caption": "a"} for _ in range(2)]
    rows[1]["image"] = saved_as("TIFF", values, dtype)
    batches = TableBatches(Dataset.from_list(rows), 2, 0, seed=0, size=8)
    with caplog.at_level("WARNING"):
        assert batches[0].image_ids == [0, 0]
    assert "floats from 0 to 1, or integers of 8 or 16 bits, got mode" in caplog.text


def test_a_table_is_shuffled_once_an_epoch(monkeypatch):
    """Also where a batch lies in two; and a run that starts late has the same order."""
    table = Dataset.from_list([{"image": png("red"), "caption": f"{i}"} for i in range(4)])
    seeds, make = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or make(seed))
    batches = TableBatches(table, 3, 0, seed=0, size=8)
    seen = [batches[index].image_ids for index in range(8)]
    assert [seed for seed in seeds if seed[-1] == 5] == [[0, epoch, 5] for epoch in range(6)]
    assert TableBatches(table, 3, 0, seed=0, size=8)[7].image_ids == seen[7]


def test_several_captions_an_image_are_drawn_from():
    table = Dataset.from_list([{"image": png("red"), "caption": ["one", "two", "three"]}])
    drawn = {t for i in range(20) for t in TableBatches(table, 1, 0, seed=0, size=8)[i].captions}
    assert drawn == {"one", "two", "three"}


def coco(folder, images="train2017"):
    """Two images with five captions each, and one without, as COCO keeps them."""
    (folder / "annotations").mkdir(parents=True)
    (folder / images).mkdir(exist_ok=True)
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        Image.new("RGB", (40, 30), "red").save(folder / images / name)
    file = folder / "annotations" / "captions_train2017.json"
    told = [
        {"id": 10 * i + n, "image_id": i, "caption": f" {i} {n}"} for i in (1, 2) for n in range(5)
    ]
    shown = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)]
    file.write_text(json.dumps({"info": {}, "images": shown, "annotations": told}))
    return file


@pytest.mark.parametrize("images", ["train2017", "annotations"])
def test_cocos_captions_are_read(images, tmp_path):
    """A row an image, one of its captions a time; so its others are never its negatives."""
    task = Task(str(coco(tmp_path, images)), size=8)
    batches = task.images(2, 0)
    assert len(batches.rows.table) == 2 and task.one_caption() is None
    seen = set()
    for index in range(40):
        batch = batches[index]
        assert [text[0] for text in batch.captions] == [str(row + 1) for row in batch.image_ids]
        seen.update(batch.captions)
    assert seen == {f"{i} {n}" for i in (1, 2) for n in range(5)}


def test_all_of_several_coco_files_are_read(tmp_path):
    first = coco(tmp_path)
    first.with_name("captions_again_train2017.json").write_text(first.read_text())
    assert len(open_table(str(first.parent / "captions_*.json"), "train")) == 4


def test_cocos_images_are_looked_for(tmp_path):
    file = coco(tmp_path)
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no image 1.jpg of .*train2017.*Put the images"):
        open_table(str(file), "train")
    boxes = {"images": [], "annotations": [{"image_id": 1, "bbox": []}]}
    file.write_text(json.dumps(boxes))
    with pytest.raises(ValueError, match="captions_"):
        open_table(str(file), "train")


def test_rows_of_one_image_file_have_one_id(tmp_path):
    """A row a caption: in a batch the captions of one image are not each other's negatives."""
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    rows = [
        {"image": str(tmp_path / f"{n}.png"), "caption": f"{n} {i}"} for n in "ab" for i in "12"
    ]
    Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    for index in range(5):
        batch = Task(str(tmp_path / "rows.csv"), size=8).images(4, 0)[index]
        same = {text: row for text, row in zip(batch.captions, batch.image_ids, strict=True)}
        assert same["a 1"] == same["a 2"] != same["b 1"] == same["b 2"]


def test_one_file_under_two_names_has_one_id(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "i.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("image,caption\ni.png,a\n./i.png,b\n")
    first, second = Task("rows.csv", size=8).images(2, 0)[0].image_ids
    assert first == second


def test_files_and_folders_are_opened(tmp_path):
    data = captioned(6, seed=0)
    data.to_parquet(tmp_path / "w.parquet")
    imagefolder(data, tmp_path / "folder")
    (tmp_path / "shards" / "data").mkdir(parents=True)
    for half in range(2):
        shard = data.shard(2, half, contiguous=True)
        shard.to_parquet(tmp_path / "shards" / "data" / f"train-0000{half}-of-00002.parquet")
    for source in (
        tmp_path / "w.parquet",
        tmp_path / "folder",
        tmp_path / "shards",
        tmp_path / "shards" / "data" / "train-*.parquet",
    ):
        assert len(open_table(str(source), "train")) == 6
        batch = Task(str(source), size=24).images(2, 1)[0]
        assert batch.pixels.shape == (2, 3, 24, 24)
        assert set(batch.captions) <= set(data["caption"])


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_is_read(tmp_path):
    for shard in range(2):
        files = {}
        for i in range(3):
            files[f"{i:03}.png"] = png("red")["bytes"]
            files[f"{i:03}.txt"] = f"text {shard} {i}".encode()
        tar_of(tmp_path / f"shard{shard}.tar", files)
    task = Task(str(tmp_path / "*.tar"), text="txt", size=8)
    batches = task.images(6, 0, image="png")
    assert sorted(batches[0].captions) == [f"text {s} {i}" for s in range(2) for i in range(3)]
    assert (batches[0].pixels[:, 0] == 1).all() and (batches[0].pixels[:, 1:] == -1).all()
    assert set(task.captions()) == set(batches[0].captions)
    with pytest.raises(ValueError, match=r"\['image'\] missing among \['png', 'txt'\]"):
        task.images(6, 0)
    # A shard that was written again is read again.
    tar_of(tmp_path / "shard0.tar", {"0.png": png("blue")["bytes"], "0.txt": b"again"})
    assert "again" in task.images(4, 0, image="png")[0].captions


def test_pairs_of_webdataset_are_read(tmp_path):
    files = {}
    for i, label in enumerate(("1", "0", "0.5")):
        files[f"{i}.jpg_0"], files[f"{i}.jpg_1"] = png("red")["bytes"], png("blue")["bytes"]
        files |= {f"{i}.label_0": label.encode(), f"{i}.txt": b"text", f"{i}.npy": b"junk"}
    tar_of(tmp_path / "shard.tar", files)
    pairs = Task(str(tmp_path / "shard.tar"), text="txt", size=8).pairs(2, 0)
    batch = pairs[0]
    assert pairs.ties == 1 and batch.captions == ["text"] * 2
    reds = {
        row: winner[0].mean() > 0 for row, winner in zip(batch.image_ids, batch.winner, strict=True)
    }
    assert reds == {0: True, 1: False}


@pytest.mark.parametrize("ending", ["npy", "json", "pth", "seg.png"])
def test_files_beside_those_of_webdataset_are_not_read(ending, tmp_path):
    """Nor is an undecodable caption more than a row that cannot be read."""
    files = {"__index__": b"", "folder/._000.png": b"junk"}
    for i in range(4):
        files[f"./a.b/{i:03}.png"] = png("red")["bytes"]
        files[f"./a.b/{i:03}.txt"] = b"\xff" if i == 2 else f"text {i}".encode()
        if i:
            files[f"./a.b/{i:03}.{ending}"] = b"junk"
    tar_of(tmp_path / "shard.tar", files)
    batches = Task(str(tmp_path / "*.tar"), text="txt", size=8).images(4, 0, image="png")
    assert set(batches[0].captions) == {"text 0", "text 1", "text 3"}
    assert batches.rows.unreadable == {2}


def test_wrong_data_are_named(tmp_path):
    table = Dataset.from_list([{"jpg": png("red"), "caption": "one"}])
    with pytest.raises(ValueError, match="--image_column"):
        TableBatches(table, 1, 0, seed=0, size=8)
    table.to_parquet(tmp_path / "t.parquet")
    named = Task(str(tmp_path / "t.parquet"), text="text")
    for read in (named.captions, named.one_caption):
        with pytest.raises(ValueError, match=r"'text'\] missing among .*--caption_column"):
            read()
    with pytest.raises(ValueError, match="at least one row"):
        TableBatches(table.select([]), 1, 0, seed=0, size=8, image="jpg")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Task(str(tmp_path / "gone.parquet"), size=8).images(1, 0)
