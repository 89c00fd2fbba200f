"""The pipeline of chapter 19 beside diffusers: seconds per picture, loading time, peak memory; same weights and dtype.

    python benchmarks/stable_diffusion.py [--pairs 7] [--full]

The miniature is timed in turns, and medians are printed. `--full` also writes Stable Diffusion 1.5 with random weights
to a temporary folder (2.2 or 4.3 GB) and lets each side load it and paint one picture in one step, in a process of its
own, whose peak memory is read: on a CUDA device if there is one, else on the CPU, in float32 where that is faster than
bfloat16. On a CUDA device both also paint whole pictures in turns, as they are and with compiled U-Nets.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from timing import in_turns, ratio

from diffusionbook.data import pick_device
from diffusionbook.stable_diffusion import StableDiffusion
from diffusionbook.training import has_bf16

CAPTION, STEPS = "red heart, noto style", 20


def painter(side: str, folder, dtype: torch.dtype, memory: str | None, device: str, compiled: bool = False):
    """A function steps, size → picture in tensor form, by us ("ours") or by diffusers ("theirs")."""
    if side == "ours":
        pipeline = StableDiffusion.from_pretrained(folder, dtype=dtype, memory=memory).to(device)
        if compiled:
            pipeline.unet.compile()
        return lambda steps, size=None: pipeline(CAPTION, steps=steps, sampler="ddim", size=size and (size, size),
                                                 output="tensor", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    if memory == "low":
        pipeline.vae.enable_tiling()
        if device != "cpu":
            pipeline.enable_sequential_cpu_offload()
    if memory is None or device == "cpu":
        pipeline.to(device)
    if compiled:
        pipeline.unet.compile()
    pipeline.set_progress_bar_config(disable=True)
    return lambda steps, size=None: pipeline(CAPTION, num_inference_steps=steps, guidance_scale=3.0, height=size or 64,
                                             width=size or 64, output_type="pt").images


def miniature(pairs: int) -> None:
    device = pick_device().type
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusion.from_pretrained("emoji").save_pretrained(folder)  # diffusers wants all parts in one place
        painters = [painter(side, folder, torch.float32, None, device) for side in ("ours", "theirs")]
    times = in_turns([partial(paint, STEPS) for paint in painters], pairs + 1, cuda=device == "cuda")
    ours, theirs = (own[1:] for own in times)  # warm
    print("| miniature, 64×64, 20 steps | diffusionbook | diffusers | ratio |\n|---|---|---|---|")
    seconds = [f"{statistics.median(own) / 1000:.2f}" for own in (ours, theirs)]
    print(f"| seconds per picture on {device} | {' | '.join(seconds)} | {ratio(ours, theirs):.2f} |\n")


def precision() -> torch.dtype:
    """What Stable Diffusion is computed in: half of float32's bits where the machine is quick with them."""
    if torch.cuda.is_available():
        return torch.float16
    return torch.bfloat16 if has_bf16("cpu") else torch.float32


def alone(side: str, folder: str, memory: str | None, size: int) -> None:
    """In a process of its own: load, paint one step, and print the seconds and the peak memory in GB."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if side == "theirs":
        from diffusers import StableDiffusionPipeline  # noqa: F401  (ours is imported too: no import is timed)
    began = time.perf_counter()
    paint = painter(side, folder, precision(), memory, device)
    loaded = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated if device == "cuda" else (
        lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    after_loading = peak()
    with torch.no_grad():
        paint(1, size)
    print(json.dumps({"load_s": loaded, "load_gb": after_loading / 1e9, "peak_gb": peak() / 1e9}))


def pictures(folder: str, size: int, pairs: int) -> None:
    """Seconds per whole picture at full size, in turns, eager and compiled."""
    device = pick_device().type
    for compiled in (False, True):
        painters = [painter(side, folder, precision(), None, device, compiled) for side in ("ours", "theirs")]
        paints = [partial(paint, STEPS, size) for paint in painters]
        in_turns(paints, 2, cuda=device == "cuda")  # compilation, and the first of all is slower
        ours, theirs = in_turns(paints, pairs, cuda=device == "cuda")
        seconds = " | ".join(f"{statistics.median(own) / 1000:.2f}" for own in (ours, theirs))
        print(f"| {'compiled' if compiled else 'eager'} | {seconds} | {ratio(ours, theirs):.2f} |", flush=True)


def full(size: int, pairs: int) -> None:
    from diffusionbook.autoencoders import VAE, VAEConfig
    from diffusionbook.schedules import NoiseSchedule
    from diffusionbook.text import TextConfig, TextEncoder, clip_tokenizer
    from diffusionbook.unet import UNet, UNetConfig

    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(precision())
        pipeline = StableDiffusion(
            unet=UNet(UNetConfig.preset("sd15")), vae=VAE(VAEConfig.preset("sd")), tokenizer=clip_tokenizer(pad="eos"),
            text_encoder=TextEncoder(TextConfig.preset("sd15")), schedule=NoiseSchedule.scaled_linear())
        torch.set_default_dtype(torch.float32)
        pipeline.save_pretrained(folder)
        for sums in Path(folder).rglob("SHA256SUMS"):
            sums.unlink()  # public folders have none, and diffusers would not check them
        del pipeline
        print(f"| Stable Diffusion 1.5, random weights, {precision()}, {size}×{size} | load, s | after loading, GB | "
              "peak, GB |\n|---|---|---|---|")
        for memory in ("", "low"):
            for side in ("ours", "theirs"):
                done = subprocess.run([sys.executable, __file__, "--alone", side, folder, "--memory", memory, "--size",
                                       str(size)], capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.strip().splitlines()[-1])
                name = {"ours": "diffusionbook", "theirs": "diffusers"}[side] + (", low memory" if memory else "")
                seconds, loaded, peak = (found[key] for key in ("load_s", "load_gb", "peak_gb"))
                print(f"| {name} | {seconds:.1f} | {loaded:.2f} | {peak:.2f} |", flush=True)
        if torch.cuda.is_available():
            print(f"\n| seconds per picture, {STEPS} steps | diffusionbook | diffusers | ratio |\n|---|---|---|---|")
            pictures(folder, size, pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--alone", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        alone(given.alone[0], str(Path(given.alone[1])), given.memory or None, given.size)
    else:
        miniature(given.pairs)
        if given.full:
            full(given.size, given.pairs)
