"""Train the miniature VAE on the emoji: 64×64×3 → 8×8×4, 48 times fewer numbers.

    python recipes/emoji_vae.py [--folder runs/emoji_vae] [--steps 2800]

Resumable: the same command goes on where it stopped. At the end the weights go to diffusionbook/weights/emoji/vae.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusionbook.autoencoders import VAE, VAEConfig
from diffusionbook.data import emoji, pick_device
from diffusionbook.training import has_bf16, train

BATCH = 32
KL_WEIGHT = 3e-6  # per latent number and relative to a loss per pixel: keeps the space smooth, costs little detail
SHIPPED = Path(__file__).parent.parent / "diffusionbook" / "weights" / "emoji"


def reconstruction_loss(restored: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 on three scales, so that shapes settle first, plus the squared error that PSNR measures."""
    loss = 4 * F.mse_loss(restored, images)
    for _ in range(3):
        loss = loss + F.l1_loss(restored, images)
        restored, images = F.avg_pool2d(restored, 2), F.avg_pool2d(images, 2)
    return loss


@torch.no_grad()
def psnr(vae: VAE, images: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB over pictures restored from the mean latent."""
    errors = []
    for batch in images.split(BATCH):
        with torch.autocast(batch.device.type, torch.bfloat16):
            restored = vae.decode(vae.encode(batch).mean)
        errors.append(((restored.float().clamp(-1, 1) - batch) ** 2).flatten(1).mean(1))
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


@torch.no_grad()
def standardise(vae: VAE, images: torch.Tensor) -> None:
    """Fold shift and scale into the 1×1 convolutions so that every latent channel has mean 0 and deviation 1."""
    latents = torch.cat([vae.encode(batch).mean for batch in images.split(BATCH)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    inward, outward = vae.quant_conv, vae.post_quant_conv
    inward.weight[:channels] /= std.view(-1, 1, 1, 1)
    inward.bias[:channels] = (inward.bias[:channels] - mean) / std
    inward.bias[channels:] -= 2 * std.log()
    outward.bias += (outward.weight[:, :, 0, 0] * mean).sum(1)
    outward.weight *= std.view(1, -1, 1, 1)


def restore(vae: VAE, images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
    """The loss of one batch: how far pictures, some of them mirrored, are from what the VAE makes of them."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)
    noise = torch.randn(len(images), 4, 8, 8, generator=generator).to(images.device)
    restored, cloud = vae(images, noise)
    kl = cloud.kl().mean()
    return reconstruction_loss(restored.float(), images) + KL_WEIGHT * kl, {"kl": kl.item()}


def main(folder: Path, steps: int) -> None:
    device = pick_device()
    pictures, unseen = emoji("train").images().to(device), emoji("validation").images().to(device)
    torch.manual_seed(0)
    vae = VAE(VAEConfig.preset("emoji")).to(device, memory_format=torch.channels_last)
    average = train(vae, pictures, restore, batch=BATCH, steps=steps, lr=1.2e-3, folder=folder, ema=0.995,
                    bf16=has_bf16(device), evaluate=lambda: {"psnr": psnr(vae, unseen)})
    average.swap(vae)
    standardise(vae, pictures[:: max(1, len(pictures) // 2000)])
    vae.save_pretrained(SHIPPED / "vae", dtype=torch.float16)
    for split in ("validation", "object_style", "tone_style"):
        print(f"{split}: {psnr(vae, emoji(split).images().to(device)):.2f} dB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji_vae"))
    parser.add_argument("--steps", type=int, default=2800)
    given = parser.parse_args()
    main(given.folder, given.steps)
