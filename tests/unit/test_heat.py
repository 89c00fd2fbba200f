"""Heat: closed forms, the laws that heat obeys, gradients, kinds of arrays, bad inputs (chapter 01)."""

import doctest
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import diffusionbook.heat
from diffusionbook.heat import (
    dct,
    decay_rates,
    difference,
    divergence,
    explicit_steps,
    heat,
    idct,
    laplacian,
    max_stable_step,
    to_batch,
)

SPACINGS = [(1,), (1, 1), (1, 2), (0.5, 0.5), (1, 0.7, 2.5)]
SYMBOLS = ["continuous", "discrete"]
BOUNDARIES = ["reflect", "periodic"]

every_symbol = pytest.mark.parametrize("symbol", SYMBOLS)
every_boundary = pytest.mark.parametrize("boundary", BOUNDARIES)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS, ids=str)

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
pictures = shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=st.floats(-1, 1)))
times = st.floats(0, 20)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def blob(spacing, t):
    """The axes of a wide grid, a Gaussian of integral 1, and what heat makes of it in time t.

    Its variance is 6 times the largest spacing squared, so that the pixels sample it to 1e-12, and the grid reaches
    8.5 standard deviations, so that it has faded to 1e-15 at the border.
    """
    variance = 6 * max(spacing) ** 2
    reach = 8.5 * math.sqrt(variance + 2 * t)
    sides = [h * np.arange(-math.ceil(reach / h), math.ceil(reach / h) + 1) for h in spacing]
    axes = np.meshgrid(*sides, indexing="ij", sparse=True)

    def gaussian(v):
        return math.prod(np.exp(-(x**2) / (2 * v)) / math.sqrt(2 * math.pi * v) for x in axes)

    return axes, gaussian(variance), gaussian(variance + 2 * t)


def last(frames):
    *_, (_, picture) = frames
    return picture


# --- closed forms ------------------------------------------------------------------------------
@every_boundary
@every_spacing
def test_a_gaussian_stays_one(spacing, boundary):
    _, before, after = blob(spacing, t=2.0)
    error = heat(before, 2.0, spacing=spacing, boundary=boundary) - after
    assert np.linalg.norm(error) <= 1e-10 * np.linalg.norm(after)


@every_symbol
@every_spacing
def test_variance_grows_by_2t_along_each_axis(spacing, symbol):
    axes, before, _ = blob(spacing, t=2.0)
    after = heat(before, 2.0, spacing=spacing, symbol=symbol)
    for x in axes:
        gain = (x**2 * after).sum() / after.sum() - (x**2 * before).sum() / before.sum()
        assert gain / (2 * 2.0) == pytest.approx(1, abs=1e-6)


@every_boundary
@every_symbol
def test_each_wave_dies_at_its_rate(symbol, boundary):
    n, h, t = 12, 0.5, 0.3
    rates = decay_rates(n, h, boundary=boundary, symbol=symbol)
    for k, rate in enumerate(rates.tolist()):
        swings = k / 2 if boundary == "reflect" else k
        wave = np.cos(2 * np.pi * swings * (np.arange(n) + 0.5) / n)
        if boundary == "periodic" and 2 * k == n:
            wave = (-1.0) ** np.arange(n)
        got = heat(wave, t, spacing=h, boundary=boundary, symbol=symbol)
        np.testing.assert_allclose(got, math.exp(-rate * t) * wave, atol=1e-14)
        frequency = 2 * math.pi * swings / (n * h)
        by_neighbours = (2 - 2 * math.cos(frequency * h)) / h**2
        assert rate == pytest.approx(frequency**2 if symbol == "continuous" else by_neighbours)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_waves_are_eigenvectors_of_the_laplacian(n):
    waves = idct(torch.eye(n, dtype=torch.float64))  # row k is wave k
    rates = decay_rates(n, 0.7, symbol="discrete")
    torch.testing.assert_close(laplacian(waves, spacing=0.7, batch_axis=0), -rates[:, None] * waves)


def test_discrete_and_continuous_rates_meet_at_second_order():
    errors = []
    for n in (32, 64, 128):
        h = 1 / n
        rates = [decay_rates(n, h, symbol=symbol)[3].item() for symbol in SYMBOLS]
        errors.append(abs(rates[0] - rates[1]))
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx([2, 2], abs=0.1)


def test_infinite_patience_leaves_the_mean():
    picture = random(9, 14)
    np.testing.assert_allclose(heat(picture, 1e6), np.full_like(picture, picture.mean()), atol=1e-14)


def test_time_zero_changes_nothing():
    picture = random(9, 14)
    np.testing.assert_allclose(heat(picture, 0), picture, atol=1e-14)
    assert list(explicit_steps(picture, 0)) == []


# --- the laws ----------------------------------------------------------------------------------
@every_boundary
@every_symbol
@pytest.mark.parametrize("value", [0.0, 0.1, 100.0, -3e5])
def test_a_constant_is_kept(value, symbol, boundary):
    picture = np.full((31, 20, 5), value)
    result = heat(picture, 7.0, symbol=symbol, boundary=boundary, spacing=(1, 2, 0.3))
    np.testing.assert_allclose(result, picture, rtol=1e-15, atol=0)


def test_explicit_steps_keep_a_constant_to_the_bit_and_the_mean_over_1000():
    constant = np.full((9, 8, 7), 0.1)
    assert np.array_equal(last(explicit_steps(constant, 5.0, spacing=(1, 2, 0.5))), constant)
    picture = random(16, 12) + 3
    end = last(explicit_steps(picture, 100.0, step=0.1))
    assert abs(end.mean() - picture.mean()) <= 1e-12
    end = last(explicit_steps(picture.astype(np.float32), 100.0, step=0.1))
    assert abs(end.mean(dtype=float) - picture.astype(np.float32).mean(dtype=float)) <= 1e-6


@every_boundary
@every_symbol
@given(picture=pictures, s=times, t=times)
@settings(max_examples=25, deadline=None)
def test_two_times_add_up(symbol, boundary, picture, s, t):
    def flow(u, t):
        return heat(u, t, symbol=symbol, boundary=boundary)

    np.testing.assert_allclose(flow(flow(picture, s), t), flow(picture, s + t), atol=1e-12)
    assert abs(flow(picture, t).mean() - picture.mean()) <= 1e-12


@every_boundary
@given(picture=pictures, t=times)
@settings(max_examples=50, deadline=None)
def test_discrete_heat_never_leaves_the_range(boundary, picture, t):
    result = heat(picture, t, symbol="discrete", boundary=boundary)
    assert picture.min() - 1e-14 <= result.min() and result.max() <= picture.max() + 1e-14


@given(picture=pictures, part=st.floats(0.05, 1), data=st.data())
@settings(max_examples=50, deadline=None)
def test_explicit_steps_never_leave_the_range(picture, part, data):
    spacing = data.draw(st.tuples(*[st.floats(0.2, 5)] * picture.ndim))
    step = part * max_stable_step(spacing)
    for _, frame in explicit_steps(picture, 4 * step, step=step, spacing=spacing):
        assert picture.min() - 1e-14 <= frame.min() and frame.max() <= picture.max() + 1e-14


def test_continuous_heat_rings_after_a_short_time_only():
    step = np.repeat([0.0, 1.0], 16)
    assert heat(step, 0.05).min() < -0.01
    assert heat(step, 2.0).min() > -1e-8


@every_symbol
def test_energy_only_falls(symbol):
    picture = random(24, 17)
    series = [heat(picture, t, symbol=symbol) for t in (0, 0.1, 1, 4, 20, 200)]
    for power in (2, 4, 6):
        moments = [(u**power).mean() for u in series]
        assert all(later < earlier for earlier, later in pairwise(moments))


@every_boundary
@every_symbol
def test_commutes_with_flips_turns_and_shifts(symbol, boundary):
    picture = random(12, 12)

    def flow(u):
        return heat(u, 1.7, symbol=symbol, boundary=boundary)

    moves = [np.rot90, np.transpose, np.flipud, np.fliplr]
    if boundary == "periodic":
        moves.append(lambda u: np.roll(u, (3, -5), (0, 1)))
    for move in moves:
        np.testing.assert_allclose(flow(move(picture)), move(flow(picture)), atol=1e-14)


def test_reflecting_is_periodic_on_the_mirrored_picture():
    picture = random(7, 10)
    mirrored = np.block([[picture, picture[:, ::-1]], [picture[::-1], picture[::-1, ::-1]]])
    np.testing.assert_allclose(heat(picture, 3), heat(mirrored, 3, boundary="periodic")[:7, :10], atol=1e-14)


@every_boundary
def test_heat_is_its_own_transpose(boundary):
    u, v = random(2, 9, 6)
    here, there = heat(u, 2, boundary=boundary) * v, u * heat(v, 2, boundary=boundary)
    assert here.sum() == pytest.approx(there.sum(), abs=1e-13)


def test_units_of_length_do_not_change_the_physics():
    picture = random(8, 9, 4)
    millimetres = heat(picture, 3.0, spacing=(1, 2, 0.5))
    np.testing.assert_allclose(heat(picture, 3.0e-6, spacing=(1e-3, 2e-3, 0.5e-3)), millimetres, atol=1e-13)


# --- explicit steps ----------------------------------------------------------------------------
def test_explicit_steps_converge_to_discrete_heat_at_first_order():
    picture, t = random(10, 13), 2.0
    exact = heat(picture, t, symbol="discrete", spacing=(1, 2))
    steps = (0.02, 0.01, 0.005)
    errors = [abs(last(explicit_steps(picture, t, step=step, spacing=(1, 2))) - exact).max() for step in steps]
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize(
    ("spacing", "bound"), [((1,), 0.5), ((1, 1), 0.25), ((1, 1, 1), 1 / 6), ((1, 2), 0.4), (0.1, 0.005)]
)
def test_stability_bound(spacing, bound):
    assert max_stable_step(spacing) == pytest.approx(bound)


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 1), (0.1, 4)], ids=str)
def test_a_checkerboard_fades_below_the_bound_and_explodes_above(spacing):
    board = (-1.0) ** np.indices((8,) * len(spacing)).sum(0)
    bound = max_stable_step(spacing)
    frames = [u for _, u in explicit_steps(board, 50 * bound, step=0.99 * bound, spacing=spacing)]
    assert abs(frames[-1]).max() < 0.5
    u = board
    for _ in range(100):
        u = u + 1.1 * bound * laplacian(u, spacing=spacing)
    assert abs(u).max() > 1e4
    with pytest.raises(ValueError, match=f"between 0 and {bound:.6g}, the stability bound"):
        explicit_steps(board, 1.0, step=1.01 * bound, spacing=spacing)


def test_explicit_steps_end_at_t():
    frames = list(explicit_steps(random(6), 1.05, step=0.5))
    assert [t for t, _ in frames] == pytest.approx([0.35, 0.7, 1.05])
    assert len(list(explicit_steps(random(6, 5), 1.0))) == 4
    assert len(list(explicit_steps(random(6, 5), 0.3, step=0.1))) == 3  # 0.3 / 0.1 is a hair above 3


def test_differences_and_divergence():
    u, v = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1, -1):
        inside = v.narrow(axis, 0, v.shape[axis] - 1)
        left, right = (difference(u, axis, 0.3) * inside).sum(), -(u * divergence(inside, axis, 0.3)).sum()
        torch.testing.assert_close(left, right)
        assert divergence(inside, axis).sum().abs() < 1e-13
    assert divergence(difference(u[:, :1], 1), 1).abs().max() == 0
    assert torch.equal(difference(torch.tensor([1.0, 4.0, 2.0]), 0, 0.5), torch.tensor([6.0, -4.0]))


# --- the cosine transform ----------------------------------------------------------------------
@given(n=st.integers(1, 40), axis=st.sampled_from([0, 1, -1]))
@settings(max_examples=40, deadline=None)
def test_dct_is_a_rotation(n, axis):
    u = torch.randn(n, n, 2 if axis != -1 else n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    waves = dct(u, axis)
    torch.testing.assert_close(waves.square().sum(axis), u.square().sum(axis))
    torch.testing.assert_close(idct(waves, axis), u)
    torch.testing.assert_close((dct(u, axis) * waves).sum(), (u * idct(waves, axis)).sum())


def test_dct_by_its_definition():
    n = 5
    k, i = torch.meshgrid(*[torch.arange(n, dtype=torch.float64)] * 2, indexing="ij")
    matrix = (2 / n) ** 0.5 * torch.cos(torch.pi * k * (2 * i + 1) / (2 * n))
    matrix[0] /= 2**0.5
    torch.testing.assert_close(dct(torch.eye(n, dtype=torch.float64)).T, matrix)


# --- gradients ---------------------------------------------------------------------------------
@every_boundary
@every_symbol
def test_gradients(symbol, boundary):
    g = torch.Generator().manual_seed(0)
    u = torch.randn(2, 4, 5, dtype=torch.float64, generator=g, requires_grad=True)
    t = torch.tensor([0.3, 1.1], dtype=torch.float64, requires_grad=True)

    def flow(u, t):
        return heat(u, t, symbol=symbol, boundary=boundary, spacing=(1, 2), batch_axis=0)

    assert torch.autograd.gradcheck(flow, (u, t))
    assert torch.autograd.gradgradcheck(flow, (u, t))


def test_gradients_through_explicit_steps():
    u = torch.randn(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: last(explicit_steps(u, 1.0, batch_axis=0)), u)


def test_change_in_time_is_the_laplacian():
    u, t = torch.from_numpy(random(6, 7)), torch.tensor(0.8, dtype=torch.float64)
    _, change = torch.func.jvp(lambda t: heat(u, t, symbol="discrete"), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(change, laplacian(heat(u, t, symbol="discrete")))


# --- kinds of arrays ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "kept"),
    [("float64", "float64"), ("float32", "float32"), ("float16", "float16"), ("uint8", "float32"), ("int16", "float32"),
     ("uint16", "float32"), ("int32", "float64"), ("int64", "float64"), ("bool", "float32"), (">f4", "float32")],
)
def test_dtypes(given, kept):
    picture = (100 * abs(random(8, 9))).astype(given)
    result = heat(picture, 1.0)
    assert isinstance(result, np.ndarray) and result.dtype == kept and result.shape == picture.shape
    tolerance = 1e-2 if given == "float16" else 1e-4
    np.testing.assert_allclose(result, heat(picture.astype(float), 1.0), rtol=tolerance, atol=tolerance)
    if given != ">f4":
        tensor = heat(torch.from_numpy(picture), 1.0)
        assert tensor.dtype == getattr(torch, kept)
        np.testing.assert_allclose(tensor.numpy(), result, rtol=0, atol=1e-6)


def test_bfloat16_and_lists():
    picture = torch.from_numpy(random(8, 9)).bfloat16()
    result = heat(picture, 1.0)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, heat(picture.float(), 1.0).bfloat16())
    assert heat([[0, 0, 4, 0, 0]], 0.5).dtype == np.float64


@every_boundary
@every_symbol
def test_numpy_and_torch_agree_and_bytes_repeat(symbol, boundary):
    picture = random(33, 20).astype(np.float32)
    options = {"spacing": (1, 2), "symbol": symbol, "boundary": boundary}
    first = heat(picture, 2.0, **options)
    for _ in range(9):
        assert heat(picture, 2.0, **options).tobytes() == first.tobytes()
    assert np.array_equal(heat(torch.from_numpy(picture), 2.0, **options).numpy(), first)
    assert abs(heat(picture.astype(float), 2.0, **options) - first).max() <= 1e-6


def test_the_input_is_left_alone():
    picture = random(7, 8)
    picture.flags.writeable = False
    for array in (picture, picture[::-1, ::2], np.asfortranarray(picture)):
        before = array.copy()
        result = heat(array, 0)
        result += 1
        assert np.array_equal(array, before)
    tensor = torch.ones(3, 3)
    list(explicit_steps(tensor, 1.0))
    assert torch.equal(tensor, torch.ones(3, 3))


@given(
    ndim=st.integers(1, 5), channel=st.none() | st.integers(-5, 4), batch=st.none() | st.integers(-5, 4), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_to_batch_and_back(ndim, channel, batch, data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim))
    axes = [axis for axis in (channel, batch) if axis is not None]
    image = random(*shape)
    inside = all(-ndim <= axis < ndim for axis in axes)
    distinct = {axis % ndim for axis in axes}
    if not inside or len(distinct) < len(axes) or len(distinct) == ndim:
        with pytest.raises(ValueError):
            to_batch(image, channel_axis=channel, batch_axis=batch)
        return
    u, h, back = to_batch(image, channel_axis=channel, batch_axis=batch)
    assert u.ndim == 2 + ndim - len(axes) and len(h) == ndim - len(axes)
    assert u.shape[0] == (1 if batch is None else shape[batch])
    assert u.shape[1] == (1 if channel is None else shape[channel])
    assert np.array_equal(back(u), image)
    if batch is not None:
        index = shape[batch] - 1
        rest = image.take(index, batch)
        assert np.array_equal(np.sort(u[index].numpy(), None), np.sort(rest, None))


def test_channels_and_batches_do_not_mix():
    pictures = random(4, 3, 9, 7)
    together = heat(pictures, 1.5, batch_axis=0, channel_axis=1, spacing=(1, 2))
    for b in range(4):
        for c in range(3):
            np.testing.assert_allclose(together[b, c], heat(pictures[b, c], 1.5, spacing=(1, 2)), atol=1e-14)
    last_axis = heat(np.moveaxis(pictures, 1, -1), 1.5, batch_axis=0, channel_axis=-1, spacing=(1, 2))
    np.testing.assert_allclose(np.moveaxis(last_axis, -1, 1), together, atol=1e-14)
    mixed = heat(pictures[0], 1.5)  # without channel_axis this is a volume
    assert abs(mixed - together[0]).max() > 0.1


def test_one_time_for_each_picture():
    pictures, t = torch.from_numpy(random(3, 2, 8, 5)), torch.tensor([0.0, 0.5, 30.0])
    series = heat(pictures, t, batch_axis=0, channel_axis=1)
    for picture, time, result in zip(pictures, t.tolist(), series, strict=True):
        torch.testing.assert_close(result, heat(picture, time, channel_axis=0))


def test_sigma_is_the_root_of_2t():
    picture = random(9, 9)
    np.testing.assert_allclose(heat(picture, sigma=3.0), heat(picture, 4.5), atol=1e-15)
    assert heat(picture, sigma=0).shape == (9, 9)


def test_on_the_meta_device():
    u = torch.empty(2, 3, 8, 9, device="meta")
    assert heat(u, 1.0, batch_axis=0, channel_axis=1).shape == u.shape
    assert last(explicit_steps(u, 1.0, batch_axis=0, channel_axis=1)).is_meta


@pytest.mark.gpu
@every_boundary
def test_on_a_gpu(boundary):
    picture = torch.from_numpy(random(33, 20)).float()
    result = heat(picture.cuda(), 2.0, boundary=boundary)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), heat(picture, 2.0, boundary=boundary), rtol=0, atol=1e-6)


# --- bad input ---------------------------------------------------------------------------------
GOOD = np.ones((4, 5, 3))


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.array([1.0, np.nan]), {}, "NaN or infinity"),
        (torch.tensor([1.0, math.inf]), {}, "NaN or infinity"),
        (np.empty((0, 5)), {}, r"empty: its shape is \(0, 5\)"),
        (GOOD + 1j, {}, "real numbers, got complex128"),
        (torch.ones(3, dtype=torch.complex64), {}, "real numbers, got torch.complex64"),
        (np.array(["a"]), {}, "real numbers"),
        (np.float64(3), {}, "no axis"),
        (GOOD, {"spacing": 0}, "above 0"),
        (GOOD, {"spacing": (1, -2, 1)}, "above 0"),
        (GOOD, {"spacing": math.nan}, "above 0"),
        (GOOD, {"spacing": (1, 1)}, "each of the 3 axes of space, got 2"),
        (GOOD, {"channel_axis": 3}, "channel_axis must be a whole number from -3 to 2"),
        (GOOD, {"batch_axis": -4}, "batch_axis must be"),
        (GOOD, {"channel_axis": 1.0}, "whole number"),
        (GOOD, {"channel_axis": 2, "batch_axis": -1}, "both 2"),
        (np.ones(3), {"channel_axis": 0}, "no axis"),
        (GOOD, {"t": -1.0}, "cannot flow backwards"),
        (GOOD, {"t": math.inf}, "finite"),
        (GOOD, {"t": torch.tensor([1.0, 2.0])}, "one for each"),
        (GOOD, {"t": None}, "either t or sigma"),
        (GOOD, {"sigma": 2.0}, "either t or sigma"),
        (GOOD, {"t": None, "sigma": math.nan}, "finite"),
        (GOOD, {"boundary": "zero"}, 'must be "reflect" or "periodic", got \'zero\''),
        (GOOD, {"symbol": "exact"}, '"continuous" or "discrete"'),
    ],
)
def test_bad_input_is_refused(image, options, message):
    with pytest.raises(ValueError, match=message):
        heat(image, **{"t": 1.0, **options})


@pytest.mark.parametrize(("options", "message"), [({"step": 0}, "stability bound"), ({"step": math.nan}, "stability"),
                                                  ({"t": -1}, "backwards"), ({"spacing": 0}, "above 0")])
def test_bad_explicit_steps_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        explicit_steps(GOOD, **{"t": 1.0, **options})


def test_examples_in_docstrings():
    assert doctest.testmod(diffusionbook.heat).failed == 0


def test_heat_is_exact_whatever_the_default_dtype():
    line = np.random.default_rng(0).standard_normal(1000)
    usual = heat(line, sigma=0.5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert np.abs(heat(line, sigma=0.5) - usual).max() < 1e-12
    finally:
        torch.set_default_dtype(torch.float32)
