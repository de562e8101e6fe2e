"""A script's main, its errors in one line, and the command that was given or goes on."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def debugging() -> bool:
    """Whether tracebacks are shown: `--debug` on the command line."""
    return not {"--debug", "--debug=true"}.isdisjoint(sys.argv)


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
        if debugging() or not _raised_here(error):
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
