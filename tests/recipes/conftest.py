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


@pytest.fixture
def fresh_accelerate():
    """Accelerate's state is the process's: a test in another precision starts and leaves it new."""
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(scope="session", params=["flow", "epsilon"])
def any_base(request, tmp_path_factory):
    """Folder of an untrained tiny pipeline of the world, one of each kind."""
    return _saved(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def flow_base(tmp_path_factory):
    return _saved("flow", tmp_path_factory)


@pytest.fixture(scope="session")
def epsilon_base(tmp_path_factory):
    return _saved("epsilon", tmp_path_factory)


def _saved(kind, tmp_path_factory):
    import torch

    from lab.world import architectures

    torch.manual_seed(0)
    model = architectures.BASES[kind](width={"flow": 32, "epsilon": 8}[kind], layers=1)
    # A new transformer predicts nothing at all: its last layer is zero.
    for parameter in model.denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    folder = tmp_path_factory.mktemp(kind) / "pipeline"
    model.pipeline().save_pretrained(folder)
    return folder
