"""Chapter 02b against other packages: where they solve the same equation, the pictures agree."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.feature import structure_tensor as skimage_structure_tensor

from diffusionbook.filtering import coherence_enhance, like_imdiffusefilt, structure_tensor, tensor_diffuse


def picture(*shape, seed=0):
    """A smooth random picture in [0, 100], float32."""
    u = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return (100 * (u - u.min()) / np.ptp(u)).astype(np.float32)


@pytest.mark.parametrize("option, conduction", [(1, "exponential"), (2, "quadratic")])
@pytest.mark.parametrize("shape, gamma", [((30, 41), 1 / 5), ((12, 13, 14), 1 / 7)])
def test_minimal_connectivity_equals_medpy(shape, gamma, option, conduction):
    """medpy computes in float32; twelve iterations add up its rounding."""
    smoothing = pytest.importorskip("medpy.filter.smoothing")
    u = picture(*shape)
    theirs = smoothing.anisotropic_diffusion(u, niter=12, kappa=8, gamma=gamma, option=option)
    ours = like_imdiffusefilt(u, gradient_threshold=8, iterations=12, connectivity="minimal", conduction=conduction)
    np.testing.assert_allclose(ours.image, theirs, atol=2e-4)


def test_the_identity_tensor_equals_simpleitk_without_edges():
    """A conductance far above all slopes turns ITK's filter into plain diffusion with the same explicit step."""
    sitk = pytest.importorskip("SimpleITK")
    u = picture(32, 37)
    theirs = sitk.GetArrayFromImage(sitk.GradientAnisotropicDiffusion(
        sitk.GetImageFromArray(u), timeStep=0.1, conductanceParameter=1e4, numberOfIterations=20))
    ours = tensor_diffuse(u, np.eye(2), 2.0)
    inside = (slice(6, -6),) * 2
    assert np.abs(ours - theirs)[inside].max() < 0.01 * np.abs(u - theirs)[inside].max() + 0.05


@pytest.fixture
def dip():
    """DIPlib; while it loads it looks for this part of IPython without importing it."""
    pytest.importorskip("IPython.terminal.pt_inputhooks")
    return pytest.importorskip("diplib")


def test_the_identity_tensor_equals_diplib_without_edges(dip):
    """Inside only: DIPlib surrounds the picture with zeros."""
    u = picture(48, 52)
    theirs = np.asarray(dip.PeronaMalikDiffusion(dip.Image(u), iterations=10, K=1e5, stepSizeLambda=0.2))
    ours = tensor_diffuse(u, np.eye(2), 2.0)
    inside = (slice(14, -14),) * 2
    assert np.abs(ours - theirs)[inside].max() < 0.02 * np.abs(u - theirs)[inside].max()


def test_structure_tensor_equals_scikit_image():
    """In its own unit of slope, and up to the smoothing of its Sobel operator: on these waves a few per cent."""
    y, x = np.mgrid[:64, :64]
    u = np.sin((2 * y + x) / 7)
    theirs = skimage_structure_tensor(u, sigma=3, order="rc")
    ours = structure_tensor(torch.tensor(u)[None, None], (1, 1), window=3)[0].numpy()
    inside = (slice(12, -12),) * 2
    for (i, j), other in zip([(0, 0), (0, 1), (1, 1)], theirs, strict=True):
        a, b = ours[i, j][inside] / ours[0, 0][inside].mean(), other[inside] / theirs[0][inside].mean()
        np.testing.assert_allclose(a, b, atol=0.05)


def test_directions_like_diplib_but_within_the_range(dip):
    """Both smooth along the lines; DIPlib's stencil leaves the range of the picture, ours does not."""
    y, x = np.mgrid[:64, :64]
    clean = (np.sin((0.9 * y + 0.45 * x) * 2 * np.pi / 9) > 0).astype(np.float32)
    noisy = np.clip(clean + 0.3 * np.random.default_rng(0).standard_normal(clean.shape), 0, 1).astype(np.float32)
    theirs = np.asarray(dip.CoherenceEnhancingDiffusion(dip.Image(noisy), 1, 3, 30))
    ours = coherence_enhance(noisy, 10.0)
    inside = (slice(8, -8),) * 2
    error = [((u - clean)[inside] ** 2).mean() for u in (ours, theirs, noisy)]
    assert error[0] < 0.7 * error[2] and error[0] < 1.5 * error[1]
    assert ours.min() >= 0 and ours.max() <= 1
    assert theirs.min() < -0.01 and theirs.max() > 1.01
