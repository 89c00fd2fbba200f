"""Scores against SciPy and torch.distributions: densities, quadrature, an adaptive ODE solver, sampled noise."""

import numpy as np
import pytest
import torch
from scipy import integrate, ndimage, optimize, stats

from diffusionbook.scores import GaussianMixture, fokker_planck, jacobian_trace, probability_flow, transition

F64 = torch.float64


def mixture(dimension=2, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    square = 0.6 * torch.randn(3, dimension, dimension, generator=g, dtype=F64)
    means = 1.5 * torch.randn(3, dimension, generator=g, dtype=F64)
    return GaussianMixture(means, square @ square.mT + 0.1 * torch.eye(dimension, dtype=F64), [1, 2, 3])


def scipy_density(exact, alpha=1.0, sigma=0.0):
    """The diffused density at one point, from SciPy's bells."""
    eye = np.eye(exact.means.shape[1])
    bells = [stats.multivariate_normal(alpha * m, alpha**2 * c + sigma**2 * eye)
             for m, c in zip(exact.means.numpy(), exact.covariances.numpy(), strict=True)]
    return lambda x: sum(w * bell.pdf(x) for w, bell in zip(exact.weights.numpy(), bells, strict=True))


@pytest.mark.parametrize("dimension", [1, 2, 4])
@pytest.mark.parametrize("pull", [0.0, 1.0])
def test_density_is_that_of_scipy(dimension, pull):
    exact, x = mixture(dimension), np.random.default_rng(0).normal(size=(20, dimension))
    alpha, sigma = (v.item() for v in transition(0.4, pull=pull))
    theirs = scipy_density(exact, alpha, sigma)(x)
    np.testing.assert_allclose(exact.log_prob(torch.from_numpy(x), alpha, sigma), np.log(theirs), rtol=0, atol=1e-12)


def test_density_is_that_of_torch():
    exact, x = mixture(), 3 * torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    d = torch.distributions
    theirs = d.MixtureSameFamily(d.Categorical(exact.weights), d.MultivariateNormal(exact.means, exact.covariances))
    torch.testing.assert_close(exact.log_prob(x), theirs.log_prob(x), rtol=0, atol=1e-12)


def test_score_is_the_numerical_slope_of_scipys_density():
    exact, x = mixture(), np.array([0.3, -0.7])
    density = scipy_density(exact, 0.8, 0.6)
    slope = optimize.approx_fprime(x, lambda x: np.log(density(x)), 1e-7)
    np.testing.assert_allclose(exact.score(torch.from_numpy(x), 0.8, 0.6), slope, rtol=0, atol=1e-5)


def test_posterior_mean_by_adaptive_quadrature():
    exact, (alpha, sigma) = mixture(1), (0.7, 0.5)
    prior = scipy_density(exact)
    for x in (-1.0, 0.2, 2.0):
        def joint(x0, power, x=x):
            return x0**power * prior(x0) * stats.norm.pdf(x, alpha * x0, sigma)

        above, below = (integrate.quad(joint, -12, 12, args=(power,), epsabs=1e-12, limit=200)[0] for power in (1, 0))
        ours = exact.x0(torch.tensor([x], dtype=F64), alpha, sigma).item()
        assert ours == pytest.approx(above / below, abs=1e-9)
        log_p = exact.log_prob(torch.tensor([x], dtype=F64), alpha, sigma).exp().item()
        assert log_p == pytest.approx(below, abs=1e-10)


def test_blurred_density_is_scipys_gaussian_filter():
    h, samples = 0.1, 300
    axis = (np.arange(samples) + 0.5 - samples / 2) * h
    p = mixture(1).log_prob(torch.from_numpy(axis[:, None])).exp().numpy()
    theirs = ndimage.gaussian_filter1d(p, np.sqrt(2 * 0.5) / h, truncate=10)
    np.testing.assert_allclose(fokker_planck(p, 0.5, spacing=h), theirs, rtol=0, atol=1e-12)


def test_fokker_planck_against_the_method_of_lines():
    """Fine finite differences and an implicit adaptive solver, which know nothing of our blur and squeeze."""
    h, samples, pull = 0.05, 400, 1.0
    axis = (np.arange(samples) + 0.5 - samples / 2) * h
    faces = axis[:-1] + h / 2
    p0 = np.exp(-((np.abs(axis - 1) - 1) ** 2) / 0.1)

    def change(_, p):
        flux = np.concatenate([[0], pull * faces * (p[1:] + p[:-1]) / 2 + np.diff(p) / h, [0]])
        return np.diff(flux) / h

    theirs = integrate.solve_ivp(change, (0, 0.4), p0, method="LSODA", lband=1, uband=1, rtol=1e-8, atol=1e-10).y[:, -1]
    np.testing.assert_allclose(fokker_planck(p0, 0.4, spacing=h, pull=pull), theirs, atol=2e-3 * p0.max())  # O(h^2)


def test_flow_against_an_adaptive_solver():
    exact, x = mixture(), torch.tensor([0.4, -1.1], dtype=F64)

    def velocity(t, x):
        return -x - exact.score(torch.from_numpy(x), *transition(t, pull=1)).numpy()

    theirs = integrate.solve_ivp(velocity, (1.5, 0.0), x.numpy(), rtol=1e-9, atol=1e-11).y[:, -1]
    *_, ours = probability_flow(lambda x, t: exact.score(x, *transition(t, pull=1)), x, torch.linspace(1.5, 0, 2001),
                                pull=1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_samples_pass_a_kolmogorov_smirnov_test():
    exact = mixture(1)
    x, cdf = exact.sample(20_000, seed=1).numpy()[:, 0], lambda x: sum(
        w * stats.norm.cdf(x, m, np.sqrt(c)) for w, m, c in
        zip(exact.weights.tolist(), exact.means.flatten().tolist(), exact.covariances.flatten().tolist(), strict=True))
    assert stats.kstest(x, cdf).pvalue > 1e-3


def test_a_walk_of_grains_is_a_blurred_density():
    """Scatter a density's points, add noise to each: their histogram is the blurred density."""
    exact, t = mixture(1), 0.5
    g = torch.Generator().manual_seed(2)
    alpha, sigma = transition(t)
    x = alpha * exact.sample(400_000) + sigma * torch.randn(400_000, 1, generator=g, dtype=F64)
    counts, edges = np.histogram(x.numpy(), 60, (-6, 6), density=True)
    axis = torch.from_numpy((edges[1:] + edges[:-1]) / 2)[:, None]
    np.testing.assert_allclose(counts, exact.log_prob(axis, alpha, sigma).exp(), rtol=0, atol=6e-3)  # 4 sd of a bin


def test_trace_against_the_whole_jacobian():
    exact, x = mixture(4), torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    whole = torch.stack([torch.autograd.functional.jacobian(lambda x: exact.x0(x, 0.8, 0.6), one) for one in x])
    ours = jacobian_trace(lambda x: exact.x0(x, 0.8, 0.6), x, probes=None)
    torch.testing.assert_close(ours, whole.diagonal(dim1=1, dim2=2).sum(1), rtol=0, atol=1e-12)
