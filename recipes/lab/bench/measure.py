"""What the benches share: time of runs that take turns, peak memory in a process of its own."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Run = Callable[[], object]


def in_turns(
    runs: Mapping[str, Run], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run in each round, by the clock; in a round each runs once."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> str:
    """Median and quartiles of times / base, round by round."""
    ratios = [one / other for one, other in zip(times, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def growth(run: Run, number: int) -> float:
    """MiB that the resident set's peak grows by in a number of runs, in a fresh process (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = _resident_mib("VmRSS")
    for _ in range(number):
        run()
    return _resident_mib("VmHWM") - before


def _resident_mib(entry: str) -> float:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith(entry)) / 1024


def peak(bench: str, *arguments: str) -> float:
    """The growth that a bench of this folder prints, started as a process of its own."""
    command = [sys.executable, "-m", f"recipes.lab.bench.{bench}", *arguments]
    # Freed blocks go back to the system at once: the peak is the tensors', not a reserve.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.check_output(command, env=settings).split()[-1])
