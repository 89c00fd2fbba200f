"""Train the miniature VAE on the emoji: 64×64×3 → 8×8×4, 48 times fewer numbers.

    python recipes/emoji_vae.py                                          # from nothing
    python recipes/emoji_vae.py --from emoji --lr 6e-4 --steps 2400      # go on from the weights that ship
    python recipes/emoji_vae.py --ratio 12                               # a small one for comparison: 12, 48 or 192

Resumable: the same command goes on where it stopped. At the end the weights go where they ship; `--ship` names another
folder. A latent diffusion model belongs to the latents that it was trained on: with `--from` they are held near those
that the weights began with, and so remain readable for it. On a GPU take `--batch 128`.
"""

import argparse
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusionbook.autoencoders import VAE, VAEConfig
from diffusionbook.data import emoji, pick_device
from diffusionbook.training import has_bf16, train

BATCH = 32
#: Small networks for the comparison: numbers of a picture for each one kept → channels at 64, 32, 16, … pixels.
RATIOS = {12: (16, 32, 32), 48: (16, 32, 32, 32), 192: (16, 32, 32, 32, 24)}
KL_WEIGHT = 3e-6  # per latent number and relative to a loss per pixel: keeps the space smooth, costs little detail
HOLD = 0.5  # how much a squared move of a latent number counts, beside the loss per pixel, with `--from`
WEIGHTS = Path(__file__).parent.parent / "diffusionbook" / "weights"


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
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=has_bf16(batch.device)):
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


def restore(vae: VAE, images: torch.Tensor, generator: torch.Generator, old: VAE | None = None):
    """The loss of one batch: how far pictures, some of them mirrored, are from what the VAE makes of them.

    And, given the network as it was before, how far latents have moved. Returns the loss and what the log keeps of it.
    """
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)
    side = images.shape[-1] // vae.factor
    noise = torch.randn(len(images), vae.config.latent_channels, side, side, generator=generator).to(images.device)
    restored, cloud = vae(images, noise)
    kl = cloud.kl().mean()
    loss, seen = reconstruction_loss(restored.float(), images) + KL_WEIGHT * kl, {"kl": kl.item()}
    if old:
        with torch.no_grad():
            before = old.encode(images).mean
        move = (cloud.mean - before).square().mean()
        loss, seen = loss + HOLD * move, seen | {"move": move.item()}
    return loss, seen


def main(folder: Path, ship: Path, start: str | None, ratio: int | None, steps: int, batch: int, lr: float) -> None:
    torch.manual_seed(0)
    config = VAEConfig.preset("emoji")
    vae = VAE.from_pretrained(start) if start else VAE(replace(config, channels=RATIOS[ratio]) if ratio else config)
    device = pick_device()
    pictures, unseen = emoji("train").images().to(device), emoji("validation").images().to(device)
    vae = vae.to(device, memory_format=torch.channels_last)
    old = deepcopy(vae).requires_grad_(False) if start else None
    average = train(vae, pictures, partial(restore, old=old), batch=batch, steps=steps, lr=lr, folder=folder, ema=0.995,
                    bf16=has_bf16(device), evaluate=lambda: {"psnr": psnr(vae, unseen)})
    average.swap(vae)
    if not start:
        standardise(vae, pictures[:: max(1, len(pictures) // 2000)])
    vae.save_pretrained(ship, dtype=torch.float16)
    for split in ("validation", "object_style", "tone_style"):
        print(f"{split}: {psnr(vae, emoji(split).images().to(device)):.2f} dB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="log and state (default runs/emoji_vae…)")
    parser.add_argument("--ship", type=Path, help="where the weights go (default: where they ship)")
    parser.add_argument("--from", dest="start", help="weights to go on from: emoji, or a folder")
    parser.add_argument("--ratio", type=int, choices=RATIOS, help="train a small network of this compression instead")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    given = parser.parse_args()
    if given.start and given.ratio:
        parser.error("--ratio begins a small network anew; leave out --from")
    name = f"emoji_vae_{given.ratio}" if given.ratio else "emoji_vae_on" if given.start else "emoji_vae"
    ship = WEIGHTS / "emoji" / (f"vae-{given.ratio}" if given.ratio else "vae")
    main(given.folder or Path("runs") / name, given.ship or ship, given.start, given.ratio, given.steps, given.batch,
         given.lr)
