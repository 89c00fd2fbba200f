"""Train the miniature Stable Diffusion on the emoji: the latent U-Net, told by the frozen miniature CLIP.

    python recipes/emoji_stable_diffusion.py [--folder runs/emoji_stable_diffusion] [--steps 7000] [--batch 256]
                                             [--device cuda]

Needs the VAE of recipes/emoji_vae.py and the CLIP of recipes/emoji_clip.py; neither takes part in the training, so
pictures and captions are encoded once. Resumable: the same command goes on where it stopped. At the end the whole
pipeline lies in the run's folder as `pipeline`, as diffusers' StableDiffusionPipeline reads it, and its U-Net,
schedule go to diffusionbook/weights/emoji (or to `--ship`), where VAE and CLIP lie. On two CPU cores take
`--steps 11000 --batch 64`.

An object has two or three pictures only, a person has dozens. What is done about it: objects are drawn more often than
their number of pictures asks for; each picture is seen in several places and sizes; words come from CLIP, in which
"pizza" is near "sandwich"; dropout; and min-SNR weights, which spend less on noise levels with little left to learn.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from shared import SHIPPED, UNSEEN, options
from torch import nn
from torch.utils.data import StackDataset

from diffusionbook.autoencoders import VAE
from diffusionbook.clip import CLIP, CLIPConfig
from diffusionbook.data import compose_caption, emoji
from diffusionbook.denoising import diffusion_loss, min_snr
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.text import TextEncoder, Tokenizer
from diffusionbook.training import balanced_weights, generator_for, has_bf16, mean_loss, train
from diffusionbook.unet import UNet, UNetConfig

WITHOUT_STYLE = 0.2  # captions that leave the style out, so that "pizza" alone gives varied pictures
WITHOUT_CAPTION = 0.1  # empty captions: classifier-free guidance needs to know what no caption looks like
VIEWS = 8  # how often each picture is encoded: as it is, and moved and scaled a little
DROPOUT = 0.15
SCHEDULE = NoiseSchedule.cosine()


def moved(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Scale and shift pictures (B, 3, 64, 64) by up to 8 %, each in its own way; what comes in is white."""
    scale = 1 + 0.08 * (2 * torch.rand(len(images), generator=generator) - 1)
    turn = torch.zeros(len(images), 2, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = scale
    turn[:, :, 2] = 0.16 * torch.rand(len(images), 2, generator=generator) - 0.08
    grid = F.affine_grid(turn.to(images), list(images.shape), align_corners=False)
    return (F.grid_sample(images - 1, grid, align_corners=False) + 1).clamp(-1, 1)


@torch.no_grad()
def encode(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents of all images."""
    clouds = [vae.encode(batch.to(vae.device)) for batch in images.split(64)]
    return torch.cat([c.mean for c in clouds]), torch.cat([torch.exp(c.logvar / 2) for c in clouds])


class Words:
    """The vectors of many captions, each caption encoded once: `rows` numbers captions, `table` (N, M, width)."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.numbers = tokenizer, {"": 0}

    def rows(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([self.numbers.setdefault(caption, len(self.numbers)) for caption in captions])

    @torch.no_grad()
    def table(self, encoder: TextEncoder) -> torch.Tensor:
        ids = self.tokenizer(list(self.numbers)).to(encoder.device)
        return torch.cat([encoder(part) for part in ids.split(256)])


def velocity_error(unet: UNet, x0, context, generator: torch.Generator, weight=None) -> torch.Tensor:
    """Mean squared error of the velocity at random noise and times, for latents with the vectors of captions."""
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    t = torch.randint(SCHEDULE.steps, (len(x0),), generator=generator).to(x0.device)
    return diffusion_loss(unet, x0, noise, t, schedule=SCHEDULE, prediction="v", weight=weight, context=context).mean()


class Ordered(nn.Module):
    """A U-Net that takes what it is given in order, as CUDA graphs want it."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, context=context)


def recorded(unet: UNet, batch: int) -> Callable:
    """The U-Net, on a GPU as CUDA graphs: its maps are so small that kernels take longer to start than to run."""
    if unet.device.type != "cuda":
        return unet
    c = unet.config
    samples = (torch.randn(batch, c.in_channels, c.sample_size, c.sample_size, device=unet.device),
               torch.zeros(batch, dtype=torch.int64, device=unet.device),
               torch.randn(batch, CLIPConfig.preset("emoji").text.context_length, c.context_width, device=unet.device))
    with torch.autocast("cuda", torch.bfloat16, enabled=has_bf16(unet.device), cache_enabled=False):
        graphs = torch.cuda.make_graphed_callables(Ordered(unet), samples)
    return lambda x, t, *, context: graphs(x, t, context)


def main(folder: Path, steps: int, batch: int, device: torch.device, ship: Path, limit: int | None = None) -> None:
    data = emoji("train")
    vae = VAE.from_pretrained(SHIPPED / "vae").to(device)
    clip = CLIP.from_pretrained(SHIPPED / "clip").to(device)
    images, attributes = data.images(range(limit) if limit else None).to(device), data.attributes[:limit]
    views = [images, *(torch.cat([moved(part, generator_for(view, i)) for i, part in enumerate(images.split(256))])
                       for view in range(1, VIEWS))]
    mean, deviation = (torch.stack(parts, dim=1) for parts in zip(*(encode(vae, v) for v in views), strict=True))
    words = Words(clip.tokenizer)
    with_style, without_style = (
        words.rows([compose_caption(a["name"], tone=a["tone"], style=a["style"] if style else None)
                    for a in attributes]) for style in (True, False))
    pictures = StackDataset(mean=mean, deviation=deviation, with_style=with_style, without_style=without_style)
    unseen = {split: (encode(vae, other.images(range(limit) if limit else None))[0].cpu(),
                      words.rows(other.captions[:limit])) for split in UNSEEN for other in [emoji(split)]}
    table = words.table(clip.text_model)
    unseen = {split: StackDataset(x0=x0, rows=rows) for split, (x0, rows) in unseen.items()}

    torch.manual_seed(0)
    unet = UNet(replace(UNetConfig.preset("emoji-latent"), dropout=DROPOUT)).to(device)
    network = recorded(unet, batch)

    def loss(_, batch: dict, generator: torch.Generator) -> torch.Tensor:
        """Of a view and a latent drawn from its cloud; some captions are told without their style, some not at all."""
        count = len(batch["mean"])
        chance = torch.rand(3, count, generator=generator)
        view = torch.where(chance[2] < 0.5, 0, 1 + (2 * (chance[2] - 0.5) * (VIEWS - 1)).long()).clamp(max=VIEWS - 1)
        index = torch.arange(count, device=device), view.to(device)
        noise = torch.randn(batch["mean"][:, 0].shape, generator=generator).to(device)
        x0 = batch["mean"][index] + batch["deviation"][index] * noise
        rows = torch.where((chance[0] < WITHOUT_STYLE).to(device), batch["without_style"], batch["with_style"])
        rows = torch.where((chance[1] < WITHOUT_CAPTION).to(device), 0, rows)
        return velocity_error(network, x0, table[rows], generator, partial(min_snr, gamma=5.0))

    def unseen_error(split: str) -> float:
        return mean_loss(unet, unseen[split], lambda unet, batch, generator: velocity_error(
            unet, batch["x0"], table[batch["rows"]], generator), batch=256, seed=1, bf16=has_bf16(device))

    train(unet, pictures, loss, weights=balanced_weights([a["name"] for a in attributes]), batch=batch, steps=steps,
          lr=8e-4, warmup=200, ema=0.9995, weight_decay=0.02, bf16=has_bf16(device), every=500,
          folder=folder, evaluate=lambda: {split: unseen_error(split) for split in UNSEEN}).swap(unet)
    StableDiffusion(vae=vae, unet=unet, text_encoder=clip.text_model, tokenizer=clip.tokenizer, schedule=SCHEDULE,
                    prediction="v").save_pretrained(folder / "pipeline", dtype=torch.float16)
    for part in ("unet", "scheduler"):
        shutil.copytree(folder / "pipeline" / part, ship / part, dirs_exist_ok=True)
    for split in UNSEEN:
        print(f"{split}: {unseen_error(split):.3f}")


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=7_000, batch=256, trial=True))
