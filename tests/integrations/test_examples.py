"""The examples in the integrations' docstrings run, under the names that users import.

pytest's --doctest-modules would import the folder `integrations` a second time under another name,
and the classes of the two would differ.
"""

import doctest
import importlib
import inspect
import logging
import pkgutil
from pathlib import Path

import pytest

from agsm_loss import integrations

MODULES = [
    found.name.removeprefix("agsm_loss.integrations.")
    for found in pkgutil.walk_packages(integrations.__path__, "agsm_loss.integrations.")
    if not found.ispkg
]


def imported(name):
    """The module; a skip where it names an extra that is not installed."""
    try:
        return importlib.import_module(f"agsm_loss.integrations.{name}")
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore:DDPOTrainer is deprecated")
@pytest.mark.filterwarnings("ignore:.*_encode_prompt.* is deprecated")  # called by trl
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # an example loads a pipeline of the repository
    module = imported(name)
    written = inspect.getsource(module).count(">>> ")
    logging.disable(logging.WARNING)  # DeepSpeed, where it is installed, logs to stdout
    try:
        ran = doctest.testmod(module)
    finally:
        logging.disable(logging.NOTSET)
    assert ran.failed == 0, f"{ran.failed} of {module.__name__}'s examples fail, as printed above."
    assert ran.attempted == written, (
        f"{module.__name__}: expected to run its {written} lines of examples, ran {ran.attempted}. "
        "doctest did not find the others: put them into the docstring of the module or of a class."
    )
    assert written, f"{module.__name__}: expected an example, got none."


def test_every_module_is_listed():
    assert {"denoisers", "noise", "tokens.attach", "hosts.base"} <= set(MODULES)
