"""Shape annotations are executed in the tests, and every test starts from the same seed."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads wait for the other workers'
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the expected bits are a CPU's

import beartype  # noqa: F401  # before the hook, in which it would be compiled anew
import fresh
import jaxtyping
import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("suite")


def pytest_configure(config):
    worker = hasattr(config, "workerinput")
    if worker or not getattr(config.option, "numprocesses", None):
        fresh.begin(whole_suite=worker)
    jaxtyping.install_import_hook("agsm_loss", "beartype.beartype")


def pytest_unconfigure():
    fresh.end()


def pytest_collection_finish():
    """The garbage collector looks at the modules no more: a twentieth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _annotations(request):
    """A test marked `unchecked_shapes` sees the library as users do, without executed shapes."""
    off = request.node.get_closest_marker("unchecked_shapes") is not None
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", off)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
