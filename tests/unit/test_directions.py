"""Diffusion with a direction (chapter 02b): the stencil, the tensors, the filters, and the way over from MATLAB."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data

from diffusionbook.filtering import (
    _with_eigenvalues,
    coherence_enhance,
    diffuse,
    edge_enhance,
    like_imdiffuseest,
    like_imdiffusefilt,
    selling_stencil,
    structure_tensor,
    tensor_diffuse,
)
from diffusionbook.heat import heat, to_batch

few = settings(max_examples=40, deadline=None)


def tensors(count, d, *, seed=0, thinnest=1e-4):
    """Random symmetric positive definite tensors with eigenvalues from `thinnest` to 1: (d, d, count)."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(count, d, d, generator=g, dtype=torch.float64)).Q
    values = thinnest ** torch.rand(count, d, generator=g, dtype=torch.float64)
    return (turn * values.unsqueeze(1) @ turn.mT).movedim(0, -1)


def along(degrees, thin=1e-3):
    """The tensor with eigenvalue 1 along an angle and `thin` across, and its normal, both in (row, column)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    e, n = torch.tensor([s, c], dtype=torch.float64), torch.tensor([c, -s], dtype=torch.float64)
    return torch.outer(e, e) + thin * torch.outer(n, n), n


def moments(u, spacing=None):
    """Mass and covariance of a picture that is a spot, in units of length."""
    spacing = spacing or (1,) * u.ndim
    axes = np.meshgrid(*[h * (np.arange(n) - n // 2) for n, h in zip(u.shape, spacing, strict=True)], indexing="ij")
    return u.sum(), np.array([[(u * a * b).sum() for b in axes] for a in axes])


def spot(*shape):
    u = np.zeros(shape)
    u[tuple(n // 2 for n in shape)] = 1
    return u


def stripes(size=48, degrees=25, noise=0.3, seed=0):
    """Bright and dark lines at an angle, clean and noisy, in [0, 1] before the noise."""
    y, x = np.mgrid[:size, :size]
    _, n = along(degrees)
    clean = 0.5 + 0.5 * np.sin((n[0].item() * y + n[1].item() * x) * 2 * np.pi / 8)
    return clean, clean + noise * np.random.default_rng(seed).standard_normal(clean.shape)


# --- the stencil ---------------------------------------------------------------------------------
@pytest.mark.parametrize("d", [2, 3])
def test_the_stencil_gives_the_tensor_back_with_no_negative_weight(d):
    D = tensors(3000, d)
    weights, offsets = selling_stencil(D)
    assert weights.shape == (3 * (d - 1), 3000) and offsets.shape == (3 * (d - 1), d, 3000)
    assert (weights >= 0).all() and offsets.dtype == torch.int64
    sums = torch.einsum("kn,kin,kjn->ijn", weights, offsets.double(), offsets.double())
    assert (sums - D).abs().max() < 1e-12


@pytest.mark.parametrize("D, expected", [
    ([[1, 0], [0, 1]], {(1, 0): 1, (0, 1): 1}),
    ([[2, 1], [1, 2]], {(1, 0): 1, (0, 1): 1, (1, 1): 1}),
    ([[2, -1], [-1, 2]], {(1, 0): 1, (0, 1): 1, (1, -1): 1}),
    ([[1, 0, 0], [0, 2, 0], [0, 0, 3]], {(1, 0, 0): 1, (0, 1, 0): 2, (0, 0, 1): 3}),
])
def test_known_stencils(D, expected):
    weights, offsets = selling_stencil(torch.tensor(D, dtype=torch.float64))
    found = {}
    for w, e in zip(weights.tolist(), offsets.tolist(), strict=True):
        if w:
            found[max(tuple(e), tuple(-i for i in e))] = w
    assert found == pytest.approx(expected)


def test_the_stencil_in_float32_stays_consistent():
    D = tensors(2000, 2, thinnest=1e-3).float()
    weights, offsets = selling_stencil(D)
    assert weights.dtype == torch.float32
    sums = torch.einsum("kn,kin,kjn->ijn", weights.double(), offsets.double(), offsets.double())
    assert (sums - D).abs().max() < 1e-6


@pytest.mark.parametrize("d", [2, 3])
def test_gradient_of_the_weights(d):
    half = tensors(5, d, thinnest=1e-2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: selling_stencil((x + x.transpose(0, 1)) / 2)[0], half)


@pytest.mark.parametrize("bad, message", [
    ([[1.0, 2.0], [2.0, 1.0]], "positive definite"),
    ([[0.0, 0.0], [0.0, 0.0]], "positive definite"),
    ([[float("nan"), 0.0], [0.0, 1.0]], "positive definite"),
    ([[float("inf"), 0.0], [0.0, 1.0]], "finite"),
    ([[1.0, 0.9], [0.0, 1.0]], "symmetric; average it with its transpose"),
    ([[1e-6, 0.0], [1e-7, 1e-6]], "symmetric"),
    ([[1.0, float("nan")], [0.0, 1.0]], "symmetric"),
    ([[1.0]], "shape"),
    ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], "shape"),
])
def test_a_tensor_that_is_none_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        selling_stencil(torch.tensor(bad))


# --- diffusion with a given tensor ---------------------------------------------------------------
@pytest.mark.parametrize("shape, spacing", [
    ((41, 41), (1, 1)), ((41, 31), (1, 2)), ((41, 41), (0.5, 0.5)), ((17, 19, 17), (1, 0.8, 1.3))])
def test_a_spot_spreads_by_twice_t_times_the_tensor(shape, spacing):
    """The covariance grows by 2 t D, whatever the spacing: exact as long as nothing reaches the border."""
    d = len(shape)
    D = tensors(1, d, seed=3, thinnest=0.2)[..., 0].numpy()
    t = 0.5 * min(spacing) ** 2
    mass, covariance = moments(tensor_diffuse(spot(*shape), D, t, spacing=spacing), spacing)
    assert mass == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(covariance, 2 * t * D, atol=1e-9)


def test_with_the_identity_it_is_the_heat_equation():
    """Explicit steps of 0.2 are of first order: a smooth picture shows how close they are."""
    u = heat(np.random.default_rng(0).random((24, 30)), 2.0)
    after, exact = tensor_diffuse(u, np.eye(2), 2.0), heat(u, 2.0, symbol="discrete")
    assert np.abs(after - exact).max() < 0.04 * np.abs(u - exact).max()


@pytest.mark.parametrize("t", [0.05, 0.2, 0.5, 1.0])
def test_short_times_are_right_for_a_rough_picture_too(t):
    """One step of the largest stable size would miss by half of the change; ten are within a tenth."""
    u = np.random.default_rng(0).random((24, 30))
    after, exact = tensor_diffuse(u, np.eye(2), t), heat(u, t, symbol="discrete")
    assert np.sqrt(((after - exact) ** 2).mean()) < 0.1 * np.sqrt(((u - exact) ** 2).mean())


@pytest.mark.parametrize("degrees", [*range(0, 91, 5), 22.5, 135, 158])
def test_a_stripe_stays_at_every_angle(degrees):
    """Against the exact profile, which widens by the little that flows across."""
    D, n = along(degrees)
    y, x = torch.meshgrid(*[torch.arange(61, dtype=torch.float64) - 30] * 2, indexing="ij")
    across = n[0] * y + n[1] * x
    after = tensor_diffuse(torch.exp(-(across**2) / (2 * 1.5**2)), D, 20.0)
    exact = 1.5 / math.sqrt(1.5**2 + 2 * 1e-3 * 20)
    assert 0.999 <= after[30, 30] / exact <= 1.001
    assert after.min() >= 0 and after.max() <= 1


@pytest.mark.parametrize("direction", [(1, 0, 0), (1, 1, 0), (1, 2, 3), (2, -1, 4)])
def test_a_fibre_stays_in_three_dimensions(direction):
    e = torch.tensor(direction, dtype=torch.float64)
    e = e / e.norm()
    D = (1 - 1e-3) * torch.outer(e, e) + 1e-3 * torch.eye(3, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(*[torch.arange(25, dtype=torch.float64) - 12] * 3, indexing="ij"), -1)
    squared = (points**2).sum(-1) - (points @ e) ** 2
    after = tensor_diffuse(torch.exp(-squared / (2 * 1.5**2)), D, 5.0)
    assert 0.999 <= after[12, 12, 12] * (1.5**2 + 2 * 1e-3 * 5) / 1.5**2 <= 1.001
    assert after.min() >= 0


@few
@given(st.integers(0, 10**6), st.sampled_from([(5, 7), (9, 4), (4, 5, 3)]), st.floats(1e-3, 1), st.floats(0.1, 50))
def test_nothing_leaves_the_range_and_the_mean_is_kept(seed, shape, thinnest, t):
    u = np.random.default_rng(seed).random(shape)
    D = tensors(math.prod(shape), len(shape), seed=seed, thinnest=thinnest).unflatten(-1, shape)
    after = tensor_diffuse(u, D, t, spacing=(1, 0.7, 2)[: len(shape)])
    assert after.min() >= u.min() - 1e-13 and after.max() <= u.max() + 1e-13  # rounding of the last bit
    assert after.mean() == pytest.approx(u.mean(), abs=1e-13)


def test_mean_over_a_thousand_steps():
    u = np.random.default_rng(0).random((20, 20))
    D = tensors(400, 2, thinnest=0.5).unflatten(-1, (20, 20))
    assert abs(tensor_diffuse(u, D, 300.0).mean() - u.mean()) < 1e-12


def test_a_constant_picture_stays_to_the_bit():
    D = tensors(63, 2).unflatten(-1, (7, 9))
    u = np.full((7, 9), 0.1)
    assert (tensor_diffuse(u, D, 10.0) == u).all()
    assert (coherence_enhance(u, 10.0) == u).all()
    assert (edge_enhance(u, 10.0) == u).all()


@pytest.mark.parametrize("D, t, message", [
    (np.eye(3), 1.0, "shape"), (np.eye(2), -1.0, "at least 0"), (np.eye(2), math.nan, "at least 0"),
    (-np.eye(2), 1.0, "positive definite"), (np.ones((2, 2, 4, 5)), 1.0, "shape")])
def test_bad_input_of_tensor_diffuse(D, t, message):
    with pytest.raises(ValueError, match=message):
        tensor_diffuse(np.ones((5, 4)), D, t)


# --- structure tensor ----------------------------------------------------------------------------
@pytest.mark.parametrize("spacing", [1, (0.5, 2)])
def test_structure_tensor_of_a_slope(spacing):
    y, x = np.mgrid[:20, :30].astype(float)
    dy, dx = np.broadcast_to(spacing, 2)
    u, h, _ = to_batch(3 * y * dy - 2 * x * dx, spacing=spacing)
    J = structure_tensor(u, h)[0, :, :, 5:-5, 5:-5]
    expected = torch.tensor([[9.0, -6.0], [-6.0, 4.0]]).to(J)[..., None, None].expand_as(J)
    torch.testing.assert_close(J, expected, atol=1e-10, rtol=0)


def test_structure_tensor_adds_channels_and_never_has_negative_eigenvalues():
    u = torch.rand(1, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    J = structure_tensor(u, (1, 1), presmooth=0.7, window=2)
    parts = [structure_tensor(c, (1, 1), presmooth=0.7, window=2) for c in u.split(1, 1)]
    torch.testing.assert_close(J, sum(parts))
    assert torch.linalg.eigvalsh(J.movedim((1, 2), (-2, -1))).min() > -1e-15


def test_the_closed_form_equals_the_eigenvectors():
    J = tensors(200, 2) * 3

    def change(mu):
        return torch.exp(-mu)

    values, vectors = torch.linalg.eigh(J.movedim(-1, 0))
    expected = (vectors * torch.exp(-values).unsqueeze(1) @ vectors.mT).movedim(0, -1)
    torch.testing.assert_close(_with_eigenvalues(J, change), expected, atol=1e-12, rtol=0)
    stacked = torch.zeros(3, 3, 200, dtype=torch.float64)
    stacked[:2, :2], stacked[2, 2] = J, 7.0
    torch.testing.assert_close(_with_eigenvalues(stacked, change)[:2, :2], expected, atol=1e-6, rtol=0)


# --- both filters --------------------------------------------------------------------------------
FILTERS = [coherence_enhance, edge_enhance]
both = pytest.mark.parametrize("enhance", FILTERS, ids=lambda f: f.__name__)


@both
@pytest.mark.parametrize("shape", [(17, 20), (9, 8, 7)])
def test_filters_keep_range_and_mean(enhance, shape):
    u = np.random.default_rng(0).random(shape)
    after = enhance(u, 4.0)
    assert after.shape == u.shape and after.dtype == u.dtype
    assert u.min() <= after.min() and after.max() <= u.max() and after.var() < u.var()
    assert after.mean() == pytest.approx(u.mean(), abs=1e-13)


@both
def test_time_zero_changes_nothing(enhance):
    u = np.random.default_rng(0).random((8, 9))
    assert (enhance(u, 0.0) == u).all()


@both
def test_kinds_of_input(enhance):
    u = np.random.default_rng(0).integers(0, 256, (16, 18)).astype(np.uint8)
    expected = enhance(u.astype(np.float64), 2.0)
    assert enhance(u, 2.0).dtype == np.float32
    np.testing.assert_allclose(enhance(u, 2.0), expected, atol=0.3)  # of 255; laws to the 8th power amplify rounding
    tensor = enhance(torch.tensor(u, dtype=torch.float64), 2.0)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), expected)


@both
def test_a_picture_alone_and_in_company_is_the_same_and_so_is_every_run(enhance):
    u = np.random.default_rng(0).random((3, 14, 15))
    u[1] *= 9
    together = enhance(u, 3.0, batch_axis=0)
    for alone, one in zip(u, together, strict=True):
        assert (enhance(alone, 3.0) == one).all()


@both
def test_channels_share_their_directions(enhance):
    """Grey three times over stays grey; the order of the channels does not matter."""
    grey = np.random.default_rng(0).random((14, 15))
    rgb = np.stack([grey, 2 * grey, -grey], -1)
    after = enhance(rgb, 3.0, channel_axis=-1, contrast=0.3)
    np.testing.assert_allclose(after, after[..., :1] * [1, 2, -1], atol=1e-12)
    swapped = enhance(rgb[..., ::-1], 3.0, channel_axis=-1, contrast=0.3)
    np.testing.assert_allclose(swapped[..., ::-1], after, atol=1e-12)


@both
def test_turned_mirrored_or_scaled_pictures(enhance):
    u = np.random.default_rng(0).random((16, 19))
    after = enhance(u, 3.0)
    np.testing.assert_allclose(enhance(np.rot90(u), 3.0), np.rot90(after), atol=1e-9)
    np.testing.assert_allclose(enhance(u[::-1], 3.0), after[::-1], atol=1e-9)
    np.testing.assert_allclose(enhance(255 * u - 7, 3.0), 255 * after - 7, atol=1e-6)


def test_the_unit_of_length_does_not_matter():
    u = np.random.default_rng(0).random((16, 19))
    np.testing.assert_allclose(
        coherence_enhance(u, 3.0 * 0.01, presmooth=0.07, window=0.4, spacing=0.1), coherence_enhance(u, 3.0), atol=1e-9)
    small = edge_enhance(u, 3.0 * 0.01, presmooth=0.07, spacing=0.1)
    np.testing.assert_allclose(small, edge_enhance(u, 3.0), atol=1e-9)


def test_spacing_does_not_change_the_physics():
    """The same smooth pattern, sampled twice as densely along one axis, gives the same picture."""
    y, x = np.meshgrid(np.arange(0, 40, 0.25), np.arange(0, 40, 0.5), indexing="ij")
    pattern = np.sin(0.5 * y + 0.35 * x) + 0.3 * np.sin(0.1 * x * y / 4)
    fine = coherence_enhance(pattern, 6.0, contrast=0.1, window=3, spacing=(0.25, 0.5))[::2]
    coarse = coherence_enhance(pattern[::2], 6.0, contrast=0.1, window=3, spacing=0.5)
    change = np.abs(coarse - pattern[::2])[12:-12, 12:-12]
    assert np.abs(fine - coarse)[12:-12, 12:-12].mean() < 0.2 * change.mean()


@both
@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 3)])
def test_gradients(enhance, shape):
    """Off the kinks, where two stencils meet; in 3-D eigenvectors limit how exact they can be."""
    u = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: enhance(x, 0.4, contrast=0.5, step=0.2), u, atol=1e-4, rtol=1e-3)


@both
def test_gradients_where_the_picture_is_flat(enhance):
    u = torch.zeros(6, 7, dtype=torch.float64)
    u[2:, 3:] = 1
    u.requires_grad_()
    enhance(u, 1.0, contrast=0.3).square().sum().backward()
    assert torch.isfinite(u.grad).all() and u.grad.abs().max() > 0


@both
@pytest.mark.parametrize("options, message", [
    ({"t": -1}, "t must be"), ({"t": math.inf}, "t must be"), ({"contrast": 0}, "contrast"),
    ({"presmooth": -1}, "presmooth"), ({"step": 0}, "step"), ({"spacing": 0}, "spacing"),
    ({"channel_axis": 5}, "axis")])
def test_bad_options(enhance, options, message):
    with pytest.raises(ValueError, match=message):
        enhance(np.eye(8), **{"t": 1.0, **options})


def test_more_bad_options():
    for options in ({"alpha": 0}, {"alpha": 1.5}, {"window": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            coherence_enhance(np.eye(8), 1.0, **options)
    with pytest.raises(ValueError, match="conductance"):
        edge_enhance(np.eye(8), 1.0, conductance="none")
    for enhance in FILTERS:
        with pytest.raises(ValueError, match="NaN"):
            enhance(np.full((8, 8), np.nan), 1.0)
        with pytest.raises(ValueError, match="empty"):
            enhance(np.zeros((0, 8)), 1.0)
        with pytest.raises(ValueError, match="2 or 3 axes of space, got 1"):
            enhance(np.arange(9.0), 1.0)  # one axis has no directions


# --- what they are for ---------------------------------------------------------------------------
@pytest.mark.parametrize("degrees", [0, 25, 45, 110])
def test_lines_in_noise_are_found_as_well_as_if_the_direction_were_known(degrees):
    clean, noisy = stripes(degrees=degrees)

    def error(u):
        return ((u - clean) ** 2).mean()

    blurred = min(error(heat(noisy, t)) for t in (0.1, 0.2, 0.5, 1, 2, 4))
    found, known = error(coherence_enhance(noisy, 20.0)), error(tensor_diffuse(noisy, along(degrees)[0], 20.0))
    assert found < 1.3 * known and found < 0.7 * blurred


def test_sheets_in_three_dimensions_too():
    z, y, x = np.mgrid[:20, :20, :20]
    n = np.array([2, 1, -1]) / math.sqrt(6)
    clean = 0.5 + 0.5 * np.sin((n[0] * z + n[1] * y + n[2] * x) * 2 * np.pi / 8)
    noisy = clean + 0.3 * np.random.default_rng(0).standard_normal(clean.shape)
    known = tensor_diffuse(noisy, np.eye(3) - 0.999 * np.outer(n, n), 4.0)
    blurred = min(((heat(noisy, t) - clean) ** 2).mean() for t in (0.1, 0.2, 0.5, 1, 2))
    found = ((coherence_enhance(noisy, 4.0, window=3) - clean) ** 2).mean()
    assert found < 2 * ((known - clean) ** 2).mean() and found < 0.7 * blurred


def test_edge_enhancement_takes_the_noise_off_the_edge_itself():
    """A noisy, slanting edge: as much noise gone from the flat parts, but on the edge far more than by `diffuse`."""
    _, n = along(30)
    y, x = np.mgrid[:80, :80] - 40
    distance = n[0].item() * y + n[1].item() * x
    clean = np.clip(distance / 1.5 + 0.5, 0, 1)
    noisy = clean + 0.1 * np.random.default_rng(0).standard_normal(clean.shape)
    flat, edge = np.abs(distance) > 10, (np.abs(distance) < 1.5) & (np.hypot(y, x) < 30)
    ours = edge_enhance(noisy, 8.0, presmooth=1) - clean
    scalar = diffuse(noisy, 8.0, presmooth=1, conductance="weickert") - clean
    assert ours[flat].std() < 0.015 and scalar[flat].std() < 0.015
    assert ours[edge].std() < 0.75 * scalar[edge].std()


@pytest.mark.parametrize("dtype, white", [("uint8", 255), ("uint16", 60_000), ("float32", 1e6), ("float64", 1)])
def test_edges_without_noise_stay(dtype, white):
    """Every slope counts as an edge then, and the squares of so many contrasts must not overflow."""
    half = np.zeros((16, 16), dtype)
    half[:, 8:] = white
    assert np.abs(edge_enhance(half, 2.0) / white - half / white).max() < 0.02


@pytest.mark.parametrize("contrast", [1e-6, 1e-12])
def test_a_contrast_far_below_all_slopes_gives_the_same_in_single_precision(contrast):
    half = np.zeros((16, 16), np.float32)
    half[:, 8:] = 255
    assert np.abs(edge_enhance(half, 2.0, contrast=contrast) - half).max() < 5


# --- the way over from MATLAB --------------------------------------------------------------------
@pytest.mark.parametrize("shape, connectivity, each", [
    ((41, 41), "minimal", 1 / 5), ((41, 41), "maximal", 2 / 7),
    ((25, 25, 25), "minimal", 1 / 7), ((25, 25, 25), "maximal", 13 / 47)])
def test_it_solves_for_the_time_that_it_says(shape, connectivity, each):
    image, time = like_imdiffusefilt(spot(*shape), gradient_threshold=1e6, iterations=7, connectivity=connectivity)
    mass, covariance = moments(image)
    assert time == pytest.approx(7 * each)
    assert mass == pytest.approx(1)
    np.testing.assert_allclose(covariance, 2 * time * np.eye(len(shape)), atol=1e-9)


@pytest.mark.parametrize("conduction", ["exponential", "quadratic"])
@pytest.mark.parametrize("shape", [(12, 15), (6, 7, 8)])
def test_minimal_connectivity_is_the_explicit_scheme(shape, conduction):
    u = np.random.default_rng(0).random(shape)
    image, time = like_imdiffusefilt(u, gradient_threshold=0.2, iterations=4, connectivity="minimal",
                                     conduction=conduction)
    explicit = diffuse(u, time, contrast=0.2, scheme="explicit", step=time / 4, conductance=conduction)
    np.testing.assert_allclose(image, explicit, atol=1e-14)


@few
@given(st.integers(0, 10**6), st.sampled_from([(6, 7), (4, 5, 3)]), st.sampled_from(["minimal", "maximal"]),
       st.floats(1e-3, 10))
def test_it_keeps_range_and_mean(seed, shape, connectivity, threshold):
    u = np.random.default_rng(seed).random(shape)
    after = like_imdiffusefilt(u, gradient_threshold=threshold, connectivity=connectivity).image
    assert after.min() >= u.min() - 1e-14 and after.max() <= u.max() + 1e-14
    assert after.mean() == pytest.approx(u.mean(), abs=1e-14)


def test_defaults_follow_the_type():
    u = np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint8)
    for image, threshold in [(u, 25.5), (u.astype(np.uint16), 6553.5), (u.astype(np.int16), 6553.5), (u / 255, 0.1),
                             (u[::-1, ::2], 25.5), (u.astype(">i2"), 6553.5), (u > 99, 0.1)]:
        a, b = like_imdiffusefilt(image), like_imdiffusefilt(image, gradient_threshold=threshold, iterations=5)
        assert (a.image == b.image).all() and a.time == pytest.approx(10 / 7)
    tensor = like_imdiffusefilt(torch.tensor(u / 255))
    np.testing.assert_array_equal(tensor.image.numpy(), like_imdiffusefilt(u / 255).image)


def test_one_threshold_for_each_iteration():
    u = np.random.default_rng(0).random((9, 9))
    first = like_imdiffusefilt(u, gradient_threshold=0.5, iterations=1).image
    second = like_imdiffusefilt(first, gradient_threshold=0.2, iterations=1).image
    both_at_once = like_imdiffusefilt(u, gradient_threshold=[0.5, 0.2])
    assert (both_at_once.image == second).all() and both_at_once.time == pytest.approx(4 / 7)


def test_gradient_through_it():
    u = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: like_imdiffusefilt(x, gradient_threshold=0.3, iterations=2).image, u)


@pytest.mark.parametrize("noise", [8, 18, 35])
@pytest.mark.parametrize("name", ["camera", "coins", "brick"])
def test_the_estimate_is_good(name, noise):
    """At most 1 dB below the best number of iterations, and far above the noisy picture."""
    clean = getattr(data, name)()[:256, :256].astype(np.float32)
    noisy = clean + noise * np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    thresholds, iterations, time = like_imdiffuseest(noisy)
    assert iterations == len(thresholds) and time == pytest.approx(iterations * 2 / 7)
    assert all(a > b for a, b in zip(thresholds, thresholds[1:], strict=False))

    def psnr(u):
        return 10 * math.log10(255**2 / ((u - clean) ** 2).mean())

    u, found = noisy, []
    for threshold in thresholds:
        u = like_imdiffusefilt(u, gradient_threshold=threshold, iterations=1).image
        found.append(psnr(u))
    assert found[-1] > psnr(noisy) + 2 and found[-1] > max(found) - 1
    assert found[-1] > psnr(like_imdiffusefilt(noisy, gradient_threshold=25.5).image)  # MATLAB's default for uint8


@pytest.mark.parametrize("call, message", [
    (lambda: like_imdiffusefilt(np.eye(4), connectivity="all"), "connectivity"),
    (lambda: like_imdiffusefilt(np.eye(4), conduction="tukey"), "conduction"),
    (lambda: like_imdiffusefilt(np.eye(4), gradient_threshold=0), "gradient_threshold"),
    (lambda: like_imdiffusefilt(np.eye(4), gradient_threshold=[1, 2], iterations=3), "gradient_threshold"),
    (lambda: like_imdiffusefilt(np.eye(4), iterations=0), "iterations"),
    (lambda: like_imdiffusefilt(np.eye(4), iterations=2.5), "iterations"),
    (lambda: like_imdiffusefilt(np.zeros(5)), "grey picture"),
    (lambda: like_imdiffusefilt(np.full((3, 3), np.nan)), "NaN"),
    (lambda: like_imdiffuseest(np.ones((8, 8))), "constant"),
])
def test_bad_input_from_matlab(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rounding_in_one_half_of_a_tensor_does_not_turn_for_ever():
    """This one, out of a volume in float32, once did: its halves differ in the last digit."""
    D = torch.tensor([[0.009999997913837433, 6.984919309616089e-10, 4.656612873077393e-10],
                      [2.3283064365386963e-10, 0.009999999776482582, 3.4924596548080444e-10],
                      [4.656612873077393e-10, 1.1641532182693481e-10, 0.009999999776482582]])
    weights, offsets = selling_stencil(D)
    rebuilt = torch.einsum("kn,kin,kjn->ijn", weights[:, None], offsets[..., None].float(), offsets[..., None].float())
    assert (rebuilt[..., 0] - D).abs().max() < 1e-8


def test_a_volume_in_float32_is_filtered_as_in_float64():
    volume = np.zeros((10, 16, 16))
    volume[3:7, 4:12, 4:12] = 1
    volume += 0.1 * np.random.default_rng(0).standard_normal(volume.shape)
    precise, single = (coherence_enhance(x, 2.0, alpha=0.1, contrast=0.5) for x in (volume, volume.astype("float32")))
    assert np.abs(precise - single).max() < 1e-5


@pytest.mark.parametrize("enhance", [partial(coherence_enhance, t=2.0), partial(edge_enhance, t=2.0)])
def test_the_unit_of_the_numbers_does_not_matter_to_directions(enhance):
    noisy = np.random.default_rng(1).standard_normal((24, 24)).cumsum(1)
    assert np.allclose(enhance(noisy * 1e-30) / 1e-30, enhance(noisy), rtol=1e-6)
