"""The book's systems side by side: same captions, same seeds, same judge, on both kinds of held-out combination.

    python benchmarks/systems.py [--systems sd glide dalle dalle2] [--pictures 512]
    python benchmarks/systems.py --systems dalle2 dalle2-text dalle2-caption
    python benchmarks/systems.py --systems sd-4 sd-2 sd-1 lcm-4 lcm-2 lcm-1    # few steps, without and with a LoRA
    python benchmarks/systems.py --time            # seconds a picture, on a machine that does nothing else

The second line is the control that papers ask for: the decoder told what the prior draws, told the text's embedding in
its place, or told the caption alone. Each result is a line in benchmarks/systems.jsonl; what is there already isn't
measured again, so a run can be stopped and continued. `--tables` prints what is there. Needs the weights of the judge,
of CLIP and of the systems that are measured.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from critic import Critic, features_of, trained_critic
from safetensors.torch import load_file, save_file
from timing import in_turns

from diffusionbook.data import compose_caption, emoji, pick_device
from diffusionbook.metrics import Judge, data_copying, fid, kid, nearest_neighbours

LOG = Path(__file__).with_suffix(".jsonl")
SECONDS = LOG.with_name("systems_seconds.json")
KINDS = ("tone_style", "object_style")  # the easy kind of held-out combination, and the hard one
BATCH = 32
VARIED, SEEDS = 16, 8  # captions without a style, and pictures of each

Paint = Callable[..., torch.Tensor]  # (captions, seed=…) -> (B, 3, 64, 64) in [-1, 1]; picture i has seed + i


def systems(device) -> dict[str, Callable[[], tuple[Paint, int]]]:
    """What can be measured, by name: functions that load it and return how it paints, and its number of parameters."""
    def sd():
        from diffusionbook.stable_diffusion import StableDiffusion
        pipe = StableDiffusion.from_pretrained("emoji").to(device)
        return plain(pipe), count(pipe.unet, pipe.vae, pipe.text_encoder)

    def few(steps: int, distilled: bool):
        from diffusionbook.checkpoints import locate
        from diffusionbook.stable_diffusion import StableDiffusion
        pipe = StableDiffusion.from_pretrained("emoji").to(device)
        networks = [pipe.unet, pipe.vae, pipe.text_encoder]
        if not distilled:
            return plain(pipe, steps=steps), count(*networks)
        networks.append(pipe.load_lora(locate("emoji", "lcm")))
        return plain(pipe, steps=steps, sampler="lcm", spacing="lcm", guidance=1), count(*networks)

    def dalle():
        from diffusionbook.dalle import DallE
        pipe = DallE.from_pretrained("emoji").to(device)
        return plain(pipe), count(*(part for part in vars(pipe).values() if isinstance(part, torch.nn.Module)))

    def dalle2(kind: str):
        from diffusionbook.dalle2 import DallE2
        pipe = DallE2.from_pretrained("emoji").to(device)
        networks = [pipe.text_encoder, pipe.text_projection, pipe.decoder.network, pipe.upsampler.network]
        if kind == "prior":
            return plain(pipe), count(*networks, pipe.prior.network)
        if kind == "glide":
            return plain(pipe.without_prior()), count(*networks)

        def paint(captions, seed):
            embedding = pipe.read(captions).embedding if kind == "text" else None
            return pipe.paint(embedding, captions, seed=seed)

        return paint, count(*networks)

    return {"sd": sd, "dalle": dalle, "dalle2": lambda: dalle2("prior"), "glide": lambda: dalle2("glide"),
            "dalle2-text": lambda: dalle2("text"), "dalle2-caption": lambda: dalle2("caption"),
            **{f"{name}-{steps}": partial(few, steps, distilled) for name, distilled in (("sd", False), ("lcm", True))
               for steps in (4, 2, 1)}}


def plain(pipe, **options) -> Paint:
    """A pipeline as a function of captions and seed."""
    return lambda captions, seed: pipe(captions, seed=seed, output="tensor", progress=False, **options)


def count(*networks) -> int:
    """How many parameters networks have together."""
    return sum(p.numel() for network in networks for p in network.parameters())


def questions(kind: str, pictures: int) -> tuple[list[int], list[dict], list[str]]:
    """Which held-out pictures of a kind are asked for: their places, attributes and captions."""
    data = emoji(kind)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [order[i % len(order)] for i in range(pictures)]  # few captions come up more than once, with new seeds
    attributes = [data.attributes[i] for i in chosen]
    return chosen, attributes, [compose_caption(a["name"], tone=a["tone"], style=a["style"]) for a in attributes]


def unstyled() -> list[str]:
    """The captions without a style that variety is measured on, each as often as it has seeds."""
    names = sorted({a["name"] for a in emoji(KINDS[-1]).attributes})
    return [name for name in names[::max(1, len(names) // VARIED)][:VARIED] for _ in range(SEEDS)]


def paint_all(paint: Paint, captions: list[str], folder: Path, *, restart: int = 0) -> torch.Tensor:
    """One picture (3, 64, 64) for each caption, in [-1, 1] on the CPU.

    Picture i begins from seed i, or i % restart. Finished batches are kept in the folder and not painted again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures, batch = [], restart or BATCH
    for i in range(0, len(captions), batch):
        asked, file = captions[i:i + batch], folder / f"{i}-{min(i + batch, len(captions))}.safetensors"
        if not file.exists():
            painted = paint(asked, seed=0 if restart else i).float().cpu().clamp(-1, 1)
            save_file({"pictures": painted.add(1).mul(127.5).round().byte().contiguous()}, file)
        pictures.append(load_file(file)["pictures"] / 127.5 - 1)
    return torch.cat(pictures)


@torch.no_grad()
def scores(painted: torch.Tensor, real: torch.Tensor, attributes: list[dict], captions: list[str], *,
           others: torch.Tensor, judge: Judge, critic: Critic, train: torch.Tensor) -> dict[str, float]:
    """What the judge and the critic say of painted pictures beside the real ones of the same captions.

    Shares of right answers, each also as a share of what the same judge gives the real pictures; FID and KID in the
    judge's features, to `others`, real pictures of other captions (the estimate of KID wants independent samples), and
    the same for the real ones; the critic's mean score; distance to the nearest of the training pictures' features
    `train`, and the chance to be nearer to them than the real pictures are (0.5: no copying).
    """
    ours, theirs = judge.report(painted, attributes), judge.report(real, attributes)
    found = {key: share for key, share in ours.items()}
    found |= {f"{key} / real": share / theirs[key] if theirs[key] else float("nan") for key, share in ours.items()}
    features, true, reference = (features_of(judge, images).double() for images in (painted, real, others))
    estimate, copied = kid(reference, features), data_copying(train, true, features)
    found |= {"FID": fid(reference, features), "FID of real": fid(reference, true),
              "KID": estimate.value, "KID error": estimate.error, "KID of real": kid(reference, true).value,
              "nearest training picture": nearest_neighbours(features, train)[0].mean().item(),
              "nearer than real": copied.value, "nearer than real error": copied.error}
    for name, images in (("CLIP score", painted), ("CLIP score of real", real)):
        found[name] = critic.score(images, captions).mean().item()
    return found


@torch.no_grad()
def variety(pictures: torch.Tensor, judge: Judge) -> dict[str, float]:
    """Over several seeds of captions without a style: how many styles the judge sees, how far pictures lie apart."""
    styles, distances = [], []
    for group in pictures.split(SEEDS):
        styles.append(judge(group.to(judge.device))["style"].argmax(1).unique().numel())
        distances.append(F.pdist(judge.features(group.to(judge.device)).cpu()).mean().item())
    return {"styles in 8 seeds": sum(styles) / len(styles), "captions with two styles or more":
            sum(number > 1 for number in styles) / len(styles), "distance among seeds": sum(distances) / len(distances)}


def measure(paint: Paint, folder: Path, *, pictures: int, judge: Judge, critic: Critic, train: torch.Tensor,
            kinds: tuple[str, ...] = KINDS) -> dict[str, dict[str, float]]:
    """All scores of one system, for each held-out kind apart, and its variety."""
    results = {}
    for kind in kinds:
        chosen, attributes, captions = questions(kind, pictures)
        painted, data = paint_all(paint, captions, folder / kind), emoji(kind)
        others = sorted(set(range(len(data))) - set(chosen)) or chosen
        results[kind] = scores(painted, data.images(chosen), attributes, captions, others=data.images(others),
                               judge=judge, critic=critic, train=train)
    results["variety"] = variety(paint_all(paint, unstyled(), folder / "variety", restart=SEEDS), judge)
    return results


def clock(paints: dict[str, Paint], device, *, rounds: int = 5) -> dict:
    """Seconds a picture of each system, the median of calls for eight pictures in turns."""
    captions = questions(KINDS[0], 8)[2]
    calls = [lambda paint=paint: paint(captions, seed=0) for paint in paints.values()]
    in_turns(calls, 1, cuda=device.type == "cuda")  # the first of all is slower
    times = in_turns(calls, rounds, cuda=device.type == "cuda")
    seconds = {name: round(statistics.median(part) / 1000 / len(captions), 3)
               for name, part in zip(paints, times, strict=True)}
    return {"device": device.type, "threads": torch.get_num_threads(), "seconds": seconds}


def table(rows: list[dict]) -> str:
    """A Markdown table of results: a line for each number, a column for each system."""
    lines = []
    for part in (*KINDS, "variety"):
        known = list(dict.fromkeys(key for row in rows for key in row["results"].get(part, {})))
        lines += [f"\n| {part} | " + " | ".join(row["system"] for row in rows) + " |", "|---|" + "---:|" * len(rows)]
        for key in known:
            values = [row["results"].get(part, {}).get(key, float("nan")) for row in rows]
            lines.append(f"| {key} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines + ["", *(f"{row['system']}: {row['parameters']:,} parameters, on {row['device']}"
                                    for row in rows)])


def main() -> None:
    device = pick_device()
    known = systems(device)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--systems", nargs="+", default=["sd", "glide", "dalle", "dalle2"], choices=known)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/systems"), help="where pictures are kept")
    parser.add_argument("--time", action="store_true", help="measure seconds a picture and stop")
    parser.add_argument("--tables", action="store_true", help="print what was measured and stop")
    given = parser.parse_args()
    if given.time:
        found = clock({name: known[name]()[0] for name in given.systems}, device)
        SECONDS.write_text(json.dumps(found) + "\n")
        return print(found)
    rows = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    if not given.tables:
        judge = Judge.from_pretrained("emoji").to(device)
        critic = trained_critic(judge, given.folder / "critic")
        train = features_of(judge, emoji("train").images()).double()
        done = {(row["system"], row["pictures"]) for row in rows}
        for name in given.systems:
            if (name, given.pictures) in done:
                continue
            paint, parameters = known[name]()
            row = {"system": name, "pictures": given.pictures, "parameters": parameters, "device": device.type,
                   "results": measure(paint, given.folder / name, pictures=given.pictures, judge=judge, critic=critic,
                                      train=train)}
            rows.append(row)
            with LOG.open("a") as log:
                log.write(json.dumps(row) + "\n")
    print(table(rows))
    if SECONDS.exists():
        print("\nseconds a picture:", json.loads(SECONDS.read_text()))


if __name__ == "__main__":
    main()
