"""Chapter 09: timesteps for every number of steps, golden numbers, and a distribution whose answer is known."""

import itertools
import math

import pytest
import torch

from diffusionbook.denoising import Denoiser, Prediction, Wrapped
from diffusionbook.samplers import SAMPLERS, alpha_sigma, ddim, dpmpp_2m, sample, starting_noise, timesteps
from diffusionbook.schedules import NoiseSchedule

SPACINGS = ("trailing", "leading", "linspace")
LINEAR = NoiseSchedule.linear()
MEAN, STD = 0.3, 0.25  # of the Gaussian whose denoiser is known exactly


def last(states):
    *_, (x, _) = states
    return x


def exact_denoiser(schedule=LINEAR, prediction="epsilon"):
    """The best possible network for pixels from N(MEAN, STD²), by Bayes' rule."""
    def network(x, t):
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in (schedule.alpha(t.double()), schedule.sigma(t.double())))
        x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return {"epsilon": (x - alpha * x0) / sigma, "x0": x0, "v": (alpha * x - x0) / sigma}[prediction]
    return Denoiser(network, schedule, prediction)


def exact_picture(x, schedule=LINEAR):
    """Where the probability-flow equation takes x from the last timestep: the quantile stays the same."""
    alpha, sigma = schedule.alpha(schedule.steps - 1), schedule.sigma(schedule.steps - 1)
    return MEAN + STD * (x - alpha * MEAN) / torch.sqrt(alpha**2 * STD**2 + sigma**2)


def noise(count=4):
    return starting_noise((count, 1, 8, 8)).double()


def error(sampler, steps, **options):
    x = noise()
    denoise = exact_denoiser(**options)
    found = last(SAMPLERS[sampler](denoise, x, timesteps(denoise.schedule.steps, steps)))
    return (found - exact_picture(x, denoise.schedule)).abs().max().item()


# Timesteps


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_for_every_number_of_steps(spacing):
    for steps in range(1, 1001):
        times = timesteps(1000, steps, spacing=spacing)
        assert len(times) == steps
        assert all(a > b for a, b in itertools.pairwise(times)), steps
        assert 0 <= times[-1] and times[0] <= 999
        assert all(type(t) is int for t in times)
        if spacing != "leading":
            assert times[0] == 999
        if spacing == "linspace" and steps > 1:
            assert times[-1] == 0
        if spacing == "leading":
            assert times[-1] in (0, 1)
    assert times == list(range(999, -1, -1))


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 333, 1024])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_of_other_schedules(total, spacing):
    for steps in range(1, total + 1):
        times = timesteps(total, steps, spacing=spacing)
        assert len(set(times)) == steps and times == sorted(times, reverse=True)
        assert 0 <= times[-1] and times[0] < total


@pytest.mark.parametrize("spacing, expected", [
    ("trailing", [999, 799, 599, 399, 199]),
    ("leading", [801, 601, 401, 201, 1]),
    ("linspace", [999, 749, 500, 250, 0]),
])
def test_five_timesteps(spacing, expected):
    assert timesteps(1000, 5, spacing=spacing) == expected


def test_trailing_steps_are_even_when_they_divide_the_total():
    assert timesteps(1000, 20) == list(range(999, 0, -50))
    for steps in (3, 7, 30, 333):
        gaps = {a - b for a, b in itertools.pairwise(timesteps(1000, steps))}
        assert gaps <= {math.floor(1000 / steps), math.ceil(1000 / steps)}


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps must lie in 1…1000, got {steps}"):
        timesteps(1000, steps)


def test_unknown_spacings_are_refused():
    with pytest.raises(ValueError, match='"trailing", "leading" or "linspace", got \'karras\''):
        timesteps(1000, 5, spacing="karras")


# Known values


def golden_input():
    return torch.arange(768.0).reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / 768


def golden_network(x, t):
    t = t.view(-1, 1, 1, 1)
    return x * t / (t + 1)


@pytest.mark.parametrize("prediction, total, mean", [("epsilon", 172.0067, 0.223967), ("v", 52.5302, 0.0684)])
def test_ddim_golden_numbers(prediction, total, mean):
    """Ten steps on the model of diffusers' own tests; it clips x0 and keeps the noise as it was."""
    inner = Denoiser(golden_network, LINEAR, prediction)

    def clipped(x, t):
        answer = inner(x, t)
        return Prediction(answer.x0.clamp(-1, 1), answer.eps)

    x = last(ddim(Wrapped(inner, clipped), golden_input(), list(range(900, -1, -100))))
    assert x.abs().sum().item() == pytest.approx(total, abs=1e-2)
    assert x.abs().mean().item() == pytest.approx(mean, abs=1e-3)


def test_one_step_is_the_first_guess_of_the_clean_picture():
    x, denoise = noise(), exact_denoiser()
    for sampler in SAMPLERS.values():
        (found, answer), = sampler(denoise, x, [999])
        assert torch.equal(found, answer.x0) and torch.equal(answer.x0, denoise(x, 999).x0)


def test_the_last_state_is_the_last_guess():
    for sampler in SAMPLERS.values():
        *_, (x, answer) = sampler(exact_denoiser(), noise(), timesteps(1000, 7))
        assert torch.allclose(x, answer.x0, rtol=0, atol=1e-14)


def test_the_clean_point_has_no_noise():
    assert alpha_sigma(LINEAR, None) == (1.0, 0.0)
    assert alpha_sigma(LINEAR, 300) == (float(LINEAR.alpha(300)), float(LINEAR.sigma(300)))


def test_the_first_step_of_dpmpp_is_that_of_ddim():
    times = timesteps(1000, 9)
    first, second = (list(sampler(exact_denoiser(), noise(), times)) for sampler in (ddim, dpmpp_2m))
    assert torch.allclose(first[0][0], second[0][0], rtol=0, atol=1e-6)
    assert (first[5][0] - second[5][0]).abs().max() > 0.002  # with a past it is another method


def test_two_steps_of_dpmpp_are_two_of_ddim():
    """The first has no past and the last goes to the clean point: both are of first order."""
    states = [last(sampler(exact_denoiser(), noise(), [999, 400])) for sampler in (ddim, dpmpp_2m)]
    assert torch.allclose(*states, rtol=0, atol=1e-6)


def test_dpmpp_second_step_by_the_formula():
    times = [900, 600, 200]
    denoise, x = exact_denoiser(), noise()
    states = list(dpmpp_2m(denoise, x, times))
    (x1, before), (x2, answer), _ = states
    (a0, s0), (a1, s1), (a2, s2) = (alpha_sigma(LINEAR, t) for t in times)
    h0, h = math.log(a1 / s1) - math.log(a0 / s0), math.log(a2 / s2) - math.log(a1 / s1)
    direction = answer.x0 + (answer.x0 - before.x0) * h / (2 * h0)
    assert torch.allclose(x2, s2 / s1 * x1 - a2 * (math.exp(-h) - 1) * direction, rtol=0, atol=1e-12)


# The distribution whose answer is known


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_arrives(sampler, prediction):
    assert error(sampler, 300, prediction=prediction) < {"ddim": 0.02, "dpmpp_2m": 0.001}[sampler]


def test_ddim_halves_its_error_when_steps_double():
    errors = [error("ddim", steps) for steps in (20, 40, 80, 160, 320)]
    assert all(1.7 < a / b < 2.3 for a, b in itertools.pairwise(errors)), errors


def test_dpmpp_does_better_than_ddim():
    errors = {steps: error("dpmpp_2m", steps) for steps in (20, 40, 80, 160)}
    for steps, better in {20: 1.2, 40: 2, 80: 8, 160: 50}.items():
        assert errors[steps] < error("ddim", steps) / better, steps
    assert all(a / b > 3 for a, b in itertools.pairwise(errors.values())), errors  # more than halving


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, *range(101, 112), 333, 999, 1000])
def test_awkward_numbers_of_steps(sampler, steps):
    """Those at which well-known samplers take one step too many or leave the table."""
    states = list(SAMPLERS[sampler](exact_denoiser(), noise(1), timesteps(1000, steps)))
    assert len(states) == steps and torch.isfinite(states[-1][0]).all()
    if steps > 100:
        assert (states[-1][0] - exact_picture(noise(1))).abs().max() < 6 / steps


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_schedules_that_end_without_signal(sampler, prediction):
    assert error(sampler, 200, prediction=prediction, schedule=LINEAR.zero_terminal_snr()) < 0.03


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_cosine_schedule(sampler, spacing):
    denoise, x = exact_denoiser(NoiseSchedule.cosine(), "v"), noise()
    found = last(SAMPLERS[sampler](denoise, x, timesteps(1000, 250, spacing=spacing)))
    assert (found - exact_picture(x, denoise.schedule)).abs().max() < 0.02


def test_generated_pixels_have_the_right_mean_and_spread():
    x = sample(exact_denoiser(), (64, 1, 8, 8), steps=50, seed=0, dtype=torch.float64, progress=False)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02) and x.std().item() == pytest.approx(STD, abs=0.02)


# The whole loop


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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(sampler):
    run = lambda count, seed: sample(exact_denoiser(), (count, 1, 4, 4), sampler=sampler, steps=6,  # noqa: E731
                                     seed=seed, progress=False)
    batch = run(3, 10)
    for i in range(3):
        assert torch.allclose(run(1, 10 + i)[0], batch[i], rtol=0, atol=1e-6)
    assert not torch.allclose(batch[0], batch[1], atol=0.1)


def test_on_step_sees_every_state():
    seen = []
    x = sample(exact_denoiser(), (2, 1, 4, 4), steps=5, progress=False, on_step=lambda *state: seen.append(state))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    expected = list(dpmpp_2m(exact_denoiser(), starting_noise((2, 1, 4, 4)), timesteps(1000, 5)))
    for (_, state, answer), (wanted, wanted_answer) in zip(seen, expected, strict=True):
        assert torch.equal(state, wanted) and torch.equal(answer.x0, wanted_answer.x0)
    assert torch.equal(seen[-1][1], x)


def test_given_noise_is_used_and_left_alone():
    latents = starting_noise((2, 1, 4, 4), seed=77)
    kept = latents.clone()
    given = sample(exact_denoiser(), (2, 1, 4, 4), steps=3, latents=latents, progress=False)
    assert torch.equal(given, sample(exact_denoiser(), (2, 1, 4, 4), steps=3, seed=77, progress=False))
    assert torch.equal(latents, kept)


def test_the_spacing_asked_for_is_used():
    seen = []

    def network(x, t):
        seen.append(int(t[0]))
        return x

    sample(Denoiser(network, LINEAR), (1, 1, 2, 2), steps=5, spacing="leading", sampler="ddim", progress=False)
    assert seen == [801, 601, 401, 201, 1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nan_is_noticed(sampler):
    with pytest.raises(FloatingPointError, match="NaN"):
        sample(Denoiser(lambda x, t: x / 0, LINEAR), (1, 1, 2, 2), sampler=sampler, steps=3, progress=False)


@pytest.mark.parametrize("options, message", [
    ({"sampler": "euler"}, "no sampler named 'euler'; choose one of ddim, dpmpp_2m"),
    ({"steps": 0}, "1…1000"),
    ({"steps": 1001}, "1…1000"),
    ({"spacing": "even"}, "spacing"),
    ({"latents": torch.zeros(1, 1, 2, 3)}, r"latents must have shape \(1, 1, 2, 2\), got \(1, 1, 2, 3\)"),
])
def test_impossible_wishes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(exact_denoiser(), (1, 1, 2, 2), progress=False, **options)


def test_the_number_type_asked_for_is_kept():
    for dtype in (torch.float64, torch.bfloat16):
        for sampler in SAMPLERS:
            x = sample(Denoiser(lambda x, t: x * 0.5, LINEAR), (1, 1, 2, 2), sampler=sampler, steps=3, dtype=dtype,
                       progress=False)
            assert x.dtype == dtype


def test_the_bar_shows_only_when_asked(capsys):
    sample(exact_denoiser(), (1, 1, 2, 2), steps=3, progress=False)
    assert capsys.readouterr().err == ""
    sample(exact_denoiser(), (1, 1, 2, 2), steps=3)
    assert "/3" in capsys.readouterr().err
