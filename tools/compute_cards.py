"""Measure chapters and write the numbers into their compute cards.

    python tools/compute_cards.py                         (every chapter of book/, on a machine that does nothing else)
    python tools/compute_cards.py book/01_heat.ipynb ...   (some)
    python tools/compute_cards.py --gpu                    (adds the minutes on this machine's GPU, keeps the rest)

Each notebook runs alone on at most two CPU cores. The sentence that begins with **Compute card:** is the marked place;
what the author says after it stays. Minutes are rounded up to halves, so that a second measurement seldom changes them.
"""
import argparse
import math
import os
import re
import sys
from pathlib import Path

import nbformat
import torch
from clean_notebooks import clean
from run_alone import run_alone

ROOT = Path(__file__).resolve().parents[1]
CARD = re.compile(r"\*\*Compute card:\*\* at most (?P<cpu>half a minute|[\d.]+ minutes?) on (?P<cores>one CPU core|"
                  r"two CPU cores)(?P<gpu>, [^,]+ on an? [^,]+,)?(?P<memory> and \d+\.\d GB of memory)?, "
                  r"everything included\.")


def minutes(seconds):
    """Say a time, rounded up to half minutes."""
    halves = max(1, math.ceil(seconds / 30))
    return "half a minute" if halves == 1 else f"{halves / 2:g} minute{'s' * (halves > 2)}"


def write(cpu, cores, gpu, memory):
    """Write a card of the texts that `CARD` finds; `gpu` and `memory` may be None."""
    return f"**Compute card:** at most {cpu} on {cores}{gpu or ''}{memory or ''}, everything included."


def card(path):
    """Return the parts of the one card in the notebook at `path`."""
    cells = nbformat.read(path, as_version=4).cells
    found = [match for cell in cells if cell.cell_type == "markdown" for match in CARD.finditer(cell.source)]
    if len(found) != 1:
        example = write("1.5 minutes", "two CPU cores", None, " and 0.8 GB of memory")
        raise ValueError(f"{path.name} must hold one compute card, found {len(found)}; write it like: {example}")
    return found[0].groupdict()


def update(path, **parts):
    """Replace `parts` of the notebook's card, and return the new card."""
    new = write(**(card(path) | parts))
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = CARD.sub(new, cell.source)
    path.write_text(clean(nbformat.writes(notebook)), encoding="utf-8")
    return new


def measure(path, gpu):
    """Run the notebook and return the parts of its card that the run says something about."""
    if gpu:
        run = run_alone(path)
        parts = {"gpu": f", {minutes(run.seconds)} on an {torch.cuda.get_device_name()},"}
    else:
        cores = sorted(os.sched_getaffinity(0))[:2]
        os.sched_setaffinity(0, cores)  # the kernel inherits it
        run = run_alone(path, environment=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(len(cores))})
        parts = {"cpu": minutes(run.seconds), "cores": ["one CPU core", "two CPU cores"][len(cores) - 1],
                 "memory": f" and {math.ceil(run.memory / 1e8) / 10:.1f} GB of memory"}
    if run.error:
        sys.exit(f"{path.name} failed: {run.error}")
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of book/")
    parser.add_argument("--gpu", action="store_true", help="measure the minutes on this machine's GPU")
    parser.add_argument("--anyway", action="store_true", help="measure though the machine is busy")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        sys.exit("--gpu needs a CUDA device; PyTorch finds none.")
    if os.getloadavg()[0] > 0.7 and not arguments.anyway:
        sys.exit(f"Other programs keep this machine busy (load {os.getloadavg()[0]:.1f}), so times would be too long; "
                 "wait until it is idle, or say --anyway.")
    for path in arguments.notebooks or sorted((ROOT / "book").glob("*.ipynb")):
        print(path.name, update(path, **measure(path, arguments.gpu)), flush=True)


if __name__ == "__main__":
    main()
