"""Train the miniature dVAE on the emoji: 64×64 pixels → 8×8 tiles of 512 kinds.

    python recipes/emoji_dvae.py [--folder runs/emoji_dvae] [--steps 1600]

It is trained as a VQ, which is a dVAE that chooses by distance: in tries of 250 steps softened draws stayed with fewer
than ten codes. In the first fifth nothing is quantised, so that encoder and decoder know pictures before they must do
with codes; the error is the square of the pixels', and the network sees crops of 32×32. Resumable: the same command
goes on where it stopped. At the end the weights go to diffusionbook/weights/emoji/dvae.
"""

from pathlib import Path

import torch
from shared import UNSEEN, options, report_unseen
from torch import Tensor, nn

from diffusionbook.data import emoji, pick_device
from diffusionbook.dvae import VQ, DVAEConfig, map_pixels, perplexity
from diffusionbook.training import balanced_weights, has_bf16, train

CROP = 32
FREE = 0.2  # the share of the steps without a codebook


class Learner(nn.Module):
    """A `VQ` while it is trained: it counts its steps, and at first it passes on features instead of codes."""

    def __init__(self, vq: VQ, *, steps: int):
        super().__init__()
        self.vq, self.free = vq, int(FREE * steps)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def loss(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict]:
        """Mean squared error of crops of pictures (B, 3, H, W), plus the commitment to the codes."""
        corner = torch.randint((images.shape[-1] - CROP) // self.vq.factor + 1, (2,), generator=generator)
        y, x = (self.vq.factor * corner).tolist()
        images = images[..., y:y + CROP, x:x + CROP]
        if self.step < self.free:
            output, commitment = self.vq.decoder(self.vq.features(images)), torch.zeros((), device=images.device)
        else:
            output, commitment = self.vq(images, generator)
        self.step += self.training
        error = (output[:, :3].sigmoid() - map_pixels(images)).square().mean()
        return 40 * error + 0.25 * commitment, {"commitment": commitment.item()}


@torch.no_grad()
def report(vq: VQ, images: Tensor) -> dict[str, float]:
    """Mean PSNR in dB of pictures restored from their codes, and how many codes are in use."""
    codes = torch.cat([vq.encode(batch) for batch in images.split(64)])
    errors = torch.cat([(vq.decode(c) - x).square().flatten(1).mean(1)
                        for c, x in zip(codes.split(64), images.split(64), strict=True)])
    return {"psnr": (10 * torch.log10(4 / errors)).mean().item(), "perplexity": perplexity(codes, vq.config.codes)}


def main(folder: Path, steps: int, ship: Path) -> None:
    device = pick_device()
    data = emoji("train")
    unseen = {split: emoji(split).images().to(device) for split in UNSEEN}
    torch.manual_seed(0)
    net = Learner(VQ(DVAEConfig.preset("emoji")), steps=steps).to(device)
    average = train(net, data.images().to(device), Learner.loss, steps=steps, lr=3e-3, warmup=50, weight_decay=0.0,
                    batch=32, ema=0.995, weights=balanced_weights([a["name"] for a in data.attributes]), folder=folder,
                    bf16=has_bf16(device), evaluate=lambda: report(net.vq, unseen["validation"][:128]))
    average.swap(net)
    net.vq.as_dvae().save_pretrained(ship / "dvae", dtype=torch.float16)
    report_unseen(lambda split: report(net.vq, unseen[split]))


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=1600))
