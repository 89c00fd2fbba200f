"""A whole pipeline with random weights, small enough to paint in a blink."""

import pytest
import torch

from diffusionbook.autoencoders import VAE, VAEConfig
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.text import TextConfig, TextEncoder, train_bpe
from diffusionbook.unet import UNet, UNetConfig

WORDS = ["red heart, noto style", "pizza, twemoji style", "grinning face, 3d style"]


@pytest.fixture(scope="session")
def tiny():
    """Random weights everywhere: a new network says 0 whatever it is told, and would hide every mistake."""
    torch.manual_seed(0)
    tokenizer = train_bpe(WORDS, 540, context_length=12)
    text_encoder = TextEncoder(TextConfig(vocab_size=540, context_length=12, width=16, layers=1, heads=2)).eval()
    unet = UNet(UNetConfig(channels=(16, 24), attention=("cross", "cross"), heads=(2, 2), context_width=16,
                           layers_per_block=1, groups=8, sample_size=8)).eval()
    vae = VAE(VAEConfig(channels=(8, 8, 16, 16), layers_per_block=1, groups=4, scaling_factor=0.7,
                        sample_size=64)).eval()
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.1 * torch.randn_like(p))
        vae.decoder.conv_out.weight.mul_(3)  # pictures with contrast, so that a difference shows
        for p in text_encoder.embeddings.parameters():
            p.normal_()
    return StableDiffusion(vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer,
                           schedule=NoiseSchedule.cosine(), prediction="v")
