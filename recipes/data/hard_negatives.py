"""Hard negatives of English captions: the same text with one number, colour or relation changed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLOUR_WORDS = (
    "red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray",
)  # fmt: skip
RELATION_WORDS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_WORDS |= {"on": "under", "under": "on"}
RELATION_WORDS |= {"in front of": "behind", "behind": "in front of", "left": "right"}
RELATION_WORDS |= {"right": "left", "inside": "outside", "outside": "inside"}

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
