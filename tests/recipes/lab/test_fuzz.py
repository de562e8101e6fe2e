"""The fuzz finds nothing in its first cases, and does find what is wrong."""

import logging

import pytest

from data import tables
from lab import fuzz

CASES = {"captions": 12, "prompts": 150, "images": 150, "tables": 25}
"""Checkpoints and models cost too much for the suite: the command tries them."""


@pytest.fixture(autouse=True)
def quiet():
    levels = {name: logging.getLogger(name).level for name in ("transformers", "diffusers")}
    fuzz.quiet()
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("kind", CASES)
def test_nothing_fails(kind):
    tried = [fuzz.attempt(1, kind, number) for number in range(CASES[kind])]
    failed = [(i, error) for i, (outcome, error) in enumerate(tried) if outcome == "failed"]
    assert not failed
    assert "read" in {outcome for outcome, _ in tried}


def test_a_row_that_is_gone_and_a_librarys_error_are_failures(monkeypatch):
    def first_failure():
        found = (fuzz.attempt(1, "tables", number) for number in range(30))
        return next(error for outcome, error in found if outcome == "failed")

    with monkeypatch.context() as losing:
        rows = tables._rows_of_table
        losing.setattr(tables, "_rows_of_table", lambda file: list(rows(file))[1:])
        assert isinstance(first_failure(), fuzz.RuleError)
    monkeypatch.setattr(tables, "_rows_of_table", lambda file: 1 / 0)
    assert isinstance(first_failure(), ZeroDivisionError)
