"""Train the miniature's prior: from a caption, as CLIP reads it, to the CLIP embedding of a picture.

    python recipes/emoji_prior.py [--folder runs/emoji_prior] [--steps 4000] [--batch 64]

Needs the CLIP of recipes/emoji_clip.py, which takes no part in training: all embeddings are worked out once. Resumable:
the same command goes on where it stopped. At the end network and schedule go to diffusionbook/weights/emoji.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from shared import SHIPPED, UNSEEN, options, report_unseen
from torch.utils.data import StackDataset

from diffusionbook.clip import CLIP
from diffusionbook.dalle2 import save_scheduler
from diffusionbook.data import compose_caption, emoji, pick_device
from diffusionbook.denoising import Condition, Denoiser, diffusion_loss
from diffusionbook.prior import DiffusionPrior, PriorConfig, sample_embedding, text_condition
from diffusionbook.schedules import NoiseSchedule
from diffusionbook.training import balanced_weights, has_bf16, mean_loss, train

WITHOUT_STYLE = 0.2  # captions that leave the style out, so that "pizza" alone gives varied pictures
WITHOUT_CAPTION = 0.1  # empty captions, for classifier-free guidance
SCHEDULE = NoiseSchedule.cosine()


def load_clip(device: torch.device) -> CLIP:
    """The miniature CLIP with its tokenizer."""
    return CLIP.from_pretrained(SHIPPED / "clip").to(device)


class Captions:
    """What CLIP says about each of many captions, worked out once; number 0 is the empty caption."""

    def __init__(self, clip: CLIP, captions: list[str]):
        self.numbers = {caption: i for i, caption in enumerate(dict.fromkeys(["", *captions]))}
        read = partial(text_condition, clip.text_tower(), clip.tokenizer)
        texts = list(self.numbers)
        parts = [read(texts[i:i + 256]).parts() for i in range(0, len(texts), 256)]
        self.parts = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.parts["context"] = self.parts["context"].half()  # by far the largest

    def number(self, captions: list[str]) -> torch.Tensor:
        """The numbers (B,) of captions that are known."""
        return torch.tensor([self.numbers[caption] for caption in captions])

    def told(self, numbers: torch.Tensor) -> Condition:
        """Context, embedding and mask of captions by number."""
        told = {name: part[numbers] for name, part in self.parts.items()}
        return Condition(**told | {"context": told["context"].to(told["embedding"].dtype)})


@torch.no_grad()
def look(clip: CLIP, images: torch.Tensor) -> torch.Tensor:
    """The embeddings of all pictures, (N, D)."""
    return torch.cat([clip.encode_image(part.to(clip.device)) for part in images.split(128)])


def two_captions(attributes: list[dict]) -> tuple[list[str], list[str]]:
    """The captions of pictures with and without their style."""
    return tuple([compose_caption(a["name"], tone=a["tone"], style=style and a["style"]) for a in attributes]
                 for style in (True, None))


def choose_captions(batch: dict, generator: torch.Generator) -> torch.Tensor:
    """The number of a caption for each picture: with its style, without it, or empty."""
    chance = torch.rand(2, len(batch["with_style"]), generator=generator).to(batch["with_style"].device)
    numbers = torch.where(chance[0] < WITHOUT_STYLE, batch["without_style"], batch["with_style"])
    return torch.where(chance[1] < WITHOUT_CAPTION, 0, numbers)


def main(folder: Path, steps: int, batch: int, ship: Path, clip: CLIP | None = None) -> dict:
    device = pick_device()
    clip = (clip or load_clip(device)).eval()
    data, unseen = emoji("train"), {split: emoji(split) for split in UNSEEN}
    with_style, without_style = two_captions(data.attributes)
    captions = Captions(clip, [*with_style, *without_style, *(c for part in unseen.values() for c in part.captions)])
    embeddings = look(clip, data.images())

    torch.manual_seed(0)
    prior = DiffusionPrior(PriorConfig.preset("emoji")).to(device)
    prior.measure(embeddings)
    pictures = StackDataset(x0=prior.standardise(embeddings), with_style=captions.number(with_style),
                            without_style=captions.number(without_style))
    others = {split: StackDataset(x0=prior.standardise(look(clip, part.images())),
                                  number=captions.number(part.captions)) for split, part in unseen.items()}

    def error(prior, x0, numbers, generator):
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        t = torch.randint(SCHEDULE.steps, (len(x0),), generator=generator).to(x0.device)
        told = captions.told(numbers).parts()
        return diffusion_loss(prior, x0, noise, t, schedule=SCHEDULE, prediction="x0", **told).mean()

    def loss(prior, batch: dict, generator: torch.Generator):
        return error(prior, batch["x0"], choose_captions(batch, generator), generator)

    def unseen_error(split: str) -> float:
        return mean_loss(prior, others[split], lambda prior, batch, generator: error(
            prior, batch["x0"], batch["number"], generator), seed=1)

    average = train(prior, pictures, loss, weights=balanced_weights([a["name"] for a in data.attributes]), steps=steps,
                    lr=5e-4 * (batch / 64) ** 0.5, warmup=200, ema=0.998, weight_decay=0.05, batch=batch,
                    bf16=has_bf16(device), folder=folder, at_start=1.0, every=400,
                    evaluate=lambda: {"validation_loss": unseen_error("validation")})
    average.swap(prior)
    prior.eval().save_pretrained(ship / "prior", dtype=torch.float16)
    save_scheduler(ship / "prior_scheduler", Denoiser(prior, SCHEDULE, "x0"), limit=5.0)

    def report(split: str) -> dict[str, float]:
        """Error, and how near what is drawn comes to the real picture's embedding, and to a picture of that kind."""
        part, some = unseen[split], torch.arange(min(256, len(unseen[split])))
        told = captions.told(others[split][some]["number"].to(device))
        drawn = sample_embedding(prior, told, captions.told(torch.zeros(1, dtype=torch.int64)), schedule=SCHEDULE,
                                 guidance=2.0)
        real = prior.restore(others[split][some]["x0"].to(device))
        near = F.normalize(drawn, dim=1) @ F.normalize(embeddings, dim=1).T
        found = [data.attributes[i] for i in near.argmax(1).tolist()]
        same = {f"same {key}": sum(a[key] == part.attributes[i][key] for i, a in enumerate(found)) / len(found)
                for key in ("style", "group", "name")}
        likeness = {"to the picture": F.cosine_similarity(drawn, real).mean().item(),
                    "text to the picture": F.cosine_similarity(told.embedding, real).mean().item()}
        return {"loss": unseen_error(split), **likeness, **same}

    return report_unseen(report)


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=4000, batch=64))
