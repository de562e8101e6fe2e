import logging

import pytest


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """diffusers advises at every cast to float64."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
