"""Hard negatives of English captions: the same text with one number, colour or relation changed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLOUR_WORDS = (
    "red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray",
)  # fmt: skip
RELATION_WORDS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATION_WORDS |= {"on": "under", "under": "on"}
RELATION_WORDS |= {"in front of": "behind", "behind": "in front of", "left": "right"}
RELATION_WORDS |= {"right": "left", "inside": "outside", "outside": "inside"}


def edits(text: str) -> list[str]:
    """English captions one edit from `text`: count ±1, another colour, relation reversed.

    >>> edits("two red cats on a mat")[:3]
    ['three red cats on a mat', 'two green cats on a mat', 'two blue cats on a mat']
    """
    changed: list[str] = []

    def swap(match: re.Match[str], word: str) -> None:
        changed.append(text[: match.start()] + word + text[match.end() :])

    for match in _words(NUMBERS, text):
        place = NUMBERS.index(match.group().lower())
        for other in (place - 1, place + 1):
            if 0 <= other < len(NUMBERS):
                swap(match, NUMBERS[other])
    for match in _words(COLOUR_WORDS, text):
        for colour in COLOUR_WORDS:
            if colour != match.group().lower():
                swap(match, colour)
    for match in _words(tuple(RELATION_WORDS), text):
        swap(match, RELATION_WORDS[match.group().lower()])
    return changed


def edited(text: str, number: int, rng: np.random.Generator) -> list[str]:
    """Up to `number` of a caption's edits, drawn without replacement."""
    every = edits(text) if number else []
    return [every[i] for i in rng.permutation(len(every))[:number]]


def _words(words: Sequence[str], text: str) -> list[re.Match[str]]:
    longest_first = sorted(words, key=len, reverse=True)
    pattern = r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b"
    return list(re.finditer(pattern, text, flags=re.IGNORECASE))
