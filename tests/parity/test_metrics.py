"""Scores against SciPy."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial import cKDTree
from scipy.stats import mannwhitneyu

from diffusionbook.metrics import data_copying, fid, nearest_neighbours, precision_recall

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
