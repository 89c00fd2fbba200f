"""Autoencoders beside diffusers': the same architecture, weights, inputs and number type, in interleaved pairs.

    python benchmarks/autoencoders.py            # on the CPU, or on a GPU where there is one
    python benchmarks/autoencoders.py --smoke    # seconds: does everything still run?
    python benchmarks/autoencoders.py --memory   # on a CPU: most memory of one decode in one piece and in tiles

Prints Markdown tables. A ratio below 1 means that ours is faster.
"""
import argparse
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from timing import in_turns, row, setting

from diffusionbook.autoencoders import VAE, TinyVAE, TinyVAEConfig, VAEConfig

with warnings.catch_warnings():  # some of its parts warn about optional packages while they load
    warnings.simplefilter("ignore")
    import diffusers


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    config: VAEConfig | TinyVAEConfig
    batch: int
    size: int
    decode: bool


def cases(cuda: bool, smoke: bool) -> list[Case]:
    """The miniature, the public one, narrowed on a CPU, and TAESD; both ways."""
    if smoke:
        networks = [("tiny", VAEConfig(channels=(8, 16), layers_per_block=1, groups=4), 1, 32),
                    ("tiny TAESD", TinyVAEConfig(width=8, blocks=(1, 1)), 1, 32)]
    else:
        sd = VAEConfig.preset("sd")
        networks = [("emoji", VAEConfig.preset("emoji"), 256 if cuda else 8, 64),
                    ("sd", sd, 4, 512) if cuda else ("sd, a quarter as wide",
                                                     replace(sd, channels=(32, 64, 128, 128)), 1, 256),
                    ("taesd", TinyVAEConfig.preset("taesd"), 8 if cuda else 1, 512 if cuda else 256)]
    return [Case(*network, decode) for network in networks for decode in (False, True)]


@torch.no_grad()
def pair(case: Case, device: torch.device) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Two functions that do the same work, the first with our network, the second with diffusers'."""
    torch.manual_seed(0)
    tiny = isinstance(case.config, TinyVAEConfig)
    kinds = (TinyVAE, diffusers.AutoencoderTiny) if tiny else (VAE, diffusers.AutoencoderKL)
    ours, theirs = kinds[0](case.config).eval(), kinds[1].from_config(case.config.to_config()).eval()
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(device), theirs.to(device)
    images = torch.rand(case.batch, 3, case.size, case.size, device=device) * 2 - 1
    z = torch.randn(case.batch, case.config.latent_channels, *[case.size // ours.factor] * 2, device=device)
    scale = 1 if tiny else case.config.scaling_factor
    if case.decode:
        functions = [lambda: ours.decode(z), lambda: theirs.decode(z / scale, return_dict=False)[0]]
    elif tiny:
        functions = [lambda: ours.encode(images), lambda: theirs.encode(images, return_dict=False)[0]]
    else:
        functions = [lambda: ours.encode(images).mean, lambda: theirs.encode(images).latent_dist.mean * scale]
    torch.testing.assert_close(functions[0](), functions[1](), rtol=1e-2, atol=1e-3)
    return tuple(functions)


@torch.no_grad()
def speed(cuda: bool, smoke: bool, pairs: int, only: str) -> None:
    """Print the table of times."""
    device = torch.device("cuda" if cuda else "cpu")
    print("| network | batch | side | pass | ours, ms | diffusers, ms | ratio |\n|---|---|---|---|---|---|---|")
    for case in cases(cuda, smoke):
        if only not in case.name:
            continue
        functions = pair(case, device)
        for function in functions * 2:  # warm up
            function()
        print(row(in_turns(functions, pairs, cuda=cuda), case.name, case.batch, case.size,
                  "decode" if case.decode else "encode"), flush=True)


@torch.no_grad()
def one_decode(side: int, tile: int) -> None:
    """Decode one latent with the miniature; print how much memory the process took at most, and the seconds."""
    vae, z = VAE.from_pretrained("emoji"), torch.randn(1, 4, side // 8, side // 8)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    vae.decode(z, tile=tile or None)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) / 1024, time.perf_counter() - start)


def memory(side: int) -> None:
    """Print the table of memory; each decode has a process of its own."""
    print("| miniature's decode | side | most memory, MB | seconds |\n|---|---|---|---|")
    for tile in (0, 512, 256):
        call = [sys.executable, __file__, "--one-decode", str(side), str(tile)]
        megabytes, seconds = subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()
        print(f"| {f'tiles of {tile}' if tile else 'in one piece'} | {side} | {float(megabytes):.0f} "
              f"| {float(seconds):.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny networks and few pairs")
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    parser.add_argument("--side", type=int, default=2048, help="pixels a side for --memory (default 2048)")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs per row (default 15)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--one-decode", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_decode:
        return one_decode(*options.one_decode)
    cuda, pairs = torch.cuda.is_available(), 2 if options.smoke else options.pairs
    print(setting(diffusers, pairs, cuda=cuda))
    if options.memory:
        return memory(options.side)
    return speed(cuda, options.smoke, pairs, options.only)


if __name__ == "__main__":
    main()
