"""A script's main, its errors in one line, and the command that was given or goes on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

DEBUG = "AGSM_DEBUG"
"""1 in the environment shows the traceback of an error, in place of its one line."""

# Errors of a program. All others, whoever raises them, tell of what it was given: options, files,
# the hub, the network, a disk, numbers, memory.
_BUGS = (AssertionError, AttributeError, LookupError, NameError, NotImplementedError, OverflowError,
         RecursionError, StopIteration, SyntaxError, TypeError, ZeroDivisionError)  # fmt: skip


def command(main: Callable[[], None], left: str = "without a checkpoint") -> None:
    """Runs a script's main; an error that is not a bug's is one line instead of a traceback.

    left: what a Ctrl-C leaves behind, to be printed.
    """
    name = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{name}: stopped at once, {left}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, _BUGS) or os.environ.get(DEBUG) == "1":
            raise
        print(f"{name}: error: {one_line(error)} ({DEBUG}=1 shows the traceback)", file=sys.stderr)
        raise SystemExit(1) from None


def one_line(error: BaseException) -> str:
    """An error's text in one line of at most 2,000 characters."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:  # of a process that prepares batches
        text = text.splitlines()[-1]
    return shorten(text, 2000, placeholder=" ...")


def command_of(options: Any, *more: str) -> str:
    """The command of a recipe's run, or one that does the same, with more to it.

    options: as of `run.options`.
    """
    module: Any = sys.modules[options.of.module]
    given = sys.argv[1:]
    if module.__name__ != "__main__":  # another program has called the recipe
        defaults = options.of.defaults
        changed = {name: one for name, one in vars(options).items() if one != defaults[name]}
        given = [f"--{name}={value}" for name, value in changed.items()]
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    start = ["accelerate", "launch"] if launched else ["python"]
    name = module.__spec__.name if module.__spec__ is not None else ""
    script = [os.path.relpath(module.__file__)]
    if "." in name:  # of the lab, whose commands are started by `python -m`
        script = ["-m", f"recipes.{name.removeprefix('recipes.')}"]
    return shlex.join([*start, *script, *given, *more])


def continued_by(options: Any) -> str:
    """The command that goes on with a recipe's run."""
    resume = ("--resume_from_checkpoint", "latest")
    return command_of(options, *(() if options.resume_from_checkpoint else resume))
