"""Train the miniature dVAE on the emoji: 64×64 pixels → 16×16 tiles of 1,024 kinds.

    python recipes/emoji_dvae.py [--folder runs/emoji_dvae] [--steps 4000] [--ship diffusionbook/weights/emoji]

Resumable: the same command goes on where it stopped. At the end the weights go to OUT/dvae.
"""

from pathlib import Path

import torch
from shared import options

from diffusionbook.data import emoji, pick_device
from diffusionbook.dvae import DVAE, Annealed, DVAEConfig, perplexity
from diffusionbook.training import balanced_weights, train

BATCH = 32
KL_WEIGHT = 0.1  # of the bound's: enough to spread the codes, too little to blur them


@torch.no_grad()
def report(dvae: DVAE, images: torch.Tensor) -> dict[str, float]:
    """Mean PSNR in dB of pictures restored from their hard codes, and how many codes are in use."""
    errors, codes = [], []
    for batch in images.split(BATCH):
        codes.append(dvae.encode(batch))
        errors.append((dvae.decode(codes[-1]) - batch).square().flatten(1).mean(1))
    return {"psnr": (10 * torch.log10(4 / torch.cat(errors))).mean().item(),
            "perplexity": perplexity(torch.cat(codes), dvae.config.codes)}


def main(folder: Path, steps: int, ship: Path) -> None:
    device = pick_device()
    data = emoji("train")
    unseen = emoji("validation").images().to(device)
    torch.manual_seed(0)
    net = Annealed(DVAE(DVAEConfig.preset("emoji")), steps=steps, kl_weight=KL_WEIGHT).to(device)
    average = train(net, data.images().to(device), Annealed.loss, steps=steps, lr=1e-3, batch=BATCH, ema=0.998,
                    weights=balanced_weights([a["name"] for a in data.attributes]), folder=folder,
                    bf16=device.type == "cuda", evaluate=lambda: report(net.dvae, unseen))
    average.swap(net)
    net.dvae.save_pretrained(ship / "dvae", dtype=torch.float16)
    for split in ("validation", "object_style", "tone_style"):
        print(split, report(net.dvae, emoji(split).images().to(device)))


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=4000))
