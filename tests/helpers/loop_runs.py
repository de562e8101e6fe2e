"""The shared loop on a layer of three weights: quick runs to kill, resume and compare."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from agsm_loss._random import draws
from run import loop
from run.settings import LoopOptions


@dataclass
class Batch:
    pixels: Any
    image_ids: list
    captions: list


class Numbers(torch.utils.data.Dataset):
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
    finished: list = field(default_factory=list)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def run(options, *, loss=None, at=None, after=None, scaler=None):
    """Trains the model; returns it and what the hooks counted.

    loss: batch, index, the model -> the loss, in place of the mean square of its output.
    at: micro-step -> called before it. after: (step, model), called after each optimizer step.
    """
    accelerator = loop.start(options)
    accelerator.scaler = scaler
    bare = Model()
    optimizer = torch.optim.AdamW(
        [p for p in bare.parameters() if p.requires_grad], lr=options.learning_rate
    )
    model, optimizer = accelerator.prepare(bare, optimizer)
    counter = Counter()

    def error(batch, index):
        if at is not None:
            at(index)
        value = loss(batch, index, model) if loss else model(batch.pixels).square().mean()
        return value, {"index": torch.tensor(float(index))}

    def update_ema():
        counter.steps += 1
        if after is not None:
            after(counter.steps, bare)

    hooks = loop.Hooks(
        error,
        lambda step: {"at": step},
        lambda: counter.finished.append(1),
        update_ema,
        (counter,),
        True,
    )
    loop.train(options, accelerator, model, optimizer, Numbers(), hooks)
    return bare, counter


def killed_at(number):
    """For `run(at=...)`: ends it as if it had been killed."""

    def at(index):
        if index == number:
            raise KeyboardInterrupt

    return at


def options(folder, **changes):
    defaults = LoopOptions(
        output_dir=str(folder),
        max_train_steps=6,
        logging_steps=2,
        validation_steps=4,
        checkpointing_steps=2,
    )
    return replace(defaults, **changes)


def resumed(chosen, **changes):
    return replace(chosen, resume_from_checkpoint="latest", **changes)


def entries(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)
