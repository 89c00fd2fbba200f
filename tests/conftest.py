"""What all tests share."""
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a passing commit stays passing; `--hypothesis-profile=default` looks further.
settings.register_profile("same-examples", derandomize=True, deadline=None)
settings.load_profile("same-examples")


@pytest.fixture(scope="session")
def root():
    """The folder that holds the whole project."""
    return Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
