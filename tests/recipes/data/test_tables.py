"""Tables from files and folders: no row vanishes without a word, errors name the file."""

import io
import json
import tarfile
from types import SimpleNamespace

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from data.batches import TableBatches, TablePairs
from data.tables import check_columns, fingerprint, open_table
from data.task import Task
from lab.world.task import World
from rewards.rollout import PromptBatches


def pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


def with_metadata(folder, *names):
    pictures(folder, *names)
    lines = [f"{name},a picture {name}" for name in names]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))


def captions(source, **more):
    return sorted(str(text) for text in open_table(str(source), "train", **more)["caption"])


def test_a_folder_has_all_of_its_rows_whatever_the_names(tmp_path, caplog):
    for name in ("cat", "dog", "train"):
        with_metadata(tmp_path / "classes" / name, "0.jpg", "1.jpg")
    with_metadata(tmp_path / "photos", "a.jpg", "red_train.jpg", "test_tube.jpg")
    assert len(open_table(str(tmp_path / "classes"), "train")) == 6
    assert len(open_table(str(tmp_path / "photos"), "train")) == 3
    assert not caplog.text
    with pytest.raises(ValueError, match=r"split: expected one of .*photos \(train\), got 'test'"):
        open_table(str(tmp_path / "photos"), "test")


def test_folders_that_are_all_splits_are_splits(tmp_path, caplog):
    with_metadata(tmp_path / "train", "0.jpg", "1.jpg")
    with_metadata(tmp_path / "val" / "deep", "2.jpg")
    assert captions(tmp_path) == ["a picture 0.jpg", "a picture 1.jpg"]
    assert "1 files of splits other than train are not read" in caplog.text
    assert len(open_table(str(tmp_path), "validation")) == 1
    with pytest.raises(ValueError, match=r"\(train, validation\), got 'test'"):
        open_table(str(tmp_path), "test")


def test_texts_beside_pictures_are_captions(tmp_path, caplog):
    pictures(tmp_path / "10_dog", "a.jpg", "b.png", "c.jpg", "d.jpg")
    for name, text in (("a.txt", "\ufeffa\u0308 dog\r\n"), ("b.caption", "b"), ("d.txt", " ")):
        (tmp_path / "10_dog" / name).write_text(text, encoding="utf-8")
    with_metadata(tmp_path / "more", "e.jpg")
    (tmp_path / "more" / "e.txt").write_text("not this")
    batch = Task(str(tmp_path), size=8).images(4, 0)[0]
    assert set(batch.captions) == {"\xe4 dog", "b", "a picture e.jpg"}
    assert "1 pictures without a caption are not read" in caplog.text
    with pytest.raises(ValueError, match=r"metadata.csv .* or a .txt beside.* got 1 pictures"):
        open_table(str(pictures(tmp_path / "bare", "a.jpg")), "train")


def test_metadata_of_several_kinds_and_of_pairs_are_read(tmp_path):
    pictures(tmp_path, "a.jpg", "b.jpg")
    row = {"image_w_file_name": "a.jpg", "image_l_file_name": "b.jpg", "caption": "a"}
    (tmp_path / "metadata.JSONL").write_text("\ufeff" + json.dumps(row), encoding="utf-8")
    assert Task(str(tmp_path), size=8).pairs(1, 0)[0].captions == ["a"]
    (tmp_path / "metadata.JSONL").unlink()
    pd.DataFrame({"file_name": ["a.jpg"], "caption": ["b"]}).to_parquet(
        tmp_path / "metadata.parquet"
    )
    assert Task(str(tmp_path), size=8).images(1, 0)[0].captions == ["b"]
    (tmp_path / "metadata.csv").write_text("file,caption\na.jpg,a\n")
    with pytest.raises(ValueError, match=r"metadata.csv, line 2: expected a column file_name"):
        open_table(str(tmp_path), "train")


def test_shards_are_read_and_pictures_beside_them_told(tmp_path, caplog):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / "data").mkdir(exist_ok=True)
        frame = pd.DataFrame({"image": [b"x"], "caption": [name]})
        frame.to_parquet(tmp_path / "data" / f"{name}.parquet")
    pictures(tmp_path / "assets", "preview.png")
    assert [text[:11] for text in captions(tmp_path)] == ["train-00000", "train-00001"]
    assert "1 pictures and tables of another kind are not read" in caplog.text
    assert "1 files of splits other than train are not read" in caplog.text
    frame.to_parquet(tmp_path / "data" / "test_tube.parquet")
    with pytest.raises(ValueError, match=r"got data/test_tube[.]parquet beside data/test-0"):
        open_table(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (("train_0", "train_1", "test_0"), ["train_0", "train_1"]),
        (("train2017", "val2017"), ["train2017"]),
        (("Train.0", "Test.0"), ["Train.0"]),
        (("part/train/0", "part/val/0"), ["part/train/0"]),
        (("train_data", "train_0"), ["train_0", "train_data"]),
        (("train_data", "val"), None),
    ],
    ids=str,
)
def test_rows_of_another_split_are_not_read(names, read, tmp_path):
    for name in names:
        file = tmp_path / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"image": [b"x"], "caption": [name]}).to_parquet(file)
    if read is not None:
        assert captions(tmp_path) == read
        return
    with pytest.raises(ValueError, match=r"got train_data\.parquet beside val\.parquet\. Rename"):
        open_table(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.CSV", "\ufeffimage,caption\r\ni.png,7\r\n"),
        ("a.tsv", "image\tcaption\ni.png\t7\n"),
        ("a.jsonl", '\ufeff{"image": "i.png", "caption": "7"}\n'),
        ("a.JSON", '[{"image": "i.png", "caption": "7"}]'),
        ("[x]::y/a.csv", "image,caption\ni.png,7\n"),
        ("[x]::y/a.jsonl", '{"image": "i.png", "caption": ["7", "", null]}\n'),
    ],
)
def test_tables_of_texts_are_read(name, content, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures(tmp_path, "i.png"))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert Task(name, size=8).images(1, 0)[0].captions == ["7"]


def test_rows_with_one_caption_and_with_several_may_be_mixed(tmp_path):
    rows = [{"image": "a", "caption": "one"}, {"image": "b", "caption": ["two", None], "x": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"image": "c"}])))
    table = open_table(str(tmp_path / "a.jsonl"), "train")
    assert table[:]["caption"] == [["one"], ["two", None], [None]]
    assert table.column_names == ["image", "caption", "x"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "image,caption\ni.png,a, b\n", "a.csv, line 2: expected 2 fields.*got 3"),
        ("a.csv", "image,caption\ni.png,café\n".encode("cp1252"), "a.csv: expected UTF-8"),
        ("a.csv", "image,caption\n", "at least one row in .*a.csv"),
        ("a.csv", "", "a.csv: expected a header"),
        ("a.jsonl", "", "at least one row in .*a.jsonl"),
        ("a.jsonl", '{"image": "i", "caption": 7}', "a.jsonl, line 1: expected a text, got '7'"),
        ("a.jsonl", '{"image": "i", "caption": {"en": "a"}}', "line 1: expected a text, got"),
        ("a.jsonl", '{"image": "i", "caption": "\\ud800"}', "line 1: expected a text, got"),
        ("a.jsonl", '{"image": "i", "caption": [["a"], "b"]}', "line 1: expected a text, got .*a"),
        ("a.jsonl", f'{{"image": 1{"0" * 400}}}', "line 1: expected a text, got '100"),
        ("a.csv", "image;caption\ni.png;a, b\n", "a.csv, line 1: expected ',' .*looks like ';'"),
        ("a.csv", "sep=,\nimage,caption\n", "a.csv, line 1: expected a header.*Remove the line"),
        ("a.csv.gz", "", r"end in one of .parquet, .tar, .*got .gz of .*a.csv.gz. Unpack"),
        ("a.tar.gz", "", "end in one of .parquet.*got .gz"),
        ("a.xlsx", "", "end in one of .parquet.*got .xlsx"),
        ("a.ndjson", "", "end in one of .parquet.*got .ndjson"),
        ("a.png", "", "end in one of .parquet.*got .png"),
        ("a.txt", "", "end in one of .parquet.*got .txt"),
        ("a.json", '["a"]', "a.json, row 1: expected a row of names"),
        ("a.json", '{"images": null, "annotations": 3}', "a.json: expected COCO's captions"),
        ("a.json", '{"images": [{"id": 1}], "annotations": []}', r"a.json.*'file_name'"),
        ("a.parquet", b"", "a.parquet cannot be read: .*Write it again"),
        ("a.parquet", b"PAR1" * 9, "a.parquet cannot be read: .*Write it again"),
        ("a.tar", b"junk" * 300, "a.tar cannot be read: .*Write it again"),
        ("b::c.parquet", b"", "b::c.parquet: expected a path without ::.*Rename"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=told) as error:
        open_table(str(tmp_path / name), "train")
    assert "\n" not in str(error.value)


def test_an_empty_parquet_is_no_damage(tmp_path):
    for name, captions in (("a", ["a"]), ("b", [])):
        frame = pyarrow.table({"image": [b"x"] * len(captions), "caption": captions})
        pyarrow.parquet.write_table(frame, tmp_path / f"{name}.parquet")
    assert len(open_table(str(tmp_path), "train")) == 1
    with pytest.raises(ValueError, match=r"at least one row in .*b.parquet, got none"):
        open_table(str(tmp_path / "b.parquet"), "train")


def test_damaged_parquets_and_those_with_brackets(tmp_path):
    file = tmp_path / "[1]*.parquet"
    pd.DataFrame({"image": [b"x" * 999] * 9, "caption": ["a"] * 9}).to_parquet(file)
    assert len(open_table(str(file), "train")) == 9
    whole = file.read_bytes()
    (tmp_path / "2.parquet").write_bytes(b"PAR1" + b"\xff" * 80 + whole[84:])
    with pytest.raises(ValueError, match=r"2.parquet cannot be read: .*Write it again"):
        open_table(str(tmp_path / "2.parquet"), "train")


def test_a_parquet_with_texts_that_are_none_is_an_error(tmp_path):
    """As a damaged one has: all of its other bytes are read without a word."""
    buffers = [
        None,
        pyarrow.array([0, 2], pyarrow.int32()).buffers()[1],
        pyarrow.py_buffer(b"a\xb4"),
    ]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"caption": texts}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read: .*UTF8.* Write it again"):
        open_table(str(tmp_path / "a.parquet"), "train", columns=[])


def test_columns_of_other_kinds_are_refused():
    for cell in ({"en": "a", "de": "b"}, 7, [3], [{"en": "a"}]):
        table = Dataset.from_list([{"image": b"", "caption": cell}])
        with pytest.raises(ValueError, match=r"expected texts in the column caption.*got"):
            check_columns(table, ["image"], "caption")
    with pytest.raises(ValueError, match="expected images in the column image"):
        TableBatches(Dataset.from_list([{"image": 7, "caption": "a"}]), 1, 0, seed=0, size=8)
    rows = [{"jpg_0": b"", "jpg_1": b"", "label_0": "first", "caption": "a"}]
    with pytest.raises(ValueError, match="expected numbers in label_0"):
        TablePairs(Dataset.from_list(rows), 1, 0, seed=0, size=8)


def coco(folder, images, annotations):
    file = folder / "captions_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


def test_coco_with_holes(tmp_path, caplog):
    """Its first image is missing, a caption is null, an image has none."""
    pictures(tmp_path, "2.png")
    shown = [{"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)]
    told = [{"image_id": i, "caption": text} for i, text in ((1, "a"), (2, None), (2, " b\n"))]
    task = Task(str(coco(tmp_path, shown, told)), size=8)
    assert task.images(2, 0)[0].captions == ["b", "b"]
    assert "1 images without a caption are not read" in caplog.text


def test_cocos_ids_are_of_one_image_each(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    told = [{"image_id": 1, "caption": "a"}]
    same = [{"id": 1, "file_name": "a.png"}] * 2
    assert len(open_table(str(coco(tmp_path, same, told)), "train")) == 1
    with pytest.raises(ValueError, match=r"2017.json: expected an id.*got 1 for a.png and b.png"):
        open_table(str(coco(tmp_path, [*same, {"id": 1, "file_name": "b.png"}], told)), "train")


def test_a_name_of_300_letters_is_an_error_of_its_own_row(tmp_path, caplog):
    pictures(tmp_path, "2.png")
    shown = [{"id": i, "file_name": name} for i, name in ((1, "x" * 300), (2, "2.png"))]
    told = [{"image_id": i, "caption": f"{i}"} for i in (1, 2)]
    assert Task(str(coco(tmp_path, shown, told)), size=8).images(2, 0)[0].captions == ["2", "2"]
    assert "row 0 cannot be read" in caplog.text and "too long" in caplog.text


def tar_of(file, number=3):
    with tarfile.open(file, "w") as tar:
        for name in (f"{i}.{ending}" for i in range(number) for ending in ("JPG", "txt")):
            member = tarfile.TarInfo(name)
            member.size = 600
            tar.addfile(member, io.BytesIO(b"\xef\xbb\xbf" + b"x" * 597))
    return file.read_bytes()


def test_a_tar_that_is_cut_is_an_error(tmp_path):
    whole = tar_of(tmp_path / "a.tar")
    size = 1536  # of a member
    read = {"columns": ["jpg"], "text": "txt"}
    assert len(open_table(str(tmp_path / "a.tar"), "train", **read)) == 3
    for cut in (2 * size + 100, 4 * size, 2 * size - 200, 4 * size + 300, 6 * size):
        (tmp_path / "c.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"c.tar cannot be read: .*Write it again"):
            open_table(str(tmp_path / "c.tar"), "train", **read)
    (tmp_path / "c.tar").write_bytes(whole * 2)
    with pytest.raises(ValueError, match="files behind it"):
        open_table(str(tmp_path / "c.tar"), "train", **read)
    texts = open_table(str(tmp_path / "a.tar"), "train", **read)["txt"]
    assert set(texts) == {"x" * 597}


def test_a_tar_with_a_name_twice_is_an_error(tmp_path):
    tar_of(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(ValueError, match=r"a.tar cannot be read: .*it has 1.txt twice. Write it"):
        open_table(str(tmp_path / "a.tar"), "train", columns=["jpg"], text="txt")


def test_names_in_capitals_are_read(tmp_path, caplog):
    pictures(tmp_path / "beside", "a.JPG", "b.jpg")
    (tmp_path / "beside" / "a.TXT").write_text("a dog")
    (tmp_path / "beside" / "b.Caption").write_text("a cat")
    assert captions(tmp_path / "beside") == ["a cat", "a dog"]
    assert not caplog.text
    pictures(tmp_path / "told", "a.jpg")
    (tmp_path / "told" / "Metadata.csv").write_text("file_name,caption\na.jpg,a dog\n")
    assert captions(tmp_path / "told") == ["a dog"]


def test_columns_in_capitals_are_told(tmp_path):
    (tmp_path / "a.csv").write_text("Image,Caption\ni.png,a\n")
    with pytest.raises(ValueError, match=r"capitals count: Image, Caption\)\. Name them with"):
        Task(str(tmp_path / "a.csv"), size=8).images(1, 0)


def test_a_pattern_in_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "br[1]" / "deep"
    folder.mkdir(parents=True)
    for name in "ab":
        (folder / f"{name}.csv").write_text(f"image,caption\ni.png,{name}\n")
    assert captions(tmp_path / "br[1]" / "*" / "[ab].csv") == ["a", "b"]


def shards(folder, *columns):
    for name, of in zip("abc", columns, strict=False):
        pyarrow.parquet.write_table(pyarrow.table(of), folder / f"{name}.parquet")
    return folder


def test_shards_with_other_columns_are_read(tmp_path):
    first = {"image": [b"x"], "caption": pyarrow.nulls(1), "n": pyarrow.array([1], "int32")}
    second = {"n": [2], "image": [b"x"], "caption": ["a"], "more": [1.5]}
    table = open_table(str(shards(tmp_path, first, second, {"caption": ["b"]})), "train")
    assert table["caption"][:] == [None, "a", "b"] and table["more"][:] == [None, 1.5, None]
    assert table["n"][:] == [1, 2, None]


def test_shards_with_types_that_can_be_converted_are_read(tmp_path):
    """As `datasets` does it: to those of the first."""
    table = open_table(str(shards(tmp_path, {"x": ["a"]}, {"x": [2]})), "train")
    assert table["x"][:] == ["a", "2"]


def test_a_shard_with_other_types_is_named(tmp_path):
    shards(tmp_path, {"caption": ["a"]}, {"caption": [["a", "b"]]})
    with pytest.raises(
        ValueError, match=r"b.parquet: expected columns of types that.*caption"
    ) as e:
        open_table(str(tmp_path), "train")
    assert "\n" not in str(e.value)


def test_what_save_to_disk_wrote_is_read(tmp_path):
    parts = {
        name: Dataset.from_dict({"image": [b""], "caption": [name]}) for name in ("train", "x")
    }
    parts["x"].with_format("numpy").save_to_disk(tmp_path / "one")
    DatasetDict(parts).save_to_disk(tmp_path / "several")
    assert open_table(str(tmp_path / "one"), "train")[0] == {"image": b"", "caption": "x"}
    assert captions(tmp_path / "several") == ["train"]
    with pytest.raises(ValueError, match=r"split: expected one of .*\(train, x\), got 'test'"):
        open_table(str(tmp_path / "several"), "test")


def test_prompts_are_the_captions_that_there_are(tmp_path, caplog):
    rows = [{"image": b"", "caption": text} for text in ("", "a\n", " ", ["x"][0])]
    Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    assert list(Task(str(tmp_path / "t.parquet")).captions()) == ["a", "a", "x", "x"]
    told = [one.message for one in caplog.records]
    assert len(told) == 1 and "row 0 cannot be read (expected a text" in told[0]
    assert "the next one stands for it. So far 1 of 4 rows" in told[0]
    Dataset.from_list(rows[:1]).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"none of the 1 rows of .*e.parquet has a text"):
        list(Task(str(tmp_path / "e.parquet")).captions())
    assert Task(str(tmp_path / "e.parquet")).one_caption() is None


def test_empty_captions_are_not_drawn():
    cells = [["", "a dog"], ["", " "], [" a cat", None]]
    table = Dataset.from_list([{"image": png("red"), "caption": cell} for cell in cells])
    batches = TableBatches(table, 3, 0, seed=0, size=8)
    assert {text for i in range(9) for text in batches[i].captions} == {"a dog", "a cat"}
    assert batches.rows.unreadable == {1}


def png(colour, size=8):
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def test_the_fingerprint_is_of_the_rows_in_their_order():
    rows = [{"image": png("red", 8 + i), "caption": f"a/{i}", "x": i} for i in range(3)]

    def of(rows):
        return TableBatches(Dataset.from_list(rows), 1, 0, seed=0, size=8).fingerprint

    same = [{**row, "x": 0} for row in rows]  # not read
    assert of(rows) == of(same)
    others = [rows[::-1], rows[:2], [*rows, rows[0]], [{**rows[0], "caption": "b/0"}, *rows[1:]],
              [{**rows[0], "image": png("red", 99)}, *rows[1:]]]  # fmt: skip
    assert len({of(rows), *map(of, others)}) == 6
    files = [{**row, "image": f"one/{i}.png"} for i, row in enumerate(rows)]
    moved = [{**row, "image": f"two/{i}.png"} for i, row in enumerate(rows)]
    named = [{**row, "image": f"one/x{i}.png"} for i, row in enumerate(rows)]
    assert of(files) == of(moved) != of(named)
    parts = Dataset.from_list(rows), Dataset.from_list(rows[:0])
    assert fingerprint(parts[0]) != fingerprint(parts[1])


def test_the_fingerprint_of_pairs_knows_who_won():
    def of(labels):
        rows = [{"jpg_0": png("red"), "jpg_1": png("red"), "label_0": one, "caption": "a"}
                for one in labels]  # fmt: skip
        return TablePairs(Dataset.from_list(rows), 1, 0, seed=0, size=8).fingerprint

    assert of([1, 0]) == of([1, 0]) and len({of([1, 0]), of([0, 1]), of([1, 0.5])}) == 3


def test_the_fingerprint_of_prompts_is_of_their_file_or_of_the_captions(tmp_path):
    def of(prompts="", data="t.parquet", images=0):
        options = SimpleNamespace(
            sampling_prompts=prompts and str(tmp_path / prompts),
            agsm_weight=0,
            image_column="image",
        )
        task = Task(str(tmp_path / data), size=8)
        return PromptBatches(options, task, 1, 1, images).fingerprint

    for name, texts in (("t", "ab"), ("u", "ba"), ("v", "ab")):
        rows = [{"image": png("red", 8 + ord(name)), "caption": text} for text in texts]
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    assert of() == of(data="v.parquet") != of(data="u.parquet")
    assert of(images=1) != of(data="v.parquet", images=1)
    (tmp_path / "p.txt").write_text("a\nb\n")
    first = of("p.txt")
    (tmp_path / "p.txt").write_text("b\na\n")
    assert of("p.txt") != first
    assert World("world").captions().fingerprint == ""


def test_the_fingerprint_is_of_the_images_contents(tmp_path):
    """Under the same name and of the same size; files that are not here are known by name."""
    file = tmp_path / "a.bmp"
    picture = Image.new("RGB", (300, 300), "red")

    def of(cell):
        rows = [{"image": cell, "caption": "a"}]
        return TableBatches(Dataset.from_list(rows), 1, 0, seed=0, size=8).fingerprint

    seen = set()
    for place in ((0, 0), (299, 299)):
        picture.putpixel(place, (0, 0, 255))
        picture.save(file)
        seen |= {of(str(file)), of(file.read_bytes()), of({"bytes": None, "path": str(file)})}
    assert len(seen) == 4 and of(str(file)) in seen
    assert of("nowhere.bmp") == of("else/nowhere.bmp") not in seen
    assert of("no\0where.bmp") not in seen


def test_texts_whose_picture_is_missing_are_told(tmp_path, caplog):
    pictures(tmp_path, "a.jpg")
    for name in ("a.txt", "b.txt", "c.caption"):
        (tmp_path / name).write_text("a dog")
    assert captions(tmp_path) == ["a dog"]
    assert "2 texts without a picture are not read" in caplog.text
