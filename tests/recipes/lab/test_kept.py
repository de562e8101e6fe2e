"""The study of guidance kept: the layout, the rivals' losses, the scale that a model acts like."""

from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recipe_runs import log

from agsm_loss import AGSMLoss, Bank
from lab import train_rivals
from lab.studies import accuracy, report
from lab.train_rivals import LevelTemperature, Rival
from lab.world.captions import metadata
from lab.world.detect import in_corner
from lab.world.prompts import corner_scenes, rows, scenes
from lab.world.render import render
from lab.world.score import summarize, verdicts
from lab.world.task import World
from model.pipeline import TextToImage
from train_agsm import Inputs


def test_corner_scenes_are_few_right_and_in_the_lower_left():
    drawn = list(islice(corner_scenes(3, 5), 40))
    images = np.stack([render(scene) for _, scene in drawn])
    judged = verdicts(images, [metadata(spec) for spec, _ in drawn], corner=True)
    assert all(one.correct and one.cornered for one in judged)
    assert summarize(judged)["cornered"] == 1.0
    assert len({image.tobytes() for image in images}) == 5
    anywhere = [in_corner(render(scene)) for _, scene in islice(scenes(0), 40)]
    assert 0 < sum(anywhere) < 30 and not in_corner(np.full((24, 24, 3), 128, np.uint8))


def test_the_task_trains_on_them_and_says_how_many_are_there():
    settings = {"data": "world:corner:5", "seed": 1}
    task = World.of(settings, 2)
    batch = task.images(16, 1)[0]
    assert len({image.numpy().tobytes() for image in batch.pixels}) <= 5
    assert batch.captions == task.images(16, 1)[0].captions and all(batch.hard)
    asked = rows("validation", 1)
    blank = np.full((len(asked), 24, 24, 3), 128, np.uint8)
    assert task.summarize(task.judge(blank, asked))["cornered"] == 0.0
    assert "cornered" not in summarize(World.of({"data": "world"}, 1).judge(blank, asked))
    with pytest.raises(ValueError, match="data: expected world for preference pairs"):
        task.pairs(2, 0)
    for wrong in ("world:corner:", "world:corner:x", "world:nowhere", "worlds"):
        with pytest.raises(ValueError, match="data: expected world or world:corner:N"):
            World.of({"data": wrong}, 1)


def text_alone(noisy, timesteps, text, bank, **image):
    """A denoiser whose prediction is its text; the untrained model's (`Bank.OFF`) is 0."""
    return text["text"] * (bank[0] != int(Bank.OFF))


def rival(name, weight=1.0):
    torch.manual_seed(0)
    own, edited = torch.randn(2, 3, 4, dtype=torch.float64)
    own.requires_grad_()
    null, target = torch.randn(1, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    captions = {"null": {"text": null}, "hard_negatives": [[7], [8], [9]]}
    text = {"text": torch.cat([own, edited])}
    inputs = Inputs(target, torch.zeros(3), target, text, {}, captions)
    options = SimpleNamespace(objective=name, rival_weight=weight, agsm_guidance_scale=3.0)
    made = Rival(options, SimpleNamespace(denoiser=text_alone, reference=nullcontext))
    loss, _ = made(inputs)
    return loss, torch.autograd.grad(loss, own)[0], own.detach(), edited, null, target


def test_the_trainers_losses_are_agsm_but_for_a_factor():
    """musubi-tuner's and ai-toolkit's has 9 times the value, 3 times AGSM's gradient at s = 3;
    DiffSynth-Studio's the value, a third of the gradient."""
    loss, gradient, own, _, null, target = rival("target")
    pred = own.clone().requires_grad_()
    both = torch.stack([pred, null.expand_as(pred)], 1)
    ours = AGSMLoss(guidance_scale=3)(both, both.detach(), target)
    (same,) = torch.autograd.grad(ours, pred)
    torch.testing.assert_close(loss, 9 * ours)
    torch.testing.assert_close(gradient, 3 * same)
    loss, gradient, *_ = rival("prediction")
    torch.testing.assert_close(loss, ours)
    torch.testing.assert_close(gradient, same / 3)


def test_the_other_rivals_are_their_formulas():
    loss, _, own, edited, _, target = rival("drift", 0.3)
    torch.testing.assert_close(loss, F.mse_loss(own, target) + 0.3 * own.square().mean())
    loss, _, own, *_ = rival("contrastive", 0.05)
    torch.testing.assert_close(
        loss, F.mse_loss(own, target) - 0.05 * F.mse_loss(own, target[[2, 0, 1]])
    )
    loss, _, own, edited, _, target = rival("tdpo", 2.0)
    gap = (edited - target).square().mean(1) - (own - target).square().mean(1)
    torch.testing.assert_close(loss, -F.logsigmoid(2 * gap).mean())


def test_tdpo_trains_by_its_command(flow_base, tmp_path):
    flags = ["--model", str(flow_base), "--objective", "tdpo", "--rank", "1", "--num_tokens", "0",
             "--max_train_steps", "1", "--train_batch_size", "2", "--validation_steps", "9",
             "--learning_rate", "0.1"]  # fmt: skip
    with pytest.raises(ValueError, match="tdpo: expected --candidates hard:1"):
        train_rivals.main([*flags, "--output_dir", str(tmp_path / "without")])
    train_rivals.main([*flags, "--candidates", "hard:1", "--output_dir", str(tmp_path / "with")])
    line = log(tmp_path / "with")[0]
    assert line["loss"] == pytest.approx(np.log(2)) and line["grad_norm"] > 0


def test_a_temperature_per_noise_level_is_the_gaps_standard_deviation():
    temperature = LevelTemperature(0.5, momentum=0.5)
    temperature.levels = torch.tensor([0, 0, 7, 7])
    errors = torch.tensor([[0.0, 1, 3], [0, 2, 2], [4, 5, 5], [0, 9, 5]])
    low, high = 0.5 * np.std([1, 3, 2, 2]), 0.5 * np.std([1, 1, 9, 5])
    expected = torch.tensor([low, low, high, high], dtype=torch.float32)
    torch.testing.assert_close(temperature(errors), expected)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    # The mean keeps half of what it had; the masked gap is not in the new half.
    gaps = np.array([1, 3, 2, 2, 1, 3, 2]), np.array([0.5] * 4 + [1.0] * 3)
    mean = np.average(gaps[0], weights=gaps[1])
    low = 0.5 * np.sqrt(np.average((gaps[0] - mean) ** 2, weights=gaps[1]))
    assert temperature(errors, mask)[0] == pytest.approx(low, rel=1e-5)
    again = LevelTemperature(0.5)
    again.load_state_dict(temperature.state_dict())
    torch.testing.assert_close(again.sums, temperature.sums)


def test_the_scale_that_a_model_holds(flow_base, monkeypatch):
    """Of one that knows the data: without words it predicts the noisy image, under a caption 2.5
    times the way from there to the clean one."""
    model, real, targets = TextToImage.load(str(flow_base), torch.float32), accuracy.add_noise, []

    def noised(scheduler, latents, noise, timesteps):
        targets.append(accuracy.regression_target(scheduler, latents, noise, timesteps))
        return real(scheduler, latents, noise, timesteps)

    def denoiser(noisy, timesteps, text, bank):
        empty = model.encode_prompts([""] * len(noisy))
        return 2.5 * targets[-1] * any((text[name] != empty[name]).any() for name in text)

    monkeypatch.setattr(accuracy, "add_noise", noised)
    monkeypatch.setattr(accuracy, "PlainDenoiser", lambda module: denoiser)
    assert accuracy.held_scale(model, 5, seed=0, low=0.5, batch_size=3) == pytest.approx(2.5)
    assert len(targets) == 2


def test_the_report_compares_with_the_best_guided_entry():
    of = {"a": "base", "b": "base", "c": "x", "d": "base"}
    plan = SimpleNamespace(
        sampled={name: {"of": one} for name, one in of.items()},
        scales=lambda name: [1.0 if name == "d" else 2.0],
    )
    scores = {"a": 0.6, "b": 0.7, "c": 0.9, "d": 0.8}
    groups = {name: [{"heldout": {"overall": one}}] for name, one in scores.items()}
    assert report._guided(plan, groups) == "b"
    plan.sampled = {"c": {"of": "x"}}
    assert report._guided(plan, groups) == ""
