"""Train the miniature Stable Diffusion on the emoji: text encoder and latent U-Net together, the VAE frozen.

    python recipes/emoji_stable_diffusion.py [--folder runs/emoji_stable_diffusion] [--steps 3400]

Needs the VAE of recipes/emoji_vae.py. Resumable: the same command goes on where it stopped. At the end the whole
pipeline goes to diffusionbook/weights/emoji.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from diffusionbook.autoencoders import VAE
from diffusionbook.data import compose_caption, emoji, pick_device
from diffusionbook.denoising import diffusion_loss
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.text import TextConfig, TextEncoder, train_bpe
from diffusionbook.training import fit
from diffusionbook.unet import UNet, UNetConfig

BATCH = 64
WITHOUT_STYLE = 0.2  # captions that leave the style out, so that "pizza" alone gives varied pictures
WITHOUT_CAPTION = 0.1  # empty captions: classifier-free guidance needs to know what no caption looks like
SCHEDULE = NoiseSchedule.cosine()
UNSEEN = ("validation", "object_style", "tone_style")
SHIPPED = Path(__file__).parent.parent / "diffusionbook" / "weights" / "emoji"


def balanced_weights(names: list[str]) -> torch.Tensor:
    """Weigh pictures so that a name with 18 pictures comes up √6 times as often as one with 3, not 6 times."""
    count = Counter(names)
    return torch.tensor([count[name] ** -0.5 for name in names])


class Captions:
    """All pictures' captions as token ids: with style, without style, and the empty one."""

    def __init__(self, data, tokenizer):
        with_style = [compose_caption(a["name"], tone=a["tone"], style=a["style"]) for a in data.attributes]
        without = [compose_caption(a["name"], tone=a["tone"]) for a in data.attributes]
        self.ids = torch.stack([tokenizer(with_style), tokenizer(without)])  # (2, pictures, length)
        self.empty = tokenizer([""])[0]

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Captions of the pictures at `index`, some without style, some empty: (B, length)."""
        chance = torch.rand(2, len(index), generator=generator)
        ids = self.ids[(chance[0] < WITHOUT_STYLE).long(), index]
        return torch.where((chance[1] < WITHOUT_CAPTION)[:, None], self.empty, ids)


@torch.no_grad()
def encode(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents of all images, computed once: the VAE takes no part in training."""
    clouds = [vae.encode(batch) for batch in images.split(64)]
    return torch.cat([c.mean for c in clouds]), torch.cat([torch.exp(c.logvar / 2) for c in clouds])


def errors(networks, x0, ids, generator: torch.Generator) -> torch.Tensor:
    """Squared error of the velocity at random noise and times, per latent: (B,)."""
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    t = torch.randint(SCHEDULE.steps, (len(x0),), generator=generator).to(x0.device)
    with torch.autocast(x0.device.type, torch.bfloat16):
        context = networks["text_encoder"](ids)
        return diffusion_loss(networks["unet"], x0, noise, t, schedule=SCHEDULE, prediction="v", context=context)


@torch.no_grad()
def unseen_error(networks, x0, ids) -> float:
    """Mean error over pictures that took no part in training, with the same noise and times at every call."""
    generator = torch.Generator().manual_seed(1)
    parts = zip(x0.split(BATCH), ids.split(BATCH), strict=True)
    return torch.cat([errors(networks, *part, generator) for part in parts]).mean().item()


def train(folder: Path, steps: int) -> None:
    device = pick_device()
    data = emoji("train")
    vae = VAE.from_pretrained(SHIPPED / "vae").to(device)
    mean, std = encode(vae, data.images().to(device))
    text_config = TextConfig.preset("emoji")
    tokenizer = train_bpe(data.captions, text_config.vocab_size, pad="eos", context_length=text_config.context_length)
    captions = Captions(data, tokenizer)
    weights = balanced_weights([a["name"] for a in data.attributes])
    unseen = {split: (encode(vae, other.images().to(device))[0], tokenizer(other.captions).to(device))
              for split in UNSEEN for other in [emoji(split)]}

    torch.manual_seed(0)
    networks = nn.ModuleDict({
        "text_encoder": TextEncoder(text_config),
        "unet": UNet(UNetConfig.preset("emoji-latent")),
    }).to(device)

    def loss(generator: torch.Generator):
        index = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        x0 = mean[index] + std[index] * torch.randn(BATCH, *mean.shape[1:], generator=generator).to(device)
        return errors(networks, x0, captions.draw(index, generator).to(device), generator).mean()

    average = fit(networks, loss, steps=steps, lr=8e-4, folder=folder, ema=0.998, every=200, warmup=200,
                  evaluate=lambda: {"validation_loss": unseen_error(networks, *unseen["validation"])})
    average.swap(networks)
    networks.eval()
    StableDiffusion(vae=vae, unet=networks["unet"], text_encoder=networks["text_encoder"], tokenizer=tokenizer,
                    schedule=SCHEDULE, prediction="v").save_pretrained(SHIPPED, dtype=torch.float16)
    for split in UNSEEN:
        print(f"{split}: {unseen_error(networks, *unseen[split]):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji_stable_diffusion"))
    parser.add_argument("--steps", type=int, default=3400)
    given = parser.parse_args()
    train(given.folder, given.steps)
