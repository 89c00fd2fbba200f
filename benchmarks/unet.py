"""The U-Net beside diffusers': the same architecture, weights, inputs and number type, in interleaved pairs.

    python benchmarks/unet.py            # on the CPU, or on a GPU where there is one: also compiled and channels-last
    python benchmarks/unet.py --smoke    # seconds: does everything still run?

Prints a Markdown table. A ratio below 1 means that ours is faster.
"""
import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from timing import in_turns, row, setting
from torch import nn

from diffusionbook.training import has_bf16
from diffusionbook.unet import UNet, UNetConfig

with warnings.catch_warnings():  # some of its parts warn about optional packages while they load
    warnings.simplefilter("ignore")
    import diffusers


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    config: UNetConfig
    batch: int
    size: int
    train: bool
    bf16: bool = False  # autocast, as in training
    fast: bool = False  # compiled, channels last
    words: int = 24


def cases(cuda: bool, smoke: bool) -> list[Case]:
    """The miniature and three public networks, the large ones narrowed on a CPU so that the table takes minutes.

    A processor that computes bfloat16 in software has rows in float32 alone.
    """
    halves = [False, True] if has_bf16("cuda" if cuda else "cpu") else [False]
    if smoke:
        tiny = UNetConfig(channels=(16, 32), attention=("cross", None), heads=(2, 2), context_width=12, groups=8,
                          layers_per_block=1)
        return [Case("tiny", tiny, 2, 8, train, bf16) for train in (False, True) for bf16 in halves]
    preset = UNetConfig.preset
    narrow = {} if cuda else {"channels": (80, 160, 320, 320), "groups": 16}
    glide = {} if cuda else {"channels": (64, 128, 192, 256), "heads": (1, 2, 3, 4)}
    networks = [
        ("emoji-latent", preset("emoji-latent"), 256 if cuda else 32, 8),
        ("ddpm-cifar10", preset("ddpm-cifar10"), 128 if cuda else 4, 32),
        ("sd15" if cuda else "sd15, a quarter as wide", replace(preset("sd15"), **narrow), 8 if cuda else 1, 64),
        ("glide" if cuda else "glide, a third as wide", replace(preset("glide"), **glide), 16 if cuda else 1, 64),
    ]
    ways = [(True, False), (True, True)] if cuda else [(bf16, False) for bf16 in halves]
    return [Case(name, config, batch, size, train, bf16, fast)
            for name, config, batch, size in networks for train in (False, True) for bf16, fast in ways]


def pair(case: Case, device: torch.device) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions that do the same work, the first with our network, the second with diffusers'."""
    torch.manual_seed(0)
    ours = UNet(case.config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.02 * torch.randn_like(p))
    kind = diffusers.UNet2DConditionModel if case.config.context_width else diffusers.UNet2DModel
    theirs = kind.from_config(case.config.to_config())
    theirs.load_state_dict(ours.state_dict())
    layout = {"memory_format": torch.channels_last} if case.fast else {}
    networks = [network.to(device, **layout).train(case.train) for network in (ours, theirs)]
    x = torch.randn(case.batch, case.config.in_channels, case.size, case.size, device=device).to(**layout)
    t = torch.randint(0, 1000, (case.batch,), device=device)
    words = embedding = None
    if case.config.context_width:
        words = torch.randn(case.batch, case.words, case.config.context_width, device=device)
    if "added" in case.config.attention:
        embedding = torch.randn(case.batch, 4 * case.config.channels[0], device=device)
    told = ([words] if words is not None else []) + ([embedding] if embedding is not None else [])
    answers = [lambda: networks[0](x, t, words, embedding), lambda: networks[1](x, t, *told, return_dict=False)[0]]
    if case.fast:
        answers = [torch.compile(answer) for answer in answers]
    with torch.no_grad():
        torch.testing.assert_close(answers[0](), answers[1](), rtol=1e-2, atol=1e-2)
    return tuple(work(answer, network, case) for answer, network in zip(answers, networks, strict=True))


def work(answer: Callable[[], torch.Tensor], network: nn.Module, case: Case) -> Callable[[], None]:
    """One forward pass, or one step of training."""
    device = next(network.parameters()).device.type

    def forward():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=case.bf16):
            answer()

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, foreach=True) if case.train else None

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=case.bf16):
            loss = answer().float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step if case.train else forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny network and few pairs")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs per row (default 15)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda, pairs = device.type == "cuda", 2 if options.smoke else options.pairs
    print(setting(diffusers, pairs, cuda=cuda))
    print("| network | batch | pass | numbers | ours, ms | diffusers, ms | ratio |\n|---|---|---|---|---|---|---|")
    for case in cases(cuda, options.smoke):
        if options.only not in case.name:
            continue
        functions = pair(case, device)
        for function in functions * 2:  # warm up
            function()
        times = in_turns(functions, pairs, cuda=cuda)
        numbers = ("bf16 autocast" if case.bf16 else "fp32") + (", compiled, channels last" if case.fast else "")
        print(row(times, case.name, case.batch, "training step" if case.train else "forward", numbers), flush=True)


if __name__ == "__main__":
    main()
