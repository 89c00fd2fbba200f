"""Densities that diffuse, exact scores, reverse walks, SURE and residual steps (chapter 03)."""

import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionbook.denoising import Denoiser
from diffusionbook.filtering import conductance, diffuse
from diffusionbook.heat import explicit_steps, heat, laplacian
from diffusionbook.samplers import sample
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.scores import (
    DiffusionBlock,
    GaussianMixture,
    fokker_planck,
    jacobian_trace,
    probability_flow,
    reverse_sde,
    sure_loss,
    transition,
    tweedie,
)

F64 = torch.float64


def close(ours, expected, atol=1e-10):
    torch.testing.assert_close(ours, torch.as_tensor(expected, dtype=ours.dtype), rtol=0, atol=atol)


def mixture(dimension=2, bells=3, *, seed=0, dtype=F64):
    """Bells of all shapes, no two alike."""
    g = torch.Generator().manual_seed(seed)
    square = 0.6 * torch.randn(bells, dimension, dimension, generator=g, dtype=dtype)
    covariances = square @ square.mT + 0.05 * torch.eye(dimension, dtype=dtype)
    means = 1.5 * torch.randn(bells, dimension, generator=g, dtype=dtype)
    return GaussianMixture(means, covariances, torch.arange(1.0, bells + 1))


def points(count, dimension=2, *, seed=1):
    return 2 * torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=F64)


def grid(side, samples, dimension=1):
    """Middles of the cells of a cube around the origin, (samples, ..., dimension), and their distance."""
    h = side / samples
    axis = (torch.arange(samples, dtype=F64) + 0.5 - samples / 2) * h
    return torch.stack(torch.meshgrid(*[axis] * dimension, indexing="ij"), -1), h


# The walk


@pytest.mark.parametrize(("t", "pull", "alpha", "variance"), [
    (0.0, 0, 1, 0), (8.0, 0, 1, 16), (0.5, 1, math.exp(-0.5), 1 - math.exp(-1)), (40.0, 1, 0, 1), (80.0, 0.5, 0, 2)])
def test_transition_known_values(t, pull, alpha, variance):
    ours = transition(t, pull=pull)
    close(ours[0], alpha)
    close(ours[1] ** 2, variance)


@given(st.floats(0, 5), st.floats(0, 5), st.sampled_from([0.0, 0.3, 1.0]))
def test_two_walks_are_one(s, t, pull):
    (a, b), (c, d), (alpha, sigma) = (transition(time, pull=pull) for time in (s, t, s + t))
    close(a * c, alpha)
    close((c * b) ** 2 + d**2, sigma**2)


def test_a_weak_pull_tends_to_none():
    close(transition(2.0, pull=1e-9)[1], transition(2.0)[1], atol=1e-8)
    assert transition(1e-18, pull=1)[1].item() == pytest.approx(math.sqrt(2e-18))  # expm1: no rounding to 0


def test_transition_takes_many_times():
    alpha, sigma = transition(torch.tensor([0.0, 1.0]), pull=1)
    assert alpha.shape == sigma.shape == (2,) and alpha.dtype == F64


@pytest.mark.parametrize(("t", "pull"), [(-1, 0), (math.nan, 0), (math.inf, 1), (1, -1), (1, math.nan)])
def test_transition_refuses(t, pull):
    with pytest.raises(ValueError, match="finite and at least 0"):
        transition(t, pull=pull)


# Densities on a grid


@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize("pull", [0.0, 1.0, 0.4])
@pytest.mark.parametrize("t", [0.05, 0.6])
def test_grid_agrees_with_the_mixture(dimension, pull, t):
    """The same blur that acts on pixels: a mixture's density under it is the diffused mixture's."""
    exact = GaussianMixture(torch.tensor([[-1.0], [1.5]], dtype=F64).expand(2, dimension), [0.2, 0.3], [1, 2])
    x, h = grid(24, 160, dimension)
    ours = fokker_planck(exact.log_prob(x).exp(), t, spacing=h, pull=pull)
    close(ours, exact.log_prob(x, *transition(t, pull=pull)).exp())


def test_without_a_pull_it_is_heat():
    picture = torch.rand(9, 13, generator=torch.Generator().manual_seed(0), dtype=F64)
    close(fokker_planck(picture, 3.0, spacing=(1, 2)), heat(picture, 3.0, spacing=(1, 2)), atol=1e-15)


def test_grid_keeps_mass_and_settles_to_the_bell_curve():
    x, h = grid(24, 384)
    box = ((x[:, 0] > 1) & (x[:, 0] < 3)).double() / 2
    settled = fokker_planck(box, 20.0, spacing=h, pull=1)
    close(settled.sum() * h, box.sum() * h, atol=1e-8)
    close(settled, box.sum() * h * torch.exp(-x[:, 0] ** 2 / 2) / math.sqrt(2 * math.pi), atol=1e-8)


def test_grid_semigroup():
    exact, (x, h) = mixture(1), grid(40, 400)
    p = exact.log_prob(x).exp()
    close(fokker_planck(fokker_planck(p, 0.3, spacing=h, pull=1), 0.5, spacing=h, pull=1),
          fokker_planck(p, 0.8, spacing=h, pull=1))


def test_entropy_and_distance_to_the_end_are_monotone():
    """Lyapunov functionals: entropy grows without a pull, and with one the divergence from N(0, 1) falls."""
    x, h = grid(30, 300)
    p = mixture(1).log_prob(x).exp()
    bell = torch.exp(-x[:, 0] ** 2 / 2) / math.sqrt(2 * math.pi)
    entropies, distances = [], []
    for t in (0, 0.1, 0.3, 1, 2):
        free, pulled = fokker_planck(p, t, spacing=h), fokker_planck(p, t, spacing=h, pull=1).clamp(min=1e-300)
        entropies.append(-torch.xlogy(free.clamp(min=0), free.clamp(min=1e-300)).sum().item() * h)
        distances.append((pulled * (pulled / bell).log())[bell > 1e-12].sum().item() * h)
    assert entropies == sorted(entropies) and distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.1 * distances[0]


def test_numpy_in_numpy_out():
    p = np.ones((4, 5), dtype=np.float32)
    ours = fokker_planck(p, 0.1, spacing=0.1)
    assert isinstance(ours, np.ndarray) and ours.dtype == np.float32 and ours.shape == p.shape


@pytest.mark.parametrize("arguments", [{"t": -1}, {"t": 1, "spacing": 0}, {"t": 1, "pull": -1},
                                       {"t": math.inf, "pull": 1}])
def test_grid_refuses(arguments):
    with pytest.raises(ValueError):
        fokker_planck(torch.ones(8), **arguments)
    with pytest.raises(ValueError, match="NaN"):
        fokker_planck(torch.full((8,), math.nan), 1.0)


# Mixtures


@pytest.mark.parametrize("dimension", [1, 2, 5])
@pytest.mark.parametrize("level", [(1.0, 0.0), (0.8, 0.6), (0.0, 1.0), (1.0, 30.0)])
def test_score_is_the_gradient(dimension, level):
    exact = mixture(dimension)
    x = points(6, dimension).requires_grad_()
    (gradient,) = torch.autograd.grad(exact.log_prob(x, *level).sum(), x)
    close(exact.score(x.detach(), *level), gradient)


def test_density_integrates_to_one():
    x, h = grid(40, 400, 2)
    close(mixture().log_prob(x).exp().sum() * h**2, 1.0)


@given(st.floats(0, 3), st.sampled_from([0.0, 1.0]), st.integers(1, 4))
@settings(deadline=None, max_examples=25)
def test_tweedie_is_the_posterior_mean(t, pull, dimension):
    """The mean of x0 by regression and by one step uphill."""
    exact, x = mixture(dimension), points(5, dimension)
    alpha, sigma = transition(t + 1e-3, pull=pull)
    close(tweedie(x, exact.score(x, alpha, sigma), alpha=alpha, sigma=sigma), exact.x0(x, alpha, sigma))


def test_posterior_mean_by_quadrature():
    exact, x0 = mixture(1), grid(40, 4000)[0]
    alpha, sigma, x = 0.7, 0.9, points(4, 1)
    joint = exact.log_prob(x0).exp() * torch.exp(-((x - alpha * x0.T) ** 2) / (2 * sigma**2))  # (4, 4000)
    close(exact.x0(x, alpha, sigma), (joint @ x0) / joint.sum(1, keepdim=True))


def test_one_bell_is_linear_regression():
    exact = GaussianMixture(torch.full((1, 3), 0.5, dtype=F64), 0.25)
    x, (alpha, sigma) = points(4, 3), (0.6, 0.8)
    gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    close(exact.x0(x, alpha, sigma), 0.5 + gain * (x - alpha * 0.5))


def test_ends_of_the_posterior_mean():
    exact, x = mixture(), points(4)
    close(exact.x0(x, 0.5, 0.0), x / 0.5)  # no noise: nothing to guess
    close(exact.x0(x, 0.0, 1.0), (exact.weights @ exact.means).expand(4, 2))  # no signal: the mean of all


@pytest.mark.parametrize("shape", ["full", "round"])
def test_diffused_is_the_same_law(shape):
    exact = mixture() if shape == "full" else GaussianMixture(points(3), [0.1, 0.2, 0.3])
    x = points(6)
    for t, pull in [(0.3, 0.0), (0.3, 1.0)]:
        later, level = exact.diffused(*transition(t, pull=pull)), transition(t, pull=pull)
        close(later.log_prob(x), exact.log_prob(x, *level))
        close(later.score(x), exact.score(x, *level))
        close(later.diffused(*transition(0.2, pull=pull)).score(x), exact.score(x, *transition(t + 0.2, pull=pull)))


def test_the_density_obeys_its_equation():
    """p_t = pull div(x p) + laplacian p, every derivative by autograd."""
    exact, pull, t = mixture(), 1.0, torch.tensor(0.4, dtype=F64)
    normal = torch.distributions.MultivariateNormal

    def density(x, t):
        alpha, sigma = torch.exp(-pull * t), (-torch.expm1(-2 * pull * t) / pull).sqrt()
        log_p = [normal(alpha * m, alpha**2 * c + sigma**2 * torch.eye(2, dtype=F64)).log_prob(x)
                 for m, c in zip(exact.means, exact.covariances, strict=True)]
        return (exact.weights * torch.stack(log_p).exp()).sum()

    for x in points(3):
        p = density(x, t)
        close(exact.log_prob(x, *transition(t, pull=pull)).exp(), p)
        gradient, change = torch.autograd.functional.jacobian(density, (x, t))
        (hessian, _), _ = torch.autograd.functional.hessian(density, (x, t))
        close(change, pull * (2 * p + x @ gradient) + hessian.trace())


def test_a_round_bell_is_a_full_one():
    means, x = points(3), points(5)
    variances = torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    full = GaussianMixture(means, variances[:, None, None] * torch.eye(2, dtype=F64))
    for ask in ("log_prob", "score", "x0", "posterior"):
        close(getattr(GaussianMixture(means, variances), ask)(x, 0.9, 0.3), getattr(full, ask)(x, 0.9, 0.3))


def test_rotating_everything_rotates_the_score():
    exact, x = mixture(), points(5)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=F64)
    turned = GaussianMixture(exact.means @ turn.T, turn @ exact.covariances @ turn.T, exact.weights)
    close(turned.score(x @ turn.T), exact.score(x) @ turn.T)


def test_far_away_nothing_overflows():
    exact = mixture()
    x = torch.tensor([[1e6, -1e6]], dtype=F64)
    for ask in ("log_prob", "score", "posterior"):
        assert torch.isfinite(getattr(exact, ask)(x, 1.0, 1e-3)).all()
    assert torch.isfinite(exact.x0(x.float(), 1.0, 1e-3)).all()


@pytest.mark.parametrize("block", [1, 6, 10**6])
def test_blocks_do_not_show(block, monkeypatch):
    exact, x, level = mixture(), points(11), (torch.linspace(0.1, 1, 11), torch.linspace(1, 0.2, 11))
    expected = {ask: getattr(exact, ask)(x, *level) for ask in ("log_prob", "score", "x0", "posterior")}
    monkeypatch.setattr(GaussianMixture, "BLOCK", block)
    for ask, value in expected.items():
        close(getattr(exact, ask)(x, *level), value, atol=1e-13)


def test_one_level_per_sample():
    exact, x = mixture(), points(6).reshape(2, 3, 2)
    alpha, sigma = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3)
    together = exact.x0(x, alpha, sigma)
    assert together.shape == x.shape and exact.posterior(x, alpha, sigma).shape == (2, 3, 3)
    for i in range(2):
        for j in range(3):
            close(together[i, j], exact.x0(x[i, j], alpha[i, j], sigma[i, j]), atol=1e-13)


def test_dtype_follows_the_question():
    exact, x = mixture(), points(4).float()
    assert exact.score(x).dtype == exact.log_prob(x).dtype == torch.float32
    close(exact.score(x), exact.score(x.double()), atol=1e-5)
    assert exact.log_prob(torch.empty(0, 2)).shape == (0,)


def test_gradients_of_the_exact_denoiser():
    exact = mixture()
    x = points(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: exact.x0(x, 0.8, 0.6), x)
    assert torch.autograd.gradgradcheck(lambda x: exact.score(x, 0.8, 0.6).sum(), x)


def test_samples_have_the_right_moments_and_repeat():
    exact = mixture()
    x = exact.sample(200_000, seed=3)
    mean = exact.weights @ exact.means
    spread = exact.means - mean
    covariance = torch.einsum("k,kij->ij", exact.weights, exact.covariances) + (exact.weights * spread.T) @ spread
    close(x.mean(0), mean, atol=0.02)  # five standard errors
    close(x.T.cov(), covariance, atol=0.05)
    assert torch.equal(x, exact.sample(200_000, seed=3)) and not torch.equal(x[:9], exact.sample(9, seed=4))
    assert torch.equal(exact.sample(5, seed=0), copy.deepcopy(exact).sample(5, seed=0))


def test_a_variance_that_rounding_left_below_0_counts_as_0():
    thin = GaussianMixture(torch.zeros(2, 2), torch.tensor([-1e-8, 1.0]), torch.tensor([1.0, 0.0]))
    assert torch.equal(thin.sample(3), torch.zeros(3, 2))


def test_frozen_and_portable():
    exact = mixture()
    with pytest.raises(AttributeError):
        exact.means = 0
    again = pickle.loads(pickle.dumps(exact))
    assert torch.equal(again.score(points(3)), exact.score(points(3)))


def test_meta_device():
    exact = GaussianMixture(torch.empty(3, 2, device="meta"), torch.empty(3, 2, 2, device="meta"))
    x = torch.empty(5, 2, device="meta")
    assert exact.x0(x, 0.6, 0.8).is_meta and exact.score(x).shape == (5, 2) and exact.posterior(x).shape == (5, 3)


@pytest.mark.parametrize(("arguments", "message"), [
    ((torch.zeros(3),), "means must be"),
    ((torch.zeros(0, 2),), "means must be"),
    ((torch.zeros(3, 2, dtype=torch.long),), "floating point"),
    ((torch.zeros(3, 2), torch.ones(2)), "covariances must be"),
    ((torch.zeros(3, 2), torch.ones(3, 2)), "covariances must be"),
    ((torch.zeros(3, 2), -1.0), "negative"),
    ((torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])), "negative"),
    ((torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])), "symmetric"),
    ((torch.zeros(3, 2), 1.0, [1, 2]), "weights must have shape"),
    ((torch.zeros(3, 2), 1.0, [1, -1, 2]), "weights must be at least 0"),
    ((torch.zeros(3, 2), 1.0, [0, 0, 0]), "weights must be at least 0"),
    ((torch.full((3, 2), math.nan),), "NaN"),
])
def test_mixture_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_questions_refused():
    exact = mixture()
    with pytest.raises(ValueError, match="shape end with"):
        exact.score(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="floating point"):
        exact.score(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="one for each"):
        exact.x0(torch.zeros(4, 2), torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="sigma above 0"):
        GaussianMixture(torch.zeros(2, 2)).log_prob(torch.zeros(2))


# The mixture as a network


def test_pictures_as_a_mixture_are_the_perfect_denoiser():
    bank = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    x, (alpha, sigma) = bank[:2] + 0.1, (0.8, 0.6)
    logits = -((x[:, None] - alpha * bank) ** 2).flatten(2).sum(2) / (2 * sigma**2)  # (2, 5)
    expected = torch.einsum("nk,kchw->nchw", logits.softmax(1), bank)
    ours = GaussianMixture(bank)
    close(ours.x0(x, alpha, sigma), expected)
    close(tweedie(x, ours.score(x, alpha, sigma), alpha=alpha, sigma=sigma), expected)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_samplers_of_the_book_find_the_data(sampler):
    """With the exact denoiser every sample is a picture of the data set, and all of them are found."""
    bank = torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    exact, schedule = GaussianMixture(bank), NoiseSchedule.linear()
    denoise = Denoiser(lambda x, t: exact.x0(x, schedule.alpha(t), schedule.sigma(t)), schedule, prediction="x0")
    x = sample(denoise, (24, 1, 2, 2), sampler=sampler, steps=40, progress=False)
    nearest = (x[:, None] - bank).flatten(2).norm(dim=2).min(1)
    assert nearest.values.max() < 1e-3 and set(nearest.indices.tolist()) == {0, 1, 2}


# Backwards in time


def score_of(exact, pull):
    return lambda x, t: exact.score(x, *transition(t, pull=pull))


def moments(x):
    return x.mean(0), x.T.cov()


@pytest.mark.parametrize("pull", [0.0, 1.0])
@pytest.mark.parametrize("way", [reverse_sde, probability_flow])
def test_reverse_walks_bring_the_distribution_back(way, pull):
    exact, count = mixture(), 10_000
    start = exact.diffused(*transition(2.0, pull=pull)).sample(count, seed=1)
    *_, x = way(score_of(exact, pull), start, torch.linspace(1, 0, 200) ** 2 * 2, pull=pull)
    for ours, expected in zip(moments(x), moments(exact.sample(200_000, seed=2)), strict=True):
        close(ours, expected, atol=0.06)  # sampling error, and the error of 200 steps


def test_flow_of_one_bell_in_closed_form():
    """Along the flow a single bell only stretches: x_t = alpha m + sd_t / sd_0 (x_0 - m), each axis by itself."""
    exact = GaussianMixture(torch.tensor([[0.5, -1.0]], dtype=F64), torch.diag_embed(torch.tensor([[0.25, 4.0]])))
    x0, errors = points(5), []
    alpha, sigma = transition(1.0, pull=1)
    variance = torch.tensor([0.25, 4.0], dtype=F64)
    x1 = alpha * exact.means[0] + ((alpha**2 * variance + sigma**2) / variance).sqrt() * (x0 - exact.means[0])
    for steps in (20, 40, 80):
        *_, x = probability_flow(score_of(exact, 1.0), x1, torch.linspace(1, 0, steps + 1), pull=1)
        errors.append((x - x0).abs().max().item())
    assert errors[-1] < 2e-3
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(1.8 < order < 2.3 for order in orders), orders  # Heun's method is of second order


def test_flow_leads_there_and_back():
    exact, x = mixture(), points(5)
    times = torch.linspace(0, 1.5, 600)
    *_, noise = probability_flow(score_of(exact, 1.0), x, times, pull=1)
    *_, again = probability_flow(score_of(exact, 1.0), noise, times.flip(0), pull=1)
    close(again, x, atol=1e-4)


def test_reverse_sde_repeats_and_yields_each_step():
    exact, x = mixture(), points(5)
    runs = [list(reverse_sde(score_of(exact, 1.0), x, [2.0, 1.0, 0.5, 0.1], pull=1, seed=s)) for s in (0, 0, 1)]
    assert len(runs[0]) == 3 and torch.equal(runs[0][-1], runs[1][-1]) and not torch.equal(runs[0][-1], runs[2][-1])


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 1.0], [1.0, math.nan]])
def test_reverse_sde_refuses_times_that_do_not_fall(times):
    with pytest.raises(ValueError, match="must fall"):
        list(reverse_sde(lambda x, t: x, points(2), times))


# SURE and its relatives


def test_trace_of_known_maps():
    matrix, x = points(3, 3), points(7, 3)
    close(jacobian_trace(lambda x: x @ matrix.T, x, probes=None), matrix.trace().expand(7))
    close(jacobian_trace(lambda x: x**3, x), (3 * x**2).sum(1))  # a diagonal Jacobian: one probe is exact
    picture = torch.rand(2, 1, 3, 4, dtype=F64)
    close(jacobian_trace(lambda x: x * 2, picture), torch.full((2,), 24.0))


def test_probes_are_right_on_average():
    exact, x = mixture(), points(3)
    def denoise(x):
        return exact.x0(x, 1.0, 0.7)

    truth = jacobian_trace(denoise, x, probes=None)
    close(jacobian_trace(denoise, x, probes=4000), truth, atol=0.05)
    assert torch.equal(jacobian_trace(denoise, x, seed=5), jacobian_trace(denoise, x, seed=5))
    close(jacobian_trace(denoise, x[:2], probes=3), jacobian_trace(denoise, x, probes=3)[:2])  # whatever the batch


def test_trace_refuses():
    with pytest.raises(ValueError, match="keep the shape"):
        jacobian_trace(lambda x: x[:, :1], points(2))
    with pytest.raises(ValueError, match="without a gradient"):
        jacobian_trace(lambda x: x.detach(), points(2))
    for probes in (0, -1):
        with pytest.raises(ValueError, match="probes must be"):
            jacobian_trace(lambda x: x, points(2), probes=probes)
        with pytest.raises(ValueError, match="probes must be"):
            sure_loss(lambda x: x, points(2), 0.1, probes=probes)


def test_three_names_of_one_number_by_quadrature():
    """SURE, implicit and denoising score matching agree, even for a wrong score; 1-D integrals, no randomness."""
    exact, sigma = GaussianMixture(torch.tensor([[-1.0], [2.0]], dtype=F64), [0.3, 0.5]), 0.8
    y, h = grid(30, 3000)
    p = exact.log_prob(y, 1.0, sigma).exp() * h  # (3000,): weights of the average over y

    def wrong(y):
        return -torch.tanh(y) + 0.3 * y.sin()

    def denoise(y):
        return y + sigma**2 * wrong(y)

    from_sure = (p * sure_loss(denoise, y, sigma, probes=None)).sum()
    x0 = exact.x0(y, 1.0, sigma)
    second_moment = exact.posterior(y, 1.0, sigma) @ torch.zeros(2, dtype=F64)  # of x0 given y, by its bells
    for k in range(2):
        bell = GaussianMixture(exact.means[k:k + 1], exact.covariances[k:k + 1])
        variance = 1 / (1 / exact.covariances[k] + 1 / sigma**2)
        second_moment += exact.posterior(y, 1.0, sigma)[:, k] * (variance + bell.x0(y, 1.0, sigma)[:, 0] ** 2)
    error = denoise(y)[:, 0] ** 2 - 2 * denoise(y)[:, 0] * x0[:, 0] + second_moment  # of the denoiser, given y
    denoising = sigma**4 * (p * (error / sigma**4)).sum()
    implicit = sigma**2 + 2 * sigma**4 * (p * (wrong(y)[:, 0] ** 2 / 2 + jacobian_trace(wrong, y))).sum()
    close(from_sure, denoising, atol=1e-8)
    close(from_sure, implicit, atol=1e-8)


def test_sure_is_the_error_on_average():
    exact, sigma = mixture(), 0.6
    clean = exact.sample(40_000, seed=0)
    y = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    for factor in (0.3, 1.0):
        def denoise(y, factor=factor):
            return y + factor * (exact.x0(y, 1.0, sigma) - y)

        with torch.no_grad():
            guess, truth = sure_loss(denoise, y, sigma), (denoise(y) - clean).square().mean(1)
        assert not guess.requires_grad and guess.shape == (40_000,)
        close(guess.mean(), truth.mean(), atol=0.012)  # four standard errors


def test_sure_trains():
    """The best linear denoiser, found without one clean sample."""
    g = torch.Generator().manual_seed(0)
    y = 2 * torch.randn(20_000, 1, generator=g) + torch.randn(20_000, 1, generator=g)
    gain = torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.SGD([gain], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        sure_loss(lambda y: gain * y, y, 1.0).mean().backward()
        optimizer.step()
    assert gain.item() == pytest.approx(0.8, abs=0.02)  # 4 / (4 + 1)


# An explicit step as a residual block


def test_block_is_an_explicit_step_of_heat():
    x = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(0), dtype=F64)
    block = DiffusionBlock(step=0.2).double()
    close(block(x), x + block.step.detach() * laplacian(x, channel_axis=1, batch_axis=0), atol=1e-14)
    *_, (_, last) = explicit_steps(x, 1.0, step=0.2, channel_axis=1, batch_axis=0)
    close(torch.nn.Sequential(*[block] * 5)(x), last, atol=1e-7)  # float32 rounds 0.2


def test_block_is_an_explicit_step_of_the_edge_preserving_filter():
    x = torch.rand(11, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
    law = conductance("quadratic")
    block = DiffusionBlock(step=0.25, conductance=lambda squared: law(squared / 0.2**2)).double()
    filtered = diffuse(x, 1.0, contrast=0.2, scheme="explicit", step=0.25)
    close(torch.nn.Sequential(*[block] * 4)(x[None, None])[0, 0].detach(), filtered, atol=1e-12)


def test_block_keeps_brightness_and_range():
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    y = DiffusionBlock(step=0.25, conductance=lambda s: 1 / (1 + s / 0.01)).double()(x)
    close(y.mean(), x.mean(), atol=1e-14)
    assert x.min() <= y.min() and y.max() <= x.max() and not torch.equal(x, y)
    flat = torch.full((1, 1, 5, 5), 0.3)
    assert torch.equal(DiffusionBlock()(flat), flat)


def test_block_learns_and_runs_on_meta():
    block = DiffusionBlock(conductance=torch.nn.Softplus())
    block(torch.rand(1, 1, 6, 6)).square().sum().backward()
    assert block.filters.grad.abs().sum() > 0 and block.step.grad is not None
    assert block.to("meta")(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 3, 8, 8)


def test_samples_are_drawn_through_the_symmetric_root():
    """Eigenvectors come with either sign, another one on a GPU; what is drawn must not depend on it."""
    covariance = torch.tensor([[2.0, 0.9], [0.9, 0.5]], dtype=F64)
    mixture = GaussianMixture(torch.zeros(1, 2, dtype=F64), covariance[None])
    g = torch.Generator().manual_seed(3)
    torch.multinomial(torch.ones(1, dtype=F64), 7, replacement=True, generator=g)
    noise = torch.randn(7, 2, generator=g, dtype=F64)
    root = torch.as_tensor(scipy.linalg.sqrtm(covariance.numpy()))
    close(mixture.sample(7, seed=3), noise @ root)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    exact, x = mixture(), points(6)
    there = GaussianMixture(exact.means.cuda(), exact.covariances.cuda(), exact.weights.cuda())
    close(there.x0(x.cuda(), 0.6, 0.8).cpu(), exact.x0(x, 0.6, 0.8))
    close(there.sample(9, seed=1).cpu(), exact.sample(9, seed=1))
    *_, a = reverse_sde(score_of(there, 1.0), x.cuda(), [1.0, 0.5, 0.1], pull=1)
    *_, b = reverse_sde(score_of(exact, 1.0), x, [1.0, 0.5, 0.1], pull=1)
    close(a.cpu(), b)
    close(fokker_planck(x.cuda(), 0.1, pull=1).cpu(), fokker_planck(x, 0.1, pull=1))
