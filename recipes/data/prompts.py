r"""Texts from files: lines, rows of tables, and prompts to sample. Captions one edit away from one.

Files are UTF-8, with a BOM or without. A line ends at \n or \r\n, and at no other character.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.sources import world

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_UNSEEN = "\0\xad\u061c\u180e\ufeff" + "".join(
    one
    for one in map(chr, range(0x3001))
    if one.isspace() or (one >= "\u2000" and unicodedata.category(one) == "Cf")
)
"""Blanks, and marks that no font draws; Cf below U+2000 has signs that are drawn."""


def normal(text: str) -> str:
    """NFC, without what cannot be seen at its ends: blanks, BOMs, NULs, marks of direction.

    A joiner behind a virama stays: with it the letter is another.
    """
    text = unicodedata.normalize("NFC", text).lstrip(_UNSEEN)
    seen = text.rstrip(_UNSEEN)
    joiner = text[len(seen) : len(seen) + 1]
    is_virama = seen and unicodedata.combining(seen[-1]) == 9
    return seen + joiner if is_virama and joiner in "\u200c\u200d" else seen


def texts_of(cell: Any) -> list[str]:
    """The texts of a caption's cell, one or several, `normal`, without empty ones.

    Raises:
        ValueError: there is none.
    """
    texts = cell if isinstance(cell, (list, tuple)) else [cell]
    found = [normal(text) for text in texts if isinstance(text, str)]
    if not any(found):
        raise ValueError(f"expected a text, or several, got {cell!r}")
    return [text for text in found if text]


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a text file, with their ends.

    Raises:
        OSError, ValueError: it cannot be read; it is not UTF-8.
    """
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        try:
            yield from lines
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}: expected UTF-8, got other bytes ({error}). Save it as UTF-8."
            ) from error


def rows_of(file: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, row) of a .csv, .tsv, .jsonl or .json: mappings; of JSON, maybe other values.

    A .json is a list, or has a row a line; what is neither is one row.

    Raises:
        OSError, ValueError: it cannot be read, or is not what its name says.
    """
    if file.suffix.lower() in DELIMITERS:
        yield from _rows_of_csv(file)
        return
    if file.suffix.lower() == ".json":
        text = "".join(lines_of(file))
        try:
            whole = json.loads(text)
        except ValueError as error:  # also of a number with too many digits
            if getattr(error, "msg", "") != "Extra data":  # else a row a line
                raise ValueError(f"{file}: expected JSON, got {error}. Mend it.") from error
        except RecursionError as error:
            raise ValueError(f"{file}: expected rows, got lists within lists.") from error
        else:
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"{file}, row {i}", row) for i, row in enumerate(rows, 1))
            return
    for number, line in enumerate(lines_of(file), 1):
        if line.strip():
            try:
                yield f"{file}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{file}, line {number}: expected JSON, a row a line, got {error}."
                ) from error


def _rows_of_csv(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    delimiter = DELIMITERS[file.suffix.lower()]
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(lines_of(file), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(lines, [])]
        _check_delimiter(file, names, delimiter)
        if not any(names) or len(set(names)) < len(names):
            raise ValueError(f"{file}: expected a header of different names, got {names}.")
        for row in lines:
            where = f"{file}, line {lines.line_num}"
            if len(row) not in (0, len(names)):
                raise ValueError(
                    f"{where}: expected {len(names)} fields, as in the header, got {len(row)}. Put "
                    f"texts that have a {delimiter!r} into double quotes."
                )
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {lines.line_num}: {error}. Mend the line.") from error


def _check_delimiter(file: Path, names: list[str], delimiter: str) -> None:
    first = names[0] if names else ""
    if first.lower().startswith("sep="):
        raise ValueError(
            f"{file}, line 1: expected a header of names, got {delimiter.join(names)!r}. Remove "
            f"the line, and have {delimiter!r} between the columns."
        )
    other = next((one for one in ";\t|," if one in first and one != delimiter), "")
    if other and len(names) == 1:
        raise ValueError(
            f"{file}, line 1: expected {delimiter!r} between the columns of a {file.suffix}, got "
            f"{first!r}, which looks like {other!r}. Save it with {delimiter!r}."
        )


def read_prompts(source: str) -> list[dict[str, Any]]:
    """A row with a "prompt" each: of a text file with one a line, or of a table (`rows_of`).

    `world:FOLD:PER_CATEGORY` names prompts of the embedded world.

    Raises:
        FileNotFoundError, ValueError: no such file, no row in it, or a row without a prompt.
    """
    if source.startswith("world:"):
        made: list[dict[str, Any]] = world("task").read_prompts(source)
        return made
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file {source!r}")
    if path.suffix.lower() in {*DELIMITERS, ".jsonl", ".json"}:
        found = [_with_prompt(row, where) for where, row in rows_of(path)]
    else:
        found = [{"prompt": text} for text in map(normal, lines_of(path)) if text]
    if not found:
        raise ValueError(f"{source}: expected at least one prompt, got none.")
    return found


def _with_prompt(row: Any, where: str) -> dict[str, Any]:
    row = {"prompt": row} if isinstance(row, str) else row
    text = row.get("prompt") if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not normal(text) or not is_unicode(text):
        raise ValueError(
            f"{where}: expected a prompt in every row, a text, got {row!r}. Its name is prompt, in "
            "small letters."
        )
    return {**row, "prompt": normal(text)}


def is_unicode(text: str) -> bool:
    """False for halves of characters, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLOUR_WORDS = (
    "red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray",
)  # fmt: skip
RELATION_WORDS = {"left of": "right of", "left": "right", "above": "below", "on": "under",
                  "in front of": "behind", "inside": "outside"}  # fmt: skip
RELATION_WORDS |= {other: word for word, other in RELATION_WORDS.items()}

MOST_CHARACTERS = 10**7
"""Of all edits of one caption together: a caption of a million characters has ten."""

_TABLES = (
    {word: NUMBERS[max(i - 1, 0) : i] + NUMBERS[i + 1 : i + 2] for i, word in enumerate(NUMBERS)},
    {word: tuple(other for other in COLOUR_WORDS if other != word) for word in COLOUR_WORDS},
    {word: (other,) for word, other in RELATION_WORDS.items()},
)


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(longest_first) + r")\b", re.IGNORECASE)


_RULES = [(_any_of(table), table) for table in _TABLES]


def edits(text: str) -> list[str]:
    """English captions one edit from `text`: count ±1, another colour, relation reversed.

    >>> edits("two red cats on a mat")[:3]
    ['three red cats on a mat', 'two green cats on a mat', 'two blue cats on a mat']
    """
    most = MOST_CHARACTERS // max(1, len(text))
    return [text[:start] + word + text[end:] for start, end, word in islice(_changes(text), most)]


def edited(text: str, number: int, rng: np.random.Generator) -> list[str]:
    """Up to `number` of a caption's edits, drawn without replacement."""
    every = edits(text) if number else []
    return [every[i] for i in rng.permutation(len(every))[:number]]


def _changes(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, another word) of each edit."""
    for pattern, table in _RULES:
        for match in pattern.finditer(text):
            # Letters like the long s match without being in the table.
            for word in table.get(match.group().lower(), ()):
                yield match.start(), match.end(), word
