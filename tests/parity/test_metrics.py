"""Scores against SciPy and torch-fidelity."""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial import cKDTree
from scipy.stats import mannwhitneyu

from diffusionbook.metrics import data_copying, fid, kid, nearest_neighbours, precision_recall

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(400, 24)) @ RNG.normal(size=(24, 24))
FAKE = RNG.normal(size=(350, 24)) @ RNG.normal(size=(24, 24)) + 0.5


def test_fid_equals_the_formula_with_scipys_matrix_root():
    covariances = [np.cov(points, rowvar=False) for points in (REAL, FAKE)]
    difference = REAL.mean(0) - FAKE.mean(0)
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert fid(torch.from_numpy(REAL), torch.from_numpy(FAKE)) == pytest.approx(expected, rel=1e-9)


def test_neighbours_are_those_of_a_kd_tree():
    distances, indices = nearest_neighbours(torch.from_numpy(FAKE), torch.from_numpy(REAL), k=3)
    expected, where = cKDTree(REAL).query(FAKE, k=3)
    assert np.array_equal(indices.numpy(), where)
    assert np.allclose(distances.numpy(), expected, rtol=1e-12)


def test_precision_and_recall_follow_their_definition():
    def covered(points, cloud):
        reach = cKDTree(cloud).query(cloud, k=4)[0][:, -1]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(cloud, reach, strict=True)) for p in points])

    result = precision_recall(torch.from_numpy(REAL), torch.from_numpy(FAKE))
    assert result == pytest.approx((covered(FAKE, REAL), covered(REAL, FAKE)), abs=1e-12)
    assert 0 < result.precision < 1  # a comparison of zeros would say nothing


def test_data_copying_is_the_mann_whitney_statistic():
    train, unseen, fake = REAL[:200], REAL[200:], REAL[150:] + 0.3
    near_unseen, near_fake = (cKDTree(train).query(points)[0] for points in (unseen, fake))
    expected = mannwhitneyu(near_unseen, near_fake).statistic / (len(unseen) * len(fake))
    result = data_copying(*(torch.from_numpy(points) for points in (train, unseen, fake)))
    assert result.value == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def fidelity(monkeypatch):
    """The parts of torch-fidelity that compute scores from given features, without those that need torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed (pip install --no-deps torch-fidelity)")
    package, utils = types.ModuleType("torch_fidelity"), types.ModuleType("torch_fidelity.utils")
    package.__path__ = spec.submodule_search_locations
    utils.__getattr__ = lambda name: None  # what loads pictures and extractors isn't called
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", utils)
    return lambda name: importlib.import_module(f"torch_fidelity.{name}")


def test_fid_equals_torch_fidelity(fidelity):
    theirs = fidelity("metric_fid")
    statistics = [theirs.fid_features_to_statistics(torch.from_numpy(points)) for points in (REAL, FAKE)]
    (expected,) = theirs.fid_statistics_to_metric(*statistics, False).values()
    assert fid(torch.from_numpy(REAL), torch.from_numpy(FAKE)) == pytest.approx(expected, rel=1e-9)
    assert expected > 1  # a comparison of zeros would say nothing


def test_kid_equals_torch_fidelity(fidelity):
    real, fake = torch.from_numpy(REAL[:350]), torch.from_numpy(FAKE)
    theirs = fidelity("metric_kid").kid_features_to_metric(real, fake, kid_subsets=1, kid_subset_size=350,
                                                           rng_seed=0, verbose=False)
    assert kid(real, fake).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_precision_and_recall_equal_torch_fidelity(fidelity):
    real, fake = torch.from_numpy(REAL), torch.from_numpy(FAKE)
    ours = precision_recall(real, fake)
    theirs = fidelity("metric_prc").prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-9)
