"""Ends a run when it is asked to: by Ctrl-C, by SIGTERM, or because who started it is gone.

with Stop("the run ends after this step").watching() as stop:
    for ...:
        ...
        if stop.asked(accelerator):
            stop.end(accelerator, "step 12", saved, options)
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Which signal has asked the loop to end, if one has.

    message: what is printed at once; "" prints nothing.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        self.signal: int | None = None
        self.since = 0.0

    @contextmanager
    def watching(self) -> Iterator[Stop]:
        """Keeps SIGINT and SIGTERM for the loop; SIGINT once more, a second later, interrupts."""
        # Python runs handlers in the main thread alone.
        inside = threading.current_thread() is threading.main_thread()
        before = {one: signal.signal(one, self._keep) for one in SIGNALS} if inside else {}
        try:
            yield self
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        # A launcher may pass on the Ctrl-C that its processes got as well.
        if self.signal is not None and number == signal.SIGINT and time.time() > self.since + 1:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self.since = number, time.time()
            if self.message:  # by the descriptor: a handler may interrupt a print
                os.write(2, f"\n{signal.Signals(number).name}: {self.message}\n".encode())

    def asked(self, accelerator: Any) -> bool:
        """Whether a process of the run has been asked to end; to be called on all of them."""
        if self.signal is not None:
            accelerator.set_trigger()
        return bool(accelerator.check_trigger())

    def exit(self) -> SystemExit:
        """The exception that ends the process as shells expect it: 130 or 143."""
        return SystemExit(128 + (self.signal or signal.SIGTERM))

    def end(self, accelerator: Any, after: str, saved: Path, options: Any) -> NoReturn:
        """Ends the run, and prints the command that continues it."""
        if accelerator.is_main_process:
            command = continued_by(options)
            same = " with accelerate's options as before" if command.startswith("acc") else ""
            print(
                f"Stopped after {after}, saved as {saved}. To continue{same}: {command}", flush=True
            )
        accelerator.end_training()
        raise self.exit()


@contextmanager
def signals_kept() -> Iterator[None]:
    """Processes started in here never see Ctrl-C or SIGTERM: who started them ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it would take the signals out of the mask again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


PIPED = "AGSM_ENDS_WITH_STDIN"
"""Set in the environment of a process whose standard input is a pipe of the one that started it."""


def end_with_parent() -> None:
    """Ends a `PIPED` process by SIGTERM when its standard input ends, as its parent has then."""
    if PIPED not in os.environ:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def command_of(options: Any, *more: str) -> str:
    """The command of a recipe's run, or one that does the same, with more to it."""
    module: Any = sys.modules[type(options).__module__]
    given = sys.argv[1:]
    if module.__name__ != "__main__":  # another program has called the recipe
        changed = (one for one in fields(options) if getattr(options, one.name) != one.default)
        given = [f"--{one.name}={getattr(options, one.name)}" for one in changed]
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    start = ["accelerate", "launch"] if launched else ["python"]
    return shlex.join([*start, os.path.relpath(module.__file__), *given, *more])


def continued_by(options: Any) -> str:
    """The command that goes on with a recipe's run."""
    resume = ("--resume_from_checkpoint", "latest")
    return command_of(options, *(() if options.resume_from_checkpoint else resume))


debugging = False
"""Whether `command` shows the traceback of every error (`--debug`)."""


def debug_flags() -> list[str]:
    """For commands that this one starts."""
    return ["--debug"] if debugging else []


def command(main: Callable[[], None], left: str = "without a checkpoint") -> None:
    """Runs a script's main; errors that its user can mend are one line instead of a traceback.

    Those are what this repository's own code raises; others keep their traceback.

    left: what a Ctrl-C leaves behind, to be printed.
    """
    name = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{name}: stopped at once, {left}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        if debugging or not _raised_here(error):
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _raised_here(error: Exception) -> bool:
    import agsm_loss
    from agsm_loss import integrations

    ours = [Path(one.__file__ or "").resolve().parent for one in (agsm_loss, integrations)]
    ours.append(Path(__file__).resolve().parents[1])
    place = traceback.extract_tb(error.__traceback__)[-1]
    inside = any(folder in Path(place.filename).resolve().parents for folder in ours)
    return inside and (place.line or "").startswith("raise ")
