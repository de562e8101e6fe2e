"""Ends a run when it is asked to: by Ctrl-C, by SIGTERM, or because who started it is gone.

with Stop("the run ends after this step").watching() as stop:
    for ...:
        ...
        if stop.asked(accelerator):
            stop.end(accelerator, "step 12", saved, options)
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from run.cli import continued_by

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
    """Processes started in here never see Ctrl-C or SIGTERM: `end_helpers` ends them."""
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


def end_helpers(processes: Iterable[Any]) -> None:
    """Kills processes of `signals_kept`, where they are not asked to end in order."""
    # torch's watch of them would call it a fault.
    inside = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if inside else None
    for one in processes:
        one.kill()
        one.join()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


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
