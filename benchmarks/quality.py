"""Quality per network call: KID of a miniature for each sampler, number of calls and guidance.

    python benchmarks/quality.py --samplers dpmpp_2m --calls 15    # the two that are to be compared first
    python benchmarks/quality.py --samplers ddim --calls 50
    python benchmarks/quality.py                                   # every sampler with 5, 10, 15, 25 and 50 calls
    python benchmarks/quality.py --samplers dpmpp_2m --calls 25 --guidance 0 1 2 3 5 8
    python benchmarks/quality.py --painter pixels --guidance 1     # a small network at 32×32: minutes a line

The line before the last measures what guidance costs: precision rises with it and recall, the variety, falls.

All pictures of a run start from the same noises and captions (or classes, drawn from the training split), and all are
compared with the same real pictures, through the judge's features; small ones are enlarged for it, real and
painted alike. Each result is a line in benchmarks/quality.jsonl, and each batch of features a file in runs/quality:
what is there already isn't painted again, so a run can be stopped and continued. Ends with a table of all lines that
belong together.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from diffusionbook.checkpoints import write_atomically
from diffusionbook.data import emoji, pick_device
from diffusionbook.denoising import Condition, classifier_free
from diffusionbook.metrics import Estimate, Judge, extract, kid, precision_recall
from diffusionbook.samplers import SAMPLERS, sample
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.training import load_denoiser

LOG = Path(__file__).with_suffix(".jsonl")
BATCH = 64


def steps_for(sampler: str, calls: int) -> int:
    """How many steps spend about so many network calls."""
    if sampler in ("heun", "edm"):
        return (calls + 1) // 2  # two a step, one in the last
    return calls - 9 if sampler == "pndm" else calls  # its first three steps take twelve


class Latents:
    """The miniature Stable Diffusion, asked for captions."""

    def __init__(self, device):
        self.pipe = StableDiffusion.from_pretrained("emoji").to(device)
        self.network, self.data = self.pipe.unet, emoji("train")
        self.wishes = self.data.captions

    def __call__(self, captions: list[str], **options) -> torch.Tensor:
        """Pictures (B, 3, 64, 64), the first from the noise of `seed`."""
        return self.pipe(captions, output="tensor", progress=False, **options)

    def real(self, chosen: list[int]) -> torch.Tensor:
        """Pictures (N, 3, 64, 64) to compare with."""
        return self.data.images(chosen)


class Pixels:
    """The miniature that paints small pictures, asked for classes."""

    def __init__(self, device):
        self.denoise, classes = load_denoiser("pixels")
        self.network = self.denoise.network.to(device)
        self.side = self.network.config.sample_size
        self.data = emoji("train", size=self.side)
        told = [", ".join(a[key] for key in ("group", "tone", "style") if a[key]) for a in self.data.attributes]
        self.wishes = [1 + classes.index(name) for name in told]  # class 0 is none

    def __call__(self, numbers: list[int], *, guidance: float, **options) -> torch.Tensor:
        """Pictures (B, 3, 64, 64), the first from the noise of `seed`."""
        device = self.network.device
        told, untold = (Condition(embedding=torch.tensor(n, device=device)) for n in (numbers, [0] * len(numbers)))
        denoise = classifier_free(replace(self.denoise, condition=told), untold, scale=guidance)
        x = sample(denoise, (len(numbers), 3, self.side, self.side), device=device, progress=False, **options)
        return self.enlarge(x.clamp(-1, 1))

    def real(self, chosen: list[int]) -> torch.Tensor:
        """Pictures (N, 3, 64, 64) to compare with."""
        return self.enlarge(self.data.images(chosen))

    @staticmethod
    def enlarge(images: torch.Tensor) -> torch.Tensor:
        """Small pictures → 64×64, as the judge wants them."""
        return F.interpolate(images, size=(64, 64), mode="bilinear")


PAINTERS = {"latents": Latents, "pixels": Pixels}


@torch.no_grad()
def paint(painter: Callable, wishes: list, features: Callable, folder: Path, **options) -> torch.Tensor:
    """Features of one picture for each wish, picture i from the noise of seed i: (N, D); goes on after a stop."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in tqdm(range(0, len(wishes), BATCH), desc=folder.name, leave=False):
        path = folder / f"{start}.pt"
        if not path.exists():
            points = features(painter(wishes[start:start + BATCH], seed=start, **options)).cpu()
            write_atomically(path, lambda file, points=points: torch.save(points, file))
        parts.append(torch.load(path, weights_only=True))
    return torch.cat(parts)


def table(rows: list[dict]) -> None:
    """All results as Markdown, and the verdict on 15 calls of DPM-Solver++ against 50 of DDIM."""
    print("\n| sampler | calls | guidance | KID ± standard error | precision | recall |\n|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["guidance"], row["sampler"], row["calls"])):
        print(f"| {row['sampler']} | {row['calls']} | {row['guidance']:g} | {Estimate(row['kid'], row['error'])} "
              f"| {row['precision']:.2f} | {row['recall']:.2f} |")
    found = {(row["guidance"], row["sampler"], row["calls"]): row for row in rows}
    for guidance in sorted({row["guidance"] for row in rows}):
        fast, slow = found.get((guidance, "dpmpp_2m", 15)), found.get((guidance, "ddim", 50))
        if fast and slow:
            gap = Estimate(fast["kid"] - slow["kid"], (fast["error"]**2 + slow["error"]**2) ** 0.5)
            print(f"\nguidance {guidance:g}: KID of dpmpp_2m with 15 calls less that of ddim with 50: {gap}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--calls", nargs="+", type=int, default=[5, 10, 15, 25, 50])
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--guidance", nargs="+", type=float, default=[3.0])
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where features are kept")
    parser.add_argument("--painter", choices=PAINTERS, default="latents")
    given = parser.parse_args()
    device = pick_device()
    painter = PAINTERS[given.painter](device)
    features = Judge.from_pretrained("emoji").to(device).features
    order = torch.randperm(len(painter.data), generator=torch.Generator().manual_seed(0)).tolist()
    wishes = [painter.wishes[i] for i in order[:given.pictures]]
    real = extract(painter.real(order[given.pictures:3 * given.pictures]).to(device), features).cpu()
    rows = [json.loads(line) for line in LOG.read_text(encoding="utf8").splitlines()] if LOG.exists() else []
    rows = [row for row in rows if (row["painter"], row["pictures"]) == (given.painter, given.pictures)]
    known = {(row["guidance"], row["asked"], row["sampler"]) for row in rows}
    for setting in itertools.product(given.guidance, given.calls, given.samplers):
        guidance, asked, sampler = setting
        steps, calls = steps_for(sampler, asked), []
        if setting in known or steps < 1:
            continue
        options = {"sampler": sampler, "steps": steps, "guidance": guidance}
        counter = painter.network.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        painter(wishes[:1], **options)
        counter.remove()
        folder = given.folder / f"{given.painter}-{sampler}-{steps}-guidance-{guidance:g}"
        painted = paint(painter, wishes, features, folder, **options)
        score, shares = kid(real, painted), precision_recall(real, painted)
        row = {"painter": given.painter, "sampler": sampler, "asked": asked, "calls": len(calls), "guidance": guidance,
               "pictures": given.pictures, "kid": score.value, "error": score.error, **shares._asdict()}
        with open(LOG, "a", encoding="utf8") as log:
            log.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"{sampler:16s} {row['calls']:3d} calls, guidance {guidance:g}: KID {score}", flush=True)
    table(rows)


if __name__ == "__main__":
    main()
