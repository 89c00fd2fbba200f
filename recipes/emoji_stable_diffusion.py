"""Train the miniature Stable Diffusion on the emoji: text encoder and latent U-Net together, the VAE frozen.

    python recipes/emoji_stable_diffusion.py [--folder runs/emoji_stable_diffusion] [--steps 11000]

Needs the VAE of recipes/emoji_vae.py. Resumable: the same command goes on where it stopped. At the end the whole
pipeline goes to diffusionbook/weights/emoji.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import StackDataset

from diffusionbook.autoencoders import VAE
from diffusionbook.data import compose_caption, emoji, pick_device
from diffusionbook.denoising import diffusion_loss
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.text import TextConfig, TextEncoder, train_bpe
from diffusionbook.training import balanced_weights, has_bf16, mean_loss, train
from diffusionbook.unet import UNet, UNetConfig

WITHOUT_STYLE = 0.2  # captions that leave the style out, so that "pizza" alone gives varied pictures
WITHOUT_CAPTION = 0.1  # empty captions: classifier-free guidance needs to know what no caption looks like
SCHEDULE = NoiseSchedule.cosine()
UNSEEN = ("validation", "object_style", "tone_style")
SHIPPED = Path(__file__).parent.parent / "diffusionbook" / "weights" / "emoji"


@torch.no_grad()
def encode(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents of all images, computed once: the VAE takes no part in training."""
    clouds = [vae.encode(batch) for batch in images.split(64)]
    return torch.cat([c.mean for c in clouds]), torch.cat([torch.exp(c.logvar / 2) for c in clouds])


def velocity_error(networks: nn.ModuleDict, x0, ids, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity at random noise and times, for latents with captions."""
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    t = torch.randint(SCHEDULE.steps, (len(x0),), generator=generator).to(x0.device)
    context = networks["text_encoder"](ids)
    unet = networks["unet"]
    return diffusion_loss(unet, x0, noise, t, schedule=SCHEDULE, prediction="v", context=context).mean()


def main(folder: Path, steps: int) -> None:
    device = pick_device()
    data = emoji("train")
    vae = VAE.from_pretrained(SHIPPED / "vae").to(device)
    mean, deviation = encode(vae, data.images().to(device))
    text_config = TextConfig.preset("emoji")
    tokenizer = train_bpe(data.captions, text_config.vocab_size, pad="eos", context_length=text_config.context_length)
    without_style = [compose_caption(a["name"], tone=a["tone"]) for a in data.attributes]
    with_style = [compose_caption(a["name"], tone=a["tone"], style=a["style"]) for a in data.attributes]
    pictures = StackDataset(mean=mean, deviation=deviation, with_style=tokenizer(with_style),
                            without_style=tokenizer(without_style))
    empty = tokenizer([""])[0]
    unseen = {split: StackDataset(x0=encode(vae, other.images().to(device))[0], ids=tokenizer(other.captions))
              for split in UNSEEN for other in [emoji(split)]}

    torch.manual_seed(0)
    networks = nn.ModuleDict({
        "text_encoder": TextEncoder(text_config),
        "unet": UNet(UNetConfig.preset("emoji-latent")),
    }).to(device)

    def loss(networks: nn.ModuleDict, batch: dict, generator: torch.Generator) -> torch.Tensor:
        """Draw latents from their clouds; leave the style out of some captions and leave some captions empty."""
        noise = torch.randn(batch["mean"].shape, generator=generator).to(device)
        chance = torch.rand(2, len(noise), 1, generator=generator).to(device)
        ids = torch.where(chance[0] < WITHOUT_STYLE, batch["without_style"], batch["with_style"])
        ids = torch.where(chance[1] < WITHOUT_CAPTION, empty.to(device), ids)
        return velocity_error(networks, batch["mean"] + batch["deviation"] * noise, ids, generator)

    def unseen_error(split: str) -> float:
        return mean_loss(networks, unseen[split], lambda networks, batch, generator: velocity_error(
            networks, **batch, generator=generator), seed=1, bf16=has_bf16(device))

    average = train(networks, pictures, loss, weights=balanced_weights([a["name"] for a in data.attributes]),
                    steps=steps, lr=8e-4, warmup=200, ema=0.998, bf16=has_bf16(device), folder=folder,
                    evaluate=lambda: {"validation_loss": unseen_error("validation")})
    average.swap(networks)
    StableDiffusion(vae=vae, unet=networks["unet"], text_encoder=networks["text_encoder"], tokenizer=tokenizer,
                    schedule=SCHEDULE, prediction="v").save_pretrained(SHIPPED, dtype=torch.float16)
    for split in UNSEEN:
        print(f"{split}: {unseen_error(split):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/emoji_stable_diffusion"))
    parser.add_argument("--steps", type=int, default=11000)
    given = parser.parse_args()
    main(given.folder, given.steps)
