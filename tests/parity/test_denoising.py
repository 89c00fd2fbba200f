"""Chapter 05 against diffusers' conversions, weights and learned variance, torch's KL and SciPy's bell curve."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, kl_divergence

from diffusionbook.denoising import (
    Denoiser,
    Prediction,
    diffusion_loss,
    learned_log_variance,
    min_snr,
    target,
    to_prediction,
    variational_bound,
)
from diffusionbook.schedules import NoiseSchedule

diffusers = pytest.importorskip("diffusers")

CONFIGS = [{"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"},
           {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}]
TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
by_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["beta_schedule"])


def batch(count=4, dtype=torch.float64):
    return torch.randn(2, count, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))


@by_config
@pytest.mark.parametrize("prediction", TYPES)
@pytest.mark.parametrize("t", [1, 300, 700, 990])
def test_same_reading_of_an_output(config, prediction, t):
    """Their DDIM gives back the clean picture it has read; eta = 0 shows the noise too."""
    theirs = diffusers.DDIMScheduler(**config, prediction_type=TYPES[prediction], clip_sample=False)
    ours = NoiseSchedule.from_config(config)
    theirs.alphas_cumprod = ours.alpha_bar
    theirs.set_timesteps(1000)
    output, x = batch()
    answer = to_prediction(output, x, t, schedule=ours, prediction=prediction)
    step = theirs.step(output, t, x)
    size = max(1, answer.x0.abs().max().item())  # where the answer is large, so are its rounding errors
    torch.testing.assert_close(step.pred_original_sample, answer.x0, rtol=1e-9, atol=1e-9 * size)
    state = ours.alpha(t - 1) * answer.x0 + ours.sigma(t - 1) * answer.eps
    torch.testing.assert_close(step.prev_sample, state, rtol=1e-9, atol=1e-9 * size)


@by_config
def test_same_velocity(config):
    ours, theirs = NoiseSchedule.from_config(config), diffusers.DDPMScheduler(**config)
    x0, noise = batch(dtype=torch.float32)
    t = torch.tensor([0, 5, 500, 999])
    v = target(x0, noise, t, schedule=ours, prediction="v")
    torch.testing.assert_close(v, theirs.get_velocity(x0, noise, t), rtol=1e-5, atol=1e-5)


def test_same_flow_step():
    """One Euler step of their flow scheduler, from a network's output, is ours along the straight line."""
    theirs, ours = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), NoiseSchedule.flow(shift=3.0)
    output, x = batch(dtype=torch.float32)
    answer = Denoiser(lambda x, t: output, ours, "flow")(x, 999)
    step = theirs.step(output, theirs.timesteps[0], x).prev_sample  # the next noise level in its list
    state = ours.alpha(998) * answer.x0 + ours.sigma(998) * answer.eps
    torch.testing.assert_close(step, state.float(), rtol=1e-5, atol=1e-5)


@by_config
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_same_min_snr(config, prediction):
    """The weight as their training scripts compute it, from their own SNR."""
    training = pytest.importorskip("diffusers.training_utils")
    ours, theirs = NoiseSchedule.from_config(config), diffusers.DDPMScheduler(**config)
    t = torch.tensor([10, 200, 500, 900])
    snr = training.compute_snr(theirs, t)
    weights = torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr + (prediction == "v"))
    x0, noise = batch(dtype=torch.float32)
    plain, weighted = (diffusion_loss(lambda x, t: x.sin(), x0, noise, t, schedule=ours, prediction=prediction,
                                      weight=weight) for weight in (None, min_snr))
    torch.testing.assert_close(weighted, weights * plain, rtol=1e-4, atol=0)


@by_config
@pytest.mark.parametrize("spacing", [1, 20])
def test_same_learned_variance(config, spacing):
    """Their DDPM with "learned_range", for neighbouring and for distant steps."""
    theirs = diffusers.DDPMScheduler(**config, variance_type="learned_range", clip_sample=False)
    ours = NoiseSchedule.from_config(config)
    theirs.alphas_cumprod = ours.alpha_bar
    theirs.set_timesteps(1000 // spacing)
    output, x = batch()
    value = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    denoise = Denoiser(lambda x, t: torch.cat([output, value], dim=1), ours)
    for t in (spacing, 400, 980):
        step = theirs.step(torch.cat([output, value], dim=1), t, x, generator=torch.Generator().manual_seed(1))
        noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        answer, t_next = denoise(x, t), t - spacing
        spread = (0.5 * learned_log_variance(answer.variance_mix, t, t_next, schedule=ours)).exp()
        expected = ours.posterior_mean(answer.x0, x, t, t_next) + spread * noise
        torch.testing.assert_close(step.prev_sample, expected, rtol=1e-8, atol=1e-8)


@by_config
def test_same_divergence_as_torch(config):
    schedule = NoiseSchedule.from_config(config)
    x0, noise = batch()
    t = torch.tensor([1, 80, 500, 999])
    x = schedule.add_noise(x0, noise, t)
    answer = Prediction(x0 + 0.3 * noise.sin(), noise, torch.rand_like(x))
    bits = variational_bound(answer, x0, x, t, schedule=schedule)
    for i, step in enumerate(t.tolist()):
        least, most = schedule.posterior_variance(step, step - 1), schedule.betas[step]
        spread = (answer.variance_mix[i] * most.log() + (1 - answer.variance_mix[i]) * least.log()).div(2).exp()
        true, guess = (schedule.posterior_mean(picture[i:i + 1], x[i:i + 1], step, step - 1)[0]
                       for picture in (x0, answer.x0))
        nats = kl_divergence(Normal(true, least.sqrt()), Normal(guess, spread)).mean()
        torch.testing.assert_close(bits[i], nats / np.log(2), rtol=1e-7, atol=1e-10)


def test_same_pixel_likelihood_as_scipy():
    """At t = 0: the mass of a bell curve between the halfway points to the neighbouring 8-bit values."""
    schedule = NoiseSchedule.linear()
    pixels = torch.tensor([0, 1, 100, 127, 200, 254, 255])
    x0 = (pixels.double() / 127.5 - 1).view(1, -1)
    guess, mix = x0 + torch.linspace(-0.02, 0.02, 7).double(), torch.full_like(x0, 0.6)
    x = schedule.add_noise(x0, torch.zeros_like(x0), 0)
    bits = variational_bound(Prediction(guess, x, mix), x0, x, 0, schedule=schedule)
    spread = (0.6 * schedule.betas[0].log() + 0.4 * schedule.posterior_variance(1, 0).log()).div(2).exp().item()
    curve = stats.norm(guess.numpy(), spread)
    low = np.where(pixels == 0, -np.inf, x0.numpy() - 1 / 255)
    high = np.where(pixels == 255, np.inf, x0.numpy() + 1 / 255)
    mass = curve.cdf(high) - curve.cdf(low)
    assert bits.item() == pytest.approx(-np.log2(mass).mean(), rel=1e-9)
