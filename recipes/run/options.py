"""A command's options: small dataclasses, each beside the code that reads it, in one set.

    @dataclass(frozen=True)
    class Options:
        beta: float = option(5000.0, "Strength of the pull to the reference.", above=0)

    OPTIONS = OptionSet(Options, RunOptions, ModelOptions, title="Diffusion-DPO", seed=7)

    options = OPTIONS.parse(__doc__)   # defaults, then --config FILE, then the command line
    options.beta, options.seed

transformers.HfArgumentParser makes the flags: `--train_batch_size` and `--train-batch-size` are the
same, and `--full` is `--full true`. A dataclass with an `_argument_group_name` is a section of
--help. The module's docstring is the description.
"""

from __future__ import annotations

import argparse
import difflib
import operator
import os
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from run.log import quiet_libraries

_LIMITS = {"above": operator.gt, "below": operator.lt,
           "at_least": operator.ge, "at_most": operator.le}  # fmt: skip
FIRST = ("model", "data", "prompts", "output_dir", "num_tokens", "rank", "full", "reward",
         "max_train_steps", "train_batch_size", "learning_rate", "agsm_guidance_scale",
         "agsm_weight")  # fmt: skip
"""What people use most: the first in --help."""


def option(default: Any, meaning: str, **limits: float) -> Any:
    """A field: default, a sentence for --help, limits (above, below, at_least, at_most).

    "{title}" in the sentence is the set's. A list is an option with several values on the command
    line.
    """
    unknown = set(limits) - set(_LIMITS)
    if unknown:
        raise TypeError(f"limits: expected some of {list(_LIMITS)}, got {sorted(unknown)}.")
    about = {"help": meaning, **limits}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


def _from_home(value: Any) -> Any:
    """~ as the shell would replace it, which it does not after = and in YAML."""
    if isinstance(value, list):
        return [_from_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


class Chosen(argparse.Namespace):
    """A command's options as attributes; `vars(chosen)` is all of them.

    of: the set that they are of.
    """

    __slots__ = ("of",)
    of: OptionSet

    def __reduce__(self) -> Any:
        """For the processes that prepare batches: the options without their set."""
        return partial(Chosen, **vars(self)), ()


class OptionSet:
    """The options of one command.

    Args:
        kinds: dataclasses of `option`s; the first are the command's own.
        title: stands for "{title}" in their sentences.
        resolve: called with the options, to check them together and to fill in those that follow
            from others; for its errors see `parse`.
        changes: other defaults of the kinds' options, or an `option` with another sentence too.
    """

    def __init__(
        self,
        *kinds: type,
        title: str = "",
        resolve: Callable[[Chosen], None] = lambda options: None,
        **changes: Any,
    ) -> None:
        self.kinds, self.title, self.resolve = kinds, title, resolve
        self._fields: dict[str, Any] = {one.name: one for kind in kinds for one in fields(kind)}
        unknown = sorted(set(changes) - set(self._fields))
        if unknown:
            raise TypeError(f"changes: expected options of {kinds}, got {unknown}.")
        for name, change in changes.items():
            if not isinstance(change, Field):  # a default alone
                change = field(default=change, metadata=self._fields[name].metadata)
            self._fields[name] = change

    @property
    def module(self) -> str:
        """The command's module."""
        return self.kinds[0].__module__

    @property
    def defaults(self) -> dict[str, Any]:
        """Of all options, by name."""
        return {name: self._default(name) for name in self._fields}

    def help_of(self, name: str) -> str:
        """An option's sentence."""
        return str(self._fields[name].metadata["help"]).replace("{title}", self.title)

    def _default(self, name: str) -> Any:
        one = self._fields[name]
        return one.default if one.default is not MISSING else one.default_factory()

    def make(self, **given: Any) -> Chosen:
        """Options with these values, and the defaults.

        Raises:
            ValueError: a number outside its limits, or what `resolve` refuses.
            TypeError: no such option.
        """
        unknown = sorted(set(given) - set(self._fields))
        if unknown:
            raise TypeError(f"options: expected some of {sorted(self._fields)}, got {unknown}.")
        values = {**self.defaults, **given}
        chosen = Chosen(**{name: _from_home(value) for name, value in values.items()})
        chosen.of = self
        for name, value in vars(chosen).items():
            limits = self._fields[name].metadata
            for word, holds in _LIMITS.items():
                if word in limits and value is not None and not holds(value, limits[word]):
                    limit = f"{word.replace('_', ' ')} {limits[word]}"
                    raise ValueError(f"{name}: expected {limit}, got {value}. {self.help_of(name)}")
        self.resolve(chosen)
        return chosen

    def parse(self, doc: str | None, arguments: list[str] | None = None) -> Chosen:
        """Defaults, then the YAML file of --config, then the command line.

        The file's keys are the flags' names; they may stand in tables that are named like the
        sections. From here on, diffusers and transformers show no loading bars.

        Raises:
            SystemExit: an unknown option, or a value of another type or outside its choices or
                limits. One line is printed, and the exit code is 2.
        """
        parser = self._parser(doc)
        given = parser.parse_args(arguments)
        if given.config is not None:
            parser.source = f"{given.config}: "
            try:
                # Texts, as a command line's.
                table = yaml.load(given.config.read_text(), yaml.BaseLoader)
                titles = [getattr(kind, "_argument_group_name", "") for kind in self.kinds]
                of_file = parser.parse_args(flags(table or {}, [self.title, *titles]))
            except (OSError, yaml.YAMLError, ValueError) as error:
                parser.error(" ".join(str(error).split()))
            if of_file.config is not None:
                parser.error("config: expected no further file in a file.")
            parser.source = ""
            given = parser.parse_args(arguments, of_file)
        try:
            chosen = self.make(**{name: getattr(given, name) for name in self._fields})
        except ValueError as error:
            parser.error(str(error))
        quiet_libraries()
        return chosen

    def _group(self, kind: type) -> type:
        """The dataclass as HfArgumentParser takes it: with help texts, and no limits."""
        hints = get_type_hints(kind)
        rows: list[tuple[str, Any, Any]] = [
            (one.name, hints[one.name], option(self._default(one.name), self.help_of(one.name)))
            for one in fields(kind)
        ]
        title = getattr(kind, "_argument_group_name", self.title)
        return make_dataclass(
            kind.__name__, rows, namespace={"_argument_group_name": title} if title else {}
        )

    def _parser(self, doc: str | None) -> _Parser:
        parser = _Parser(
            [_Config, *map(self._group, self.kinds)],
            description=doc,
            usage="%(prog)s [options]",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        first = parser.add_argument_group("most used")
        for group in parser._action_groups:
            for action in list(group._group_actions):
                if action.dest in FIRST and group is not first:
                    group._group_actions.remove(action)
                    first._group_actions.append(action)
        titles: dict[str | None, Any] = {}
        for group in list(parser._action_groups):
            if (kept := titles.setdefault(group.title, group)) is not group:
                kept._group_actions += group._group_actions
                parser._action_groups.remove(group)
        first._group_actions.sort(key=lambda action: FIRST.index(action.dest))
        parser._action_groups.remove(first)
        parser._action_groups.insert(0, first)
        return parser


def flags(table: Any, sections: Sequence[str] = ()) -> list[str]:
    """The command line of a table of options, some of them in tables named like `sections`."""
    if not isinstance(table, Mapping):
        raise ValueError(f"expected a table of options, got {table!r}.")
    found: list[str] = []
    for key, value in table.items():
        if isinstance(value, Mapping) and key in sections:
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


@dataclass(frozen=True)
class _Config:
    config: Path | None = option(
        None, "YAML file with any of these options; the command line wins."
    )
