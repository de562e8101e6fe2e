"""The loop: rate, accumulation, checkpoints of trainable parameters, resume, what stops it."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from loop_runs import OPTIONS, Model, Numbers, entries, killed_at, options, resumed, run, same
from safetensors.torch import load_file
from torch import nn

from run import checkpoints, log, loop


def test_resume_gives_the_run_that_was_not_stopped(tmp_path):
    whole, counted = run(
        options(tmp_path / "whole", gradient_accumulation_steps=2, lr_decay_steps=3)
    )
    assert counted.steps == 6

    cut = options(tmp_path / "cut", gradient_accumulation_steps=2, lr_decay_steps=3)
    with pytest.raises(KeyboardInterrupt):
        run(cut, at=killed_at(9))  # in step 5; step 4's checkpoint is the second
    # As if it had been killed while it wrote that one.
    (tmp_path / "cut" / "checkpoints" / "checkpoint_4" / "complete").unlink()
    after, counted = run(resumed(cut))
    assert counted.steps == 6 and same(whole, after)
    assert entries(tmp_path / "cut") == entries(tmp_path / "whole")


def test_the_log_tells_steps_scores_and_means(tmp_path):
    run(options(tmp_path, gradient_accumulation_steps=2))
    told = entries(tmp_path)
    assert [line["step"] for line in told] == [0, 2, 4, 6]
    assert [line.get("scores") for line in told] == [{"at": 0}, None, {"at": 4}, {"at": 6}]
    assert [line.get("index") for line in told[1:]] == [1.5, 5.5, 9.5]


def test_the_log_tells_a_gpus_peak_memory(tmp_path, monkeypatch):
    file = tmp_path / "log.jsonl"
    log.Log(file).write(1, {"loss": 2.0})
    peaks = [3.5 * 2**30]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.append(2**30))
    log.Log(file).write(2, {"loss": 1.0})
    log.Log(file).write(3, {"loss": 1.0})
    assert entries(tmp_path) == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "gpu_memory": 3.5, "loss": 1.0},
        {"step": 3, "gpu_memory": 1.0, "loss": 1.0},
    ]


def test_only_trainable_parameters_are_saved(tmp_path):
    run(options(tmp_path))
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [one.name for one in saved] == ["checkpoint_4", "checkpoint_6"]  # the two latest
    weights = load_file(saved[-1] / checkpoints.WEIGHTS)
    assert set(weights) == {"layer.weight", "layer.bias"}
    assert not list(saved[-1].glob("*model*"))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(options(tmp_path))
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        run(options(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    def explodes(batch, index, model):
        return model(batch.pixels).sum() * (float("nan") if index == 3 else 0.0)

    with pytest.raises(FloatingPointError, match="step 4"):
        run(options(tmp_path), loss=explodes)
    assert (tmp_path / "checkpoints" / "checkpoint_2" / "complete").exists()


def test_accumulated_gradients_are_the_mean(tmp_path):
    once, _ = run(options(tmp_path / "a", max_train_steps=1, gradient_accumulation_steps=3))
    torch.manual_seed(0)
    model = Model()
    batches = torch.cat([Numbers()[i].pixels for i in range(3)])
    optimizer = torch.optim.AdamW(model.layer.parameters(), lr=1e-3)
    model(batches).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for one, other in zip(once.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_rate_rises_holds_and_falls():
    chosen = OPTIONS.make(max_train_steps=100, lr_warmup_steps=10, lr_decay_steps=20)
    rates = [loop.rate(step, chosen) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[80] == 1.0
    assert rates[90] == 0.5 and rates[100] == 0.0


class Killed(Numbers):
    """One of two processes kills itself at batch 4; the other is busy then, and deaf to SIGTERM."""

    def __init__(self, checkpoint):
        super().__init__()
        self.checkpoint = checkpoint

    def __getitem__(self, index):
        if index == 4:
            while not self.checkpoint.exists():  # of the batches before, which are fetched ahead
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 5:
            time.sleep(600)
        return super().__getitem__(index)


def test_workers_prepare_batches_and_the_run_ends_when_one_is_killed(tmp_path):
    alone, _ = run(options(tmp_path / "a", max_train_steps=4))
    helped, before = [], multiprocessing.active_children()

    def after(step, counter, model, _):
        helped[:] = [model.layer.weight.detach().clone()]

    chosen = options(tmp_path / "b", dataloader_num_workers=2)
    with pytest.raises(RuntimeError, match=r"dataloader_num_workers: .* code -9.*checkpoint_4\."):
        run(chosen, data=Killed(tmp_path / "b/checkpoints/checkpoint_4/complete"), after=after)
    assert torch.equal(alone.layer.weight, helped[0])
    assert multiprocessing.active_children() == before


def test_a_tracker_gets_nested_scores_by_name():
    flat = log.flat({"loss": 1.0, "scores": {"overall": 0.5, "reasons": {"extra": 2}}, "x": "y"})
    assert flat == {"loss": 1.0, "scores/overall": 0.5, "scores/reasons/extra": 2}


def test_a_tracker_is_used_or_refused(tmp_path):
    run(options(tmp_path / "on", report_to="tensorboard"))
    assert list((tmp_path / "on").rglob("events.out.tfevents*"))
    with (
        pytest.warns(UserWarning, match="no supported trackers"),
        pytest.raises(ValueError, match="comet_ml"),
    ):
        run(options(tmp_path / "off", report_to="comet_ml"))
