"""Edge-preserving diffusion against MedPy, and its heat limit against SciPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import data

from diffusionbook.filtering import diffuse, fed_steps
from diffusionbook.heat import heat

smoothing = pytest.importorskip("medpy.filter.smoothing")  # GPL: compared with, never built on

# ours, MedPy's number for it, and two factors: its Tukey law is (1 - s^2 / 2)^2 / 2 with s = slope / kappa, so its
# time runs half as fast and its cut lies at sqrt(2) kappa
LAWS = [("exponential", 1, 1, 1), ("quadratic", 2, 1, 1), ("tukey", 3, 0.5, 2**0.5)]
SHAPES = [(64,), (40, 37), (12, 13, 14)]


@pytest.mark.parametrize("law, option, pace, cut", LAWS)
@pytest.mark.parametrize("shape", SHAPES, ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize("contrast", [0.05, 0.3])
def test_explicit_scheme_equals_medpy(law, option, pace, cut, shape, contrast):
    """Ten steps at spacing 1, to the rounding of float32 (MedPy always computes in it)."""
    image = np.random.default_rng(len(shape)).random(shape, dtype=np.float32)
    step = 0.1
    theirs = smoothing.anisotropic_diffusion(image, niter=10, kappa=contrast, gamma=step, option=option)
    ours = diffuse(image, 10 * step * pace, contrast=cut * contrast, conductance=law, scheme="explicit",
                   step=step * pace)
    assert np.abs(ours - image).max() > 0.001  # something has happened
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


def test_photograph_equals_medpy():
    image = (data.camera() / 255).astype(np.float32)
    theirs = smoothing.anisotropic_diffusion(image, niter=20, kappa=0.1, gamma=0.2, option=2)
    ours = diffuse(image, 4, contrast=0.1, scheme="explicit", step=0.2)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("scheme, steps, most", [("explicit", 32, 3e-3), ("fed", 32, 3e-3), ("aos", 64, 2e-2)])
def test_heat_limit_is_gaussian_blur(scheme, steps, most):
    """Where nothing counts as an edge, time t is a blur of sqrt(2 t): SciPy's, and chapter 01's exact one."""
    x = np.arange(-40, 41)
    blob = np.exp(-(x[:, None] ** 2 + x**2) / (2 * 4**2))
    ours = diffuse(blob, 8, contrast=1e6, scheme=scheme, step=8 / steps)
    for truth in (ndimage.gaussian_filter(blob, 4, truncate=8), heat(blob, 8)):
        assert np.linalg.norm(ours - truth) <= most * np.linalg.norm(truth)


def test_one_long_cycle_is_a_box_filter():
    """n FED steps on a line, however long and in whatever order, are exactly a moving average of 2n + 1 pixels."""
    n, signal = 7, np.random.default_rng(0).standard_normal(60)
    t = 0.5 * (n * n + n) / 3
    u = torch.from_numpy(signal)
    for tau in fed_steps(t, 0.5):
        left, right = torch.cat([u[:1], u[:-1]]), torch.cat([u[1:], u[-1:]])
        u = u + tau * (left - 2 * u + right)
    inside = slice(n, -n)
    box = ndimage.uniform_filter1d(signal, 2 * n + 1)
    np.testing.assert_allclose(u[inside], box[inside], rtol=0, atol=1e-12)
