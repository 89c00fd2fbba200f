"""Chapter 09 against diffusers' schedulers, step by step."""

import numpy as np
import pytest
import torch

from diffusionbook.denoising import Denoiser
from diffusionbook.samplers import ddim, dpmpp_2m, timesteps
from diffusionbook.schedules import NoiseSchedule

diffusers = pytest.importorskip("diffusers")

SCHEDULES = {"linear": NoiseSchedule.linear(), "scaled_linear": NoiseSchedule.scaled_linear(),
             "squaredcos_cap_v2": NoiseSchedule.cosine()}
TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
X = torch.arange(768.0).reshape(3, 8, 8, 4).permute(3, 0, 1, 2) / 768


def network(x, t):
    t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1)
    return torch.sin(3 * x + 0.5) * (t + 100) / (t + 300)


def compare(sampler, schedule, scheduler, steps, prediction, tolerance=2e-4):
    """Every state along the way, not only the last."""
    scheduler.set_timesteps(steps)
    times = timesteps(1000, steps)
    assert [int(t) for t in scheduler.timesteps] == times
    states = sampler(Denoiser(network, schedule, prediction), X, times)
    x = X
    for t, (ours, _) in zip(scheduler.timesteps, states, strict=True):
        step = scheduler.step(network(x, t), t, x)
        x = step.prev_sample
        # Where a state grows large, so do the rounding errors of float32.
        torch.testing.assert_close(ours, x, rtol=tolerance, atol=tolerance * max(1, x.abs().max().item()))
    assert x.abs().mean() > 0.01


# An epsilon network on the cosine schedule divides by an alpha of 5e-5 and magnifies the rounding errors of both.
CASES = [(name, prediction) for name in SCHEDULES for prediction in TYPES
         if (name, prediction) != ("squaredcos_cap_v2", "epsilon")]


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 50, 250])
@pytest.mark.parametrize("name, prediction", CASES)
def test_ddim(name, prediction, steps):
    """For numbers of steps that divide 1000; for others diffusers' DDIM errs about its previous timestep."""
    scheduler = diffusers.DDIMScheduler.from_config(SCHEDULES[name].to_config() | {
        "clip_sample": False, "prediction_type": TYPES[prediction], "timestep_spacing": "trailing",
        "set_alpha_to_one": True})
    compare(ddim, SCHEDULES[name], scheduler, steps, prediction)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 20, 30, 107, 333])
@pytest.mark.parametrize("name, prediction", CASES)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpmpp_2m(name, prediction, steps):
    """For any number of steps."""
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(SCHEDULES[name].to_config() | {
        "prediction_type": TYPES[prediction], "timestep_spacing": "trailing", "algorithm_type": "dpmsolver++",
        "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"})
    compare(dpmpp_2m, SCHEDULES[name], scheduler, steps, prediction)


def test_trailing_timesteps_for_every_number_of_steps():
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.numpy()
        if len(theirs) == steps:  # rounding gives theirs one too many now and then
            assert np.abs(theirs - timesteps(1000, steps)).max() <= (0 if 1000 % steps == 0 else 1), steps


@pytest.mark.parametrize("steps", [4, 10, 50, 100, 250])
def test_leading_and_linspace_timesteps(steps):
    for spacing, offset in (("leading", 1), ("linspace", 0)):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == timesteps(1000, steps, spacing=spacing)
