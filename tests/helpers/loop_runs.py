"""The shared loop on a layer of three weights: quick runs to kill, resume and compare."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from agsm_loss._random import draws
from run import loop
from run.options import OptionSet


@dataclass
class Batch:
    pixels: Any
    image_ids: list
    captions: list


class Numbers(torch.utils.data.Dataset):
    def __init__(self, fingerprint=""):
        self.fingerprint = fingerprint

    def __getitem__(self, index):
        pixels = torch.randn(4, 3, generator=draws("numbers", index))
        return Batch(pixels, [index, index + 100], [f"caption {index}", "another"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        return self.layer(self.frozen(x))


@dataclass
class Counter:
    steps: int = 0
    average: Any = field(default_factory=lambda: torch.zeros(2))

    def state_dict(self):
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state):
        self.steps, self.average = state["steps"], state["average"]


class Trained:
    """What a `loop.Run` trains; its scores tell the step."""

    def __init__(self, module, optimizer, fingerprint):
        self.module, self.optimizer, self.fingerprint = module, optimizer, fingerprint

    def validate(self, step):
        return {"at": step}

    def summary(self):
        return "three weights", {}


def run(options, *, loss=None, at=None, after=None, scaler=None, data="", model=""):
    """Trains the model; returns it and how often the EMA was updated.

    loss: batch, index, the model -> the loss, in place of the mean square of its output.
    at: micro-step -> called before it.
    after: (step, counter, model, optimizer), called after each optimizer step.
    data: the batches, or their fingerprint. model: the fingerprint of it.
    """
    with loop.Run(options) as running:
        running.accelerator.scaler = scaler
        bare = Model()
        optimizer = torch.optim.AdamW(
            [p for p in bare.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-2
        )
        module, optimizer = running.accelerator.prepare(bare, optimizer)
        counter = Counter()

        def update_ema():
            counter.steps += 1
            if after is not None:
                after(counter.steps, counter, bare, optimizer)

        counter.update_ema = update_ema
        batches = Numbers(data) if isinstance(data, str) else data
        for index, batch in running.steps(Trained(module, optimizer, model), batches, counter):
            if at is not None:
                at(index)
            value = loss(batch, index, module) if loss else module(batch.pixels).square().mean()
            running.backward(value, {"index": torch.tensor(float(index))})
    return bare, counter


def killed_at(number):
    """For `run(at=...)`: ends it as if it had been killed."""

    def at(index):
        if index == number:
            raise KeyboardInterrupt

    return at


OPTIONS = OptionSet(loop.RunOptions, loop.LoopOptions)


def options(folder, **changes):
    few = {
        "max_train_steps": 6,
        "logging_steps": 2,
        "validation_steps": 4,
        "checkpointing_steps": 2,
    }
    return OPTIONS.make(**{"output_dir": str(folder), **few, **changes})


def resumed(chosen, **changes):
    return OPTIONS.make(**{**vars(chosen), "resume_from_checkpoint": "latest", **changes})


def entries(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)
