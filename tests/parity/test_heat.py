"""Heat against SciPy, scikit-image, SimpleITK and MedPy, each where it solves the same problem."""

import numpy as np
import pytest
import scipy.fft
import torch
from scipy import linalg, ndimage, special
from skimage import data, filters

from diffusionbook.heat import dct, explicit_steps, heat, idct, laplacian


@pytest.fixture(scope="module")
def camera():
    return data.camera()[::4, ::4].astype(float) / 255  # (128, 128)


def last(frames):
    *_, (_, picture) = frames
    return picture


# SciPy samples the Gaussian on the pixels and cuts it off. From sigma = 2 on the samples hold all of it: what lies
# beyond the finest wave of the grid and folds back is exp(-(pi sigma)^2 / 2) = 3e-9. With truncate=12 nothing is
# cut off.
@pytest.mark.parametrize("sigma", [2.0, 4.0, 11.3])
@pytest.mark.parametrize(("boundary", "mode"), [("reflect", "reflect"), ("periodic", "wrap")])
def test_gaussian_filter(camera, sigma, boundary, mode):
    theirs = ndimage.gaussian_filter(camera, sigma, mode=mode, truncate=12)
    assert abs(heat(camera, sigma=sigma, boundary=boundary) - theirs).max() <= 1e-8


def test_gaussian_filter_with_spacing(camera):
    theirs = ndimage.gaussian_filter(camera, (4, 2), truncate=12)  # in pixels: sigma / spacing
    assert abs(heat(camera, sigma=4, spacing=(1, 2)) - theirs).max() <= 1e-8


def test_gaussian_filter_of_a_volume_and_of_colour():
    volume = np.random.default_rng(0).random((12, 20, 16))
    theirs = ndimage.gaussian_filter(volume, (3, 3 / 0.7, 3 / 2.5 * 2), truncate=12)
    assert abs(heat(volume, sigma=3, spacing=(1, 0.7, 1.25)) - theirs).max() <= 1e-8
    colour = data.astronaut()[::8, ::8] / 255.0
    theirs = filters.gaussian(colour, 2.0, mode="reflect", truncate=12, channel_axis=-1)
    assert abs(heat(colour, sigma=2.0, channel_axis=-1) - theirs).max() <= 1e-8


@pytest.mark.parametrize("sigma", [0.3, 0.7, 3.0])
def test_fourier_gaussian(camera, sigma):
    """SciPy's own Fourier filter solves the same periodic problem, for small sigma too."""
    waves = ndimage.fourier_gaussian(np.fft.fft2(camera), sigma)
    np.testing.assert_allclose(heat(camera, sigma=sigma, boundary="periodic"), np.fft.ifft2(waves).real, atol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
def test_cosine_transforms(n):
    u = np.random.default_rng(n).standard_normal((3, n, 4))
    np.testing.assert_allclose(dct(torch.from_numpy(u), 1), scipy.fft.dct(u, axis=1, norm="ortho"), atol=1e-13)
    np.testing.assert_allclose(idct(torch.from_numpy(u), 1), scipy.fft.idct(u, axis=1, norm="ortho"), atol=1e-13)


def test_laplacian(camera):
    np.testing.assert_allclose(laplacian(camera), ndimage.laplace(camera), atol=1e-14)


def test_discrete_heat_is_the_matrix_exponential():
    picture, t = np.random.default_rng(0).standard_normal((6, 5)), 0.9
    matrix = laplacian(np.eye(30).reshape(30, 6, 5), batch_axis=0, spacing=(1, 2)).reshape(30, 30)
    theirs = (linalg.expm(t * matrix) @ picture.ravel()).reshape(6, 5)
    np.testing.assert_allclose(heat(picture, t, symbol="discrete", spacing=(1, 2)), theirs, atol=1e-13)


@pytest.mark.parametrize("t", [0.2, 3.0])
def test_discrete_heat_is_made_of_bessel_functions(t):
    """The response to one hot pixel is exp(-2t) I_n(2t) (Lindeberg 1990)."""
    point = np.zeros(101)
    point[50] = 1
    expected = special.ive(abs(np.arange(-50, 51)), 2 * t)
    np.testing.assert_allclose(heat(point, t, symbol="discrete"), expected, atol=1e-14)


def test_discrete_gaussian_of_itk(camera):
    """ITK's discrete Gaussian has the same kernel and reads spacing; its border repeats a pixel, so look inside."""
    itk = pytest.importorskip("SimpleITK")
    image = itk.GetImageFromArray(camera)
    image.SetSpacing((2.0, 1.0))  # x, y: the axes in reverse
    theirs = itk.DiscreteGaussian(image, variance=(8.0, 8.0), maximumKernelWidth=64, maximumError=(1e-7, 1e-7))
    ours = heat(camera, 4.0, spacing=(1, 2), symbol="discrete")
    inside = slice(24, -24)
    assert abs(ours - itk.GetArrayFromImage(theirs))[inside, inside].max() <= 1e-6


def test_explicit_steps_of_medpy(camera):
    """With a huge threshold Perona-Malik is heat; MedPy computes in float32."""
    smoothing = pytest.importorskip("medpy.filter.smoothing")
    theirs = smoothing.anisotropic_diffusion(camera, niter=20, kappa=1e6, gamma=0.2)
    np.testing.assert_allclose(last(explicit_steps(camera, 4.0, step=0.2)), theirs, atol=2e-6)
