"""Guidance away from wrong captions, in the sampler."""

import numpy as np
import pytest
import torch

import probe_guidance
from common.pipeline import TextToImage
from common.sampling import sample
from studies.guided_sampling import guided_samples, wrong_captions
from world.captions import caption
from world.prompts import deal, specs
from world.scene import Group, Spec

PROMPTS = ["two circles", "a red square", "three triangles"]
SEEDS = [(3, i) for i in range(len(PROMPTS))]


def test_it_goes_over_and_above_the_pipelines_guidance(any_base):
    """Away from the empty caption twice is the pipeline's own guidance, further."""
    model = TextToImage.load(str(any_base), torch.float32)
    for scale in (0.0, 0.5):
        got = guided_samples(
            model, PROMPTS, [[""]] * len(PROMPTS), scale=scale, num_inference_steps=4,
            seeds=SEEDS, guidance_scale=1.7,
        )  # fmt: skip
        wanted = sample(
            model.pipe, PROMPTS, seeds=SEEDS, num_inference_steps=4, guidance_scale=1.7 + scale
        )
        assert np.abs(got.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_away_from_the_empty_caption_it_is_the_pipelines_own_guidance(any_base, scale):
    model = TextToImage.load(str(any_base), torch.float32)
    wrong = wrong_captions([None] * len(PROMPTS), "null", np.random.default_rng(0))
    got = guided_samples(model, PROMPTS, wrong, scale=scale, num_inference_steps=4, seeds=SEEDS)
    wanted = sample(
        model.pipe, PROMPTS, seeds=SEEDS, num_inference_steps=4, guidance_scale=1 + scale
    )
    assert np.abs(got.astype(int) - wanted).max() <= 1


def test_several_wrong_captions_are_averaged(flow_base):
    model = TextToImage.load(str(flow_base), torch.float32)

    def images(*wrong, scale):
        lists = [list(wrong)] * len(PROMPTS)
        return guided_samples(
            model, PROMPTS, lists, scale=scale, num_inference_steps=1, seeds=SEEDS
        ).astype(int)

    one, other = images("two squares", scale=2.0), images("a circle", scale=2.0)
    both = images("two squares", "a circle", scale=2.0)
    unclipped = np.all([(0 < i) & (i < 255) for i in (one, other)], axis=0)
    assert unclipped.mean() > 0.5
    assert np.abs(2 * both - one - other)[unclipped].max() <= 2
    assert np.abs(one - other).max() > 2


def test_the_wrong_captions():
    rng = np.random.default_rng(0)
    two, three = (Spec("counting", (Group("circle", n),)) for n in (2, 3))
    four = Spec("counting", (Group("circle", 4, "red"),))
    counts = wrong_captions([two, three, four], "counts", rng)
    assert counts == [["a circle", "three circles"], ["two circles", "four circles"],
                      ["three red circles"] * 2]  # fmt: skip
    near = wrong_captions([two, three], "neighbours", rng)
    assert near == [["three circles"] * 2, ["two circles", "four circles"]]
    pair = (Group("circle", 1, "red"), Group("square", 1, "blue"))
    swapped = [Spec("color_attr", pair), Spec("position", pair, "left of"), two]
    bound, placed, other = wrong_captions(swapped, "swapped", rng)
    assert bound == ["a blue circle and a red square"]
    assert placed == ["a red circle right of a blue square"]
    assert other[0] != caption(two)
    asked = list(specs("position", "train"))
    for against in ("hard", "in_batch"):
        for spec, wrong in zip(asked, wrong_captions(asked, against, rng), strict=True):
            assert len(wrong) == 1 and wrong[0] != caption(spec)
    with pytest.raises(ValueError, match="no such edit"):
        wrong_captions(asked, "counts", rng)
    dealt = deal("validation", 40, tags=["counting"])  # nine prompts, each several times
    for spec, (wrong,) in zip(dealt, wrong_captions(dealt, "in_batch", rng), strict=True):
        assert wrong != caption(spec)
    with pytest.raises(ValueError, match="two different prompts"):
        wrong_captions([two, two], "in_batch", rng)


def test_the_table(flow_base, tmp_path):
    file = tmp_path / "table.md"
    arguments = ["--model", str(flow_base), "--scales", "0,1", "--per_category", "9",
                 "--num_inference_steps", "1", "--batch_size", "4",
                 "--output", str(file)]  # fmt: skip
    probe_guidance.main(arguments)
    head, _, *lines = [line.strip("| ").split(" | ") for line in file.read_text().splitlines()]
    assert head == ["scale", "right", "too many", "too few"] + [f"right of {n}" for n in (2, 3, 4)]
    assert [line[0] for line in lines] == ["0", "1"]
    assert all(0 <= float(cell) <= 1 for line in lines for cell in line[1:])
