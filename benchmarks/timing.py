"""What the benchmarks of this folder share: functions timed in turns, and a row of a table."""
import statistics
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import torch


def milliseconds(function: Callable[[], object], cuda: bool) -> float:
    """How long one call takes."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def in_turns(functions: Sequence[Callable[[], object]], rounds: int, *, cuda: bool = False) -> list[list[float]]:
    """Milliseconds of each function in each round; every other round runs backwards, so that nobody is always first."""
    times = [[] for _ in functions]
    for turn in range(rounds):
        for i in list(range(len(functions)))[:: -1 if turn % 2 else 1]:
            times[i].append(milliseconds(functions[i], cuda))
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the rounds' ratios; below 1 ours is faster."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def row(times: list[list[float]], *names: object) -> str:
    """One line of a table: names, the medians of ours and theirs, and their ratio."""
    ours, theirs = times
    cells = [*names, f"{statistics.median(ours):.1f}", f"{statistics.median(theirs):.1f}", f"{ratio(ours, theirs):.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def setting(peer: ModuleType, pairs: int, *, cuda: bool) -> str:
    """What stands above a table: versions, number of pairs, device."""
    where = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    return f"torch {torch.__version__}, {peer.__name__} {peer.__version__}, {pairs} interleaved pairs, {where}\n"
