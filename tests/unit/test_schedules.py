"""Noise schedules: known values, identities, properties, bad inputs (chapter 04)."""

import copy
import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionbook.schedules import (
    NoiseSchedule,
    betas_from_alpha_bar,
    flow_levels,
    linear_betas,
    rescale_zero_terminal_snr,
)

NAMES = ["linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_ramp"]


def named(name, steps=1000):
    return getattr(NoiseSchedule, name)(steps)


# Known values


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("linear", 0.9999, 4.036e-5), ("scaled_linear", 0.99915, 0.00466), ("cosine", 0.999959, 2.4e-9)],
)
def test_ends_of_the_named_schedules(name, first, last):
    schedule = named(name)
    assert schedule.alpha_bar[0].item() == pytest.approx(first, abs=5e-7)
    assert schedule.alpha_bar[-1].item() == pytest.approx(last, rel=1.3e-2 if name == "cosine" else 1e-3)


def test_noise_to_signal_of_stable_diffusion():
    schedule = NoiseSchedule.scaled_linear()
    ratio = schedule.sigma(torch.tensor([0.0, 999.0])) / schedule.alpha(torch.tensor([0.0, 999.0]))
    torch.testing.assert_close(ratio, torch.tensor([0.02917, 14.6146]), rtol=2e-4, atol=0)
    assert schedule.alpha(999).item() == pytest.approx(0.0683, abs=5e-5)


def test_half_a_linear_schedule_leaks():
    assert NoiseSchedule.linear(500).alpha_bar[-1].item() == pytest.approx(6.35e-3, rel=1e-3)
    assert NoiseSchedule.linear(500).alpha(499).item() == pytest.approx(0.0797, abs=5e-5)


def test_cosine_caps_exactly_one_beta():
    assert (NoiseSchedule.cosine().betas == 0.999).sum() == 1


def test_cosine_follows_its_formula():
    time = torch.arange(1, 1000, dtype=torch.float64) / 1000  # the last step is the capped one
    wave = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(NoiseSchedule.cosine().alpha_bar[:-1], wave, rtol=1e-9, atol=0)


def test_sigmoid_is_the_papers_curve():
    time = torch.arange(1, 1000, dtype=torch.float64) / 1000
    low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    curve = (high - 1 / (1 + torch.exp(-(6 * time - 3)))) / (high - low)
    torch.testing.assert_close(NoiseSchedule.sigmoid().alpha_bar[:-1], curve, rtol=1e-9, atol=0)
    assert NoiseSchedule.sigmoid().alpha_bar[499].item() == pytest.approx(0.5)


def test_linear_is_linspace():
    torch.testing.assert_close(
        NoiseSchedule.linear(3, beta_min=0.1, beta_max=0.3).betas,
        torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    )
    torch.testing.assert_close(
        NoiseSchedule.linear(3, beta_min=0.1, beta_max=0.3).alpha_bar,
        torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64),
    )


# Properties that hold for every schedule and every number of steps


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(NAMES), steps=st.integers(1, 3000))
def test_alpha_bar_falls_and_betas_are_variances(name, steps):
    schedule = named(name, steps)
    assert schedule.steps == steps == len(schedule.snr) == len(schedule.log_snr)
    assert torch.all((schedule.betas > 0) & (schedule.betas < 1))
    assert torch.all(schedule.alpha_bar[1:] < schedule.alpha_bar[:-1])
    assert schedule.alpha_bar[0] < 1 and schedule.alpha_bar[-1] > 0
    assert torch.all(schedule.log_snr[1:] < schedule.log_snr[:-1])


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(NAMES), steps=st.integers(2, 2000))
def test_zero_terminal_snr(name, steps):
    schedule = named(name, steps)
    silent = schedule.zero_terminal_snr()
    assert silent.alpha_bar[-1] == 0 and silent.betas[-1] == 1 and silent.snr[-1] == 0
    torch.testing.assert_close(silent.alpha_bar[0], schedule.alpha_bar[0], rtol=1e-12, atol=0)
    assert torch.all(silent.alpha_bar[1:] < silent.alpha_bar[:-1])
    ends = torch.tensor([0.0, steps - 1.5, steps - 1.25, steps - 1.0], dtype=torch.float64)
    alpha, sigma = silent.alpha(ends), silent.sigma(ends)
    assert torch.isfinite(alpha).all() and torch.isfinite(sigma).all()
    assert torch.all(alpha[1:] < alpha[:-1]) and alpha[-1] == 0 and sigma[-1] == 1
    torch.testing.assert_close(
        silent.zero_terminal_snr().betas, silent.betas
    )  # doing it twice changes nothing


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(NAMES), steps=st.integers(2, 2000), part=st.floats(0, 1), silent=st.booleans())
def test_variance_is_preserved_and_alpha_lies_between_its_neighbours(name, steps, part, silent):
    schedule = named(name, steps).zero_terminal_snr() if silent else named(name, steps)
    t = part * (steps - 1)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert (alpha**2 + sigma**2).item() == pytest.approx(1, abs=1e-12)
    before, after = schedule.alpha(math.floor(t)), schedule.alpha(math.ceil(t))
    assert after - 1e-12 <= alpha <= before + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_whole_timesteps_give_the_table(name):
    schedule = named(name, 100)
    t = torch.arange(100, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t), schedule.alpha_bar.sqrt(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(schedule.sigma(t), (1 - schedule.alpha_bar).sqrt(), rtol=1e-9, atol=0)


def test_log_snr_is_interpolated_linearly():
    schedule = NoiseSchedule.cosine(50)
    t = torch.tensor([0.25, 10.5, 47.75], dtype=torch.float64)
    log_snr = 2 * (schedule.alpha(t) / schedule.sigma(t)).log()
    before, after = schedule.log_snr[t.long()], schedule.log_snr[t.long() + 1]
    torch.testing.assert_close(log_snr, before + (t - t.floor()) * (after - before))


# The forward process


def test_chain_of_small_steps_is_the_closed_form():
    """Feed noise into one step at a time, and follow each one's weight to the end."""
    schedule = NoiseSchedule.linear(200)
    signal, noise_weights = torch.tensor(1.0, dtype=torch.float64), []
    for beta in schedule.betas:
        signal = (1 - beta).sqrt() * signal
        noise_weights = [(1 - beta).sqrt() * weight for weight in noise_weights] + [beta.sqrt()]
    torch.testing.assert_close(signal, schedule.alpha(199))
    torch.testing.assert_close(torch.stack(noise_weights).square().sum().sqrt(), schedule.sigma(199))


def test_add_noise_is_the_equation_per_picture():
    schedule = NoiseSchedule.scaled_linear()
    x0, noise = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    t = torch.tensor([0, 1, 500, 999])
    x_t = schedule.add_noise(x0, noise, t)
    for i in range(4):
        alone = schedule.alpha(int(t[i])) * x0[i] + schedule.sigma(int(t[i])) * noise[i]
        torch.testing.assert_close(x_t[i], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(schedule.add_noise(x0, noise, int(t[i]))[i], alone, rtol=1e-12, atol=1e-12)


def test_fractional_timesteps_may_differ_per_picture():
    schedule = NoiseSchedule.cosine()
    x0, noise = torch.randn(2, 2, 7)
    x_t = schedule.add_noise(x0, noise, torch.tensor([3.5, 998.25]))
    torch.testing.assert_close(x_t[1], schedule.add_noise(x0, noise, 998.25)[1])


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(NAMES), t=st.floats(0, 99), seed=st.integers(0, 999))
def test_velocity_gives_back_picture_and_noise(name, t, seed):
    schedule = named(name, 100).zero_terminal_snr()
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_t, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(alpha * x_t - sigma * v, x0)
    torch.testing.assert_close(alpha * v + sigma * x_t, noise)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(10, beta_min=0.05, beta_max=0.4), NoiseSchedule.flow(10),
                                      NoiseSchedule.cosine(10).zero_terminal_snr()], ids=repr)
@pytest.mark.parametrize("jump", [1, 2.5, 5])
def test_posterior_is_bayes_rule_by_brute_force(schedule, jump):
    """q(x_s | x_t, x_0) from a fine grid over x_s, without any formula for the posterior."""
    x0, x_t, grid = 0.7, -0.3, torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    for t in range(math.ceil(jump), 10):
        s = t - jump
        shrink = schedule.alpha(t) / schedule.alpha(s)
        added = schedule.sigma(t) ** 2 - shrink**2 * schedule.sigma(s) ** 2
        log_prior = -((grid - schedule.alpha(s) * x0) ** 2) / (2 * schedule.sigma(s) ** 2)  # q(x_s | x_0)
        log_step = -((x_t - shrink * grid) ** 2) / (2 * added)  # q(x_t | x_s)
        density = torch.softmax(log_prior + log_step, 0)
        mean = (density * grid).sum()
        variance = (density * (grid - mean) ** 2).sum()
        ours = schedule.posterior_mean(*(torch.tensor([v], dtype=torch.float64) for v in (x0, x_t)), t, s)
        torch.testing.assert_close(ours, mean[None], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(schedule.posterior_variance(t, s), variance, rtol=1e-8, atol=0)
        torch.testing.assert_close(schedule.step_variance(t, s), added, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("silent", [False, True])
def test_posterior_between_neighbours_is_equation_7_of_ddpm(name, silent):
    schedule = named(name).zero_terminal_snr() if silent else named(name)
    t, one, zero = torch.arange(1, 1000, dtype=torch.float64), torch.ones(999).double(), torch.zeros(999).double()
    before, left = schedule.alpha_bar[:-1], 1 - schedule.alpha_bar[1:]
    betas, alphas = schedule.betas[1:], schedule.alphas[1:]
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(schedule.posterior_mean(one, zero, t, t - 1), before.sqrt() * betas / left, **close)
    torch.testing.assert_close(schedule.posterior_mean(zero, one, t, t - 1), alphas.sqrt() * (1 - before) / left,
                               **close)
    torch.testing.assert_close(schedule.posterior_variance(t, t - 1), (1 - before) / left * betas, **close)
    torch.testing.assert_close(schedule.step_variance(t, t - 1), betas, **close)
    assert torch.all(schedule.posterior_variance(t, t - 1) < schedule.step_variance(t, t - 1))


@pytest.mark.parametrize("schedule", [NoiseSchedule.cosine(), NoiseSchedule.flow(), NoiseSchedule.linear(1)], ids=repr)
def test_the_step_to_the_clean_picture(schedule):
    x0, x_t = torch.randn(2, 3, 5, dtype=torch.float64)
    first, last = torch.zeros(3, dtype=torch.long), schedule.steps - 1
    for t, t_next in [(0, None), (0, -1), (last, None), (first, first - 1), (last / 2, None)]:
        torch.testing.assert_close(schedule.posterior_mean(x0, x_t, t, t_next), x0, rtol=1e-12, atol=1e-12)
        assert (schedule.posterior_variance(t, t_next) == 0).all()
        torch.testing.assert_close(schedule.step_variance(t, t_next), schedule.sigma(t) ** 2)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from([*NAMES, "flow"]), ends=st.lists(st.floats(0, 39), min_size=2, max_size=2, unique=True),
       silent=st.booleans())
def test_a_posterior_step_keeps_the_marginal(name, ends, silent):
    """Noise up to t and a posterior step back to any earlier s land on q(x_s | x_0) again."""
    schedule = named(name, 40).zero_terminal_snr() if silent else named(name, 40)
    s, t = sorted(ends)
    if schedule.alpha(s) == schedule.alpha(t):
        return  # closer than floating-point numbers can say
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    on_x0, on_x_t = schedule.posterior_mean(one, zero, t, s), schedule.posterior_mean(zero, one, t, s)
    torch.testing.assert_close(on_x0 + on_x_t * schedule.alpha(t), schedule.alpha(s)[None])
    variance = on_x_t**2 * schedule.sigma(t) ** 2 + schedule.posterior_variance(t, s)
    torch.testing.assert_close(variance, schedule.sigma(s)[None] ** 2)


def test_two_jumps_up_are_one():
    """Noise variances of (10 -> 30) and (30 -> 70), the first shrunk on the way, add up to (10 -> 70)."""
    for schedule in (NoiseSchedule.linear(100), NoiseSchedule.flow(100, shift=2)):
        shrink = schedule.alpha(70) / schedule.alpha(30)
        total = shrink**2 * schedule.step_variance(30, 10) + schedule.step_variance(70, 30)
        torch.testing.assert_close(schedule.step_variance(70, 10), total)


# Flow matching


@pytest.mark.parametrize("shift", [1, 0.1, 3.0])
def test_flow_is_a_straight_line(shift):
    schedule = NoiseSchedule.flow(50, shift=shift)
    t = torch.tensor([0, 0.5, 17.25, 48.9, 49], dtype=torch.float64)
    s = (t + 1) / 50
    s = shift * s / (shift * s + (1 - s))
    torch.testing.assert_close(schedule.sigma(t), s, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(schedule.alpha(t), 1 - s, rtol=1e-12, atol=1e-15)
    assert schedule.alpha(49) == 0 and schedule.sigma(49) == 1 and schedule.betas[-1] == 1
    x0, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = (1 - s)[:, None] * x0 + s[:, None] * noise
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(1, 2000), shift=st.floats(0.01, 100))
def test_the_tables_of_a_flow_are_shares(steps, shift):
    schedule = NoiseSchedule.flow(steps, shift=shift)
    t = torch.arange(steps, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert torch.all((schedule.betas > 0) & (schedule.betas <= 1)) and schedule.steps == steps
    torch.testing.assert_close(schedule.alpha_bar, alpha**2 / (alpha**2 + sigma**2), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.snr, (alpha / sigma) ** 2, rtol=1e-5, atol=1e-12)
    assert schedule.snr[-1] == 0 and schedule.zero_terminal_snr() is schedule


def test_shift_multiplies_the_noise_to_signal_ratio():
    plain, shifted = NoiseSchedule.flow(), NoiseSchedule.flow(shift=3)
    difference = plain.log_snr[:-1] - shifted.log_snr[:-1]
    torch.testing.assert_close(difference, torch.full((999,), 2 * math.log(3)).double(), rtol=1e-6, atol=0)


def test_flow_levels():
    assert flow_levels(4).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert flow_levels(2, shift=3).tolist() == [0.75, 1.0]


# From log-SNR back to time


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from([*NAMES, "flow"]), steps=st.integers(2, 1500), part=st.floats(0, 1), silent=st.booleans())
def test_time_of_is_the_inverse_of_log_snr(name, steps, part, silent):
    schedule = named(name, steps).zero_terminal_snr() if silent else named(name, steps)
    t = part * (steps - 1)
    log_snr = 2 * (schedule.alpha(t) / schedule.sigma(t)).log()
    assert schedule.time_of(log_snr).item() == pytest.approx(t, abs=1e-6)


def test_time_of_ends_and_shapes():
    for schedule in (NoiseSchedule.cosine(20), NoiseSchedule.flow(20, shift=2), NoiseSchedule.linear(1),
                     NoiseSchedule.linear(20).zero_terminal_snr()):
        far = torch.tensor([math.inf, 100.0, -100.0, -math.inf])
        last = schedule.steps - 1
        torch.testing.assert_close(schedule.time_of(far), torch.tensor([0.0, 0, last, last]).double())
        assert schedule.time_of(0).shape == () and schedule.time_of(0).dtype == torch.float64


# Devices and dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([7, 900]), torch.tensor([7.5, 900.0])])
def test_results_follow_the_dtype_of_the_picture(dtype, t):
    schedule = NoiseSchedule.linear()
    x0, noise = torch.randn(2, 2, 3, 4, 4).to(dtype)
    for result in (schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)):
        assert result.dtype == dtype and result.shape == x0.shape and torch.isfinite(result).all()


def test_half_precision_only_rounds_once():
    schedule = NoiseSchedule.linear()
    x0, noise = torch.randn(2, 4, 8).bfloat16()
    exact = schedule.add_noise(x0.double(), noise.double(), 400)
    torch.testing.assert_close(schedule.add_noise(x0, noise, 400), exact.bfloat16(), rtol=0.008, atol=1e-6)


def test_alpha_and_sigma_follow_t():
    schedule = NoiseSchedule.linear()
    assert (
        schedule.alpha(3).dtype == schedule.sigma(3.5).dtype == torch.float64
        and schedule.alpha(3).shape == ()
    )
    for dtype, expected in [
        (torch.int64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64,) * 2,
    ]:
        t = torch.tensor([1, 2], dtype=dtype)
        assert schedule.alpha(t).dtype == schedule.sigma(t).dtype == expected and schedule.alpha(t).shape == (
            2,
        )


@pytest.mark.parametrize("t", [5, 5.5, torch.tensor([5, 6]), torch.empty(2, dtype=torch.long, device="meta")])
def test_meta_device(t):
    schedule = NoiseSchedule.cosine()
    x0 = torch.empty(2, 3, 8, 8, device="meta")
    results = [schedule.add_noise(x0, x0, t), schedule.velocity(x0, x0, t)]
    results.append(schedule.posterior_mean(x0, x0, t, t - 1))
    for result in results:
        assert result.is_meta and result.shape == x0.shape and result.dtype == x0.dtype
    if isinstance(t, torch.Tensor):
        assert schedule.alpha(t).device == t.device and schedule.alpha(t).shape == t.shape
        assert schedule.posterior_variance(t, t - 1).device == t.device
        assert NoiseSchedule.flow().step_variance(t, t - 1).shape == t.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_as_the_cpu():
    schedule = NoiseSchedule.linear()
    x0, noise, t = *torch.randn(2, 4, 3, 8, 8), torch.tensor([0, 1, 500, 999])
    for method in (schedule.add_noise, schedule.velocity):
        here, there = method(x0, noise, t), method(x0.cuda(), noise.cuda(), t.cuda())
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-6)
    here, there = (schedule.posterior_mean(*(v.to(where) for v in (x0, noise, t, t - 1))) for where in ("cpu", "cuda"))
    assert there.is_cuda and schedule.posterior_variance(t.cuda(), t.cuda() - 1).is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_add_noise():
    schedule = NoiseSchedule.linear()
    x0, noise = torch.randn(2, 2, 3)
    x0.requires_grad_()
    schedule.add_noise(x0, noise, 500).sum().backward()
    torch.testing.assert_close(x0.grad, schedule.alpha(500).float().expand(2, 3))


def test_a_schedule_can_be_pickled_and_copied():
    schedule = NoiseSchedule.cosine(20)
    assert len(schedule.alpha_bar) == 20
    for other in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert torch.equal(other.betas, schedule.betas) and other.to_config() == schedule.to_config()


# Saving


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(100, beta_min=1e-3, beta_max=0.2),
        NoiseSchedule.scaled_linear(),
        NoiseSchedule.cosine(300),
        NoiseSchedule.cosine(300, s=0.02),
        NoiseSchedule.sigmoid(50, tau=0.7),
        NoiseSchedule.sigmoid_ramp(64),
        NoiseSchedule.from_betas([0.1, 0.2, 0.5]),
        NoiseSchedule.flow(30, shift=2.5),
    ],
    ids=repr,
)
def test_config_survives_json(schedule, silent):
    schedule = schedule.zero_terminal_snr() if silent else schedule
    config = json.loads(json.dumps(schedule.to_config()))
    assert schedule.shift or config["rescale_betas_zero_snr"] is silent
    assert config["num_train_timesteps"] == schedule.steps and config.get("shift") == schedule.shift
    again = NoiseSchedule.from_config(config)
    assert torch.equal(again.betas, schedule.betas) and again.to_config() == schedule.to_config()


def test_to_config_is_a_copy():
    schedule = NoiseSchedule.linear()
    schedule.to_config()["beta_end"] = 5
    assert schedule.to_config()["beta_end"] == 0.02


def test_from_config_passes_over_other_keys_and_fills_in_defaults():
    schedule = NoiseSchedule.from_config({"prediction_type": "epsilon", "clip_sample": False})
    assert torch.equal(schedule.betas, NoiseSchedule.linear().betas)


def test_a_schedule_does_not_follow_later_changes_of_its_betas():
    betas = torch.tensor([0.1, 0.2])
    schedule = NoiseSchedule.from_betas(betas)
    betas[0] = 0.9
    assert schedule.betas[0].item() == pytest.approx(0.1)


# Errors: what was wrong, what was expected


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid_ramp"])
@pytest.mark.parametrize(
    "ends", [(0.02, 1e-4), (0.01, 0.01), (0, 0.02), (-0.1, 0.02), (0.1, 1.0), (math.nan, 0.1)]
)
def test_bad_variance_range(name, ends):
    with pytest.raises(ValueError, match="0 < beta_min < beta_max < 1"):
        getattr(NoiseSchedule, name)(10, beta_min=ends[0], beta_max=ends[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, -3, 2.5, "10", True])
def test_bad_number_of_steps(name, steps):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        getattr(NoiseSchedule, name)(steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule.cosine(s=-1), "s must be"),
        (lambda: NoiseSchedule.cosine(s=math.nan), "s must be"),
        (lambda: NoiseSchedule.cosine(max_beta=1.0), "max_beta must lie"),
        (lambda: NoiseSchedule.sigmoid(start=3, end=-3), "start must be below end"),
        (lambda: NoiseSchedule.sigmoid(tau=0), "tau above 0"),
        (lambda: NoiseSchedule.from_betas([]), "at least one variance"),
        (lambda: NoiseSchedule.from_betas([[0.1]]), "at least one variance"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.0, 0.1]), "only|the last may be 1"),
        (lambda: NoiseSchedule.from_betas([0.1, math.nan]), "between 0 and 1"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.5]), "between 0 and 1"),
        (lambda: NoiseSchedule.from_config({"beta_schedule": "laplace"}), "beta_schedule must be one of"),
        (lambda: NoiseSchedule.linear(1).zero_terminal_snr(), "use more steps"),
        (
            lambda: rescale_zero_terminal_snr(torch.full((400,), 0.999, dtype=torch.float64)),
            "until the last step",
        ),
        (lambda: betas_from_alpha_bar(torch.tensor([1.0, 0.5]), max_beta=0), "max_beta must lie"),
        (lambda: linear_betas(0), "steps must be"),
        (lambda: flow_levels(0), "steps must be"),
        (lambda: NoiseSchedule.flow(shift=0), "shift must be"),
        (lambda: NoiseSchedule.flow(shift=math.inf), "shift must be"),
        (lambda: NoiseSchedule.from_config({"shift": 1.0, "use_dynamic_shifting": True}), "depends on the picture"),
    ],
)
def test_bad_recipes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "t", [-1, 1000, 999.5, -0.01, math.nan, math.inf, torch.tensor([0, 1000]), torch.tensor([0.0, math.nan])]
)
def test_timestep_out_of_range(t):
    x0 = torch.zeros(2, 3)
    for call in (lambda s: s.alpha(t), lambda s: s.sigma(t), lambda s: s.add_noise(x0, x0, t)):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 999\]"):
            call(NoiseSchedule.linear())


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ([1, 2], "use torch.tensor"),
        (True, "number or a tensor"),
        (torch.zeros(2, 1), r"shape \(B,\)"),
        (torch.zeros(2, dtype=torch.bfloat16), "to be exact"),
        (torch.tensor([1, 2, 3]), "one per picture: got 3 for 2"),
    ],
)
def test_malformed_timestep(t, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.linear().add_noise(torch.zeros(2, 3), torch.zeros(2, 3), t)


def test_bad_pictures():
    schedule, x0 = NoiseSchedule.linear(), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="same shape"):
        schedule.add_noise(x0, torch.zeros(2, 4), 5)
    with pytest.raises(ValueError, match="floating-point"):
        schedule.velocity(torch.zeros(2, 3, dtype=torch.uint8), x0, 5)
    with pytest.raises(ValueError, match="floating-point"):
        schedule.add_noise(torch.tensor(1.0), torch.tensor(1.0), 5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        schedule.add_noise(x0 + math.nan, x0, 5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        schedule.velocity(x0, x0 + math.inf, 5)


@pytest.mark.parametrize(("t", "t_next"), [(5, 5), (5, 6), (5, 5.01), (torch.tensor([5, 9]), torch.tensor([4, 9])),
                                           (torch.tensor([5, 9]), 7)])
def test_posterior_goes_back_in_time_only(t, t_next):
    schedule, x0 = NoiseSchedule.linear(10), torch.zeros(2, 3)
    for call in (lambda: schedule.posterior_mean(x0, x0, t, t_next), lambda: schedule.posterior_variance(t, t_next),
                 lambda: schedule.step_variance(t, t_next)):
        with pytest.raises(ValueError, match="t_next must lie below t"):
            call()


@pytest.mark.parametrize("t_next", [-2, -0.5, math.nan])
def test_next_time_out_of_range(t_next):
    for schedule in (NoiseSchedule.linear(10), NoiseSchedule.flow(10)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 9\].*-1 is the clean picture"):
            schedule.posterior_variance(5, t_next)


@pytest.mark.parametrize("config", [{"use_flow_sigmas": True, "flow_shift": 3.0, "beta_schedule": "linear"},
                                    {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0}])
def test_configs_without_betas_are_not_read_as_linear(config):
    with pytest.raises(ValueError, match=r"aren't described by betas.*NoiseSchedule.flow"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize("curve", [[1.0, 0.5, 0.6], [1.0, 0.0, 0.0], [0.0, 0.0]])
def test_a_curve_that_rises_or_ends_early_has_no_betas(curve):
    with pytest.raises(ValueError, match="must fall from step to step"):
        betas_from_alpha_bar(torch.tensor(curve))
    assert betas_from_alpha_bar(torch.tensor([1.0, 0.5, 0.0])).tolist() == [0.5, 0.999]


@pytest.mark.parametrize("curve", [[1.0, 0.5, -1.0], [1.0, 0.5, 0.5]])
def test_a_curve_that_is_level_or_ends_below_nothing(curve):
    with pytest.raises(ValueError, match="alpha_bar must fall from step to step, and only its last value may be 0"):
        betas_from_alpha_bar(torch.tensor(curve))


def test_a_sigmoid_without_slope_names_its_width():
    with pytest.raises(ValueError, match="with tau=0.05 the curve is level at its ends"):
        NoiseSchedule.sigmoid(1000, tau=0.05)


def test_a_scheduler_that_names_no_betas_is_not_taken_for_the_linear_one():
    with pytest.raises(ValueError, match="config of this SCMScheduler names no beta_schedule"):
        NoiseSchedule.from_config({"_class_name": "SCMScheduler", "num_train_timesteps": 1000})
    unclip = NoiseSchedule.from_config({"_class_name": "UnCLIPScheduler", "num_train_timesteps": 1000})
    assert torch.equal(unclip.alpha_bar, NoiseSchedule.cosine().alpha_bar)
    with pytest.raises(ValueError, match="snr_shift_scale=3.0 is not supported"):
        NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "snr_shift_scale": 3.0})
