"""Train the judge on the emoji: which name, group, skin tone and style does a picture show?

    python recipes/emoji_judge.py [--folder runs/emoji_judge] [--steps 6000] [--batch 64]
    python recipes/emoji_judge.py --strokes --folder runs/emoji_judge_strokes --steps 2000

First on the training split alone, to measure it on pictures that it never saw. Then an eighth as long on all real
pictures, because the judge of painted pictures should know every real one. With `--strokes` the judge that ships keeps
all but its eye for strokes, which learns anew in the same two stages. Resumable: the same command goes on where it
stopped. At the end the weights go to diffusionbook/weights/emoji/judge.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from shared import SHIPPED, UNSEEN, options, report_unseen
from torch.utils.data import StackDataset

from diffusionbook.data import SPLITS, emoji, pick_device
from diffusionbook.metrics import Judge, JudgeConfig
from diffusionbook.training import balanced_weights, has_bf16, train

STROKES = ("strokes.", "manner.")  # where the weights of the eye for strokes begin


def vary(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shift, tint, soften and roughen pictures (B, 3, 64, 64) a little, each in its own way."""
    count = len(images)

    def between(low: float, high: float, *shape: int) -> torch.Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(images.device)

    angle, scale, shift = between(-0.2, 0.2), between(0.85, 1.25), between(-0.12, 0.12, 2)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * scale.view(-1, 1, 1)
    grid = F.affine_grid(torch.cat([turn, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1  # what comes in from outside is white
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    softness, roughness = between(0, 0.7, 1, 1, 1), between(0, 0.1, 1, 1, 1)
    mixed = torch.lerp(moved, soft, softness) * between(0.92, 1.0, 3, 1, 1)
    return (mixed + roughness * torch.randn(images.shape, generator=generator).to(images.device)).clamp(-1, 1)


def weighed(report: Callable[[list[int]], dict[str, float]], unseen: list[dict], whole: list[dict]) -> dict[str, float]:
    """The report on unseen pictures, weighed so that each kind counts as often as it comes up in the whole data set.

    A kind is a group, with a skin tone or without. Two thirds of the unseen pictures show objects, the hard ones,
    and half of all pictures show people with a skin tone.
    """
    kinds, often = ([(a["group"], a["tone"] is None) for a in part] for part in (unseen, whole))
    total = Counter()
    for kind, count in Counter(often).items():
        found = report([i for i, other in enumerate(kinds) if other == kind])
        total.update({key: share * count / len(often) for key, share in found.items()})
    return dict(total)


def main(folder: Path, steps: int, batch: int, ship: Path, strokes: bool) -> None:
    device = pick_device()
    splits = {split: emoji(split) for split in SPLITS}
    images = {split: data.images() for split, data in splits.items()}
    attributes = {split: data.attributes for split, data in splits.items()}
    known = {key: {a[key] for a in attributes["train"]} for key in ("name", "group", "tone")}
    config = JudgeConfig(names=tuple(sorted(known["name"])), groups=tuple(sorted(known["group"])),
                         tones=(None, *sorted(known["tone"] - {None})))
    torch.manual_seed(0)
    judge = Judge(config).to(device)
    if strokes:
        old = Judge.from_pretrained(SHIPPED / "judge").state_dict()
        judge.load_state_dict({key: value if key.startswith(STROKES) else old[key]
                               for key, value in judge.state_dict().items()})
        for key, parameter in judge.named_parameters():
            parameter.requires_grad_(key.startswith(STROKES))

    unseen = torch.cat([images[split] for split in UNSEEN]), [a for split in UNSEEN for a in attributes[split]]
    asked = ("style",) if strokes else ("style", "group", "tone", "name", "name in 5")

    def report(pictures: torch.Tensor, attributes: list[dict]) -> dict[str, float]:
        found = judge.report(pictures, attributes)
        return {part: found[part] for part in asked}

    def learn(names: tuple[str, ...], steps: int, lr: float, stage: str) -> None:
        described = [a for split in names for a in attributes[split]]
        data = StackDataset(images=torch.cat([images[split] for split in names]), **judge.labels(described))

        def loss(judge: Judge, batch: dict, generator: torch.Generator):
            with torch.autocast(batch["images"].device.type, enabled=False):  # a grid is too fine for bfloat16
                seen = vary(batch["images"], generator)
            answers = {"style": judge.style(seen)} if strokes else judge(seen)
            truth = batch | {"style at large": batch["style"]}
            return sum(F.cross_entropy(logits.float(), truth[part], label_smoothing=0.1)
                       for part, logits in answers.items())

        train(judge, data, loss, batch=batch, weights=balanced_weights([a["name"] for a in described]), steps=steps,
              lr=lr, folder=folder / stage, ema=0.998, bf16=has_bf16(device), every=max(1, steps // 8),
              weight_decay=0.05, evaluate=lambda: report(*unseen)).swap(judge)

    learn(("train",), steps, 2e-3 * (batch / 64) ** 0.5, "train")
    report_unseen(lambda split: report(images[split], attributes[split]))
    print("weighed like the data set:", weighed(
        lambda index: report(unseen[0][index], [unseen[1][i] for i in index]), unseen[1],
        [a for part in attributes.values() for a in part]))
    learn(SPLITS, steps // 8, 5e-4 * (batch / 64) ** 0.5, "all")
    judge.eval().save_pretrained(ship / "judge", dtype=torch.float16)


if __name__ == "__main__":
    main(**options(__file__, __doc__, steps=6000, batch=64, strokes="learn the eye for strokes anew, keep the rest"))
