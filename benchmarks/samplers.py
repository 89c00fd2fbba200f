"""What a sampler adds to the bare network calls, in milliseconds a step, ours beside diffusers'.

    python benchmarks/samplers.py            # latents of Stable Diffusion's size, on a GPU where there is one
    python benchmarks/samplers.py --smoke    # seconds: does everything still run?

The network is one multiplication, so that hardly anything but the sampler is measured; its bare calls, timed in the
same round, are subtracted. Rounds of all samplers alternate and the median counts. Prints a Markdown table.
"""
import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from diffusionbook.denoising import Denoiser
from diffusionbook.samplers import SAMPLERS, noise_source, timesteps
from diffusionbook.schedules import NoiseSchedule

with warnings.catch_warnings():  # some of its parts warn about optional packages while they load
    warnings.simplefilter("ignore")
    import diffusers

SCHEDULE = NoiseSchedule.scaled_linear()
RANDOM = ("ddpm", "euler_ancestral", "edm", "dpmpp_2m_sde", "lcm")
CALLS = {"heun": 2, "edm": 2}  # a step
THEIRS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero", "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {"final_sigmas_type": "zero"}),
    "lcm": ("LCMScheduler", {}),
}


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """As little as a network can do."""
    return 0.5 * x


def ours(name: str, x: torch.Tensor, steps: int) -> Callable[[], int]:
    """A run of our sampler, as a function that returns the number of network calls."""
    denoise, times = Denoiser(network, SCHEDULE, "v"), timesteps(SCHEDULE, steps)

    def run() -> int:
        options = {"noise": noise_source(0)} if name in RANDOM else {}
        for _ in SAMPLERS[name](denoise, x, times, **options):
            pass
        return CALLS.get(name, 1) * steps - (name in CALLS) + (9 if name == "pndm" else 0)

    return run


def theirs(name: str, x: torch.Tensor, steps: int) -> Callable[[], int]:
    """The same with diffusers' scheduler, as its pipelines call it."""
    kind, options = THEIRS[name]
    config = SCHEDULE.to_config() | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"} | options
    scheduler = getattr(diffusers, kind).from_config(config)

    def run() -> int:
        scheduler.set_timesteps(steps, device=x.device)
        extra = {"generator": torch.Generator().manual_seed(0)} if name in RANDOM else {}
        y, calls = x, 0
        for t in scheduler.timesteps:
            said = network(scheduler.scale_model_input(y, t), t.expand(len(y)))
            y, calls = scheduler.step(said, t, y, **extra).prev_sample, calls + 1
        return calls

    return run


def seconds(run: Callable[[], int], device: torch.device) -> tuple[float, int]:
    """Time of one run, and its network calls."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    calls = run()
    synchronise()
    return time.perf_counter() - start, calls


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="few rounds of few steps")
    smoke = parser.parse_args().smoke
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, rounds, shape = (5, 2, (1, 4, 8, 8)) if smoke else (50, 15, (1, 4, 64, 64))
    x, t = torch.randn(shape, device=device), torch.zeros(len(range(shape[0])), device=device)
    runs = {(name, who): make(name, x, steps) for name in SAMPLERS for who, make in (("ours", ours), ("theirs", theirs))
            if who == "ours" or name in THEIRS}
    added: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds + 1):  # the first warms up
        for key, run in runs.items():
            took, calls = seconds(run, device)
            bare, _ = seconds(lambda calls=calls: sum(network(x, t) is None for _ in range(calls)), device)
            added[key].append((took - bare) / steps * 1000)
    milliseconds = {key: statistics.median(values[1:]) for key, values in added.items()}
    print(f"{device.type}, shape {shape}, {steps} steps, median of {rounds} rounds; milliseconds a step\n")
    print("| sampler | ours | diffusers | ratio |\n|---|---|---|---|")
    for name in SAMPLERS:
        mine, other = milliseconds[name, "ours"], milliseconds.get((name, "theirs"))
        print(f"| {name} | {mine:.3f} | " + (f"{other:.3f} | {mine / other:.2f} |" if other else "– | – |"))


if __name__ == "__main__":
    main()
