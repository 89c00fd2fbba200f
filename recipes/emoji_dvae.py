"""Train the miniature dVAE on the emoji: 64×64 pixels → 8×8 tiles of 512 kinds.

    python recipes/emoji_dvae.py [--folder runs/emoji_dvae] [--steps 1600]
    python recipes/emoji_dvae.py --softened --folder runs/emoji_dvae_softened    # to compare; nothing is shipped

It is trained as a VQ, which is a dVAE that chooses by distance. With `--softened` the same networks learn by softened
draws instead (Gumbel-softmax), from the same crops in the same number of steps. In the first fifth nothing is drawn or
quantised, so that encoder and decoder know pictures before they must do with codes; the error is the square of the
pixels', and the network sees crops of 32×32. Resumable: the same command goes on where it stopped. At the end the
weights go to diffusionbook/weights/emoji/dvae.
"""

import math
from pathlib import Path

import torch
from shared import UNSEEN, options, report_unseen
from torch import Tensor, nn

from diffusionbook.data import emoji, pick_device
from diffusionbook.dvae import DVAE, VQ, DVAEConfig, gumbel_noise, map_pixels, perplexity, uniform_kl
from diffusionbook.training import balanced_weights, has_bf16, train

CROP = 32
FREE = 0.2  # the share of the steps without a choice
COLDEST = 1 / 16  # the temperature of the last softened draws
SPREAD = 1e-3  # how much the KL to the even prior counts, in nats a place, for softened draws


class Learner(nn.Module):
    """A `VQ` while it is trained: it counts its steps, and at first it passes on features instead of codes."""

    def __init__(self, model: VQ | DVAE, *, steps: int):
        super().__init__()
        self.model, self.steps, self.free = model, steps, int(FREE * steps)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def loss(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict]:
        """Mean squared error of crops of pictures (B, 3, H, W), and what the choice of codes costs."""
        corner = torch.randint((images.shape[-1] - CROP) // self.model.factor + 1, (2,), generator=generator)
        y, x = (self.model.factor * corner).tolist()
        images = images[..., y:y + CROP, x:x + CROP]
        output, cost, seen = self.restore(images, generator)
        self.step += self.training
        return 40 * (output[:, :3].sigmoid() - map_pixels(images)).square().mean() + cost, seen

    def restore(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | float, dict]:
        """The decoder's output, what is added to the error, and what the log keeps of it."""
        if self.step < self.free:
            return self.model.decoder(self.model.features(images)), 0.0, {"commitment": 0.0}
        output, commitment = self.model(images, generator)
        return output, 0.25 * commitment, {"commitment": commitment.item()}


class Softened(Learner):
    """A `DVAE` while it is trained: at first it passes on its chances, then draws that get colder."""

    def restore(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | float, dict]:
        model, side = self.model, CROP // self.model.factor
        share = max(0.0, (self.step.item() - self.free) / max(1, self.steps - self.free))
        temperature = COLDEST + (1 - COLDEST) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
        noise = torch.zeros(len(images), model.config.codes, side, side)
        if self.step >= self.free:
            noise = gumbel_noise(noise.shape, generator)
        output, log_probs = model(images, noise, temperature=temperature)
        kl = uniform_kl(log_probs).mean() / side**2
        return output, SPREAD * kl, {"kl": kl.item(), "temperature": temperature}


@torch.no_grad()
def report(model: VQ | DVAE, images: Tensor) -> dict[str, float]:
    """Mean PSNR in dB of pictures restored from their codes, and how many codes are in use."""
    codes = torch.cat([model.encode(batch) for batch in images.split(64)])
    errors = torch.cat([(model.decode(c) - x).square().flatten(1).mean(1)
                        for c, x in zip(codes.split(64), images.split(64), strict=True)])
    return {"psnr": (10 * torch.log10(4 / errors)).mean().item(), "perplexity": perplexity(codes, model.config.codes)}


def main(folder: Path, steps: int, ship: Path, softened: bool) -> None:
    device = pick_device()
    data = emoji("train")
    unseen = {split: emoji(split).images().to(device) for split in UNSEEN}
    torch.manual_seed(0)
    config = DVAEConfig.preset("emoji")
    net = (Softened(DVAE(config), steps=steps) if softened else Learner(VQ(config), steps=steps)).to(device)
    average = train(net, data.images().to(device), Learner.loss, steps=steps, lr=3e-3, warmup=50, weight_decay=0.0,
                    batch=32, ema=0.995, weights=balanced_weights([a["name"] for a in data.attributes]), folder=folder,
                    bf16=has_bf16(device), evaluate=lambda: report(net.model, unseen["validation"][:128]))
    average.swap(net)
    if not softened:
        net.model.as_dvae().save_pretrained(ship / "dvae", dtype=torch.float16)
    report_unseen(lambda split: report(net.model, unseen[split]))


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=1600, softened="learn by softened draws, to compare; nothing is shipped"))
