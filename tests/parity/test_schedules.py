"""Noise schedules against diffusers, in both directions of the configuration."""

import json

import pytest
import torch

from diffusionbook.schedules import NoiseSchedule

diffusers = pytest.importorskip("diffusers")

CONFIGS = [
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "linear", "trained_betas": [0.01, 0.02, 0.3, 0.2], "num_train_timesteps": 4},
]
OURS = [
    NoiseSchedule.linear(),
    NoiseSchedule.linear(250, beta_min=4e-4, beta_max=0.08),
    NoiseSchedule.scaled_linear(),
    NoiseSchedule.cosine(),
    NoiseSchedule.cosine(400, s=0.02),
    NoiseSchedule.sigmoid(),
    NoiseSchedule.sigmoid_ramp(),
    NoiseSchedule.from_betas([0.1, 0.2, 0.7]),
]


def same_tables(ours, theirs):
    betas, alpha_bar = torch.as_tensor(theirs.betas).double(), torch.as_tensor(theirs.alphas_cumprod).double()
    torch.testing.assert_close(ours.betas, betas, rtol=0, atol=1e-6 if ours.alpha_bar[-1] > 0 else 1e-4)
    torch.testing.assert_close(ours.alpha_bar, alpha_bar, rtol=0, atol=1e-6)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: "trained" if "trained_betas" in c else c["beta_schedule"]
)
def test_their_configuration_read_by_us(config, scheduler, silent, tmp_path):
    if scheduler == "DDIMScheduler" and config["beta_schedule"] == "sigmoid":
        pytest.skip("DDIMScheduler has no sigmoid")
    theirs = getattr(diffusers, scheduler)(**config, rescale_betas_zero_snr=silent)
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    same_tables(NoiseSchedule.from_config(saved), theirs)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("ours", OURS, ids=repr)
def test_our_configuration_read_by_them(ours, silent, tmp_path):
    ours = ours.zero_terminal_snr() if silent else ours
    config = {"_class_name": "DDPMScheduler", **ours.to_config()}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    same_tables(ours, diffusers.DDPMScheduler.from_pretrained(tmp_path))


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda c: c["beta_schedule"])
def test_same_noisy_picture_and_velocity(config):
    ours, theirs = NoiseSchedule.from_config(config), diffusers.DDPMScheduler(**config)
    x0, noise = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 250, 700, 999])
    torch.testing.assert_close(
        ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        ours.velocity(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda c: c["beta_schedule"])
def test_same_posterior(config):
    """With a "network" that returns the clean picture, their step draws from the posterior."""
    ours = NoiseSchedule.from_config(config)
    theirs = diffusers.DDPMScheduler(**config, prediction_type="sample", clip_sample=False)
    theirs.alphas_cumprod = ours.alpha_bar  # their float32 table costs 1 - alpha_bar three digits near t = 0
    x0, x_t = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (1, 2, 500, 999):
        step = theirs.step(x0, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        noise = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = ours.posterior_mean(x0, x_t, t, t - 1) + ours.posterior_variance(t, t - 1).sqrt() * noise
        torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1000, 10])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_same_flow(shift, steps, tmp_path):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)
    theirs.save_pretrained(tmp_path)
    ours = NoiseSchedule.from_config(json.loads((tmp_path / "scheduler_config.json").read_text()))
    t = torch.arange(steps).flip(0)
    torch.testing.assert_close(ours.sigma(t), theirs.sigmas.float(), rtol=1e-6, atol=1e-7)
    x0, noise = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 2, steps - 1])  # theirs count from the noisy end
    x_t = theirs.scale_noise(x0, theirs.timesteps[steps - 1 - at], noise)
    torch.testing.assert_close(ours.add_noise(x0, noise, at), x_t, rtol=1e-5, atol=1e-6)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(ours.to_config()))
    again = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    torch.testing.assert_close(again.sigmas, theirs.sigmas, rtol=0, atol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_same_posterior_between_distant_steps(spacing):
    """Respaced sampling: the posterior of a jump over many steps, at every jump of the way."""
    theirs = diffusers.DDPMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing=spacing)
    ours = NoiseSchedule.linear()
    theirs.alphas_cumprod = ours.alpha_bar
    theirs.set_timesteps(50)
    x0, x_t = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in theirs.timesteps.tolist():
        t_next = t - 20
        step = theirs.step(x0, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        noise = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if t_next < 0:
            t_next = None
            noise *= 0 if t == 0 else 1e-10  # they clamp the variance at 1e-20
        spread = 1 if t_next is None else ours.posterior_variance(t, t_next).sqrt()
        expected = ours.posterior_mean(x0, x_t, t, t_next) + spread * noise
        torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda c: c["beta_schedule"])
def test_same_time_of_a_noise_level(config):
    """Between two steps diffusers finds times by the logarithm of sigma / alpha, from a float32 table."""
    ours, theirs = NoiseSchedule.from_config(config), diffusers.EulerDiscreteScheduler(**config)
    levels = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt().double().log().numpy()
    for t in (0.3, 17.5, 500.25, 990.75):
        log_snr = 2 * (ours.alpha(t) / ours.sigma(t)).log().item()
        assert ours.time_of(log_snr).item() == pytest.approx(t, abs=1e-6)
        theirs_t = theirs._sigma_to_t(torch.tensor(-log_snr / 2).exp().numpy(), levels)
        assert float(theirs_t) == pytest.approx(t, abs=0.01)
