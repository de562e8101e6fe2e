"""FID and KID against closed forms and slow loops, intervals, and the table of several folders."""

import json
import math

import measures_tiny
import numpy as np
import pytest
import torch
from PIL import Image

import score_images
from lab.world.summary import table
from rewards import metrics, rewards
from rewards import models as reward_models
from rewards.metrics import Metrics, fid, image_files, kid, mean_with_interval


def drawn(seed, number, features=3, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, features, generator=generator, dtype=torch.double) + shift


def with_moments(mean, deviations, number=40):
    """Features whose sample mean and covariance (a diagonal) are exactly these."""
    raw = drawn(5, number, len(mean))
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    return white * torch.tensor(deviations).double() + torch.tensor(mean).double()


def test_fid_of_known_gaussians():
    one, other = with_moments([0, 0, 0], [1, 2, 3]), with_moments([1, 0, 2], [2, 2, 1], 60)
    expected = 1 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert fid(one, other)["score"] == pytest.approx(expected)
    assert fid(one, one)["score"] == pytest.approx(0, abs=1e-9)
    few = drawn(0, 5, 8)  # fewer images than features: the covariance is singular
    turned = torch.linalg.qr(drawn(1, 8, 8))[0]
    assert fid(few @ turned, drawn(2, 50, 8) @ turned)["score"] == pytest.approx(
        fid(few, drawn(2, 50, 8))["score"]
    )


def test_kid_is_the_unbiased_mean_over_all_pairs():
    one, other = drawn(0, 45).numpy(), drawn(1, 30, shift=0.5).numpy()

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    def pairs(a, b, same=False):
        values = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b)
                  if not (same and i == j)]  # fmt: skip
        return np.mean(values)

    expected = pairs(one, one, True) + pairs(other, other, True) - 2 * pairs(one, other)
    found = kid(torch.from_numpy(one), torch.from_numpy(other))
    assert found["score"] == pytest.approx(expected)
    same = np.mean([kid(drawn(i, 30), drawn(1000 + i, 30))["score"] for i in range(60)])
    assert abs(same) < 0.04  # not biased, unlike FID
    assert np.mean([fid(drawn(i, 30), drawn(1000 + i, 30))["score"] for i in range(20)]) > 0.05


@pytest.mark.parametrize("distance", [fid, kid])
def test_intervals_cover_other_draws(distance):
    reference = drawn(99, 400, 8)
    found = [distance(drawn(i, 120, 8, shift=0.3), reference) for i in range(60)]
    middle = np.mean([one["score"] for one in found])
    covered = np.mean([one["low"] < middle < one["high"] for one in found])
    assert 0.88 <= covered < 1
    without = [
        distance(drawn(0, 10, 8)[torch.arange(10) != i], reference)["score"] for i in range(10)
    ]
    few = distance(drawn(0, 10, 8), reference)
    reach = 2.262157 * math.sqrt(9 * np.var(without))
    assert few["high"] - few["score"] == pytest.approx(reach, rel=1e-5)
    with pytest.raises(ValueError, match="three of the reference at least, got 2 and 400"):
        distance(drawn(0, 2, 8), reference)


def test_a_mean_is_over_prompts():
    found = mean_with_interval([1, 2, 3, 7], ["a", "a", "b", "c"])
    reach = 4.302653 * np.std([1.5, 3, 7], ddof=1) / math.sqrt(3)
    assert found["score"] == pytest.approx(11.5 / 3)
    assert found["high"] == pytest.approx(11.5 / 3 + reach)
    assert mean_with_interval([1, 2], ["a", "a"]) == {"score": 1.5}


class Colours(torch.nn.Module):
    """Three features a picture: the means of its channels."""

    def forward(self, images):
        return images.float().mean((2, 3))


def folder(path, shade, prompts=6, sides=(8,)):
    rng = np.random.default_rng(shade)
    for i in range(prompts):
        (path / f"{i:05d}" / "samples").mkdir(parents=True)
        text = f"a photo of {'abcdef'[i]}"
        (path / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps({"prompt": text}))
        for k in range(2):
            side = sides[k % len(sides)]
            pixels = np.clip(rng.normal(shade, 20, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path / f"{i:05d}" / "samples" / f"{k:04d}.png")
    return path


def test_folders_stand_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "Inception", lambda device: Colours())
    near, far = folder(tmp_path / "near", 100, sides=(8, 9)), folder(tmp_path / "far", 30)
    photos = folder(tmp_path / "photos", 110)
    clip = measures_tiny.clip(tmp_path / "clip")
    score_images.main(
        ["--images", str(near), str(far), "--metrics", "clipscore", "redness", "kid", "fid",
         "--reference", str(photos), "--clip", clip]
    )  # fmt: skip
    printed = [one for one in capsys.readouterr().out.splitlines() if one.startswith("|")]
    assert printed[0] == "| | clipscore | redness | fid | kid |"
    assert [line.split(" |")[0] for line in printed[2:4]] == [f"| {near}", f"| {far}"]
    scores = [json.loads((one / "scores.json").read_text())["metrics"] for one in (near, far)]
    assert scores[0]["fid"]["score"] < scores[1]["fid"]["score"]
    for found in scores:
        assert all(one["low"] <= one["score"] <= one["high"] for one in found.values())
    shades = [
        torch.tensor(np.asarray(Image.open(file)), dtype=torch.double).mean((0, 1))
        for file in image_files(far)
    ]
    real = [
        torch.tensor(np.asarray(Image.open(file)), dtype=torch.double).mean((0, 1))
        for file in image_files(photos)
    ]
    assert scores[1]["fid"]["score"] == pytest.approx(
        fid(torch.stack(shades), torch.stack(real))["score"], rel=1e-4
    )
    score = reward_models.CLIPScore(clip)
    alone = [
        float(score(metrics.read(file)[None] / 127.5 - 1, [f"a photo of {'abcdef'[i // 2]}"]))
        for i, file in enumerate(image_files(far))
    ]
    assert scores[1]["clipscore"]["score"] == pytest.approx(np.mean(alone), abs=1e-3)
    assert (far / "scores.png").exists() and "fid" in (far / "scores.md").read_text()


def test_what_cannot_be_measured_is_said(tmp_path, capsys, monkeypatch):
    path = folder(tmp_path / "a", 100)
    with pytest.raises(ValueError, match="--detector, --results, --vqa or --metrics"):
        score_images.main(["--images", str(path)])
    for flags in (["--metrics", "kid"], ["--metrics", "redness", "--reference", str(path)]):
        with pytest.raises(SystemExit):
            score_images.main(["--images", str(path), *flags])
        assert "where --metrics has fid or kid" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"expected some of .*clipscore"):
        score_images.main(["--images", str(path), "--metrics", "clip_score"])
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(metrics, "Inception", lambda device: Colours())
    with pytest.raises(FileNotFoundError, match="expected images"):
        Metrics(["fid"], reference=str(tmp_path / "empty"))


def test_fid_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        Metrics(["fid"], reference=str(folder(tmp_path / "photos", 110)))


def test_a_table_leaves_out_what_a_folder_has_not():
    one = {"overall": 0.5, "low": 0.4, "high": 0.6, "categories": {}, "metrics": {}}
    small = {"score": 0.00123456, "low": 0.001, "high": 0.0015}
    other = {"metrics": {"kid": small, "ocr": {"score": 0.25}, "fid": {"score": 23.456}}}
    lines = table({"one": one, "other": other}).splitlines()
    assert lines[0] == "| | overall | kid | ocr | fid |"
    assert lines[2] == "| one | 0.500 [0.400, 0.600] | | | |"
    assert lines[3] == "| other | | 0.001235 [0.001000, 0.001500] | 0.2500 | 23.46 |"


def test_rewards_of_the_training_commands_are_metrics(tmp_path):
    path = folder(tmp_path / "a", 100, sides=(8, 9))
    files = image_files(path)
    rows = [{"prompt": str(i)} for i in range(len(files))]
    found = Metrics(["jpeg_compressibility"])(files, rows)
    sizes = [
        float(rewards.jpeg_compressibility(metrics.read(file)[None] / 127.5 - 1, [""]))
        for file in files
    ]
    assert found["jpeg_compressibility"]["score"] == pytest.approx(np.mean(sizes))
