"""Stable Diffusion 1.5 and 2.1 at full size with random weights, beside diffusers and transformers: run by hand.

    DIFFUSIONBOOK_FULL_SIZE=1 pytest tests/parity/test_full_size.py

Needs 5 GB of memory and some minutes; both sides share one copy of the weights. Last run on 26 November 2026, on one
CPU core with torch 2.13.0, diffusers 0.42.1 and transformers 5.23.0: all five passed in a minute.
"""

import os

import pytest
import torch

from diffusionbook.autoencoders import VAE, VAEConfig
from diffusionbook.text import TextConfig, TextEncoder
from diffusionbook.unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif("DIFFUSIONBOOK_FULL_SIZE" not in os.environ, reason="takes minutes")


def shared(network, config, reference):
    """Our network with the very tensors of the reference."""
    with torch.device("meta"):
        ours = network(config)
    ours.load_state_dict(reference.state_dict(), assign=True)
    return ours.eval()


def assert_close(ours, theirs):
    assert theirs.std() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@torch.no_grad()
def test_the_u_net(name):
    torch.manual_seed(0)
    config = UNetConfig.preset(name)
    reference = diffusers.UNet2DConditionModel.from_config(config.to_config()).eval()
    ours = shared(UNet, config, reference)
    x, t, context = torch.randn(1, 4, 32, 32), torch.tensor([321]), torch.randn(1, 77, config.context_width)
    assert_close(ours(x, t, context), reference(x, t, context).sample)


@pytest.mark.parametrize("name", ["sd15", "sd21"])
@torch.no_grad()
def test_the_text_encoder(name):
    torch.manual_seed(0)
    config = TextConfig.preset(name)
    reference = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config.to_config())).eval()
    ours = shared(TextEncoder, config, reference)
    ids = torch.randint(0, 49_000, (1, 77))
    assert_close(ours(ids), reference(ids).last_hidden_state)


@torch.no_grad()
def test_the_vae():
    torch.manual_seed(0)
    config = VAEConfig.preset("sd")
    reference = diffusers.AutoencoderKL.from_config(config.to_config()).eval()
    ours = shared(VAE, config, reference)
    latents = torch.randn(1, 4, 16, 16)
    assert_close(ours.decode(latents * config.scaling_factor), reference.decode(latents).sample)
