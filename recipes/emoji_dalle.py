"""Train the miniature DALL·E on the emoji: a transformer over 32 tokens of caption and 8×8 codes.

    python recipes/emoji_dalle.py [--folder runs/emoji_dalle] [--steps 3000]

Needs the dVAE of recipes/emoji_dvae.py and the tokenizer that ships. Resumable: the same command goes on where it
stopped. At the end the weights go to diffusionbook/weights/emoji/dalle.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from shared import SHIPPED, UNSEEN, options, report_unseen
from torch.utils.data import StackDataset

from diffusionbook.dalle import DallE, DalleConfig, DalleTransformer
from diffusionbook.data import compose_caption, emoji, pick_device
from diffusionbook.dvae import DVAE
from diffusionbook.text import Tokenizer
from diffusionbook.training import balanced_weights, has_bf16, mean_loss, train

WITHOUT_STYLE = 0.2  # captions that leave the style out, so that "pizza" alone gives varied pictures
WITHOUT_CAPTION = 0.1  # empty captions: classifier-free guidance needs to know what no caption looks like


SHIFTS = ((0, 0), (3, 0), (-3, 0), (0, 3), (0, -3))  # in pixels: each gives other codes, and delays learning by heart


def shifted(images: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Pictures (N, 3, H, W) moved by some pixels; what comes in is white."""
    return F.pad(images, (right, -right, down, -down), value=1.0)


@torch.no_grad()
def encode(dvae: DVAE, images: torch.Tensor) -> torch.Tensor:
    """The codes of all images, row by row, computed once: (N, places)."""
    return torch.cat([dvae.encode(batch.to(dvae.device)) for batch in images.split(64)]).flatten(1)


def main(folder: Path, steps: int, ship: Path) -> None:
    device = pick_device()
    data = emoji("train")
    dvae = DVAE.from_pretrained(ship / "dvae").to(device)
    tokenizer = Tokenizer.from_pretrained(SHIPPED / "tokenizer")
    captions = {style: tokenizer([compose_caption(a["name"], tone=a["tone"], style=a["style"] if style else None)
                                  for a in data.attributes]) for style in (True, False)}
    codes = torch.stack([encode(dvae, shifted(data.images(), *by)) for by in SHIFTS], dim=1)  # (N, shifts, places)
    pictures = StackDataset(codes=codes, with_style=captions[True], without_style=captions[False])
    empty = tokenizer([""])[0]
    unseen = {split: StackDataset(codes=encode(dvae, other.images()), ids=tokenizer(other.captions))
              for split in UNSEEN for other in [emoji(split)]}
    torch.manual_seed(0)
    transformer = DalleTransformer(DalleConfig.preset("emoji")).to(device)

    def loss(transformer: DalleTransformer, batch: dict, generator: torch.Generator):
        """Move the pictures, leave the style out of some captions and leave some captions empty."""
        by = torch.randint(len(SHIFTS), (len(batch["codes"]),), generator=generator)
        codes = batch["codes"][torch.arange(len(by)), by]
        chance = torch.rand(2, len(batch["codes"]), 1, generator=generator).to(device)
        ids = torch.where(chance[0] < WITHOUT_STYLE, batch["without_style"], batch["with_style"])
        ids = torch.where(chance[1] < WITHOUT_CAPTION, empty.to(device), ids)
        return transformer.loss(ids, codes)

    def unseen_error(split: str) -> float:
        """Nats per code of a split's pictures, given their captions."""
        return mean_loss(transformer, unseen[split],
                         lambda net, batch, generator: net.loss(batch["ids"], batch["codes"])[1]["picture"])

    average = train(transformer, pictures, loss, weights=balanced_weights([a["name"] for a in data.attributes]),
                    steps=steps, lr=1.5e-3, warmup=200, weight_decay=0.05, batch=32, ema=0.995, folder=folder,
                    every=250, bf16=has_bf16(device), evaluate=lambda: {"validation": unseen_error("validation")})
    average.swap(transformer)
    transformer.save_pretrained(ship / "dalle", dtype=torch.float16)
    DallE(dvae=dvae, transformer=transformer, tokenizer=tokenizer)  # raises if they don't belong together
    report_unseen(lambda split: {"nats per code": unseen_error(split)})


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=3000))
