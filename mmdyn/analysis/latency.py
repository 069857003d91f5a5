"""Times of alternatives, measured side by side."""
import statistics
import time
from typing import Callable, Dict, List

import torch


def interleaved_times(cases: Dict[str, Callable[[], object]], rounds: int = 5, warmup: int = 1) -> Dict[str, List[float]]:
    """Run the cases in turns, A B A B, so that whatever else the machine does meets all of them.

    Args:
        cases: a function for each name.
        rounds: measured runs of each case.
        warmup: runs of each case before.

    Returns:
        seconds of each measured run, by name.
    """
    def timed(run):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        return time.perf_counter() - start

    def synchronise():
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for run in cases.values():
        for _ in range(warmup):
            run()
    times = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            times[name].append(timed(run))
    return times


def ratio(times: Dict[str, List[float]], name: str, reference: str) -> float:
    """Median of the ratios of neighbouring runs, ``name`` over ``reference``."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference]))
