"""log.jsonl as a tracker of accelerate's, for a loop that is not ours: trl's DDPO."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers

from run.log import (
    USED,
    append_line,
    flat,
    lines_of,
    missing_tracker,
    tracker_settings,
    used_since,
)


def extra_tracker(options: Any, first: int) -> GeneralTracker:
    """The tracker that was asked for in addition to log.jsonl, for steps from the first on."""
    if options.report_to not in LOGGER_TYPE_TO_CLASS or not filter_trackers(
        [options.report_to], options.output_dir
    ):
        raise missing_tracker(options.report_to)
    kind: Any = LOGGER_TYPE_TO_CLASS[options.report_to]
    where = {"logging_dir": options.output_dir} if kind.requires_logging_directory else {}
    settings = tracker_settings(options.report_to, first)
    tracker: GeneralTracker = kind("agsm-loss", **where, **settings)
    if hasattr(tracker, "start"):  # newer accelerate's
        tracker.start()
    tracker.store_init_configuration(vars(options))
    return tracker


# trl's names, as the other recipes have them.
_NAMES = {"reward_mean": "reward/mean", "reward_std": "reward/std"}


class JsonLines(GeneralTracker):
    """accelerate's tracker to log.jsonl: a line for all that is logged at a step.

    extra: another tracker, which is given the same scalars (trl logs tensors, arrays and a nested
    config, which not all trackers take).
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.extra: GeneralTracker | None = None
        self.step = 0
        self.line: dict[str, Any] = {}
        self.last: dict[str, float] = {}
        self.rewards: dict[str, list[float]] = {}  # of an epoch's batches, by the name in the log
        lines = lines_of(file)  # of the run that is resumed
        self.began = time.time() - (json.loads(lines[-1]).get("seconds", 0.0) if lines else 0.0)

    @property
    def tracker(self) -> Path:
        return self.file

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The recipe writes options.json."""

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Scalars only; trl also logs the rewards one by one."""
        if step != self.step:
            self.flush()
        self.step = self.step if step is None else step
        scalars = {_NAMES.get(name, name): value.item() if hasattr(value, "item") else value
                   for name, value in values.items() if getattr(value, "ndim", 0) == 0}  # fmt: skip
        if "reward/mean" in scalars:
            scalars |= {name: sum(means) / len(means) for name, means in self.rewards.items()}
            self.rewards.clear()
        self.line |= scalars
        if self.extra is not None:
            self.extra.log(scalars, step=self.step)

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """A line of its own."""
        self.flush()
        self._append(step, values)
        if self.extra is not None:
            self.extra.log(flat(values), step=step)

    def repeat(self, first: int) -> None:
        """Gives the other tracker what the log has of that step: a resumed one drops the step."""
        for line in map(json.loads, lines_of(self.file)):
            if self.extra is not None and line["step"] >= first:
                values = {name: one for name, one in line.items() if name not in ("step", *USED)}
                self.extra.log(flat(values), step=line["step"])

    def flush(self) -> None:
        """What has been logged so far is written."""
        if self.line:
            self._append(self.step, self.line)
            self.last |= self.line
        self.line = {}

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        append_line(self.file, {"step": step, **used_since(self.began), **values})

    def shown(self) -> dict[str, float]:
        """For the progress bar."""
        now = {**self.last, **self.line}
        return {name: now[name] for name in ("reward/mean", "loss") if name in now}

    def finish(self) -> None:
        self.flush()
        if self.extra is not None:
            self.extra.finish()
