"""Quality per network call: KID of the miniature Stable Diffusion for each sampler, number of calls and guidance.

    python benchmarks/quality.py --samplers dpmpp_2m --calls 15    # the two that are to be compared first
    python benchmarks/quality.py --samplers ddim --calls 50
    python benchmarks/quality.py                                   # every sampler with 5, 10, 15, 25 and 50 calls
    python benchmarks/quality.py --samplers dpmpp_2m --calls 25 --guidance 0 1 2 3 5 8

The last line measures what guidance costs: precision rises with it and recall, the variety, falls.

All pictures of a run start from the same noises and captions (drawn from the training split), and all are compared with
the same real pictures, through the judge's features. Each result is a line in benchmarks/quality.jsonl, and each batch
of features a file in runs/quality: what is there already isn't painted again, so a run can be stopped and continued.
Ends with a table of all lines that belong together.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from diffusionbook.checkpoints import write_atomically
from diffusionbook.data import emoji, pick_device
from diffusionbook.metrics import Estimate, Judge, extract, kid, precision_recall
from diffusionbook.samplers import SAMPLERS
from diffusionbook.stable_diffusion import StableDiffusion

LOG = Path(__file__).with_suffix(".jsonl")
BATCH = 64


def steps_for(sampler: str, calls: int) -> int:
    """How many steps spend about so many network calls."""
    if sampler in ("heun", "edm"):
        return (calls + 1) // 2  # two a step, one in the last
    return calls - 9 if sampler == "pndm" else calls  # its first three steps take twelve


@torch.no_grad()
def paint(pipe: StableDiffusion, captions: list[str], features: Callable, folder: Path, **options) -> torch.Tensor:
    """Features of one picture for each caption, picture i from the noise of seed i: (N, D); goes on after a stop."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in tqdm(range(0, len(captions), BATCH), desc=folder.name, leave=False):
        path = folder / f"{start}.pt"
        if not path.exists():
            some = captions[start:start + BATCH]
            pictures = pipe(some, seed=start, output="tensor", progress=False, **options)
            points = features(pictures.to(pipe.unet.device)).cpu()
            write_atomically(path, lambda file, points=points: torch.save(points, file))
        parts.append(torch.load(path, weights_only=True))
    return torch.cat(parts)


def table(rows: list[dict]) -> None:
    """All results as Markdown, and the verdict on 15 calls of DPM-Solver++ against 50 of DDIM."""
    print("\n| sampler | calls | guidance | KID ± standard error | precision | recall |\n|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["guidance"], row["sampler"], row["calls"])):
        print(f"| {row['sampler']} | {row['calls']} | {row['guidance']:g} | {Estimate(row['kid'], row['error'])} "
              f"| {row['precision']:.2f} | {row['recall']:.2f} |")
    found = {(row["sampler"], row["calls"]): row for row in rows if row["guidance"] == 3}
    fast, slow = found.get(("dpmpp_2m", 15)), found.get(("ddim", 50))
    if fast and slow:
        gap = Estimate(fast["kid"] - slow["kid"], (fast["error"]**2 + slow["error"]**2) ** 0.5)
        print(f"\nKID of dpmpp_2m with 15 calls less that of ddim with 50: {gap}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--calls", nargs="+", type=int, default=[5, 10, 15, 25, 50])
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--guidance", nargs="+", type=float, default=[3.0])
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where features are kept")
    given = parser.parse_args()
    device = pick_device()
    pipe = StableDiffusion.from_pretrained("emoji").to(device)
    features = Judge.from_pretrained("emoji").to(device).features
    data = emoji("train")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    captions = [data.captions[i] for i in order[:given.pictures]]
    real = extract(data.images(order[given.pictures:3 * given.pictures]).to(device), features).cpu()
    rows = [json.loads(line) for line in LOG.read_text(encoding="utf8").splitlines()] if LOG.exists() else []
    known = {(row["guidance"], row["asked"], row["sampler"]) for row in rows if row["pictures"] == given.pictures}
    for setting in itertools.product(given.guidance, given.calls, given.samplers):
        guidance, asked, sampler = setting
        steps, calls = steps_for(sampler, asked), []
        if setting in known or steps < 1:
            continue
        counter = pipe.unet.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        pipe(captions[:1], sampler=sampler, steps=steps, progress=False)
        counter.remove()
        folder = given.folder / f"{sampler}-{steps}-guidance-{guidance:g}"
        painted = paint(pipe, captions, features, folder, sampler=sampler, steps=steps, guidance=guidance)
        score, shares = kid(real, painted), precision_recall(real, painted)
        row = {"sampler": sampler, "asked": asked, "calls": len(calls), "guidance": guidance,
               "pictures": given.pictures, "kid": score.value, "error": score.error, **shares._asdict()}
        with open(LOG, "a", encoding="utf8") as log:
            log.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"{sampler:16s} {row['calls']:3d} calls, guidance {guidance:g}: KID {score}", flush=True)
    table([row for row in rows if row["pictures"] == given.pictures])


if __name__ == "__main__":
    main()
