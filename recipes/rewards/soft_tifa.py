"""Soft-TIFA, the score of GenEval 2 (arXiv 2512.16853): questions about an image, answered softly.

A prompt's row has GenEval 2's columns: prompt, `vqa_list` ([question, expected answer], ...) and
`skills`, one for each question. An image's score is the arithmetic mean of its answers'
probabilities (AM, how many of the parts are right) or the geometric mean (GM, whether all are). A
skill's score is the mean over all of its questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import gmean  # type: ignore[import-untyped]

from rewards.metrics import mean_with_interval, pooled_with_interval, rewards_of
from rewards.vqascore import VQAScore
from run.log import writing

ASKED = "{} Answer in one word."


class Question(NamedTuple):
    text: str
    answer: str
    skill: str


def questions_of(rows: Sequence[Mapping[str, Any]]) -> list[list[Question]]:
    """Each row's questions; none of any where no row has `vqa_list`.

    Raises:
        ValueError: a row's `vqa_list` or `skills` is missing, or is not as said above.
    """
    if not any("vqa_list" in row for row in rows):
        return [[] for _ in rows]
    return [_questions(row) for row in rows]


def _questions(row: Mapping[str, Any]) -> list[Question]:
    try:
        pairs = zip(row["vqa_list"], row["skills"], strict=True)
        found = [Question(*pair, skill) for pair, skill in pairs]
    except (KeyError, TypeError, ValueError):
        found = []
    if not found or not all(isinstance(text, str) and text for one in found for text in one):
        raise ValueError(
            f"{row['prompt']!r}: expected vqa_list, a [question, answer] or several, and skills, a "
            "text for each, in every row or in none, as in GenEval 2's data; got "
            f"{row.get('vqa_list')!r} and {row.get('skills')!r}."
        )
    return found


def scores(
    files: Sequence[Path],
    prompts: Sequence[str],
    questions: Sequence[Sequence[Question]],
    judge: VQAScore,
    results: Path,
) -> dict[str, dict[str, float]]:
    """Name -> score, low and high: vqascore, and Soft-TIFA's where there are questions.

    prompts, questions: each file's. results: a file to write, a line of probabilities an image.
    """
    probable = rewards_of(files, prompts, judge)
    answers = iter(
        rewards_of(
            [file for file, own in zip(files, questions, strict=True) for _ in own],
            [(ASKED.format(one.text), one.answer) for own in questions for one in own],
            judge.probabilities,
        )
    )
    answered = [[next(answers) for _ in own] for own in questions]
    lines = [
        {"filename": str(file), "prompt": prompt, "vqascore": own, "answers": others}
        for file, prompt, own, others in zip(files, prompts, probable, answered, strict=True)
    ]
    with writing(results):
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"vqascore": mean_with_interval(probable, prompts)}
    return found | soft_tifa(answered, questions, prompts) if any(questions) else found


def soft_tifa(
    answered: Sequence[Sequence[float]],
    questions: Sequence[Sequence[Question]],
    prompts: Sequence[str],
) -> dict[str, dict[str, float]]:
    """soft_tifa_am, soft_tifa_gm and one a skill, of the probabilities of each image's answers."""
    found = {
        "soft_tifa_am": mean_with_interval([float(np.mean(own)) for own in answered], prompts),
        "soft_tifa_gm": mean_with_interval([float(gmean(own)) for own in answered], prompts),
    }
    by_skill: dict[str, list[tuple[float, str]]] = {}
    for values, own, prompt in zip(answered, questions, prompts, strict=True):
        for value, question in zip(values, own, strict=True):
            by_skill.setdefault(question.skill, []).append((value, prompt))
    for skill, pairs in by_skill.items():
        found[f"soft_tifa_{skill}"] = pooled_with_interval(*zip(*pairs, strict=True))
    return found
