"""Train the upsampler of the miniature cascades: a 16×16 picture in, the 64×64 picture out, without words.

    python recipes/emoji_upsampler.py [--folder runs/emoji_upsampler] [--steps 2500] [--batch 16]

It learns on random crops of 32×32 pixels, a quarter of the work, and is used on whole pictures. Needs no other weights,
and serves GLIDE and DALL·E 2 alike. Resumable: the same command goes on where it stopped. At the end network and
schedule go to diffusionbook/weights/emoji/upsampler.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from shared import options, report_unseen
from torch.utils.data import StackDataset

from diffusionbook.dalle2 import roughened
from diffusionbook.data import emoji, pick_device
from diffusionbook.denoising import Condition, Denoiser, diffusion_loss
from diffusionbook.glide import enlarge
from diffusionbook.samplers import dynamic_threshold, sample
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.training import balanced_weights, has_bf16, save_denoiser, train
from diffusionbook.unet import UNet, UNetConfig

SMALL, LARGE, CROP = 16, 64, 32
SCHEDULE = NoiseSchedule.cosine()


def crop(pictures: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """A square of each picture, from its own corner."""
    return torch.stack([p[:, y:y + CROP, x:x + CROP] for p, (y, x) in zip(pictures, corners.tolist(), strict=True)])


def loss(net: UNet, batch: dict, generator: torch.Generator) -> torch.Tensor:
    """Error of the velocity on a crop of each large picture, told the same crop of the small one."""
    corners = torch.randint(LARGE - CROP + 1, (len(batch["large"]), 2), generator=generator)
    told = crop(enlarge(roughened(batch["small"], generator, noise=0.1), (LARGE, LARGE)), corners)
    x0 = crop(batch["large"], corners)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    t = torch.randint(SCHEDULE.steps, (len(x0),), generator=generator).to(x0.device)
    return diffusion_loss(net, x0, noise, t, schedule=SCHEDULE, prediction="v", concat=told).mean()


def pictures(split: str, count: int | None = None) -> dict[str, torch.Tensor]:
    """The first pictures of a split in an order of chance, small and large."""
    sizes = {"small": emoji(split, size=SMALL), "large": emoji(split, size=LARGE)}
    order = torch.randperm(len(sizes["small"]), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return {name: data.images(order) for name, data in sizes.items()}


def report(net: UNet, both: dict[str, torch.Tensor]) -> dict[str, float]:
    """PSNR (dB) and mean absolute error of upsampled pictures in [-1, 1], and of bicubic ones, beside the real ones."""
    found = []
    for small in both["small"].split(32):
        told = Condition(concat=enlarge(small, (LARGE, LARGE)).to(net.device))
        denoise = dynamic_threshold(Denoiser(net, SCHEDULE, "v", told), limit=1)
        found.append(sample(denoise, (len(small), 3, LARGE, LARGE), sampler="ddim", steps=8, device=net.device,
                            progress=False).cpu())
    bicubic = F.interpolate(both["small"], size=(LARGE, LARGE), mode="bicubic", align_corners=False)
    numbers = {}
    for name, images in {"": torch.cat(found), "bicubic_": bicubic}.items():
        gap = images.clamp(-1, 1) - both["large"]
        numbers[f"{name}psnr"] = (10 * torch.log10(4 / gap.square().flatten(1).mean(1))).mean().item()
        numbers[f"{name}l1"] = gap.abs().mean().item()
    return numbers


def main(folder: Path, steps: int, batch: int, ship: Path) -> None:
    device = pick_device()
    data = emoji("train")
    everything = StackDataset(small=emoji("train", size=SMALL).images().to(device), large=data.images().to(device))
    some = pictures("validation", 32)
    torch.manual_seed(0)
    net = UNet(UNetConfig.preset("emoji-upsampler")).to(device)
    average = train(net, everything, loss, weights=balanced_weights([a["name"] for a in data.attributes]), batch=batch,
                    steps=steps, lr=1e-3 * (batch / 16) ** 0.5, warmup=200, ema=0.998, bf16=has_bf16(device),
                    folder=folder, every=500, evaluate=lambda: report(net, some))
    average.swap(net)
    save_denoiser(ship / "upsampler", Denoiser(net.eval(), SCHEDULE, "v"), dtype=torch.float16)
    report_unseen(lambda split: report(net, pictures(split, 64)))


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=2500, batch=16))
