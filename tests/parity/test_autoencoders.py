"""Chapter 11 against diffusers' AutoencoderKL, in both directions."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionbook.autoencoders import VAE, VAEConfig

diffusers = pytest.importorskip("diffusers")

TINY = {
    "like sd": VAEConfig(channels=(8, 16, 24, 24), groups=8),
    "like the miniature": VAEConfig(channels=(8, 16, 24, 24), layers_per_block=1, groups=4, scaling_factor=1.0),
    "two levels, eight channels": VAEConfig(channels=(8, 16), latent_channels=8, groups=4, scaling_factor=0.7),
}
SD = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
      "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


def randomise(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def assert_same(ours, theirs):
    torch.manual_seed(1)
    images, scale = torch.rand(2, 3, 16, 24) * 2 - 1, ours.config.scaling_factor
    cloud, expected = ours.encode(images), theirs.encode(images).latent_dist
    assert expected.mean.std() > 0.05 and expected.std.std() > 1e-3
    torch.testing.assert_close(cloud.mean, expected.mean * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.exp(cloud.logvar / 2), expected.std * scale, rtol=1e-4, atol=1e-5)
    drawn = cloud.sample(torch.Generator().manual_seed(5)), expected.sample(torch.Generator().manual_seed(5)) * scale
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-5)
    if scale == 1:
        torch.testing.assert_close(cloud.kl(), expected.kl(), rtol=1e-4, atol=1e-4)
    latents = torch.randn(2, ours.config.latent_channels, 3, 5)
    decoded = theirs.decode(latents / scale).sample
    assert decoded.std() > 0.05
    torch.testing.assert_close(ours.decode(latents), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_ours_is_opened_by_diffusers(name, tmp_path):
    ours = randomise(VAE(TINY[name]))
    ours.save_pretrained(tmp_path)
    theirs, report = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert theirs.config.scaling_factor == ours.config.scaling_factor
    assert_same(ours, theirs.eval())


@pytest.mark.parametrize("name", TINY)
def test_theirs_is_opened_by_us(name, tmp_path):
    theirs = randomise(diffusers.AutoencoderKL.from_config(TINY[name].to_config()))
    theirs.save_pretrained(tmp_path)
    ours = VAE.from_pretrained(tmp_path)
    assert ours.config == TINY[name]
    assert_same(ours, theirs)


def test_weights_in_the_old_dialect_are_opened(tmp_path):
    theirs = randomise(diffusers.AutoencoderKL.from_config(TINY["like sd"].to_config()))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, tensor in load_file(path).items():
        for now, before in new.items():
            key = key.replace(f".{now}.", f".{before}.")
        state[key] = tensor
    assert sum(".query." in key for key in state) == 4
    save_file(state, path)
    assert_same(VAE.from_pretrained(tmp_path), theirs)


def test_the_public_autoencoder_has_the_same_tensors():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL.from_config(SD)
        ours = VAE(VAEConfig.preset("sd"))
    shapes = {key: tuple(p.shape) for key, p in ours.state_dict().items()}
    assert shapes == {key: tuple(p.shape) for key, p in theirs.state_dict().items()}
    assert ours.count_parameters() == 83_653_863 and len(shapes) == 248
    assert VAEConfig.from_config(dict(theirs.config)) == VAEConfig.preset("sd")
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    assert (count(ours.encoder), count(ours.decoder)) == (34_163_592, 49_490_179)
