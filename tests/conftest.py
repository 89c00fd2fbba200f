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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep each file's tests in one process, and the book's together; skip those marked `gpu` where there is none."""
    for item in items:
        group = "book" if item.path.parent.name == "book" and item.path.suffix == ".py" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
