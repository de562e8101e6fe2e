"""The detector is exact on rendered scenes, and its verdict on hard cases is the stated one."""

from itertools import islice

import numpy as np
import pytest

from lab.world.detect import detect, palette_error
from lab.world.prompts import scenes
from lab.world.render import GROUND, PALETTE, render
from lab.world.scene import COLOURS, SHAPES, Thing


def found(image):
    return [(one.shape, one.colour) for one in detect(image)]


def blank():
    return np.full((24, 24, 3), GROUND, dtype=np.uint8)


def test_exact_on_thousands_of_scenes():
    for _, scene in islice(scenes(11), 3000):
        got = sorted((one.shape, one.colour, *one.position) for one in detect(render(scene)))
        want = sorted((t.shape, t.colour, t.x + 3.0, t.y + 3.0) for t in scene)
        # A box may be the shape's own, without empty rows; all of ours fill their 6x6 box.
        assert got == want


def test_every_shape_in_every_colour_at_every_position():
    for shape in SHAPES:
        for colour in COLOURS:
            for x, y in ((0, 0), (18, 0), (0, 18), (18, 18), (7, 11)):
                assert found(render((Thing(shape, colour, x, y),))) == [(shape, colour)]


def test_exact_under_noise_of_24_levels():
    rng = np.random.default_rng(0)
    for _, scene in islice(scenes(12), 200):
        noisy = render(scene) + rng.normal(0, 24, (24, 24, 3))
        got = sorted(found(np.clip(noisy, 0, 255).astype(np.uint8)))
        assert got == sorted((thing.shape, thing.colour) for thing in scene)


def test_touching_shapes_of_two_colours_are_two():
    assert found(render((Thing("square", "red", 2, 2), Thing("circle", "blue", 8, 2)))) == [
        ("square", "red"),
        ("circle", "blue"),
    ]


def test_touching_shapes_of_one_colour_are_one_blob():
    image = render((Thing("square", "red", 2, 2), Thing("square", "red", 8, 2)))
    assert found(image) == [("blob", "red")]


def test_shapes_that_touch_at_a_corner_are_two():
    image = render((Thing("square", "red", 2, 2), Thing("square", "red", 8, 8)))
    assert found(image) == [("square", "red"), ("square", "red")]


@pytest.mark.parametrize(("columns", "verdict"), [(5, "square"), (4, "blob"), (2, "blob")])
def test_clipped_square(columns, verdict):
    image = blank()
    image[4:10, 24 - columns :] = PALETTE["green"]
    assert found(image) == [(verdict, "green")]


def test_a_blended_colour_is_unclear():
    image = blank()
    image[4:10, 4:10] = (255, 128, 0)  # between red and yellow
    assert found(image) == [("blob", "unclear")]


def test_a_faint_shape_is_seen_from_half_strength_on():
    def at(strength):
        image = blank()
        image[4:10, 4:10] = np.rint(
            np.array(GROUND) * (1 - strength) + strength * np.array([255, 0, 0])
        )
        return found(image)

    assert at(0.3) == []
    assert at(0.7) == [("square", "red")]


def test_specks_are_ignored_and_larger_bits_are_blobs():
    image = render((Thing("triangle", "yellow", 1, 1),))
    image[20, 10:15] = PALETTE["red"]  # five pixels
    assert found(image) == [("triangle", "yellow")]
    image[20, 10:16] = PALETTE["red"]
    assert found(image) == [("triangle", "yellow"), ("blob", "red")]


def test_a_flaw_of_two_pixels_is_forgiven():
    image = render((Thing("circle", "blue", 5, 5),))
    image[5, 7:9] = GROUND
    assert found(image) == [("circle", "blue")]


def test_a_huge_patch_is_a_blob():
    image = blank()
    image[:20, :20] = PALETTE["blue"]
    assert found(image) == [("blob", "blue")]


def test_empty_image():
    assert detect(blank()) == []


def test_bad_image_is_named():
    with pytest.raises(ValueError, match="uint8"):
        detect(np.zeros((24, 24, 3), dtype=np.float32))


def test_palette_error_is_the_distance_to_the_nearest_colour():
    clean = np.stack([render(scene) for _, scene in islice(scenes(13), 20)])
    assert np.all(palette_error(clean) == 0)
    dirty = clean.copy()
    dirty[:, ::2, :, 0] = np.where(dirty[:, ::2, :, 0] == 255, 235, dirty[:, ::2, :, 0] + 20)
    np.testing.assert_allclose(palette_error(dirty), 20 / 2**0.5, rtol=1e-5)
    assert [found(image) for image in dirty] == [found(image) for image in clean]
    between = np.full((1, 24, 24, 3), (255, 120, 0), dtype=np.uint8)
    np.testing.assert_allclose(palette_error(between), 120)
