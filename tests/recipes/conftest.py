"""Recipes are scripts, not an installed package: their folder goes on the path, as python does."""

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))


@pytest.fixture
def recipes():
    """The folder of the recipes."""
    return RECIPES
