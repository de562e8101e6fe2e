"""A recipe's options: one frozen dataclass gives the flags, the YAML file's keys, and their checks.

    @dataclass(frozen=True)
    class Options(TrainingOptions):
        TITLE = "Diffusion-DPO"        # of its own options in --help; "{title}" in a help text
        beta: float = option(5000.0, "Strength of the pull to the reference.", above=0)
        learning_rate: float = 1e-4    # a new default: the help text and the range stay

    options = parse(Options, __doc__)  # defaults, then --config FILE, then the command line

transformers.HfArgumentParser makes the flags: `--train_batch_size` and `--train-batch-size` are the
same, and `--full` is `--full true`. A class with a `SECTION` is a group of its own in --help; the
fields of the other classes come first. The module's docstring is the description.
"""

from __future__ import annotations

import difflib
import inspect
import operator
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from transformers import HfArgumentParser

from run import stop
from run.messages import quiet_libraries

Chosen = TypeVar("Chosen", bound="Checked")
_LIMITS = {"above": operator.gt, "below": operator.lt,
           "at_least": operator.ge, "at_most": operator.le}  # fmt: skip


def option(default: Any, meaning: str, **limits: float) -> Any:
    """A field: default, a sentence for --help, limits (above, below, at_least, at_most).

    A list is an option with several values on the command line.
    """
    unknown = set(limits) - set(_LIMITS)
    if unknown:
        raise TypeError(f"limits: expected some of {list(_LIMITS)}, got {sorted(unknown)}.")
    about = {"help": meaning, **limits}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Checked:
    """The base of all options: made only with numbers within their limits."""

    TITLE = ""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, about = getattr(self, one.name), _about(type(self), one.name)
            for word, holds in _LIMITS.items():
                if word in about and value is not None and not holds(value, about[word]):
                    limit = f"{word.replace('_', ' ')} {about[word]}"
                    raise ValueError(
                        f"{one.name}: expected {limit}, got {value}. "
                        f"{_meaning(type(self), one.name)}"
                    )


def parse(kind: type[Chosen], doc: str | None, arguments: list[str] | None = None) -> Chosen:
    """Defaults, then the YAML file of --config, then the command line.

    The file's keys are the flags' names; they may stand in tables that are named like the sections.
    From here on, diffusers and transformers show no loading bars.

    Raises:
        SystemExit: an unknown option, or a value of another type or outside its choices or limits.
            One line is printed, and the exit code is 2.
    """
    sections = _sections(kind)
    parser = _Parser(
        [_CONFIG, *(_group(kind, title, names) for title, names in sections.items())],
        description=doc,
        usage="%(prog)s [options]",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    given = parser.parse_args(arguments)
    if given.config is not None:
        parser.source = f"{given.config}: "
        try:
            table = yaml.load(
                given.config.read_text(), yaml.BaseLoader
            )  # texts, as a command line's
            of_file = parser.parse_args(flags(table or {}, sections))
        except (OSError, yaml.YAMLError, ValueError) as error:
            parser.error(" ".join(str(error).split()))
        if of_file.config is not None:
            parser.error("config: expected no further file in a file.")
        parser.source = ""
        given = parser.parse_args(arguments, of_file)
    stop.debugging |= given.debug  # a study may have asked for it
    try:
        options = kind(**{one.name: getattr(given, one.name) for one in fields(kind)})
    except ValueError as error:
        parser.error(str(error))
    quiet_libraries()
    return options


def flags(table: Any, sections: Mapping[str, Any] | None = None) -> list[str]:
    """The command line of a table of options, some of them in tables named like `sections`."""
    if not isinstance(table, Mapping):
        raise ValueError(f"expected a table of options, got {table!r}.")
    found: list[str] = []
    for key, value in table.items():
        if isinstance(value, Mapping) and key in (sections or {}):
            found += flags(value)
        elif isinstance(value, (Mapping, list)):
            raise ValueError(f"{key}: expected one value, got {value!r}.")
        else:
            found.append(f"--{key}={value}")
    return found


def did_you_mean(name: str, known: Iterable[str], dashes: str = "") -> str:
    """A question with the known names like it, or of which it is the initials; "" for none."""
    name, known = name.lstrip("-").replace("-", "_"), list(known)
    near = [one for one in known if "".join(part[:1] for part in one.split("_")) == name]
    near = difflib.get_close_matches(name, known) or near
    return f"; did you mean {' or '.join(dashes + one for one in near)}?" if near else ""


class _Parser(HfArgumentParser):
    """Errors in one line, which name the file that they are in and options like the unknown one."""

    source = ""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0]
            self.error(f"unknown option {name}{did_you_mean(name, vars(found), '--')}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {self.source}{message} (see --help)\n")


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Each flag once, with the kind of its value, below the description as it was written."""

    def add_argument(self, action: Action) -> None:
        # HfArgumentParser's second flag for a bool that is true by default.
        if action.option_strings[0] != f"--no_{action.dest}":
            super().add_argument(action)

    def _format_action_invocation(self, action: Action) -> str:
        names = ", ".join(one for one in action.option_strings if "-" not in one[2:])
        kinds: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "FILE"}
        if action.choices:
            return f"{names} {{{','.join(action.choices)}}}"
        value = "[BOOL]" if action.nargs == "?" else kinds.get(action.type, "")
        return f"{names} {value}".rstrip()

    def _get_help_string(self, action: Action) -> str | None:
        bare = action.default is None or action.default == ""
        return action.help if bare else super()._get_help_string(action)


def _sections(kind: type[Checked]) -> dict[str, list[str]]:
    """Section (`kind.TITLE`: the recipe's own) -> the fields that its classes first declare."""
    found: dict[str, list[str]] = {kind.TITLE: []}
    for place, one in enumerate(kind.__mro__):
        later = {
            name for base in kind.__mro__[place + 1 :] for name in inspect.get_annotations(base)
        }
        names = [name for name in inspect.get_annotations(one) if name not in later]
        found.setdefault(vars(one).get("SECTION", kind.TITLE), []).extend(names)
    return found


def _group(kind: type[Checked], title: str, names: list[str]) -> type:
    """A dataclass of some of the fields, as HfArgumentParser reads a group."""
    hints = get_type_hints(kind)
    rows: list[tuple[str, Any, Any]] = []
    for name in names:
        rows.append((name, hints[name], option(_default(kind, name), _meaning(kind, name))))
    return make_dataclass("Group", rows, namespace={"_argument_group_name": title} if title else {})


def _default(kind: type, name: str) -> Any:
    one = kind.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return one.default if one.default is not MISSING else one.default_factory()


_CONFIG_HELP = "YAML file with any of these options; the command line wins."
_DEBUG_HELP = "Show the traceback of an error, in place of its one line."
_CONFIG = make_dataclass(
    "Config",
    [
        ("config", Path | None, field(default=None, metadata={"help": _CONFIG_HELP})),
        ("debug", bool, field(default=False, metadata={"help": _DEBUG_HELP})),
    ],
)


def _about(kind: type, name: str) -> Mapping[str, Any]:
    """Help and limits of a field: its own, or those of the class whose default it replaces."""
    declared = (getattr(one, "__dataclass_fields__", {}).get(name) for one in kind.__mro__)
    return next(one.metadata for one in declared if one is not None and one.metadata)


def _meaning(kind: type[Checked], name: str) -> str:
    return str(_about(kind, name)["help"]).replace("{title}", kind.TITLE)
