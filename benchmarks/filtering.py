"""Edge-keeping diffusion side by side with medpy, SimpleITK and DIPlib: time, growth and memory.

    python benchmarks/filtering.py            # 512 x 512 and up to 2048 x 2048 and 128^3: some minutes
    python benchmarks/filtering.py --quick    # small pictures, seconds: does everything still run?

Contestants take turns within a round, the median over the rounds counts, and the last column is a ratio within this
run: only ratios carry over to another machine. Every peer is optional. Prints Markdown tables.
"""
import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from skimage import data
from skimage.transform import resize

from diffusionbook.filtering import coherence_enhance, diffuse

CONTRAST = 100.0  # of 255; above the slopes of the noise, so that the equation is well posed and has one solution


def picture(*size: int) -> np.ndarray:
    """A noisy photograph of any size, float32 in 0..255; a volume repeats it with other noise."""
    clean = 255 * resize(data.camera(), size[-2:], anti_aliasing=True)
    noise = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    return (clean + 15 * noise).astype(np.float32)


def explicit_ours(u: np.ndarray, steps: int) -> np.ndarray:
    return diffuse(u, steps / 4, contrast=CONTRAST, conductance="exponential", scheme="explicit", step=0.25)


def explicit_medpy(u: np.ndarray, steps: int) -> np.ndarray:
    from medpy.filter.smoothing import anisotropic_diffusion
    return anisotropic_diffusion(u, niter=steps, kappa=CONTRAST, gamma=0.25, option=1)


def explicit_simpleitk(u: np.ndarray, steps: int) -> np.ndarray:
    """Its contrast is relative to the mean slope, so it solves another equation; the work of a step is the same."""
    import SimpleITK as sitk
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # it warns of steps above 0.125 that are in fact stable in 2-D
    return sitk.GetArrayFromImage(sitk.GradientAnisotropicDiffusion(
        sitk.GetImageFromArray(u), timeStep=0.25, conductanceParameter=1.0, numberOfIterations=steps))


def explicit_diplib(u: np.ndarray, steps: int) -> np.ndarray:
    import diplib
    return np.asarray(diplib.PeronaMalikDiffusion(diplib.Image(u), steps, CONTRAST, 0.25))


EXPLICIT = {"this book": explicit_ours}
EXPLICIT |= {name: run for name, module, run in [
    ("medpy", "medpy", explicit_medpy), ("SimpleITK", "SimpleITK", explicit_simpleitk),
    ("DIPlib", "diplib", explicit_diplib)] if find_spec(module)}


def medians(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds that each function takes: the median over rounds in which all take turns, after one to warm up."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")
    print()


def each_iteration(size: int, rounds: int) -> None:
    u, steps = picture(size, size), 20
    seconds = medians({name: lambda run=run: run(u, steps) for name, run in EXPLICIT.items()}, rounds)
    print(f"### One explicit iteration, {size} × {size}, float32\n")
    ours = seconds["this book"]
    rows = [[name, f"{1e3 * s / steps:.2f}", f"{s / ours:.1f}"] for name, s in seconds.items()]
    table(["", "ms", "times ours"], rows)


def distance(u: np.ndarray, reference: np.ndarray) -> float:
    """Relative error, root mean square."""
    return float(np.linalg.norm(u - reference) / np.linalg.norm(reference))


def fewest_cycles(u: np.ndarray, t: float, reference: np.ndarray, tolerance: float) -> int:
    """How many FED cycles reach the tolerance."""
    for cycles in (5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320):
        if distance(fed(u, t, cycles), reference) <= tolerance:
            return cycles
    raise RuntimeError(f"no number of cycles reaches {tolerance} at t = {t}")


def fed(u: np.ndarray, t: float, cycles: int) -> np.ndarray:
    return diffuse(u, t, contrast=CONTRAST, conductance="exponential", step=t / cycles)


MOST_STEPS = 400  # that a peer is timed for; more would cost in proportion


def time_to_error(size: int, times: list[float], rounds: int, tolerance: float = 1e-2) -> None:
    """FED with as few cycles as the tolerance allows, against explicit steps as long as stability allows."""
    u, rows = picture(size, size), []
    for t in times:
        reference = diffuse(u, t, contrast=CONTRAST, conductance="exponential", scheme="explicit", step=0.05)
        cycles = fewest_cycles(u, t, reference, tolerance)
        steps = math.ceil(t / 0.25)
        timed = min(steps, MOST_STEPS)
        ours = f"this book, FED, {cycles} cycles"
        runs = {ours: lambda t=t, cycles=cycles: fed(u, t, cycles)}
        runs |= {name: lambda run=EXPLICIT[name], timed=timed: run(u, timed)
                 for name in ("medpy", "SimpleITK") if name in EXPLICIT}
        seconds = medians(runs, rounds)
        errors = {ours: f"{distance(runs[ours](), reference):.1e}", "SimpleITK": "other equation"}
        if "medpy" in runs:
            errors["medpy"] = f"{distance(explicit_medpy(u, steps), reference):.1e}"
        for name, s in seconds.items():
            s *= 1 if name == ours else steps / timed
            title = name if name == ours else f"{name}, {steps} steps"
            rows.append([f"{t:g}", title, errors[name], f"{s:.3f}", f"{s / seconds[ours]:.1f}"])
    print(f"### Time to an error of {tolerance:g} against steps of 0.05, {size} × {size}\n")
    print(f"(Of a peer's steps at most {MOST_STEPS} are timed, and the rest is taken to cost in proportion.)\n")
    table(["t", "", "error", "s", "times ours"], rows)


def growth(sizes: list[tuple[int, ...]], rounds: int) -> None:
    pictures = {" × ".join(map(str, size)): picture(*size) for size in sizes}
    seconds = medians({name: lambda u=u: fed(u, 5.0, 5) for name, u in pictures.items()}, rounds)
    each = {name: s / pictures[name].size for name, s in seconds.items()}
    first = next(iter(each.values()))
    print("### Growth with the size: FED, t = 5, 5 cycles (a volume needs more steps in a cycle)\n")
    table(["size", "s", "ns a pixel", "ratio"],
          [[name, f"{seconds[name]:.3f}", f"{1e9 * s:.0f}", f"{s / first:.2f}"] for name, s in each.items()])


def directions(size: int, rounds: int) -> None:
    u, t = picture(size, size), 4.0
    runs = {"this book, coherence_enhance": lambda: coherence_enhance(u, t)}
    if find_spec("diplib"):
        import diplib
        steps = round(t / 0.2)
        runs[f"DIPlib, {steps} iterations"] = lambda: diplib.CoherenceEnhancingDiffusion(diplib.Image(u), 1, 3, steps)
    seconds = medians(runs, rounds)
    ours = next(iter(seconds.values()))
    print(f"### Coherence-enhancing diffusion, t = {t:g}, {size} × {size}\n")
    table(["", "s", "times ours"], [[name, f"{s:.2f}", f"{s / ours:.1f}"] for name, s in seconds.items()])


MODES = {
    "FED, t = 5": lambda u: diffuse(u, 5.0, contrast=CONTRAST),
    "AOS, t = 5": lambda u: diffuse(u, 5.0, contrast=CONTRAST, scheme="aos"),
    "explicit, t = 5": lambda u: diffuse(u, 5.0, contrast=CONTRAST, scheme="explicit"),
    "automatic": lambda u: diffuse(u),
}


def peak(mode: str, size: list[int]) -> float:
    """Most memory that a run needs beyond the picture, in pictures. Linux only; to be called in a fresh process."""
    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

    run, u = MODES[mode], picture(*size)
    run(picture(*[n // 8 for n in size]))  # what a first run loads is not the picture's
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = resident("VmRSS")
    run(u)
    return (resident("VmHWM") - before) / u.nbytes


def memory(sizes: list[tuple[int, ...]], rounds: int) -> None:
    """The median of some runs, each in a process of its own: the allocator's luck moves it by a picture or two."""
    rows = []
    for mode in MODES:
        rows.append([mode])
        for size in sizes:
            command = [sys.executable, __file__, "--peak", mode, *map(str, size)]
            peaks = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                     for _ in range(rounds)]
            rows[-1].append(f"{statistics.median(peaks):.1f}")
    print("### Peak memory beyond the picture, as a multiple of the picture\n")
    table(["", *[" × ".join(map(str, size)) for size in sizes]], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small pictures and one round")
    parser.add_argument("--peak", nargs="+", metavar="MODE SIZE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        mode, *size = arguments.peak
        print(f"{peak(mode, list(map(int, size))):.1f}")
        return
    quick = arguments.quick
    print(f"{torch.get_num_threads()} threads\n")
    each_iteration(96 if quick else 512, 1 if quick else 9)
    time_to_error(64 if quick else 512, [5.0, 20.0] if quick else [50.0, 1000.0], 1 if quick else 2)
    growth([(64, 64), (128, 128), (16, 16, 16)] if quick
           else [(256, 256), (512, 512), (1024, 1024), (2048, 2048), (128, 128, 128)], 1 if quick else 5)
    directions(64 if quick else 512, 1 if quick else 3)
    memory([(256, 256)] if quick else [(512, 512), (2048, 2048), (128, 128, 128)], 1 if quick else 7)


if __name__ == "__main__":
    main()
