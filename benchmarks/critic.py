"""A CLIP that no system of this book was trained on, is guided by or ranks with, to score what they paint.

    python benchmarks/critic.py [--folder runs/critic] [--steps 700]

Its picture side is the judge's, as it is; a text transformer and one linear layer learn to agree with it (Zhai et al.
2022, "LiT": locked-image tuning), from the training pictures alone. Minutes on one CPU core; the state stays in the
folder, and systems.py trains the critic itself where there is none. Prints how well it finds the captions of unseen
pictures. The judge has seen these pictures, though not their captions, since it knows every real picture.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import StackDataset

from diffusionbook.checkpoints import locate
from diffusionbook.clip import contrastive_loss, retrieval
from diffusionbook.data import compose_caption, emoji
from diffusionbook.metrics import Judge
from diffusionbook.text import TextConfig, TextEncoder, Tokenizer
from diffusionbook.training import balanced_weights, train

WIDTH, BATCH, STEPS = 192, 192, 700
WITHOUT_STYLE = 0.2  # captions that leave the style out
UNSEEN = ("validation", "object_style", "tone_style")


class Critic(nn.Module):
    """Captions and the judge's features in one space of `WIDTH` numbers."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = [judge]  # in a list, so that its weights aren't the critic's
        self.tokenizer = Tokenizer.from_pretrained(locate("emoji", "tokenizer"))
        self.text = TextEncoder(TextConfig(vocab_size=2048, context_length=32, width=WIDTH, layers=2, heads=6,
                                           projection=WIDTH))
        self.picture = nn.Linear(judge.config.channels[-1], WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def ids(self, captions: list[str]) -> torch.Tensor:
        """Token numbers (B, L), no longer than the longest caption needs."""
        ids = self.tokenizer(captions)
        return ids[:, :int((ids == self.text.config.eos_id).int().argmax(1).max()) + 1]

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Token numbers (B, L) → vectors (B, WIDTH) of length 1."""
        return F.normalize(self.text.pooled(self.text(ids), ids), dim=1)

    def look(self, features: torch.Tensor) -> torch.Tensor:
        """The judge's features (B, D) → vectors (B, WIDTH) of length 1."""
        return F.normalize(self.picture(F.layer_norm(features, features.shape[1:])), dim=1)

    @torch.no_grad()
    def score(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """The cosine similarity (B,) of each picture in [-1, 1] with its caption."""
        return (self.look(features_of(self.judge[0], images)) * self.read(self.ids(captions))).sum(1)

    @torch.no_grad()
    def exam(self, *, choices: int = 10) -> dict[str, float]:
        """R@1 and R@5 both ways among 500 distinct captions of unseen pictures, the mean over some choices."""
        splits = [emoji(split) for split in UNSEEN]
        seen = self.look(features_of(self.judge[0], torch.cat([split.images() for split in splits])))
        captions = [caption for split in splits for caption in split.captions]
        text = torch.cat([self.read(self.ids(captions[i:i + 256])) for i in range(0, len(captions), 256)])
        chosen = [torch.randperm(len(seen), generator=torch.Generator().manual_seed(i))[:500] for i in range(choices)]
        tables = [retrieval(seen[part], text[part]) for part in chosen]
        return {key: sum(table[key] for table in tables) / len(tables) for key in tables[0]}


@torch.no_grad()
def features_of(judge: Judge, images: torch.Tensor) -> torch.Tensor:
    """The judge's features (N, D) of many pictures, on the CPU."""
    return torch.cat([judge.features(part.to(judge.device)).cpu() for part in images.split(64)])


def trained_critic(judge: Judge, folder: Path, *, steps: int = STEPS) -> Critic:
    """The critic of a judge; training goes on from the state in the folder, and there is none left to do at its end."""
    data = emoji("train")
    torch.manual_seed(0)
    critic = Critic(judge)
    whole = [compose_caption(a["name"], tone=a["tone"], style=a["style"]) for a in data.attributes]
    short = [compose_caption(a["name"], tone=a["tone"]) for a in data.attributes]
    number = {caption: i for i, caption in enumerate(dict.fromkeys([*whole, *short]))}
    ids = critic.ids(list(number))
    pictures = StackDataset(features=features_of(judge, data.images()),
                            whole=torch.tensor([number[caption] for caption in whole]),
                            short=torch.tensor([number[caption] for caption in short]))

    def loss(critic: Critic, batch: dict, generator: torch.Generator) -> torch.Tensor:
        """Whose caption is whose? A caption is also right for every other picture that it describes."""
        cut = torch.rand(len(batch["features"]), generator=generator) < WITHOUT_STYLE
        told = torch.where(cut, batch["short"], batch["whole"])
        right = (batch["whole"][:, None] == told) | (batch["short"][:, None] == told)
        return contrastive_loss(critic.look(batch["features"]), critic.read(ids[told]), critic.logit_scale, right=right)

    average = train(critic, pictures, loss, weights=balanced_weights([a["name"] for a in data.attributes]), steps=steps,
                    lr=1e-3, weight_decay=0.1, ema=0.995, batch=BATCH, folder=folder, every=500)
    average.swap(critic)
    return critic.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/critic"))
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    critic = trained_critic(Judge.from_pretrained("emoji"), given.folder, steps=given.steps)
    print({name: round(share, 3) for name, share in critic.exam().items()})


if __name__ == "__main__":
    main()
