"""Train the decoder that GLIDE and DALL·E 2 share in miniature: to 16×16 pixels from an embedding, a caption, or both.

    python recipes/emoji_decoder.py [--folder runs/emoji_decoder] [--steps 4000] [--batch 32]

The image embedding is left out a part of the time: without it the same network is GLIDE's. At other times a part of the
picture is shown, and the network learns to paint the rest. Needs the CLIP of recipes/emoji_clip.py. Resumable: the same
command goes on where it stopped. At the end decoder, text projection and schedule go to diffusionbook/weights/emoji.
"""

from pathlib import Path

import torch
from emoji_prior import Captions, choose_captions, load_clip, look, two_captions
from shared import UNSEEN, options, report_unseen
from torch import nn
from torch.utils.data import StackDataset

from diffusionbook.clip import CLIP
from diffusionbook.dalle2 import TextProjection, TextProjectionConfig, save_scheduler
from diffusionbook.data import emoji, pick_device
from diffusionbook.denoising import Denoiser, diffusion_loss
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.training import balanced_weights, has_bf16, mean_loss, train
from diffusionbook.unet import UNet, UNetConfig

SIDE = 16
WITHOUT_IMAGE = 0.3  # no image embedding: guidance needs it, and GLIDE is nothing else
WITH_A_PART = 0.25  # a part of the picture is shown, for inpainting
SCHEDULE = NoiseSchedule.cosine()


def shown(x0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What is shown of pictures (B, 3, H, W): the known part and where it is, (B, 4, H, W); mostly nothing.

    Unknown is a rectangle of at least a quarter of height and width.
    """
    count, side = len(x0), x0.shape[-1]
    draw = torch.rand(5, count, 1, 1, generator=generator)
    size = 0.25 + 0.75 * draw[:2]
    first = (1 - size) * draw[2:4] * side
    y, x = torch.arange(side).view(1, -1, 1), torch.arange(side).view(1, 1, -1)
    hole = (y >= first[0]) & (y < first[0] + size[0] * side) & (x >= first[1]) & (x < first[1] + size[1] * side)
    kept = (~hole & (draw[4] < WITH_A_PART))[:, None].to(x0)  # (B, 1, H, W)
    return torch.cat([x0 * kept, kept], dim=1)


def error(networks: nn.ModuleDict, x0, image, told, concat, generator: torch.Generator) -> torch.Tensor:
    """Mean loss of the velocity, and of the learned variance, at random noise and times."""
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    t = torch.randint(SCHEDULE.steps, (len(x0),), generator=generator).to(x0.device)
    told = networks["text_proj"](image, told).parts()
    return diffusion_loss(networks["decoder"], x0, noise, t, schedule=SCHEDULE, prediction="v", concat=concat,
                          **told).mean()


def main(folder: Path, steps: int, batch: int, ship: Path, clip: CLIP | None = None) -> dict:
    device = pick_device()
    clip = (clip or load_clip(device)).eval()
    data, unseen = emoji("train"), {split: emoji(split) for split in UNSEEN}
    with_style, without_style = two_captions(data.attributes)
    captions = Captions(clip, [*with_style, *without_style, *(c for part in unseen.values() for c in part.captions)])
    pictures = StackDataset(x0=emoji("train", size=SIDE).images().to(device), image=look(clip, data.images()),
                            with_style=captions.number(with_style), without_style=captions.number(without_style))
    others = {split: StackDataset(x0=emoji(split, size=SIDE).images(), image=look(clip, part.images()).cpu(),
                                  number=captions.number(part.captions)) for split, part in unseen.items()}

    torch.manual_seed(0)
    networks = nn.ModuleDict({
        "decoder": UNet(UNetConfig.preset("emoji-decoder")),
        "text_proj": TextProjection(TextProjectionConfig.preset("emoji")),
    }).to(device)

    def loss(networks: nn.ModuleDict, batch: dict, generator: torch.Generator) -> torch.Tensor:
        numbers = choose_captions(batch, generator)
        dropped = (torch.rand(len(numbers), 1, generator=generator) < WITHOUT_IMAGE).to(device)
        image = torch.where(dropped, networks["text_proj"].nothing, batch["image"])
        return error(networks, batch["x0"], image, captions.told(numbers), shown(batch["x0"], generator), generator)

    def unseen_error(split: str, *, with_image: bool = True) -> float:
        """The error where nothing of the picture is shown, with CLIP's embedding of the real picture or without."""
        def of(networks, batch, generator):
            nothing = torch.zeros(len(batch["x0"]), 4, SIDE, SIDE).to(batch["x0"])
            image = batch["image"] if with_image else None
            return error(networks, batch["x0"], image, captions.told(batch["number"]), nothing, generator)
        return mean_loss(networks, others[split], of, seed=1)

    def evaluate() -> dict[str, float]:
        return {"validation_loss": unseen_error("validation"),
                "validation_loss_caption_only": unseen_error("validation", with_image=False)}

    average = train(networks, pictures, loss, weights=balanced_weights([a["name"] for a in data.attributes]),
                    steps=steps, lr=8e-4 * (batch / 32) ** 0.5, warmup=200, ema=0.998, batch=batch,
                    bf16=has_bf16(device), folder=folder, every=400, evaluate=evaluate)
    average.swap(networks)
    networks.eval()
    for name, network in networks.items():
        network.save_pretrained(ship / name, dtype=torch.float16)
    save_scheduler(ship / "decoder_scheduler", Denoiser(networks["decoder"], SCHEDULE, "v"))
    return report_unseen(lambda split: {"with embedding": unseen_error(split),
                                        "caption only": unseen_error(split, with_image=False)})


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=4000, batch=32))
