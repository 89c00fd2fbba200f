"""Chapter 11: the Gaussian in the middle, and the picture that comes back."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from diffusionbook.autoencoders import (
    VAE,
    DiagonalGaussian,
    TinyVAE,
    TinyVAEConfig,
    VAEConfig,
    elbo,
    in_tiles,
)
from diffusionbook.layers import ResidualBlock

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


def test_precision_does_not_change_the_noise():
    mean, logvar = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    draw = lambda dtype: DiagonalGaussian(mean.to(dtype), logvar.to(dtype)).sample(  # noqa: E731
        torch.Generator().manual_seed(0))
    assert draw(torch.float16).dtype == torch.float16
    assert torch.allclose(draw(torch.float16).float(), draw(torch.float32), atol=2e-3)


def test_kl_of_half_precision_does_not_overflow():
    cloud = DiagonalGaussian(torch.full((1, 4), 300.0).half(), torch.full((1, 4), 20.0).half())
    assert cloud.kl().item() == pytest.approx(4 * 0.5 * (300**2 + math.exp(20) - 21), rel=1e-5)


def test_kl_and_elbo_keep_the_precision_that_they_are_given():
    """By finite differences, which float32 is too coarse for."""
    parts = [torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda mean, logvar: DiagonalGaussian(mean, logvar).kl(), parts[:2])
    assert torch.autograd.gradcheck(
        lambda x, mean, logvar: elbo(x, x / 3, DiagonalGaussian(mean, logvar), sigma=0.5), parts)


def test_logvar_is_held_in_bounds():
    cloud = DiagonalGaussian(torch.zeros(3), torch.tensor([-1e9, 0.5, 1e9]))
    assert cloud.logvar.tolist() == [-30, 0.5, 20]


# The evidence lower bound


def test_elbo_is_the_likelihood_less_the_divergence():
    torch.manual_seed(0)
    images, restored = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    cloud = DiagonalGaussian(torch.randn(3, 5), torch.randn(3, 5))
    likelihood = torch.distributions.Normal(restored, 0.3).log_prob(images).sum((1, 2, 3))
    assert torch.allclose(elbo(images, restored, cloud, sigma=0.3), likelihood - cloud.kl(), rtol=1e-5)


def test_elbo_is_the_likelihood_where_the_cloud_is_the_posterior():
    """A linear decoder with orthogonal columns has a diagonal posterior: there, on average, the bound is reached."""
    torch.manual_seed(0)
    sigma, columns = 0.5, torch.linalg.qr(torch.randn(6, 2))[0] * torch.tensor([2.0, 0.7])
    x = torch.randn(4, 6)
    posterior = 1 + columns.square().sum(0) / sigma**2  # its precision
    cloud = DiagonalGaussian(x @ columns / sigma**2 / posterior, (-posterior.log()).expand(4, 2))
    wide = DiagonalGaussian(cloud.mean, cloud.logvar + 0.5)
    covariance = columns @ columns.T + sigma**2 * torch.eye(6)
    exact = torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(x)

    def bound(cloud, draws=4000):
        many = DiagonalGaussian(cloud.mean.repeat(draws, 1), cloud.logvar.repeat(draws, 1))
        restored = many.sample(torch.Generator().manual_seed(1)) @ columns.T
        return elbo(x.repeat(draws, 1), restored, many, sigma=sigma).unflatten(0, (draws, 4)).mean(0)

    assert torch.allclose(bound(cloud), exact, atol=0.1) and (bound(wide) < exact - 0.1).all()


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


def test_the_shift_is_taken_off_before_the_scaling(vae):
    other = VAE(dataclasses.replace(SMALL, shift_factor=0.3)).eval()
    other.load_state_dict(vae.state_dict())
    with torch.no_grad():
        assert torch.allclose(other.encode(pictures()).mean, vae.encode(pictures()).mean - 0.3 * 0.5, atol=1e-6)
        assert torch.allclose(other.decode(other.encode(pictures()).mean), vae.decode(vae.encode(pictures()).mean),
                              atol=1e-5)


def test_half_precision_answers_nearly_the_same(vae):
    half = VAE(SMALL)
    half.load_state_dict(vae.state_dict())
    half = half.to(torch.bfloat16).eval()
    with torch.no_grad():
        z = vae.encode(pictures()).mean
        assert (half.encode(pictures().bfloat16()).mean.float() - z).abs().mean() < 0.05 * z.abs().mean()
        restored, expected = half.decode(z.bfloat16()).float(), vae.decode(z)
        assert (restored - expected).abs().mean() < 0.05 * expected.abs().mean()


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


# Large pictures in small memory


@pytest.mark.parametrize("size, tile", [((64, 64), 16), ((40, 72), 24), ((72, 16), 33), ((16, 24), 64)])
def test_tiles_answer_as_one_piece(vae, size, tile):
    """Random weights: statistics of a square instead of the whole would be off by whole shades."""
    images = pictures(2, size) * torch.linspace(0.1, 1, size[1])  # no two squares alike
    with torch.no_grad():
        cloud, tiled = vae.encode(images), vae.encode(images, tile=tile)
        assert torch.allclose(tiled.mean, cloud.mean, atol=1e-4)
        assert torch.allclose(tiled.logvar, cloud.logvar, atol=1e-3)
        z = torch.randn(2, 4, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(3))
        whole = vae.decode(z)
        assert whole.std() > 0.05
        assert (vae.decode(z, tile=tile) - whole).abs().max() < 1e-4


def test_norms_work_as_before_after_a_tiled_pass(vae):
    with torch.no_grad():
        before = vae.encode(pictures()).mean
        vae.encode(pictures(1, (64, 64)), tile=16)
        assert torch.equal(vae.encode(pictures()).mean, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vae.modules())


def test_a_mistake_inside_a_tiled_pass_leaves_the_norms_alone():
    block = ResidualBlock(8, 8, groups=4)
    with pytest.raises(RuntimeError):
        in_tiles(nn.Sequential(block, nn.Conv2d(5, 5, 3)), torch.zeros(1, 8, 64, 64), tile=16)
    assert not block.norm1._forward_hooks and not block.norm1._forward_pre_hooks


def test_tiles_carry_no_part_of_a_gradient(vae):
    z = torch.randn(1, 4, 16, 16, requires_grad=True)
    cloud = vae.encode(pictures(1, (64, 64)), tile=16)
    assert not cloud.mean.requires_grad and not cloud.logvar.requires_grad and not vae.decode(z, tile=16).requires_grad
    assert vae.encode(pictures()).mean.requires_grad and vae.decode(z).requires_grad and torch.is_grad_enabled()


def test_one_map_at_a_time_goes_in_tiles():
    with pytest.raises(ValueError, match=r"one map \(1, C, H, W\) at a time goes in tiles, got \(2, 3, 64, 64\)"):
        in_tiles(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), torch.zeros(2, 3, 64, 64), tile=16)


@pytest.mark.parametrize("tile", [0, 15, -64])
def test_a_tile_that_is_too_small_is_refused(vae, tile):
    with pytest.raises(ValueError, match="at least 16"):
        vae.decode(torch.zeros(1, 4, 8, 8), tile=tile)


class Memory(TorchDispatchMode):
    """Adds up the tensors that are alive and remembers the most."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.alive[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.most = max(self.most, sum(self.alive.values()))
        return out


def test_the_public_decoder_paints_2048_pixels_in_a_fraction_of_the_memory():
    with torch.device("meta"):
        model, z = VAE(VAEConfig.preset("sd")).half(), torch.empty(1, 4, 256, 256, dtype=torch.float16)
    model.decoder.mid_block.attentions[0] = nn.Identity()  # there are no fused kernels on this device
    most = {}
    for tile in (None, 512):
        with torch.no_grad(), Memory() as memory:
            assert model.decode(z, tile=tile).shape == (1, 3, 2048, 2048)
        most[tile] = memory.most
    assert most[None] > 6e9 and most[512] < 0.3 * most[None]


# The tiny one


@pytest.fixture(scope="module")
def tiny_vae():
    torch.manual_seed(0)
    return TinyVAE(TinyVAEConfig(width=8, blocks=(1, 2, 1))).eval()


def test_the_tiny_one_goes_both_ways(tiny_vae):
    with torch.no_grad():
        z = tiny_vae.encode(pictures())
        assert tiny_vae.factor == 4 and z.shape == (2, 4, 4, 6) and tiny_vae.decode(z).shape == (2, 3, 16, 24)


def test_the_tiny_one_sees_pictures_from_0_to_1_and_clamps_latents(tiny_vae):
    with torch.no_grad():
        black = tiny_vae.encode(torch.full((1, 3, 16, 16), -1.0))
        assert torch.allclose(black, tiny_vae.encoder(torch.zeros(1, 3, 16, 16)))
        z = torch.full((1, 4, 4, 4), 1000.0)
        assert torch.allclose(tiny_vae.decode(z), 2 * tiny_vae.decoder(torch.full((1, 4, 4, 4), 3.0)) - 1)


def test_gradients_reach_every_parameter_of_the_tiny_one():
    torch.manual_seed(0)
    model = TinyVAE(TinyVAEConfig(width=8, blocks=(1, 1)))
    model.decode(model.encode(pictures())).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_saved_tiny_one_answers_as_before(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path)
    again = TinyVAE.from_pretrained(tmp_path)
    with torch.no_grad():
        assert again.config == tiny_vae.config and torch.equal(again.encode(pictures()), tiny_vae.encode(pictures()))


@pytest.mark.parametrize("images, message", [
    (torch.full((1, 3, 16, 16), 2.0), "divide by 127.5"),
    (torch.zeros(1, 3, 16, 18), "multiples of 4, got 16×18"),
    (torch.zeros(1, 4, 16, 16), "B, 3, H, W"),
])
def test_the_tiny_one_refuses_what_is_not_a_picture(tiny_vae, images, message):
    with pytest.raises(ValueError, match=message):
        tiny_vae.encode(images)
    with pytest.raises(ValueError, match=r"latents must have shape \(B, 4, h, w\)"):
        tiny_vae.decode(images[:, :3])


@pytest.mark.parametrize("changes", [
    {"_class_name": "AutoencoderKL"},
    {"act_fn": "silu"},
    {"num_decoder_blocks": [1, 1, 1, 1]},
    {"out_channels": 4},
    {"decoder_block_out_channels": [64, 64, 64, 32]},
])
def test_other_tiny_ones_are_refused(changes):
    with pytest.raises(ValueError, match="AutoencoderKL|not supported"):
        TinyVAEConfig.from_config(TinyVAEConfig().to_config() | changes)


def test_the_tiny_preset():
    assert TinyVAEConfig.from_config(TinyVAEConfig.preset("taesd").to_config()) == TinyVAEConfig()
    with pytest.raises(ValueError, match="there is taesd"):
        TinyVAEConfig.preset("sd")


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


def test_training_refuses_what_encode_refuses(vae):
    with pytest.raises(ValueError, match="divide by 127.5"):
        vae(255 * pictures(), torch.zeros(2, 4, 4, 6))


@pytest.mark.parametrize("changes", [{"channels": ()}, {"layers_per_block": 0}, {"latent_channels": 0},
                                     {"scaling_factor": 0.0}, {"scaling_factor": float("nan")}])
def test_impossible_configs_are_refused(changes):
    with pytest.raises(ValueError, match="at least 1 of everything, and scaling_factor be positive"):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("count, sigma", [(1, 0.3), (2, 0.0), (2, -1.0), (2, float("nan"))])
def test_elbo_refuses_other_shapes_and_no_spread(count, sigma):
    cloud = DiagonalGaussian(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    with pytest.raises(ValueError, match="must have one shape, and sigma be positive"):
        elbo(pictures(2), pictures(count), cloud, sigma=sigma)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (4, 4, 4)])
def test_what_is_not_a_latent_is_refused(vae, shape):
    with pytest.raises(ValueError, match=r"latents must have shape \(B, 4, h, w\)"):
        vae.decode(torch.zeros(shape))


# Configs and files


@pytest.mark.parametrize("config", [SMALL, VAEConfig.preset("sd"), VAEConfig.preset("emoji"),
                                    VAEConfig(latent_channels=16, shift_factor=0.0609, quant_conv=False)])
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
    {"latents_mean": [0.1]},
    {"in_channels": 4},
    {"use_post_quant_conv": False},
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
