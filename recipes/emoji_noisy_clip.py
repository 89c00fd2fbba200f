"""Train an image tower that reads noisy pictures of 16×16 pixels, beside the miniature CLIP's text tower.

    python recipes/emoji_noisy_clip.py [--folder runs/emoji_noisy_clip] [--steps 4000] [--batch 128]

It is what guidance by CLIP asks (chapter 15). Needs the CLIP of recipes/emoji_clip.py, whose texts stay as they are.
Resumable: the same command goes on where it stopped. At the end the tower goes to diffusionbook/weights/emoji.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_decoder import SCHEDULE, SIDE
from emoji_prior import Captions, load_clip, two_captions
from shared import UNSEEN, options, report_unseen
from torch.utils.data import StackDataset

from diffusionbook.clip import contrastive_loss
from diffusionbook.data import emoji, pick_device
from diffusionbook.glide import NoisyImageConfig, NoisyImageEncoder
from diffusionbook.training import balanced_weights, generator_for, has_bf16, train

WITHOUT_STYLE = 0.2  # captions that leave the style out
LEVELS = (0, 250, 500, 750)  # times at which unseen pictures are asked about


def noised(x0: torch.Tensor, t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return SCHEDULE.add_noise(x0, torch.randn(x0.shape, generator=generator).to(x0), t)


def main(folder: Path, steps: int, batch: int, ship: Path) -> dict:
    device = pick_device()
    clip = load_clip(device).eval()
    data, unseen = emoji("train"), {split: emoji(split) for split in UNSEEN}
    both = two_captions(data.attributes)
    captions = Captions(clip, [*both[0], *both[1], *(c for part in unseen.values() for c in part.captions)])
    texts = F.normalize(captions.parts["embedding"], dim=1)  # (captions, D)
    pictures = StackDataset(x0=emoji("train", size=SIDE).images().to(device),
                            with_style=captions.number(both[0]).to(device),
                            without_style=captions.number(both[1]).to(device))
    others = {split: (emoji(split, size=SIDE).images().to(device), captions.number(part.captions).to(device))
              for split, part in unseen.items()}
    torch.manual_seed(0)
    tower = NoisyImageEncoder(NoisyImageConfig.preset("emoji")).to(device)

    def loss(tower: NoisyImageEncoder, batch: dict, generator: torch.Generator) -> torch.Tensor:
        """Whose caption is whose? A caption is also right for every other picture that it describes."""
        short = (torch.rand(len(batch["x0"]), generator=generator) < WITHOUT_STYLE).to(device)
        told = torch.where(short, batch["without_style"], batch["with_style"])
        right = (batch["with_style"][:, None] == told) | (batch["without_style"][:, None] == told)
        t = torch.randint(SCHEDULE.steps, (len(told),), generator=generator).to(device)
        found = tower(noised(batch["x0"], t, generator), t)
        return contrastive_loss(found, texts[told], clip.logit_scale.detach(), right=right)

    @torch.no_grad()
    def among_five(split: str) -> dict[str, float]:
        """How often a picture's own caption is among the five nearest of its split, at several noise levels."""
        x0, numbers = others[split]
        kinds = numbers.unique()
        shares = {}
        for level in LEVELS:
            t = torch.full((len(x0),), level, device=device)
            near = F.normalize(tower(noised(x0, t, generator_for(1, level)), t), dim=1) @ texts[kinds].T
            found = kinds[near.topk(5, dim=1).indices] == numbers[:, None]
            shares[f"in 5 at {level}"] = found.any(1).float().mean().item()
        return shares

    average = train(tower, pictures, loss, weights=balanced_weights([a["name"] for a in data.attributes]), steps=steps,
                    lr=1e-3, warmup=200, weight_decay=0.1, ema=0.998, batch=batch, bf16=has_bf16(device), folder=folder,
                    every=400, evaluate=lambda: among_five("validation"))
    average.swap(tower)
    tower.eval().save_pretrained(ship / "noisy_clip", dtype=torch.float16)
    return report_unseen(among_five)


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=4000, batch=128))
