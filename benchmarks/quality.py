"""Quality per network call: KID of the miniature Stable Diffusion for each sampler, number of steps and guidance.

    python benchmarks/quality.py [--samplers ddim dpmpp_2m] [--calls 5 10 15 25 50] [--pictures 1024]
    python benchmarks/quality.py --samplers dpmpp_2m --calls 25 --guidance 0 1 2 3 5 8

The second line measures what guidance costs: precision rises with it and recall, the variety, falls.

All pictures of a run start from the same noises and captions (drawn from the training split), and all are compared with
the same real pictures through the judge's features. Each result is a line in benchmarks/quality.jsonl; lines that are
there already aren't measured again, so that a run can be stopped and continued.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from tqdm import tqdm

from diffusionbook.data import emoji, pick_device
from diffusionbook.metrics import Judge, extract, kid, precision_recall
from diffusionbook.samplers import SAMPLERS
from diffusionbook.stable_diffusion import StableDiffusion

LOG = Path(__file__).with_suffix(".jsonl")
CALLS_PER_STEP = {"heun": 2}  # every other sampler asks the network once a step
BATCH = 64


@torch.no_grad()
def paint(pipe, captions: list[str], judge: Judge, **options) -> torch.Tensor:
    """The judge's features of one picture for each caption, picture i from the noise of seed i: (N, D)."""
    features = []
    for start in tqdm(range(0, len(captions), BATCH), leave=False):
        pictures = pipe(captions[start:start + BATCH], seed=start, output="tensor", progress=False, **options)
        features.append(judge.features(pictures.to(judge.device)).cpu())
    return torch.cat(features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpmpp_2m"], choices=SAMPLERS)
    parser.add_argument("--calls", nargs="+", type=int, default=[5, 10, 15, 25, 50])
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--guidance", nargs="+", type=float, default=[3.0])
    given = parser.parse_args()
    device = pick_device()
    judge, pipe = Judge.from_pretrained("emoji").to(device), StableDiffusion.from_pretrained("emoji").to(device)
    data = emoji("train")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    captions = [data.captions[i] for i in order[:given.pictures]]
    real = extract(data.images(order[given.pictures:3 * given.pictures]).to(device), judge.features).cpu()
    done = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    known = {(r["sampler"], r["calls"], r["pictures"], r["guidance"]) for r in done}
    for guidance, calls, sampler in itertools.product(given.guidance, given.calls, given.samplers):
        setting = (sampler, calls, given.pictures, guidance)
        if setting in known or calls % CALLS_PER_STEP.get(sampler, 1):
            continue
        steps = calls // CALLS_PER_STEP.get(sampler, 1)
        painted = paint(pipe, captions, judge, sampler=sampler, steps=steps, guidance=guidance)
        score, shares = kid(real, painted), precision_recall(real, painted)
        row = dict(zip(("sampler", "calls", "pictures", "guidance"), setting, strict=True))
        row |= {"kid": score.value, "error": score.error, **shares._asdict()}
        with open(LOG, "a", encoding="utf8") as log:
            log.write(json.dumps(row) + "\n")
        print(f"{sampler:16s} {calls:3d} calls, guidance {guidance:g}: KID {score}, precision {shares.precision:.2f}, "
              f"recall {shares.recall:.2f}", flush=True)


if __name__ == "__main__":
    main()
