"""One reader for pictures and for folders of them: what training sees is what scoring sees."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from data.pictures import image_files, read_picture, to_uint8
from rewards import metrics


def saved(picture, kind="PNG", **more):
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def first_pixel(picture, kind="PNG", **more):
    return read_picture(saved(picture, kind, **more)).getpixel((0, 0))


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 51), (244, 204, 204)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("LA", (10, 0), (255, 255, 255)),
        ("LA", (10, 255), (10, 10, 10)),
    ],
)
def test_what_is_transparent_is_white(mode, colour, seen):
    assert first_pixel(Image.new(mode, (2, 2), colour)) == seen


def test_colours_that_are_named_transparent_are_white():
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for kind in ("PNG", "GIF"):
        assert first_pixel(palette, kind) == (255, 0, 0)
        assert first_pixel(palette, kind, transparency=0) == (255, 255, 255)
    for mode, colour in (("RGB", (1, 2, 3)), ("L", 7)):
        plain = Image.new(mode, (2, 2), colour)
        assert first_pixel(plain, transparency=colour) == (255, 255, 255)


def test_the_transparent_grey_of_16_bits_is_white_and_the_next_one_is_not():
    grey = Image.fromarray(np.array([[9000, 9001]], np.uint16))
    seen = read_picture(saved(grey, transparency=9000))
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (35, 35, 35)]


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key"),
    [
        (1, 0, b"\x40", b"\0\1"),  # 0 and 1
        (2, 0, b"\x10", b"\0\1"),
        (4, 0, b"\x01", b"\0\1"),
        (8, 0, b"\0\1", b"\0\1"),
        (16, 2, bytes(6) + b"\1\2" * 3, b"\1\2" * 3),
    ],
)
def test_the_transparent_colour_of_any_number_of_bits_is_white(bits, colour, row, key):
    def chunk(name, data):
        told = name + data
        return struct.pack(">I", len(data)) + told + struct.pack(">I", zlib.crc32(told))

    header = struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    file = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in parts)
    seen = read_picture(file)
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def swapped_profile():
    """sRGB's profile with red and green exchanged."""
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return whole.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_of_the_profile(mode):
    picture = Image.new("RGB", (2, 2), (204, 51, 102)).convert(mode)
    seen = read_picture(saved(picture, icc_profile=swapped_profile())).getpixel((0, 0))
    np.testing.assert_allclose(seen, (51, 204, 102), atol=3)


def test_a_profile_that_is_damaged_or_of_other_colours_changes_nothing():
    grey = Image.new("L", (2, 2), 100)
    for profile in (b"junk", swapped_profile()):
        assert first_pixel(grey, icc_profile=profile) == (100, 100, 100)


def damaged():
    # Each format of Pillow has errors of its own; AVIF's was no OSError.
    for kind in ("AVIF", "DDS", "PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"):
        whole = saved(Image.effect_noise((32, 32), 100).convert("RGB"), kind)
        for cut in (0, 5, len(whole) // 4, len(whole) // 2):
            yield whole[:cut]
    whole = bytearray(saved(Image.effect_noise((32, 32), 100).convert("RGB"), "DDS"))
    whole[84:88] = b"XXXX"  # a compression that nobody knows
    yield bytes(whole)


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_have_one_error():
    found = 0
    for content in damaged():
        try:
            read_picture(content)
        except ValueError as error:
            found += 1
            assert "cannot be read" in str(error) and "remove it" in str(error)
    assert found > 30


def test_the_error_names_the_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    for name in ("a.png", "gone.png"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: .*"):
            read_picture(tmp_path / name)


def test_scoring_reads_as_training_does(tmp_path):
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(tmp_path / "grey.png")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "phone.jpg", exif=exif)
    assert metrics.read(tmp_path / "grey.png").unique().tolist() == [35]
    assert metrics.read(tmp_path / "phone.jpg").shape == (3, 64, 32)


def test_hidden_files_are_left_out_and_links_followed(tmp_path):
    inside, far = tmp_path / "r", tmp_path / "far"
    for folder in (inside / ".ipynb_checkpoints", far):
        folder.mkdir(parents=True)
    for file in (inside / "a.PNG", inside / ".ipynb_checkpoints" / "a.png", far / "b.avif"):
        file.write_bytes(b"")
    (inside / "._a.png").write_bytes(b"")
    os.symlink(far, inside / "linked")
    os.symlink(inside, far / "back")  # a circle
    for found in (image_files(inside), metrics.image_files(inside)):
        assert found == [inside / "a.PNG", inside / "linked" / "b.avif"]


@pytest.mark.parametrize("link", ["best", "zero", "deep/best"])
def test_a_folder_and_a_link_to_it_are_read_once(tmp_path, link):
    """By the folder's own name, whichever is first in order; of links alone by the first one's."""
    ref, far = tmp_path / "ref", tmp_path / "far"
    for folder in (ref / "real", ref / "deep", far):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(b"")
    os.symlink(ref / "real", ref / link)
    for name in ("y", "x"):
        os.symlink(far, ref / name)
    assert image_files(ref) == [ref / name / "a.png" for name in ("deep", "real", "x")]


@pytest.mark.parametrize(("value", "told"), [("nan", "NaN"), ("inf", "infinity"), ("-inf", "inf")])
def test_what_is_not_finite_is_no_picture(value, told):
    with pytest.raises(FloatingPointError, match=f"expected finite numbers, got {told}"):
        to_uint8(torch.tensor([0.0, float(value)]))


def test_a_damaged_file_and_its_bytes_are_the_same_picture(tmp_path):
    """Pillow maps what is not compressed: it reads other pixels where the file's tags are wrong."""
    picture = Image.frombytes("CMYK", (2, 40), bytes(range(160)) * 2)
    content = saved(picture, "TIFF")
    for place, bit in ((96, 1), (96, 8), (102, 8), (102, 32)):  # in the tags of its strip
        damaged = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        file = tmp_path / "a.tif"
        file.write_bytes(damaged)
        try:
            found = read_picture(damaged)
        except ValueError:
            with pytest.raises(ValueError, match=r"a\.tif cannot be read"):
                read_picture(file)
        else:
            assert found.tobytes() == read_picture(file).tobytes()
