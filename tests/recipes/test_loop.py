"""The loop: rate, accumulation, checkpoints of trainable parameters, resume, what stops it."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from agsm_loss import draws
from common import loop
from common.settings import LoopOptions


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return torch.randn(4, 3, generator=draws("numbers", index))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        return self.layer(self.frozen(x))


class Counter:
    def __init__(self):
        self.steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def run(options, *, loss=None, dies_at=None):
    """Trains the model; returns it and what the hooks counted."""
    accelerator = loop.start(options)
    bare = Model()
    optimizer = torch.optim.AdamW(
        [p for p in bare.parameters() if p.requires_grad], lr=options.learning_rate
    )
    model, optimizer = accelerator.prepare(bare, optimizer)
    counter = Counter()

    def error(batch, index):
        if index == dies_at:
            raise KeyboardInterrupt
        return model(batch).square().mean(), {"index": torch.tensor(float(index))}

    def update_ema():
        counter.steps += 1

    hooks = loop.Hooks(
        loss or error, lambda step: {"at": step}, lambda: None, update_ema, (counter,), True
    )
    loop.train(options, accelerator, model, optimizer, Numbers(), hooks)
    return bare, counter


def options(folder, **changes):
    defaults = LoopOptions(
        output_dir=str(folder),
        max_train_steps=6,
        logging_steps=2,
        validation_steps=4,
        checkpointing_steps=2,
    )
    return replace(defaults, **changes)


def entries(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_resume_gives_the_run_that_was_not_stopped(tmp_path):
    whole, counted = run(
        options(tmp_path / "whole", gradient_accumulation_steps=2, lr_decay_steps=3)
    )
    assert counted.steps == 6

    cut = options(tmp_path / "cut", gradient_accumulation_steps=2, lr_decay_steps=3)
    with pytest.raises(KeyboardInterrupt):
        run(cut, dies_at=9)  # in step 5; step 4's checkpoint is the second
    # As if it had been killed while it wrote that one.
    (tmp_path / "cut" / "checkpoints" / "checkpoint_1" / "complete").unlink()
    resumed, counted = run(replace(cut, resume_from_checkpoint="latest"))
    assert counted.steps == 6
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert entries(tmp_path / "cut") == entries(tmp_path / "whole")


def test_the_log_tells_steps_scores_and_means(tmp_path):
    run(options(tmp_path, gradient_accumulation_steps=2))
    told = entries(tmp_path)
    assert [line["step"] for line in told] == [0, 2, 4, 6]
    assert [line.get("scores") for line in told] == [{"at": 0}, None, {"at": 4}, {"at": 6}]
    assert [line.get("index") for line in told[1:]] == [1.5, 5.5, 9.5]


def test_only_trainable_parameters_are_saved(tmp_path):
    run(options(tmp_path))
    saved = sorted((tmp_path / "checkpoints").glob("checkpoint_*"), key=loop._number)
    assert len(saved) == 2  # the two latest
    from safetensors.torch import load_file

    assert set(load_file(saved[-1] / f"0_{loop.WEIGHTS}")) == {"layer.weight", "layer.bias"}
    assert not list(saved[-1].glob("*model*"))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(options(tmp_path))
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        run(options(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    def explodes(batch, index):
        return batch.sum() * (float("nan") if index == 3 else 0.0), {}

    with pytest.raises(FloatingPointError, match="step 4"):
        run(options(tmp_path), loss=lambda batch, index: explodes(batch.requires_grad_(), index))
    assert (tmp_path / "checkpoints" / "checkpoint_0" / "complete").exists()


def test_accumulated_gradients_are_the_mean(tmp_path):
    once, _ = run(options(tmp_path / "a", max_train_steps=1, gradient_accumulation_steps=3))
    torch.manual_seed(0)
    model = Model()
    batches = torch.cat([Numbers()[i] for i in range(3)])
    optimizer = torch.optim.AdamW(model.layer.parameters(), lr=1e-3)
    model(batches).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for one, other in zip(once.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_rate_rises_holds_and_falls():
    chosen = LoopOptions(max_train_steps=100, lr_warmup_steps=10, lr_decay_steps=20)
    rates = [loop.rate(step, chosen) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[80] == 1.0
    assert rates[90] == 0.5 and rates[100] == 0.0


def test_batches_can_be_prepared_by_workers(tmp_path):
    alone, _ = run(options(tmp_path / "a", max_train_steps=2))
    helped, _ = run(options(tmp_path / "b", max_train_steps=2, dataloader_num_workers=1))
    assert torch.equal(alone.layer.weight, helped.layer.weight)


def test_a_tracker_gets_nested_scores_by_name():
    flat = loop.flat({"loss": 1.0, "scores": {"overall": 0.5, "reasons": {"extra": 2}}, "x": "y"})
    assert flat == {"loss": 1.0, "scores/overall": 0.5, "scores/reasons/extra": 2}


def test_a_tracker_is_used_or_refused(tmp_path):
    run(options(tmp_path / "on", report_to="tensorboard"))
    assert list((tmp_path / "on").rglob("events.out.tfevents*"))
    with (
        pytest.warns(UserWarning, match="no supported trackers"),
        pytest.raises(ValueError, match="comet_ml"),
    ):
        run(options(tmp_path / "off", report_to="comet_ml"))


def test_the_launchers_precision_is_not_overruled_in_silence(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    options = LoopOptions(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="mixed_precision: expected bf16, as accelerate's"):
        loop.start(options)
