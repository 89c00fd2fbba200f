"""Chapter 09: times for every number of steps, golden numbers, identities, and a distribution whose answer is known."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionbook.denoising import Condition, Denoiser, Prediction, Wrapped, classifier_free, exact_denoiser
from diffusionbook.samplers import (
    SAMPLERS,
    Level,
    _exponential_step,
    adams_weights,
    ddim,
    ddim_invert,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    dynamic_threshold,
    edm,
    euler,
    euler_ancestral,
    heun,
    lcm,
    levels,
    log_likelihood,
    mix,
    move,
    noise_source,
    pndm,
    rescaled_guidance,
    sample,
    snr_ratio,
    starting_noise,
    timesteps,
    unipc,
)
from diffusionbook.schedules import NoiseSchedule

SPACINGS = ("trailing", "leading", "linspace", "lcm", "karras", "exponential")
RANDOM = ("ddpm", "euler_ancestral", "edm", "dpmpp_2m_sde", "lcm")
ODES = {"ddim": 1, "euler": 1, "heun": 2, "pndm": 2, "dpmpp_2m": 2, "unipc": 3}  # with their orders
LINEAR, SILENT, FLOW = NoiseSchedule.linear(), NoiseSchedule.linear().zero_terminal_snr(), NoiseSchedule.flow()
SCHEDULES = {"linear": LINEAR, "scaled_linear": NoiseSchedule.scaled_linear(), "cosine": NoiseSchedule.cosine(),
             "silent": SILENT, "flow": FLOW}
COUNTS = [*range(1, 51), *range(101, 112), 333, 999, 1000]  # well-known samplers fail at some of these


def last(states):
    *_, (x, _) = states
    return x


class Gaussian:
    """The best possible denoiser for pixels from N(mean, std²), by Bayes' rule, on any schedule."""

    def __init__(self, schedule=LINEAR, mean=0.3, std=0.25):
        self.schedule, self.mean, self.std, self.calls = schedule, mean, std, 0
        self.level = functools.cache(lambda t: levels(schedule, [t])[0])

    def __call__(self, x, t):
        self.calls += 1
        _, alpha, sigma = self.level(t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        x0 = self.mean + gain * (x - alpha * self.mean)
        return Prediction(x0, (x - alpha * x0) / sigma)

    def moments(self, level):
        return level.alpha * self.mean, math.hypot(level.alpha * self.std, level.sigma)

    def follow(self, x, first, then):
        """Where the probability-flow equation takes x: the quantile stays the same."""
        (mean, std), (mean_then, std_then) = self.moments(self.level(first)), self.moments(self.level(then))
        return mean_then + std_then * (x - mean) / std


def noise(count=4):
    return starting_noise((count, 1, 8, 8)).double()


def own_noise(seed=0):
    """Fresh noise in float64, the same for every sampler that is given the same seed."""
    return noise_source(seed)


# Times


def falls(times):
    return all(a > b for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", [LINEAR, SILENT, FLOW], ids=["linear", "silent", "flow"])
def test_times_for_every_number_of_steps(schedule, spacing):
    for steps in range(1, 1001):
        *times, clean = timesteps(schedule, steps, spacing=spacing)
        assert clean is None and len(times) == steps and falls(times), steps
        assert 0 <= times[-1] and times[0] <= 999
        whole = spacing not in ("karras", "exponential")
        assert all(type(t) is int for t in times) if whole else all(type(t) in (int, float) for t in times)
        if spacing in ("trailing", "linspace", "karras", "exponential"):
            assert times[0] == 999
        if spacing in ("linspace", "karras", "exponential") and steps > 1:
            assert times[-1] == 0
        if spacing == "leading":
            assert times[-1] in (0, 1)
        if spacing == "lcm" and steps <= 50:
            assert times[0] == 999 and all(t % 20 == 19 for t in times)
    assert times == pytest.approx(range(999, -1, -1)) if whole else len(times) == 1000


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 333])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_of_other_schedules(total, spacing):
    schedule = NoiseSchedule.linear(total)
    for steps in range(1, total + 1):
        *times, _ = timesteps(schedule, steps, spacing=spacing)
        assert len(times) == steps and falls(times) and 0 <= times[-1] and times[0] < total


@pytest.mark.parametrize("spacing, expected", [
    ("trailing", [999, 799, 599, 399, 199, None]),
    ("leading", [801, 601, 401, 201, 1, None]),
    ("linspace", [999, 749, 500, 250, 0, None]),
    ("lcm", [999, 799, 599, 399, 199, None]),
])
def test_five_times(spacing, expected):
    assert timesteps(LINEAR, 5, spacing=spacing) == expected


@pytest.mark.parametrize("steps, expected", [(4, [999, 759, 499, 259]), (8, [999, 879, 759, 639, 499, 379, 259, 139])])
def test_times_of_consistency_models(steps, expected):
    assert timesteps(LINEAR, steps, spacing="lcm") == [*expected, None]


def test_trailing_steps_are_even_when_they_divide_the_total():
    assert timesteps(LINEAR, 20)[:-1] == list(range(999, 0, -50))
    for steps in (3, 7, 30, 333):
        gaps = {a - b for a, b in itertools.pairwise(timesteps(LINEAR, steps)[:-1])}
        assert gaps <= {math.floor(1000 / steps), math.ceil(1000 / steps)}


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "flow"])
@pytest.mark.parametrize("spacing, curve", [("karras", lambda r: r ** (1 / 7)), ("exponential", math.log)])
def test_grids_are_even_in_noise(name, spacing, curve):
    stops = levels(SCHEDULES[name], timesteps(SCHEDULES[name], 12, spacing=spacing))[:-1]
    stops = stops[1:] if name == "flow" else stops  # its first has no picture at all
    marks = torch.tensor([curve(stop.sigma / stop.alpha) for stop in stops], dtype=torch.float64)
    if name == "flow":  # even below the level that follows on pure noise
        first = levels(FLOW, [998])[0]
        marks = torch.cat([torch.tensor([curve(first.sigma / first.alpha)], dtype=torch.float64), marks])
    assert torch.allclose(marks.diff(), (marks[-1] - marks[0]) / (len(marks) - 1), rtol=1e-6)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", None])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"whole number in 1…1000, got {steps!r}"):
        timesteps(LINEAR, steps)


def test_unknown_spacings_are_refused():
    with pytest.raises(ValueError, match="one of trailing, .*exponential; got 'even'"):
        timesteps(LINEAR, 5, spacing="even")


def test_levels_are_those_of_the_schedule():
    first, then, clean = levels(LINEAR, [999, 300.5, None])
    assert first == (999, float(LINEAR.alpha(999)), float(LINEAR.sigma(999)))
    assert then == (300.5, float(LINEAR.alpha(300.5)), float(LINEAR.sigma(300.5)))
    assert clean == (None, 1, 0) and clean.lam == math.inf
    assert then.lam == pytest.approx(math.log(then.alpha / then.sigma))
    assert levels(SILENT, [999])[0].lam == -math.inf


# Known values


def golden_input():
    return torch.arange(768.0).reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / 768


def golden_network(x, t):
    t = t.view(-1, 1, 1, 1)
    return x * t / (t + 1)


def golden_denoiser(prediction, schedule=LINEAR):
    """That of diffusers' own tests, which clip x0 and keep the noise as it was."""
    inner = Denoiser(golden_network, schedule, prediction)

    def clipped(x, t):
        answer = inner(x, t)
        return answer._replace(x0=answer.x0.clamp(-1, 1))

    return Wrapped(inner, clipped)


def golden_noise(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


HUNDREDS = list(range(900, -1, -100))
TENTHS = [round(99.9 * i) for i in range(10, 0, -1)]
GOLDEN = {  # name: (states, sum of |x|, mean of |x|)
    "ddim": (lambda x: ddim(golden_denoiser("epsilon"), x, [*HUNDREDS, None]), 172.0067, 0.223967),
    "ddim v": (lambda x: ddim(golden_denoiser("v"), x, [*HUNDREDS, None]), 52.5302, 0.0684),
    "ddim to the clean point": (lambda x: ddim(golden_denoiser("epsilon", NoiseSchedule.linear(beta_min=0.01)), x,
                                               [*HUNDREDS, None]), 149.8295, 0.1951),
    "ddim to the first level": (lambda x: ddim(golden_denoiser("epsilon", NoiseSchedule.linear(beta_min=0.01)), x,
                                               [*HUNDREDS, 0]), 149.0784, 0.1941),
    "ddpm": (lambda x: ddpm(golden_denoiser("epsilon"), x, [*range(999, -1, -1), None], variance="small",
                            noise=golden_noise()), 258.9606, 0.3372),
    "ddpm v": (lambda x: ddpm(golden_denoiser("v"), x, [*range(999, -1, -1), None], noise=golden_noise()),
               202.0296, 0.2631),
    "pndm": (lambda x: pndm(Denoiser(golden_network, LINEAR), x, HUNDREDS), 198.1318, 0.2580),
    "dpmpp_2m": (lambda x: dpmpp_2m(Denoiser(golden_network, LINEAR), x, [*TENTHS, 0]), None, 0.3301),
    "dpmpp_2m v": (lambda x: dpmpp_2m(Denoiser(golden_network, LINEAR, "v"), x, [*TENTHS, 0]), None, 0.2251),
    "lcm, 1 step": (lambda x: lcm(Denoiser(golden_network, SCHEDULES["scaled_linear"]), x,
                                  timesteps(LINEAR, 1, spacing="lcm"), noise=golden_noise()), 18.7097, 0.0244),
    "lcm, 10 steps": (lambda x: lcm(Denoiser(golden_network, SCHEDULES["scaled_linear"]), x,
                                    timesteps(LINEAR, 10, spacing="lcm"), noise=golden_noise()), 197.7616, 0.2575),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name):
    """From the tests of diffusers, to their tolerances."""
    run, total, mean = GOLDEN[name]
    x = last(run(golden_input()))
    assert total is None or x.abs().sum().item() == pytest.approx(total, abs=1e-2)
    assert x.abs().mean().item() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("t, t_next, variance", [(420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979),
                                                 (999, 998, 0.02)])
def test_golden_variances(t, t_next, variance):
    now, then = levels(LINEAR, [t, t_next])
    assert then.sigma**2 * (1 - snr_ratio(now, then)) == pytest.approx(variance, abs=1e-5)


def test_adams_weights():
    expected = [-9 / 24, 37 / 24, -59 / 24, 55 / 24]
    assert adams_weights([700, 600, 500, 400], 300) == pytest.approx(expected)
    for k in range(4):  # a cubic's mean is exact for any times
        times, f = [950.0, 610.0, 500.0, 420.0], lambda t, k=k: (t / 1000) ** k
        mean = sum(w * f(t) for w, t in zip(adams_weights(times, 300.0), times, strict=True))
        exact = (0.42 ** (k + 1) - 0.3 ** (k + 1)) / (k + 1) / 0.12
        assert mean == pytest.approx(exact)
    assert adams_weights([700], 600) == [1]


# Identities


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_ddim_and_euler_are_one(name, steps):
    denoise, times = Gaussian(SCHEDULES[name]), timesteps(SCHEDULES[name], steps)
    for (a, _), (b, _) in zip(ddim(denoise, noise(), times), euler(denoise, noise(), times), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 7, 30])
def test_ddim_with_fresh_noise_is_ddpm(name, steps):
    denoise, times = Gaussian(SCHEDULES[name]), timesteps(SCHEDULES[name], steps)
    walks = [ddim(denoise, noise(), times, eta=1, noise=own_noise()),
             ddpm(denoise, noise(), times, variance="small", noise=own_noise()),
             euler_ancestral(denoise, noise(), times, noise=own_noise())]
    for states in zip(*walks, strict=True):
        for x, _ in states[1:]:
            assert torch.allclose(x, states[0][0], rtol=0, atol=1e-6)


def test_first_order_dpmpp_and_unipc_are_ddim():
    """The first step has no past, and so has every step of two, the second of which goes to the clean point."""
    times = timesteps(LINEAR, 9)
    walks = [list(sampler(Gaussian(), noise(), times)) for sampler in (ddim, dpmpp_2m, unipc)]
    for walk in walks[1:]:
        assert torch.allclose(walk[0][0], walks[0][0][0], rtol=0, atol=1e-12)
        assert (walk[5][0] - walks[0][5][0]).abs().max() > 0.002  # with a past it is another method
    two = [last(sampler(Gaussian(), noise(), [999, 400, None])) for sampler in (ddim, dpmpp_2m)]
    assert torch.allclose(*two, rtol=0, atol=1e-12)


def test_edm_without_churn_is_heun():
    times = timesteps(LINEAR, 12, spacing="karras")
    assert torch.equal(last(edm(Gaussian(), noise(), times, churn=0)), last(heun(Gaussian(), noise(), times)))


def test_dpmpp_second_step_by_the_formula():
    times = [900, 600, 200]
    first, (x2, _) = dpmpp_2m(Gaussian(), noise(), times)
    x1, before = first
    answer = Gaussian()(x1, 600)
    (_, a0, s0), (_, a1, s1), (_, a2, s2) = levels(LINEAR, times)
    h0, h = math.log(a1 / s1) - math.log(a0 / s0), math.log(a2 / s2) - math.log(a1 / s1)
    direction = answer.x0 + (answer.x0 - before.x0) * h / (2 * h0)
    assert torch.allclose(x2, s2 / s1 * x1 - a2 * (math.exp(-h) - 1) * direction, rtol=0, atol=1e-12)


@pytest.mark.parametrize("degree", [0, 2, 3])
def test_the_step_of_unipc_is_exact_for_polynomials(degree):
    """With answers that are a polynomial of λ, at `degree` more points than the start, the end included or not."""
    now, then = levels(LINEAR, [500, 410])
    x0 = lambda lam: 0.3 - 0.2 * lam + 0.4 * lam**2 + 0.1 * lam**3 if degree == 3 else 0.3 * lam**degree  # noqa: E731
    lam = torch.linspace(now.lam, then.lam, 20001, dtype=torch.float64)
    integral = then.sigma / then.alpha * torch.trapezoid((lam - now.lam).exp() * x0(lam), lam) * math.exp(now.lam)
    expected = then.sigma / now.sigma * 0.7 + then.alpha * integral
    for others in ([then.lam, now.lam - 0.2, now.lam - 0.5], [now.lam - 0.1, now.lam - 0.3, now.lam - 0.4]):
        known = [(at, torch.tensor(x0(at), dtype=torch.float64)) for at in others[:degree]]
        start = now.lam, torch.tensor(x0(now.lam), dtype=torch.float64)
        found = _exponential_step(torch.tensor(0.7, dtype=torch.float64), start, now, then, known)
        assert found.item() == pytest.approx(expected.item(), abs=1e-9)


# The distribution whose answer is known: orders of convergence


def order_of(name, schedule, grid, counts, **options):
    """The slope of log(error) against log(step), from level 900 down to level 100."""
    first, then = levels(schedule, [900.0, 100.0])
    errors = []
    for steps in counts:
        if grid == "time":
            times = torch.linspace(900, 100, steps + 1, dtype=torch.float64).tolist()
        else:
            lam = torch.linspace(first.lam, then.lam, steps + 1, dtype=torch.float64)
            times = [900.0, *schedule.time_of(2 * lam[1:-1]).tolist(), 100.0]
        denoise = Gaussian(schedule)
        found = last(SAMPLERS[name](denoise, noise(), times, **options))
        errors.append((found - denoise.follow(noise(), 900.0, 100.0)).abs().max().item())
    slope = torch.linalg.lstsq(
        torch.stack([torch.tensor(counts).double().log(), torch.ones(len(counts)).double()], dim=1),
        torch.tensor(errors).double().log()[:, None]).solution[0].item()
    return -slope, errors


@pytest.mark.parametrize("grid", ["time", "noise"])
@pytest.mark.parametrize("sampler, counts, names", [
    ("ddim", (20, 40, 80, 160), ["linear", "cosine", "silent", "flow"]),
    ("euler", (20, 40, 80, 160), ["linear", "cosine", "silent", "flow"]),
    ("heun", (20, 40, 80, 160), ["linear", "cosine", "silent", "flow"]),
    # Errors of higher order hide that of multistep methods until the steps are small; here, they soon are.
    ("pndm", (40, 80, 160, 320), ["flow"]),
    ("dpmpp_2m", (20, 40, 80, 160), ["linear", "silent"]),
    ("unipc", (80, 160, 320, 640), ["linear", "silent", "flow"]),
])
def test_orders_of_convergence(sampler, counts, names, grid):
    for name in names:
        order, errors = order_of(sampler, SCHEDULES[name], grid, counts)
        assert order == pytest.approx(ODES[sampler], abs=0.2), (name, errors)


def test_other_orders_of_unipc():
    assert order_of("unipc", FLOW, "noise", (40, 80, 160, 320), order=1)[0] == pytest.approx(2, abs=0.2)
    assert order_of("unipc", FLOW, "noise", (40, 80, 160, 320), order=3)[0] > 3  # its first steps are of lower order


def test_quality_for_the_same_number_of_calls():
    errors = {name: order_of(name, LINEAR, "noise", (20, 20))[1][0] for name in ("ddim", "dpmpp_2m", "unipc")}
    assert errors["unipc"] < errors["dpmpp_2m"] / 3 < errors["ddim"] / 9, errors


# Every sampler at every awkward number of steps


def calls_of(name, steps):
    """Network calls, as the docstrings say."""
    if name in ("heun", "edm"):
        return 2 * steps - 1
    return steps + 3 * min(3, steps - 1) if name == "pndm" else steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_number_of_steps(name):
    x = noise(1)[..., :2, :2]
    for steps in COUNTS:
        denoise = Gaussian()
        states = list(SAMPLERS[name](denoise, x, timesteps(LINEAR, steps)))
        assert len(states) == steps and denoise.calls == calls_of(name, steps)
        found = states[-1][0]
        assert torch.isfinite(found).all()
        if name in ODES and steps > 10:
            assert (found - denoise.follow(x, 999, None)).abs().max() < 6 / steps, steps
        if steps == 1:
            assert torch.allclose(found, denoise(x, 999).x0, rtol=0, atol=1e-7)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_spacing_on_every_schedule(name, spacing):
    x = noise(16)
    for schedule in SCHEDULES.values():
        for steps in (1, 2, 3, 5, 33):
            denoise = Gaussian(schedule)
            found = last(SAMPLERS[name](denoise, x, timesteps(schedule, steps, spacing=spacing)))
            assert torch.isfinite(found).all(), (schedule, steps)
        mean, std = found.mean().item(), found.std().item()
        assert abs(mean - denoise.mean) < 0.05, schedule
        # 33 steps leave some error; an undistilled consistency model jumps to the mean of what may be there
        assert name == "lcm" or abs(std - denoise.std) < (0.15 if name in RANDOM else 0.07), schedule


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])  # it mixes the last four
def test_the_last_state_is_the_last_guess(name):
    *_, (x, answer) = SAMPLERS[name](Gaussian(), noise(), timesteps(LINEAR, 7))
    assert torch.allclose(x, answer.x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in RANDOM if name != "lcm"])
def test_random_samplers_end_in_the_right_distribution(name):
    x = sample(Gaussian(), (16, 1, 16, 16), sampler=name, steps=120, spacing="exponential", dtype=torch.float64,
               progress=False)
    assert x.mean().item() == pytest.approx(0.3, abs=0.01) and x.std().item() == pytest.approx(0.25, abs=0.015)


# DDPM's variances


@pytest.mark.parametrize("variance, size", [("small", "posterior_variance"), ("large", "step_variance")])
@pytest.mark.parametrize("t, t_next", [(1, 0), (500, 499), (999, 998), (999, 799), (700.5, 3.25)])
def test_ddpm_steps_as_the_posterior_says(t, t_next, variance, size):
    x = noise()
    (found, answer), = ddpm(Gaussian(), x, [t, t_next], variance=variance, noise=own_noise())
    mean = LINEAR.posterior_mean(answer.x0, x, t, t_next)
    expected = mean + getattr(LINEAR, size)(t, t_next).sqrt() * own_noise()(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def learned(mix):
    inner = Gaussian()
    return Wrapped(inner, lambda x, t: inner(x, t)._replace(variance_mix=torch.full_like(x, mix)))


def test_a_learned_variance_lies_between_small_and_large():
    x, step = noise(), [600, 400]
    walk = lambda denoise, **options: last(ddpm(denoise, x, step, noise=own_noise(), **options))  # noqa: E731
    assert torch.allclose(walk(learned(0.0)), walk(Gaussian(), variance="small"), atol=1e-12)
    assert torch.allclose(walk(learned(1.0)), walk(Gaussian(), variance="large"), atol=1e-12)
    low, high = (math.log(v(600, 400)) for v in (LINEAR.posterior_variance, LINEAR.step_variance))
    deviation = math.exp((0.3 * high + 0.7 * low) / 2)
    mean = walk(Gaussian(), variance="small") - math.exp(low / 2) * own_noise()(x)
    assert torch.allclose(walk(learned(0.3)), mean + deviation * own_noise()(x), atol=1e-12)
    assert torch.allclose(walk(learned(0.3), variance="large"), walk(Gaussian(), variance="large"), atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_no_variance_gives_nan(schedule, variance):
    """diffusers' "fixed_large_log" does."""
    inner = Gaussian(schedule)
    denoise = Wrapped(inner, lambda x, t: inner(x, t)._replace(variance_mix=torch.full_like(x, 0.5)))
    for steps in (1, 2, 50, 1000):
        x = last(ddpm(denoise, noise(1), timesteps(schedule, steps), variance=variance, noise=own_noise()))
        assert torch.isfinite(x).all()


def test_a_variance_that_was_not_learned_is_refused():
    with pytest.raises(ValueError, match='needs a network that learned it; use "small" or "large"'):
        list(ddpm(Gaussian(), noise(), [999, 500], variance="learned"))
    with pytest.raises(ValueError, match="got 'fixed_large_log'"):
        list(ddpm(Gaussian(), noise(), [999, 500], variance="fixed_large_log"))


def test_no_noise_is_added_on_the_last_step():
    for name in ("ddpm", "euler_ancestral", "edm", "dpmpp_2m_sde", "lcm"):
        def forbidden(x):
            raise AssertionError("asked for noise")
        options = {"churn": 0} if name == "edm" else {}
        found = last(SAMPLERS[name](Gaussian(), noise(), [1, None], noise=forbidden, **options))
        assert torch.isfinite(found).all()


# Other options


def test_eta_says_how_much_noise_is_fresh():
    now, then = levels(LINEAR, [600, 400])
    x = noise()
    kept = last(ddim(Gaussian(), x, [600, 400]))
    answer = Gaussian()(x, 600)
    found = last(ddim(Gaussian(), x, [600, 400], eta=0.5, noise=torch.zeros_like))
    fresh = 0.5 * math.sqrt(float(LINEAR.posterior_variance(600, 400)))
    assert torch.allclose(found, then.alpha * answer.x0 + math.sqrt(then.sigma**2 - fresh**2) * answer.eps, atol=1e-12)
    assert torch.equal(last(ddim(Gaussian(), x, [600, 400], eta=0)), kept)
    for eta in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="eta must lie in"):
            next(ddim(Gaussian(), x, [600, 400], eta=eta))


def test_churn_raises_the_noise_before_the_step():
    """From r the level goes up to r(1+γ), with noise of variance r²((1+γ)² - 1), and then Heun goes down."""
    x, times = noise(), [700, 500]
    now, then = levels(LINEAR, times)
    gamma = math.sqrt(2) - 1
    up = levels(LINEAR, [float(LINEAR.time_of(2 * (now.lam - math.log(1 + gamma))))])[0]
    assert up.sigma / up.alpha == pytest.approx((1 + gamma) * now.sigma / now.alpha)
    fresh = 1.003 * now.sigma / now.alpha * math.sqrt((1 + gamma) ** 2 - 1)
    raised = up.alpha * (x / now.alpha + fresh * own_noise()(x))
    expected = last(heun(Gaussian(), raised, [up.t, 500]))
    assert torch.allclose(last(edm(Gaussian(), x, times, noise=own_noise())), expected, rtol=0, atol=1e-9)
    assert torch.equal(last(edm(Gaussian(), x, times, churn_between=(0, 0.01))), last(heun(Gaussian(), x, times)))


def test_unipc_refuses_other_orders():
    with pytest.raises(ValueError, match="order must be 1, 2 or 3, got 4"):
        next(unipc(Gaussian(), noise(), [999, None], order=4))


@given(st.lists(st.floats(0, 999), min_size=2, max_size=2, unique=True), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_step_with_a_perfect_answer_stays_on_the_way(times, seed):
    """x made of x0 and noise goes to the mixture of the same two at the next level, whatever the schedule."""
    high, low = sorted(times, reverse=True)
    if high - low < 1e-3:
        return
    g = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 2, 1, 2, 2, generator=g, dtype=torch.float64)
    for schedule in SCHEDULES.values():
        now, then = levels(schedule, [high, low])

        denoise = Wrapped(Denoiser(None, schedule), lambda x, t: Prediction(x0, eps))
        answer = Prediction(x0, eps)
        for name in ODES:
            found = last(SAMPLERS[name](denoise, mix(answer, now), [high, low]))
            assert torch.allclose(found, mix(answer, then), rtol=1e-6, atol=1e-6), name
        if now.alpha > 1e-8:  # with less signal, x0 is lost in the rounding of x
            assert torch.allclose(move(mix(answer, now), eps, now, then), mix(answer, then), rtol=1e-6, atol=1e-6)


def test_snr_ratio():
    now, then, clean = Level(5, 0.6, 0.8), Level(2, 0.8, 0.6), Level(None, 1.0, 0.0)
    assert snr_ratio(now, then) == pytest.approx((0.6 / 0.8) ** 2 / (0.8 / 0.6) ** 2)
    assert snr_ratio(now, clean) == 0 and snr_ratio(Level(9, 0.0, 1.0), then) == 0


# Inversion


@pytest.mark.parametrize("name", ["linear", "cosine", "flow"])
def test_there_and_back(name):
    schedule = SCHEDULES[name]
    denoise, x0 = Gaussian(schedule), 0.3 + 0.25 * noise()
    errors = {}
    for steps, corrections in [(20, 0), (80, 0), (20, 8)]:
        times = timesteps(schedule, steps, spacing="linspace")
        up = list(ddim_invert(denoise, x0, times, corrections=corrections))
        assert len(up) == steps
        errors[steps, corrections] = (last(ddim(denoise, up[-1][0], times)) - x0).abs().max().item()
    assert errors[80, 0] < errors[20, 0] / 2 and errors[20, 8] < errors[20, 0] / 20, errors


def test_inversion_finds_the_noise():
    x = noise()
    denoise, times = Gaussian(), timesteps(LINEAR, 500, spacing="linspace")
    found = last(ddim_invert(denoise, denoise.follow(x, 999, None), times, corrections=2))
    assert (found - x).abs().max() < 0.05


def test_inversion_starts_from_a_level_without_error_if_corrected():
    times = timesteps(LINEAR, 30)[:-1]
    x = Gaussian().follow(noise(), 999, times[-1])
    up = last(ddim_invert(Gaussian(), x, times, corrections=20))
    assert torch.allclose(last(ddim(Gaussian(), up, times)), x, rtol=0, atol=1e-4)


# Wrappers


def constant(value, schedule=LINEAR):
    return Wrapped(Denoiser(None, schedule), lambda x, t: Prediction(value, torch.zeros_like(x)))


def test_dynamic_threshold():
    x0 = torch.linspace(-3, 3, 1001).expand(2, 1, 1, 1001).clone()
    x0[1] /= 6
    x = torch.ones_like(x0)
    found = dynamic_threshold(constant(x0), quantile=0.5)(x, 500)
    assert torch.allclose(found.x0[0], x0[0].clamp(-1.5, 1.5) / 1.5)
    assert torch.equal(found.x0[1], x0[1])  # never stretched
    alpha, sigma = float(LINEAR.alpha(500)), float(LINEAR.sigma(500))
    assert torch.allclose(alpha * found.x0 + sigma * found.eps, x, atol=1e-6)
    assert torch.equal(dynamic_threshold(constant(x0), quantile=0.9, limit=1)(x, 500).x0, x0.clamp(-1, 1))
    for options in ({"quantile": 0}, {"quantile": 1.2}, {"limit": 0.5}):
        with pytest.raises(ValueError, match="quantile must lie in"):
            dynamic_threshold(constant(x0), **options)


def told(x, t, context):
    return x * context.mean((1, 2)).view(-1, 1, 1, 1) + context[:, 0, 0].view(-1, 1, 1, 1).sin()


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "flow"])
def test_rescaled_guidance(prediction):
    schedule = FLOW if prediction == "flow" else LINEAR
    g = torch.Generator().manual_seed(0)
    context, empty = torch.randn(2, 3, 4, 5, generator=g)
    x = starting_noise((3, 1, 8, 8))
    denoise = Denoiser(told, schedule, prediction, Condition(context=context))
    guided = classifier_free(denoise, Condition(context=empty), scale=6.0)(x, 400)
    rescale = lambda phi: rescaled_guidance(denoise, Condition(context=empty), scale=6.0, phi=phi)(x, 400)  # noqa: E731
    assert torch.allclose(rescale(0.0).x0, guided.x0, atol=1e-4)
    alone, without = told(x, 400, context), told(x, 400, empty)
    output = without + 6 * (alone - without)
    ratio = alone.std((1, 2, 3), keepdim=True) / output.std((1, 2, 3), keepdim=True)
    expected = Denoiser(lambda x, t: output * (0.7 * ratio + 0.3), schedule, prediction)(x, 400)
    assert torch.allclose(rescale(0.7).x0, expected.x0, rtol=1e-4, atol=1e-4)
    assert torch.allclose(rescale(0.7).eps, expected.eps, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="phi"):
        rescale(1.5)


def test_a_network_that_says_nothing_can_be_rescaled():
    x = starting_noise((2, 1, 4, 4))
    answer = rescaled_guidance(Denoiser(lambda x, t: 0 * x, LINEAR, "x0"), Condition(), scale=6.0)(x, 999)
    assert torch.isfinite(answer.x0).all() and torch.isfinite(answer.eps).all()


# Likelihood


def gaussian_network(schedule, mean=0.3, std=0.25):
    def network(x, t):
        alpha, sigma = schedule.alpha(t.double()).view(-1, 1), schedule.sigma(t.double()).view(-1, 1)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
    return Denoiser(network, schedule, "x0", grad=True)


@pytest.mark.parametrize("name", ["linear", "cosine", "silent", "flow"])
def test_likelihood_of_gaussian_data(name):
    schedule = SCHEDULES[name]
    times = timesteps(schedule, 100, spacing="exponential")
    level = levels(schedule, [0])[0]
    exact = torch.distributions.Normal(*Gaussian(schedule).moments(level))
    x = exact.mean + exact.stddev * torch.linspace(-2, 2, 10, dtype=torch.float64).view(5, 2)
    found = log_likelihood(gaussian_network(schedule), x, times, probes=None)
    assert torch.allclose(found, exact.log_prob(x).sum(1), rtol=0, atol=0.02), found - exact.log_prob(x).sum(1)
    # the derivative is a multiple of the identity, so one random direction of signs is exact as well
    guessed = log_likelihood(gaussian_network(schedule), x, times, probes=1)
    assert torch.allclose(found, guessed, atol=1e-9)


def test_likelihood_of_two_points_integrates_to_one():
    data = torch.tensor([[-0.8], [0.5]], dtype=torch.float64)
    denoise = exact_denoiser(data, LINEAR)
    denoise = Denoiser(denoise.network, LINEAR, "x0", grad=True)
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)[:, None]
    times = timesteps(LINEAR, 120, spacing="exponential")
    start = min(range(120), key=lambda i: abs(times[i] - 150))  # the density at the noise of this time
    density = log_likelihood(denoise, x, times[:start + 1], probes=None).exp()
    assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1, abs=0.01)
    level = levels(LINEAR, times[start:start + 1])[0]
    wanted = torch.distributions.Normal(level.alpha * data[:, 0], level.sigma).log_prob(x).exp().mean(1)
    assert (density - wanted).abs().max() < 0.02 * wanted.max()


def test_hutchinson_is_right_on_average():
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = Denoiser(exact_denoiser(data, LINEAR).network, LINEAR, "x0", grad=True)
    x, times = data[:2] + 0.3, [999, 800, 600, 400, 300]
    exact = log_likelihood(denoise, x, times, probes=None)
    guess = log_likelihood(denoise, x, times, probes=400, seed=3)
    assert torch.allclose(exact, guess, atol=0.15) and not torch.allclose(exact, guess, atol=1e-6)


def test_likelihood_without_gradients_is_refused():
    with pytest.raises(ValueError, match="build the Denoiser with grad=True"):
        log_likelihood(Denoiser(lambda x, t: 0.5 * x, LINEAR), torch.zeros(1, 2), [999, 500])


# Noise and the whole loop


def test_large_seeds_are_not_small_ones_again():
    seeds = [7, 2**32 - 1, 2**32, 2**32 + 7, 2**62, 2**62 + 7, 2**63 - 1]
    assert len({float(starting_noise((1, 4, 4), seed=seed).sum()) for seed in seeds}) == len(seeds)
    assert torch.equal(starting_noise((2, 4, 4), seed=2**32 - 1)[1:], starting_noise((1, 4, 4), seed=2**32))


def test_noise_depends_on_the_seed_of_each_picture_only():
    shape = (2, 3, 3)
    four = starting_noise((4, *shape), seed=5)
    assert four.dtype == torch.float32 and len({float(row.sum()) for row in four}) == 4
    for i in range(4):
        assert torch.equal(starting_noise((1, *shape), seed=5 + i)[0], four[i])
    state = torch.get_rng_state()
    many = starting_noise((200, 4, 8, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    draw = noise_source(5)
    assert torch.equal(draw(four), four) and not torch.equal(draw(four), four)
    assert torch.equal(starting_noise((4, *shape), seed=np.int64(5)), four)
    for seed in (-1, 2**63, 1.5, None):
        with pytest.raises(ValueError, match="seed must lie in"):
            noise_source(seed)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(name):
    run = lambda count, seed: sample(Gaussian(), (count, 1, 4, 4), sampler=name, steps=6, seed=seed,  # noqa: E731
                                     progress=False)
    batch = run(3, 10)
    for i in range(3):
        assert torch.allclose(run(1, 10 + i)[0], batch[i], rtol=0, atol=1e-6)
    assert (batch[0] - batch[1]).abs().max() > 0.1
    assert torch.equal(run(3, 10), batch)


def test_on_step_sees_every_state():
    seen = []
    x = sample(Gaussian(), (2, 1, 4, 4), steps=5, progress=False, on_step=lambda *state: seen.append(state))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    expected = list(dpmpp_2m(Gaussian(), starting_noise((2, 1, 4, 4)), timesteps(LINEAR, 5)))
    for (_, state, answer), (wanted, wanted_answer) in zip(seen, expected, strict=True):
        assert torch.equal(state, wanted) and torch.equal(answer.x0, wanted_answer.x0)
    assert torch.equal(seen[-1][1], x)


def test_given_noise_is_used_and_left_alone():
    latents = starting_noise((2, 1, 4, 4), seed=77)
    kept = latents.clone()
    for name in ("dpmpp_2m", "ddpm"):
        given = sample(Gaussian(), (2, 1, 4, 4), sampler=name, steps=3, latents=latents, seed=77, progress=False)
        assert torch.equal(given, sample(Gaussian(), (2, 1, 4, 4), sampler=name, steps=3, seed=77, progress=False))
    assert torch.equal(latents, kept)


def test_the_times_asked_for_are_used():
    seen = []

    def network(x, t):
        seen.append(t[0].item())
        return x

    denoise = Denoiser(network, LINEAR)
    sample(denoise, (1, 1, 2, 2), steps=5, spacing="leading", sampler="ddim", progress=False)
    assert seen == [801, 601, 401, 201, 1]
    seen.clear()
    sample(denoise, (1, 1, 2, 2), times=[640, 320.5, 3], sampler="euler", progress=False)
    assert seen == [640, 320.5]
    for times in (torch.tensor([640, 320.5, 3]), np.array([640, 320.5, 3]), iter([640, 320.5, 3])):
        seen.clear()
        sample(denoise, (1, 1, 2, 2), times=times, sampler="euler", progress=False)
        assert seen == [640, 320.5]


def test_times_that_begin_in_the_middle_need_a_state():
    half, shape = 259, (1, 1, 2, 2)  # below this step of LINEAR there is more picture than noise
    assert LINEAR.alpha_bar[half] < 0.5 < LINEAR.alpha_bar[half - 1]
    with pytest.raises(ValueError, match=f"at time {half - 1} there is more picture than noise .* give latents"):
        sample(Gaussian(), shape, times=[half - 1, 0, None], progress=False)
    sample(Gaussian(), shape, times=[half - 1, 0, None], latents=torch.zeros(shape), progress=False)
    sample(Gaussian(), shape, times=[half, 0, None], progress=False)
    short = Denoiser(lambda x, t: x, NoiseSchedule.linear(50), "v")  # ends with more picture than noise
    for denoise, options in ((Gaussian(), {"steps": 1, "spacing": "leading"}), (short, {})):
        with pytest.raises(ValueError, match='more picture than noise .*spacing="trailing" begins at the highest'):
            sample(denoise, shape, progress=False, **options)
    sample(short, shape, latents=noise(1)[:, :1, :2, :2], progress=False)


def test_noise_is_the_same_whatever_the_default_type():
    before = starting_noise((2, 3, 4, 4), seed=3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(starting_noise((2, 3, 4, 4), seed=3), before) and before.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_likelihood_needs_two_times():
    denoise = Denoiser(lambda x, t: x, NoiseSchedule.flow(), "flow", grad=True)
    with pytest.raises(ValueError, match="two times or more at which there are both signal and noise"):
        log_likelihood(denoise, torch.zeros(1, 1, 2, 2), timesteps(denoise.schedule, 1))


def test_options_reach_the_sampler():
    wanted = last(ddim(Gaussian(), starting_noise((1, 1, 2, 2)), timesteps(LINEAR, 4), eta=0.5, noise=torch.zeros_like))
    found = sample(Gaussian(), (1, 1, 2, 2), sampler="ddim", steps=4, eta=0.5, noise=torch.zeros_like, progress=False)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nan_is_noticed(name):
    with pytest.raises(FloatingPointError, match="NaN"):
        sample(Denoiser(lambda x, t: x / 0, LINEAR), (1, 1, 2, 2), sampler=name, steps=3, progress=False)


@pytest.mark.parametrize("options, message", [
    ({"sampler": "eluer"}, "no sampler named 'eluer'; choose one of ddpm, ddim, euler"),
    ({"steps": 0}, "1…1000"),
    ({"steps": 1001}, "1…1000"),
    ({"spacing": "even"}, "spacing"),
    ({"latents": torch.zeros(1, 1, 2, 3)}, r"latents must have shape \(1, 1, 2, 2\), got \(1, 1, 2, 3\)"),
    ({"eta": 0.5, "sampler": "unipc"}, "its sampler unipc has an option eta; the sampler has order"),
    ({"eat": 0.5, "sampler": "heun"}, "sampler heun has an option eat; the sampler has none"),
    ({"times": [10, 20, None]}, "times must fall"),
    ({"times": [None, 20]}, "times must fall"),
    ({"times": [10]}, "times must fall"),
    ({"times": [1001, None]}, "t must lie in"),
    ({"seed": -1}, "seed must lie in"),
    ({"shape": (0, 1, 2, 2)}, r"each at least 1, got \(0, 1, 2, 2\)"),
    ({"eta": -1}, "eta must be at least 0, got -1"),
    ({"eta": math.nan}, "eta must be at least 0, got nan"),
    ({"eta": -1, "sampler": "dpmpp_2m_sde"}, "eta must be at least 0"),
    ({"churn": -100, "sampler": "edm"}, "churn must be at least 0, got -100"),
    ({"churn": math.nan, "sampler": "edm"}, "churn must be at least 0, got nan"),
])
def test_impossible_wishes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(Gaussian(), **{"shape": (1, 1, 2, 2), "progress": False, **options})


@pytest.mark.parametrize("name", SAMPLERS)
def test_whole_numbers_are_no_noise(name):
    for options in ({"dtype": torch.int64}, {"latents": torch.ones(1, 1, 2, 2, dtype=torch.uint8)}):
        with pytest.raises(ValueError, match="x must be floating point"):
            sample(Denoiser(lambda x, t: x / 2, LINEAR), (1, 1, 2, 2), sampler=name, steps=3, progress=False, **options)


def test_ways_up_are_asked_for_by_falling_times_too():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="times must fall"):
        last(ddim_invert(Gaussian(), x, [None, 500, 999]))
    with pytest.raises(ValueError, match="times must fall"):
        log_likelihood(gaussian_network(LINEAR), x, [0, 500, 999])


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_number_type_asked_for_is_kept(name):
    for dtype in (torch.float64, torch.bfloat16):
        x = sample(Denoiser(lambda x, t: x * 0.5, LINEAR), (1, 1, 2, 2), sampler=name, steps=3, dtype=dtype,
                   progress=False)
        assert x.dtype == dtype


def test_the_bar_shows_only_when_asked(capsys):
    sample(Gaussian(), (1, 1, 2, 2), steps=3, progress=False)
    assert capsys.readouterr().err == ""
    sample(Gaussian(), (1, 1, 2, 2), steps=3)
    assert "/3" in capsys.readouterr().err


@pytest.mark.parametrize("name", SAMPLERS)
def test_points_and_videos_can_be_sampled_too(name):
    for shape in ((5, 2), (2, 1, 3, 4, 4)):
        assert sample(Gaussian(), shape, sampler=name, steps=5, progress=False).shape == shape


def test_dpmpp_sde_is_dpmpp_with_eta():
    times = timesteps(LINEAR, 6)
    assert torch.equal(last(dpmpp_2m_sde(Gaussian(), noise(), times, noise=own_noise())),
                       last(dpmpp_2m(Gaussian(), noise(), times, eta=1, noise=own_noise())))


def test_rescaled_guidance_says_that_the_network_answers_nan():
    denoise = Denoiser(lambda x, t: torch.full_like(x, torch.nan), LINEAR.zero_terminal_snr(), "v")
    with pytest.raises(FloatingPointError, match="the network answered with NaN or infinity"):
        rescaled_guidance(denoise, Condition(), scale=2.0)(torch.zeros(1, 3, 8, 8), 500)


def test_a_sampler_may_be_a_function_of_ones_own():
    def mine(denoise, x, times):
        return euler(denoise, x, times)

    denoise = Denoiser(lambda x, t: x, NoiseSchedule.linear())
    options = {"steps": 5, "progress": False}
    assert torch.equal(sample(denoise, (1, 1, 2, 2), sampler=mine, **options),
                       sample(denoise, (1, 1, 2, 2), sampler="euler", **options))
    with pytest.raises(ValueError, match="its sampler mine has an option eta; the sampler has none"):
        sample(denoise, (1, 1, 2, 2), sampler=mine, eta=1.0, **options)


def test_names_of_other_libraries_are_told_ours():
    denoise = Denoiser(lambda x, t: x, NoiseSchedule.linear())
    with pytest.raises(ValueError, match="pipelines call num_inference_steps steps"):
        sample(denoise, (1, 1, 2, 2), num_inference_steps=5)
    with pytest.raises(ValueError, match="guidance is the denoiser's"):
        sample(denoise, (1, 1, 2, 2), guidance=3)
    with pytest.raises(ValueError, match=r"give Wrapped\(denoise, function\)"):
        sample(lambda x, t: x, (1, 1, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_takes_the_type_of_the_networks_weights(dtype):
    network = torch.nn.Conv2d(1, 1, 3, padding=1).to(dtype)
    denoise = Denoiser(Timeless(network), NoiseSchedule.linear())
    assert sample(denoise, (1, 1, 4, 4), steps=2, progress=False).dtype == dtype
    latents = torch.randn(1, 1, 4, 4, dtype=torch.float32)
    assert sample(denoise, (1, 1, 4, 4), steps=2, latents=latents, progress=False).dtype == dtype


class Timeless(torch.nn.Module):
    """A network that doesn't look at the time."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        return self.network(x)


def test_noise_does_not_depend_on_the_default_dtype():
    denoise = Denoiser(lambda x, t: x, NoiseSchedule.linear())
    usual = sample(denoise, (1, 1, 4, 4), steps=2, progress=False)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(sample(denoise, (1, 1, 4, 4), steps=2, progress=False), usual)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("quantile", [0.5, 0.995, 1.0])
def test_the_size_of_a_picture_is_its_quantile(quantile):
    x0 = 3 * torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    denoise = Denoiser(lambda x, t: x0, NoiseSchedule.linear(), "x0")
    size = x0.flatten(1).abs().quantile(quantile, dim=1).view(2, 1, 1, 1)
    found = dynamic_threshold(denoise, quantile=quantile)(torch.zeros_like(x0), 10).x0
    assert torch.allclose(found, x0.clamp(-size, size) / size, atol=1e-6)
