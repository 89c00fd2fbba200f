"""What several recipes share: where weights go, which pictures are unseen, the command line, and the last report."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from diffusionbook.data import pick_device
from diffusionbook.stable_diffusion import StableDiffusion

UNSEEN = ("validation", "object_style", "tone_style")
SHIPPED = Path(__file__).parent.parent / "diffusionbook" / "weights" / "emoji"


def options(recipe: str, doc: str, *, steps: int, batch: int | None = None, trial: bool = False, **flags: str) -> dict:
    """Read the command line of a recipe, by its file: what `main` wants by name.

    With a `batch` the recipe also takes that; with `trial` a device, and a limit on the number of pictures; `flags`
    can be switched on, and say what they do.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs") / Path(recipe).stem, help="log and state")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--ship", type=Path, default=SHIPPED, help="where the weights go")
    if batch:
        parser.add_argument("--batch", type=int, default=batch)
    if trial:
        parser.add_argument("--device", type=torch.device, default=pick_device())
        parser.add_argument("--limit", type=int, help="use only so many pictures, to try the recipe out")
    for name, meaning in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    return vars(parser.parse_args())


def report_unseen(report: Callable[[str], dict[str, float]]) -> dict[str, dict[str, float]]:
    """Examine what was trained on each unseen split, print what comes out and return it."""
    reports = {split: report(split) for split in UNSEEN}
    for split, numbers in reports.items():
        print(split, {name: round(number, 4) for name, number in numbers.items()})
    return reports


@torch.no_grad()
def latents_of(painter: StableDiffusion, images: torch.Tensor) -> torch.Tensor:
    """The latents of many pictures, on the CPU."""
    return torch.cat([painter.encode(part).cpu() for part in images.split(64)])
