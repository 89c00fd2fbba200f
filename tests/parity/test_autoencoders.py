"""Chapter 11 against diffusers' AutoencoderKL and AutoencoderTiny, in both directions."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionbook.autoencoders import VAE, TinyVAE, TinyVAEConfig, VAEConfig
from diffusionbook.checkpoints import from_latent_diffusion_vae, to_latent_diffusion_vae

diffusers = pytest.importorskip("diffusers")

TINY = {
    "like sd": VAEConfig(channels=(8, 16, 24, 24), groups=8),
    "like the miniature": VAEConfig(channels=(8, 16, 24, 24), layers_per_block=1, groups=4, scaling_factor=1.0),
    "two levels, eight channels": VAEConfig(channels=(8, 16), latent_channels=8, groups=4, scaling_factor=0.7),
    "like sd3": VAEConfig(channels=(8, 16, 16), latent_channels=16, groups=4, scaling_factor=1.5, shift_factor=0.06,
                          quant_conv=False),
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
    images, scale, shift = torch.rand(2, 3, 16, 24) * 2 - 1, ours.config.scaling_factor, ours.config.shift_factor
    cloud, expected = ours.encode(images), theirs.encode(images).latent_dist
    assert expected.mean.std() > 0.05 and expected.std.std() > 1e-3
    torch.testing.assert_close(cloud.mean, (expected.mean - shift) * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.exp(cloud.logvar / 2), expected.std * scale, rtol=1e-4, atol=1e-5)
    drawn, theirs_drawn = (gaussian.sample(torch.Generator().manual_seed(5)) for gaussian in (cloud, expected))
    torch.testing.assert_close(drawn, (theirs_drawn - shift) * scale, rtol=1e-4, atol=1e-5)
    if scale == 1:
        torch.testing.assert_close(cloud.kl(), expected.kl(), rtol=1e-4, atol=1e-4)
    latents = torch.randn(2, ours.config.latent_channels, 3, 5)
    decoded = theirs.decode(latents / scale + shift).sample
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


def convert(state, config):
    """What diffusers makes of a single file of Stable Diffusion."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return convert_ldm_vae_checkpoint(dict(state), config.to_config())


@pytest.mark.parametrize("name", ["like sd", "like the miniature", "two levels, eight channels"])
def test_single_files_in_both_directions(name):
    ours = randomise(VAE(TINY[name])).state_dict()
    theirs = to_latent_diffusion_vae(ours)
    converted = convert(theirs, TINY[name])
    assert converted.keys() == ours.keys()
    others = {"model.diffusion_model.out.2.bias": torch.zeros(4), "cond_stage_model.x": torch.zeros(1)}
    alone = {key.removeprefix("first_stage_model."): tensor for key, tensor in theirs.items()}
    read = [from_latent_diffusion_vae(theirs | others, ours),
            from_latent_diffusion_vae(alone | {"loss.discriminator.main.0.bias": torch.zeros(1)}, ours)]
    for key, tensor in ours.items():
        assert all(torch.equal(found[key], tensor) for found in (converted, *read)), key


def test_the_public_single_file_has_the_same_tensors():
    with torch.device("meta"):
        ours = VAE(VAEConfig.preset("sd")).state_dict()
    theirs = to_latent_diffusion_vae(ours)
    assert len(theirs) == 248
    shapes = {key: tuple(p.shape) for key, p in ours.items()}
    assert {key: tuple(p.shape) for key, p in convert(theirs, VAEConfig.preset("sd")).items()} == shapes
    assert {key: tuple(p.shape) for key, p in from_latent_diffusion_vae(theirs, ours).items()} == shapes
    known = {"encoder.down.0.downsample.conv.weight": (128, 128, 3, 3), "decoder.up.3.upsample.conv.bias": (512,),
             "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1), "decoder.norm_out.weight": (128,),
             "encoder.mid.attn_1.q.weight": (512, 512, 1, 1), "decoder.up.0.block.0.nin_shortcut.bias": (128,),
             "decoder.mid.block_2.conv2.weight": (512, 512, 3, 3), "quant_conv.weight": (8, 8, 1, 1)}
    assert {key: tuple(theirs[f"first_stage_model.{key}"].shape) for key in known} == known


def test_a_single_file_that_lacks_a_tensor_is_refused():
    ours = VAE(TINY["like sd"]).state_dict()
    theirs = to_latent_diffusion_vae(ours)
    del theirs["first_stage_model.decoder.up.0.block.2.conv2.bias"]
    with pytest.raises(ValueError, match=r"decoder\.up\.0\.block\.2\.conv2\.bias"):
        from_latent_diffusion_vae(theirs, ours)


TINY_ONES = [TinyVAEConfig(width=8), TinyVAEConfig(width=4, blocks=(2, 1), latent_channels=16)]


@pytest.mark.parametrize("config", TINY_ONES)
def test_the_tiny_one_in_both_directions(config, tmp_path):
    ours = randomise(TinyVAE(config))
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    theirs.save_pretrained(tmp_path / "theirs")
    again = TinyVAE.from_pretrained(tmp_path / "theirs")
    assert again.config == config
    images, latents = torch.rand(2, 3, 16, 24) * 2 - 1, 2 * torch.randn(2, config.latent_channels, 3, 5)
    with torch.no_grad():
        z, decoded = theirs.encode(images).latents, theirs.decode(latents).sample
        assert z.std() > 0.01 and decoded.std() > 0.01
        torch.testing.assert_close(again.encode(images), z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.decode(latents), decoded, rtol=1e-4, atol=1e-5)


def test_the_public_tiny_one_has_the_same_tensors():
    with torch.device("meta"):
        ours, theirs = TinyVAE(TinyVAEConfig.preset("taesd")), diffusers.AutoencoderTiny()
    shapes = {key: tuple(p.shape) for key, p in ours.state_dict().items()}
    assert shapes == {key: tuple(p.shape) for key, p in theirs.state_dict().items()}
    assert ours.count_parameters() == 2_445_063 and len(shapes) == 134
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    assert (count(ours.encoder), count(ours.decoder)) == (1_222_532, 1_222_531)
    assert TinyVAEConfig.from_config(dict(theirs.config)) == TinyVAEConfig.preset("taesd")


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
