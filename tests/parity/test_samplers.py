"""Chapter 09 against diffusers' schedulers, step by step: equal where they are right, and a list of where not."""

import math
import warnings

import numpy as np
import pytest
import torch

from diffusionbook.denoising import Condition, Denoiser, Wrapped, to_prediction
from diffusionbook.samplers import (
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    dynamic_threshold,
    euler,
    euler_ancestral,
    heun,
    lcm,
    levels,
    pndm,
    rescaled_guidance,
    timesteps,
    unipc,
)
from diffusionbook.schedules import NoiseSchedule

with warnings.catch_warnings():  # some of its parts warn about optional packages while they load
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::FutureWarning")]

SCHEDULES = {"linear": NoiseSchedule.linear(), "scaled_linear": NoiseSchedule.scaled_linear(),
             "squaredcos_cap_v2": NoiseSchedule.cosine()}
TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
X = torch.arange(768.0).reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / 768
# An epsilon network on the cosine schedule divides by an alpha of 5e-5 and magnifies the rounding errors of both.
CASES = [(name, prediction) for name in SCHEDULES for prediction in TYPES
         if (name, prediction) != ("squaredcos_cap_v2", "epsilon")]


def network(x, t):
    t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1)
    return torch.sin(3 * x + 0.5) * (t + 100) / (t + 300)


def cpu_noise(seed=0):
    """Noise as diffusers draws it, from one generator for the whole batch."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


def scheduler(kind, name, prediction, **options):
    """One of theirs with the settings that are right: trailing times, no clipping, and a clean end."""
    config = SCHEDULES[name].to_config() | {"prediction_type": TYPES[prediction], "timestep_spacing": "trailing"}
    return getattr(diffusers, kind).from_config(config | options)


def theirs(scheduler, steps, *, seed=None, **options):
    """(t, state) of each of their steps; states in units where alpha² + sigma² = 1, as ours are."""
    scheduler.set_timesteps(steps)
    in_sigmas = any(name in type(scheduler).__name__ for name in ("Euler", "Heun"))
    x = X * (scheduler.sigmas[0] ** 2 + 1) ** 0.5 if in_sigmas else X
    if seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **options).prev_sample
        yield t, x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5 if in_sigmas else x


def assert_equal(ours, wanted, tolerance=2e-4):
    """Where a state grows large, so do the rounding errors of float32."""
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance * max(1, wanted.abs().max().item()))


def compare(sampler, name, prediction, steps, scheduler, tolerance=2e-4, seed=None, spacing="trailing", leave_out=0,
            **options):
    """Every state along the way, not only the last."""
    times = timesteps(SCHEDULES[name], steps, spacing=spacing)
    states = sampler(Denoiser(network, SCHEDULES[name], prediction), X, times)
    rows = list(zip(times[:-1], states, theirs(scheduler, steps, seed=seed, **options), strict=True))
    for t, (ours, _), (their_t, wanted) in rows[:len(rows) - leave_out]:
        assert abs(float(their_t) - t) < 0.01  # theirs are found in float32
        assert_equal(ours, wanted, tolerance)
        assert wanted.abs().mean() > 0.01


# Equal


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 50, 250])
@pytest.mark.parametrize("name, prediction", CASES)
def test_ddim(name, prediction, steps):
    """For numbers of steps that divide 1000; for others diffusers' DDIM errs about its previous timestep."""
    compare(ddim, name, prediction, steps,
            scheduler("DDIMScheduler", name, prediction, clip_sample=False, set_alpha_to_one=True))


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("name, prediction", CASES)
def test_ddim_with_fresh_noise(name, prediction, eta):
    compare(lambda *given: ddim(*given, eta=eta, noise=cpu_noise()), name, prediction, 20,
            scheduler("DDIMScheduler", name, prediction, clip_sample=False, set_alpha_to_one=True), seed=0, eta=eta)


@pytest.mark.parametrize("variance, theirs_is", [("small", "fixed_small"), ("large", "fixed_large")])
@pytest.mark.parametrize("steps", [2, 7, 20, 30, 100])
@pytest.mark.parametrize("name, prediction", CASES)
def test_ddpm(name, prediction, steps, variance, theirs_is):
    """Up to the last step for the large variance: see below."""
    compare(lambda *given: ddpm(*given, variance=variance, noise=cpu_noise()), name, prediction, steps,
            scheduler("DDPMScheduler", name, prediction, clip_sample=False, variance_type=theirs_is),
            seed=0, leave_out=int(variance == "large"))


@pytest.mark.parametrize("steps", [10, 40])
def test_ddpm_with_learned_variance(steps):
    def learning(x, t):
        return torch.cat([network(x, t), torch.sin(5 * x)], dim=1)  # the second half lies in [-1, 1]

    scheduler_ = scheduler("DDPMScheduler", "linear", "epsilon", clip_sample=False, variance_type="learned_range")
    scheduler_.set_timesteps(steps)
    x, generator, times = X, torch.Generator().manual_seed(0), timesteps(SCHEDULES["linear"], steps)
    states = ddpm(Denoiser(learning, SCHEDULES["linear"]), X, times, noise=cpu_noise())
    for t, (ours, _) in zip(times[:-2], states, strict=False):
        x = scheduler_.step(learning(x, t), t, x, generator=generator).prev_sample
        assert_equal(ours, x)


@pytest.mark.parametrize("steps", [2, 3, 7, 20, 107])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_euler(name, prediction, steps):
    compare(euler, name, prediction, steps, scheduler("EulerDiscreteScheduler", name, prediction), tolerance=1e-3)


@pytest.mark.parametrize("steps", [2, 7, 20])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_euler_on_karras_times(name, steps):
    compare(euler, name, "epsilon", steps,
            scheduler("EulerDiscreteScheduler", name, "epsilon", use_karras_sigmas=True, timestep_spacing="linspace"),
            tolerance=1e-3, spacing="karras")


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_euler_on_exponential_times(name):
    compare(euler, name, "epsilon", 12,
            scheduler("EulerDiscreteScheduler", name, "epsilon", use_exponential_sigmas=True,
                      timestep_spacing="linspace"), tolerance=1e-3, spacing="exponential")


@pytest.mark.parametrize("steps", [2, 7, 20])
@pytest.mark.parametrize("name, prediction", [("linear", "epsilon"), ("scaled_linear", "v")])
def test_euler_ancestral(name, prediction, steps):
    compare(lambda *given: euler_ancestral(*given, noise=cpu_noise()), name, prediction, steps,
            scheduler("EulerAncestralDiscreteScheduler", name, prediction), tolerance=1e-3, seed=0)


@pytest.mark.parametrize("steps", [2, 7, 20])
@pytest.mark.parametrize("name, prediction", [("linear", "epsilon"), ("scaled_linear", "v")])
def test_heun(name, prediction, steps):
    """Theirs takes each step in two halves."""
    states = list(theirs(scheduler("HeunDiscreteScheduler", name, prediction), steps))
    assert len(states) == 2 * steps - 1
    ours = heun(Denoiser(network, SCHEDULES[name], prediction), X, timesteps(SCHEDULES[name], steps))
    # in the units of their last sigma but one for the halves; whole steps end at odd places
    for (x, _), (_, wanted) in zip(ours, states[1::2] + states[-1:], strict=True):
        assert_equal(x, wanted, 1e-3)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_pndm(name, steps):
    """Up to the step to the clean point, which theirs takes as if it were as long as the others."""
    theirs_ = scheduler("PNDMScheduler", name, "epsilon", set_alpha_to_one=True)
    states = [x for _, x in theirs(theirs_, steps)]
    whole = states[3:12:4] + states[12:]  # the first three steps of theirs are of four calls each
    times = timesteps(SCHEDULES[name], steps)[:-1]
    ours = [x for x, _ in pndm(Denoiser(network, SCHEDULES[name]), X, times)]
    for x, wanted in zip(ours, whole, strict=False):
        assert_equal(x, wanted, 1e-3)
    assert len(ours) == steps - 1 == len(whole) - 1


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 20, 30, 107, 333])
@pytest.mark.parametrize("name, prediction", CASES)
def test_dpmpp_2m(name, prediction, steps):
    """For any number of steps."""
    compare(dpmpp_2m, name, prediction, steps, scheduler(
        "DPMSolverMultistepScheduler", name, prediction, algorithm_type="dpmsolver++", solver_order=2,
        solver_type="midpoint", final_sigmas_type="zero"))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 107])
@pytest.mark.parametrize("name, prediction", CASES)
def test_dpmpp_2m_sde(name, prediction, steps):
    compare(lambda *given: dpmpp_2m_sde(*given, noise=cpu_noise()), name, prediction, steps, scheduler(
        "DPMSolverMultistepScheduler", name, prediction, algorithm_type="sde-dpmsolver++", solver_order=2,
        solver_type="midpoint", final_sigmas_type="zero"), seed=0, tolerance=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 20, 107])
@pytest.mark.parametrize("name, prediction", CASES)
def test_unipc(name, prediction, steps):
    compare(unipc, name, prediction, steps, scheduler("UniPCMultistepScheduler", name, prediction, solver_order=2,
                                                      solver_type="bh2", final_sigmas_type="zero"))


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("prediction", TYPES)
def test_unipc_of_other_orders(prediction, order):
    """Theirs lowers the order before the end, so the last two states differ."""
    times = timesteps(SCHEDULES["linear"], 12)
    ours = [x for x, _ in unipc(Denoiser(network, SCHEDULES["linear"], prediction), X, times, order=order)]
    theirs_ = scheduler("UniPCMultistepScheduler", "linear", prediction, solver_order=order, solver_type="bh2",
                        final_sigmas_type="zero")
    for x, (_, wanted) in list(zip(ours, theirs(theirs_, 12), strict=True))[:-2]:
        assert_equal(x, wanted)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm(steps):
    compare(lambda *given: lcm(*given, noise=cpu_noise()), "scaled_linear", "epsilon", steps,
            scheduler("LCMScheduler", "scaled_linear", "epsilon", timestep_spacing="leading"), seed=0, spacing="lcm")


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_dynamic_thresholding(prediction):
    """Theirs keeps the noise as the network said it; ours works it out again, as theirs does when told to."""
    scheduler_ = scheduler("DDIMScheduler", "linear", prediction, clip_sample=False, thresholding=True,
                           sample_max_value=1e9, dynamic_thresholding_ratio=0.9, set_alpha_to_one=True)
    denoise = dynamic_threshold(Denoiser(network, SCHEDULES["linear"], prediction), quantile=0.9)
    for (ours, _), (_, wanted) in zip(ddim(denoise, X, timesteps(SCHEDULES["linear"], 10)),
                                      theirs(scheduler_, 10, use_clipped_model_output=True), strict=True):
        assert_equal(ours, wanted)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 7, 28])
def test_flow_matching(steps, shift):
    """Euler on a straight flow is our `euler`, at the same noise levels."""
    scheduler_ = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler_.set_timesteps(steps)
    schedule = NoiseSchedule.flow(shift=shift)
    sigmas = scheduler_.sigmas[:-1].double()
    times = [*schedule.time_of(2 * (torch.log1p(-sigmas) - sigmas.log())).tolist(), None]
    assert [stop.sigma for stop in levels(schedule, times)[:-1]] == pytest.approx(sigmas.tolist(), abs=1e-6)
    x = X
    states = euler(Denoiser(lambda x, t: torch.cos(2 * x), schedule, "flow"), X, times)
    for t, (ours, _) in zip(scheduler_.timesteps, states, strict=True):
        x = scheduler_.step(torch.cos(2 * x), t, x).prev_sample
        assert_equal(ours, x)


def test_trailing_times_for_every_number_of_steps():
    scheduler_ = diffusers.DDIMScheduler(timestep_spacing="trailing")
    for steps in range(1, 1001):
        scheduler_.set_timesteps(steps)
        found = scheduler_.timesteps.numpy()
        if len(found) == steps:  # see below
            ours = timesteps(SCHEDULES["linear"], steps)[:-1]
            assert np.abs(found - ours).max() <= (0 if 1000 % steps == 0 else 1), steps


@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("linspace", 0)])
def test_leading_and_linspace_times_for_every_number_of_steps(spacing, offset):
    scheduler_ = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, 1001):
        scheduler_.set_timesteps(steps)
        found, ours = scheduler_.timesteps.tolist(), timesteps(SCHEDULES["linear"], steps, spacing=spacing)[:-1]
        if spacing == "leading" and found[0] > 999:  # they leave the table, see below
            found = [t - 1 for t in found]
        if spacing == "linspace" and steps == 1:  # numpy's one point is the first, and nothing is painted from t = 0
            found = [999]
        exact = [999 - i * 999 / max(1, steps - 1) for i in range(steps)]
        ties = [spacing == "linspace" and abs(t % 1 - 0.5) < 1e-9 for t in exact]  # rounded up or down, as floats fall
        assert len(found) == steps and all(a == b or (tie and abs(a - b) == 1)
                                           for a, b, tie in zip(found, ours, ties, strict=True)), steps


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_rescaled_guidance(prediction, phi):
    """Theirs works on what the network says, and leaves the conversion to the scheduler."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    def told(x, t, *, context):
        return network(x, t) * context[:, 0, 0].view(-1, 1, 1, 1)

    yes, no = torch.full((4, 1, 1), 1.3), torch.full((4, 1, 1), 0.8)
    schedule, t = SCHEDULES["linear"], 600
    asked, without = told(X, t, context=yes), told(X, t, context=no)
    wanted = rescale_noise_cfg(without + 7.5 * (asked - without), asked, guidance_rescale=phi)
    denoise = Denoiser(told, schedule, prediction, Condition(context=yes))
    found = rescaled_guidance(denoise, Condition(context=no), scale=7.5, phi=phi)(X, t)
    expected = to_prediction(wanted, X, t, schedule=schedule, prediction=prediction)
    assert_equal(found.x0, expected.x0)
    assert_equal(found.eps, expected.eps)
    assert phi == 0 or (wanted - (without + 7.5 * (asked - without))).abs().max() > 0.1


# Not equal, and why. Each test says what theirs does; should one fail, theirs has been mended.


def last(states):
    *_, (_, x) = states
    return x


@pytest.mark.parametrize("spacing, steps, wrong", [("trailing", 30, 10), ("trailing", 7, 5), ("linspace", 50, 19),
                                                   ("linspace", 30, 29)])
def test_their_ddim_steps_to_another_time_than_it_asks_next(spacing, steps, wrong):
    """It takes the previous timestep to be t - 1000 // steps, whatever the list says."""
    scheduler_ = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler_.set_timesteps(steps)
    times = scheduler_.timesteps.tolist()
    assert sum(t - 1000 // steps != then for t, then in zip(times, times[1:], strict=False)) == wrong
    theirs_ = scheduler("DDIMScheduler", "linear", "v", clip_sample=False, set_alpha_to_one=True,
                        timestep_spacing=spacing)
    *_, (found, _) = ddim(Denoiser(network, SCHEDULES["linear"], "v"), X, [*times, None])
    assert (found - last(theirs(theirs_, steps))).abs().max() > 1e-3


def test_their_trailing_times_are_sometimes_one_too_many():
    """Rounding adds one, for which t = -1."""
    scheduler_ = diffusers.DDIMScheduler(timestep_spacing="trailing")
    wrong = []
    for steps in range(1, 1001):
        scheduler_.set_timesteps(steps)
        if len(scheduler_.timesteps) != steps:
            wrong.append(steps)
            assert scheduler_.timesteps[-1] == -1
    assert wrong and all(len(timesteps(SCHEDULES["linear"], steps)) == steps + 1 for steps in wrong)


def test_their_leading_times_leave_the_table():
    """1000 steps, with the offset of 1 that Stable Diffusion uses."""
    scheduler_ = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler_.set_timesteps(1000)
    assert scheduler_.timesteps.max() == 1000
    assert timesteps(SCHEDULES["linear"], 1000, spacing="leading")[0] == 999


def test_their_fixed_large_log_variance_is_not_a_number():
    scheduler_ = scheduler("DDPMScheduler", "linear", "epsilon", clip_sample=False, variance_type="fixed_large_log")
    assert last(theirs(scheduler_, 5, seed=0)).isnan().any()
    *_, (x, _) = ddpm(Denoiser(network, SCHEDULES["linear"]), X, timesteps(SCHEDULES["linear"], 5), variance="large")
    assert torch.isfinite(x).all()


def test_their_ddpm_adds_noise_to_the_finished_picture():
    """Whenever its last time isn't 0, as with trailing times, and much of it if the variance is large."""
    scheduler_ = scheduler("DDPMScheduler", "linear", "epsilon", clip_sample=False, variance_type="fixed_large")
    scheduler_.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    ends = [scheduler_.step(network(X, 199), 199, X, generator=generator).prev_sample for _ in range(2)]
    assert (ends[0] - ends[1]).std() > 0.5
    ours = [x for _ in range(2) for x, _ in ddpm(Denoiser(network, SCHEDULES["linear"]), X, [199, None])]
    assert torch.equal(*ours)


def test_their_ddim_stops_short_of_clean_for_stable_diffusion():
    """set_alpha_to_one=False, in the settings of Stable Diffusion, ends at the noise of t = 0."""
    theirs_ = scheduler("DDIMScheduler", "scaled_linear", "v", clip_sample=False, set_alpha_to_one=False)
    schedule = SCHEDULES["scaled_linear"]
    denoise, times = Denoiser(network, schedule, "v"), timesteps(schedule, 10)
    *_, (short, _) = ddim(denoise, X, [*times[:-1], 0])
    *_, (clean, _) = ddim(denoise, X, times)
    assert_equal(short, last(theirs(theirs_, 10)))
    assert (short - clean).abs().max() > 0.01
    assert float(schedule.sigma(0)) == pytest.approx(0.0292, abs=1e-4)


def test_their_clipping_leaves_picture_and_noise_that_do_not_make_x():
    """By default, clip_sample changes x0 but not the noise; dynamic_threshold changes both."""
    theirs_ = scheduler("DDIMScheduler", "linear", "epsilon", clip_sample=True, set_alpha_to_one=True)
    inner = Denoiser(network, SCHEDULES["linear"])
    times = timesteps(SCHEDULES["linear"], 10)
    clip_only = Wrapped(inner, lambda x, t: inner(x, t)._replace(x0=inner(x, t).x0.clamp(-1, 1)))
    *_, (same, _) = ddim(clip_only, X, times)
    *_, (both, _) = ddim(dynamic_threshold(inner, quantile=1.0, limit=1), X, times)
    assert_equal(same, last(theirs(theirs_, 10)))
    assert (same - both).abs().max() > 0.05


def test_their_multistep_solver_rounds_the_karras_times_that_it_asks_at():
    """So the network is told a time up to 0.5 away from that of x; ours is told the fraction."""
    theirs_ = scheduler("DPMSolverMultistepScheduler", "scaled_linear", "epsilon", use_karras_sigmas=True,
                        timestep_spacing="linspace")
    theirs_.set_timesteps(20)
    ours = timesteps(SCHEDULES["scaled_linear"], 20, spacing="karras")[:-1]
    gaps = np.abs(theirs_.timesteps.numpy() - ours)
    assert 0.3 < gaps.max() < 0.6
    assert any(t != round(t) for t in ours)


def test_their_karras_levels_depend_on_the_spacing():
    """With "leading" times of Stable Diffusion the largest noise is 5.1, not 14.6."""
    for spacing, largest in [("leading", 5.13), ("linspace", 14.61)]:
        scheduler_ = scheduler("EulerDiscreteScheduler", "scaled_linear", "epsilon", use_karras_sigmas=True,
                               timestep_spacing=spacing, steps_offset=1)
        scheduler_.set_timesteps(5)
        assert scheduler_.sigmas[0].item() == pytest.approx(largest, abs=0.01)
    first = levels(SCHEDULES["scaled_linear"], timesteps(SCHEDULES["scaled_linear"], 5, spacing="karras"))[0]
    assert math.exp(-first.lam) == pytest.approx(14.61, abs=0.01)
