"""What a name is, and what its content is."""

import os

import pytest

from data.sources import check_source, content_of


def test_the_content_is_also_that_of_linked_folders(tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    for folder in (model, other):
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(b"first")
    os.symlink(other, model / "unet")
    os.symlink(model, other / "back")  # a circle
    first = content_of(str(model))
    (other / "a.safetensors").write_bytes(b"other")
    second = content_of(str(model))
    (model / "unet").unlink()
    assert len({first, second, content_of(str(model))}) == 3
    assert content_of(str(model)) == content_of(str(model))


def test_two_links_to_one_folder_are_both_content(tmp_path):
    """So that one of them pointing elsewhere is a change."""
    model = tmp_path / "model"
    for name in ("a", "b"):
        (model / name).mkdir(parents=True)
        (model / name / "w.bin").write_text(name)
    found = set()
    for name in ("a", "b"):
        os.symlink(name, model / "unet")
        found.add(content_of(str(model)))
        (model / "unet").unlink()
    assert len(found) == 2


@pytest.mark.parametrize("name", ["photos.tsv", "photos.PARQUET", "shards/0001.tar", "prompts.txt"])
def test_what_ends_as_a_file_is_no_hub_id(name):
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_source("data", name)
    check_source("data", "owner/photos")
