"""Chapter 11: the Gaussian in the middle, and the picture that comes back."""

import dataclasses
import math

import pytest
import torch

from diffusionbook.autoencoders import VAE, DiagonalGaussian, VAEConfig

SMALL = VAEConfig(channels=(8, 8, 16), layers_per_block=1, groups=4, scaling_factor=0.5, sample_size=32)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = VAE(SMALL).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def pictures(count=2, size=(16, 24)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# The Gaussian


@pytest.mark.parametrize("mean, std, nats", [
    (0.0, 1.0, 0.0),
    (2.0, 1.0, 2.0),
    (0.0, 2.0, 0.5 * (4 - 1) - math.log(2)),
    (-1.0, 0.5, 0.5 * (1 + 0.25 - 1) + math.log(2)),
])
def test_kl_in_closed_form(mean, std, nats):
    cloud = DiagonalGaussian(torch.full((2, 3, 2, 2), mean), torch.full((2, 3, 2, 2), 2 * math.log(std)))
    assert cloud.kl().tolist() == pytest.approx([12 * nats] * 2, abs=1e-5)


def test_kl_equals_the_one_of_torch():
    torch.manual_seed(0)
    mean, logvar = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(DiagonalGaussian(mean, logvar).kl(), reference.sum((1, 2, 3)), rtol=1e-5)


def test_samples_have_the_mean_and_spread_promised():
    mean, logvar = torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 2 * math.log(0.5))
    drawn = DiagonalGaussian(mean, logvar).sample(torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(3, abs=0.01) and drawn.std().item() == pytest.approx(0.5, abs=0.01)


def test_samples_follow_their_generator():
    cloud = DiagonalGaussian(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    draw = lambda seed: cloud.sample(torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_logvar_is_held_in_bounds():
    cloud = DiagonalGaussian(torch.zeros(3), torch.tensor([-1e9, 0.5, 1e9]))
    assert cloud.logvar.tolist() == [-30, 0.5, 20]


# Both ways


def test_shapes_and_factor(vae):
    cloud = vae.encode(pictures())
    assert vae.factor == 4 and cloud.mean.shape == cloud.logvar.shape == (2, 4, 4, 6)
    assert vae.decode(cloud.mean).shape == (2, 3, 16, 24)
    sd = VAEConfig.preset("sd")
    assert 2 ** (len(sd.channels) - 1) == 8
    assert 512 * 512 * 3 / (64 * 64 * sd.latent_channels) == 48


def test_the_scaling_factor_stays_inside(vae):
    """The same weights with another factor: latents scale with it and pictures stay as they are."""
    other = VAE(dataclasses.replace(SMALL, scaling_factor=1.0)).eval()
    other.load_state_dict(vae.state_dict())
    with torch.no_grad():
        scaled, plain = vae.encode(pictures()), other.encode(pictures())
        assert torch.allclose(scaled.mean, 0.5 * plain.mean, atol=1e-6)
        assert torch.allclose(torch.exp(scaled.logvar / 2), 0.5 * torch.exp(plain.logvar / 2), rtol=1e-5)
        assert torch.allclose(vae.decode(scaled.mean), other.decode(plain.mean), atol=1e-5)


def test_forward_is_encode_mix_decode(vae):
    noise = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        restored, cloud = vae(pictures(), noise)
        expected = vae.encode(pictures())
        assert torch.equal(cloud.mean, expected.mean) and torch.equal(cloud.logvar, expected.logvar)
        assert torch.equal(restored, vae.decode(cloud.mean + torch.exp(cloud.logvar / 2) * noise))
        assert not torch.allclose(restored, vae(pictures(), -noise)[0], atol=1e-3)


def test_a_picture_does_not_depend_on_its_neighbours(vae):
    with torch.no_grad():
        cloud, images = vae.encode(pictures(3)), vae.decode(vae.encode(pictures(3)).mean)
        assert images.std() > 0.05
        for i in range(3):
            alone = vae.encode(pictures(3)[i:i + 1])
            assert torch.allclose(alone.mean[0], cloud.mean[i], atol=1e-5)
            assert torch.allclose(vae.decode(alone.mean)[0], images[i], atol=1e-5)


def test_reparameterised_gradient_equals_a_finite_difference():
    torch.manual_seed(0)
    model = VAE(dataclasses.replace(SMALL, channels=(8, 8))).double()
    images, noise = pictures(1, (4, 4)).double(), torch.randn(1, 4, 2, 2, dtype=torch.float64)
    weight = model.quant_conv.weight  # rows 0–3 make the mean, rows 4–7 the variance

    def loss():
        restored, _ = model(images, noise)
        return (restored - images).square().sum()

    model.zero_grad()
    loss().backward()
    for index in ((0, 1, 0, 0), (6, 3, 0, 0)):
        original, h, values = weight.data[index].item(), 1e-4, []
        for sign in (1, -1):
            weight.data[index] = original + sign * h
            values.append(loss().item())
        weight.data[index] = original
        assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-3)


def test_gradients_reach_every_parameter(vae):
    model = VAE(SMALL)
    model.load_state_dict(vae.state_dict())
    noise = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))
    restored, cloud = model(pictures(), noise)
    (restored.square().mean() + cloud.kl().mean()).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias adds the same to all scores of a query, and softmax doesn't see it.
    assert [name for name in dead if not name.endswith("to_k.bias")] == []


# Refusals


@pytest.mark.parametrize("images, message", [
    (torch.full((1, 3, 16, 16), 2.0), "divide by 127.5"),
    (torch.full((1, 3, 16, 16), float("nan")), "NaN"),
    (torch.zeros(1, 3, 16, 18), "multiples of 4, got 16×18"),
    (torch.zeros(1, 1, 16, 16), "B, 3, H, W"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
])
def test_what_is_not_a_picture_is_refused(vae, images, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(images)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (4, 4, 4)])
def test_what_is_not_a_latent_is_refused(vae, shape):
    with pytest.raises(ValueError, match=r"latents must have shape \(B, 4, h, w\)"):
        vae.decode(torch.zeros(shape))


# Configs and files


@pytest.mark.parametrize("config", [SMALL, VAEConfig.preset("sd"), VAEConfig.preset("emoji")])
def test_configs_survive_the_public_layout(config):
    assert VAEConfig.from_config(config.to_config()) == config


def test_the_miniature_keeps_the_ratio_of_the_real_one():
    config = VAEConfig.preset("emoji")
    side = config.sample_size // 2 ** (len(config.channels) - 1)
    assert (side, config.sample_size**2 * 3 / (side**2 * config.latent_channels)) == (8, 48)


def test_unknown_presets_and_other_autoencoders_are_refused():
    with pytest.raises(ValueError, match="choose one of sd, emoji"):
        VAEConfig.preset("taesd")
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        VAEConfig.from_config({"_class_name": "AutoencoderTiny"})


@pytest.mark.parametrize("changes", [
    {"down_block_types": ["AttnDownEncoderBlock2D"] * 3},
    {"act_fn": "relu"},
    {"shift_factor": 0.1},
])
def test_public_options_that_this_autoencoder_does_not_compute_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        VAEConfig.from_config(SMALL.to_config() | changes)


def test_a_saved_autoencoder_answers_as_before(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    with torch.no_grad():
        assert again.config == SMALL
        assert torch.equal(again.encode(pictures()).logvar, vae.encode(pictures()).logvar)
        assert torch.equal(again.decode(torch.ones(1, 4, 2, 2)), vae.decode(torch.ones(1, 4, 2, 2)))
