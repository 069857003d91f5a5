"""Time on a GPU what matters most first, and keep each result as soon as it is known."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import benchmark
from ..latency import environment, limits
from ..report import table
from .results import load, save, short

DET, SEG = (800, 1280), (512, 2048)
CASES = (  # suite, model, shape and number of the images
    ('det', 'PVT-small', DET, 1),
    ('cls', 'PVT-small', (224, 224), 64),
    ('cls', 'DeiT-small', (224, 224), 64),
    ('train', 'PVT-small', (256, 256), 64),
    ('det', 'DPVT-small', DET, 1),
    ('cls', 'PVT-small', (224, 224), 1),
    ('cls', 'DeiT-small', (224, 224), 1),
    ('cfvit', 'DeiT-small', (224, 224), 1024),
    ('seg', 'PVT-small', SEG, 1),
    ('det', 'PVT-medium', DET, 1),
    ('seg', 'DPVT-small', SEG, 1),
    ('seg', 'PVT-medium', SEG, 1),
    ('det', 'DPVT-medium', DET, 1),
    ('seg', 'DPVT-medium', SEG, 1),
    ('cls', 'PVT-small', (256, 256), 64),
    ('cls', 'DeiT-small', (256, 256), 64),
    ('cls', 'PVT-small', (256, 256), 1),
    ('cls', 'DeiT-small', (256, 256), 1),
)
DTYPES = ('float16', 'tf32', 'bfloat16', 'float32')
LIMIT = 45  # seconds of a case, of which the first ones compile programs


def cases(only: int | None = None) -> Iterator[dict]:
    """The cases with each type, the first ``only`` of them; names and entries are those of a group of benchmark.py."""
    found = [
        dict(suite=suite, arch=arch, shape=list(shape), batch=batch, dtype=dtype)
        for dtype in DTYPES
        for suite, arch, shape, batch in CASES
    ]
    return iter(found[:only])


def is_usable(device: str) -> bool:
    """Whether the device still computes; an access to memory that is not there ends a process's use of it."""
    try:
        return bool(torch.ones(1, device=device).item())
    except RuntimeError:
        return False


def measure(case: dict, device: str, rounds: int) -> dict:
    """The rows of a case, or its error."""
    # The cases of some suites run more often.
    rounds = max(1, rounds // benchmark.SUITES[case['suite']].get('runs', 1))
    options = benchmark.Options(device, case['dtype'], rounds, patterns=('clustered',))
    try:
        return {**benchmark.measure(case['suite'], case['arch'], case['shape'], case['batch'], options), **case}
    except Exception as error:  # whatever it is, the other cases are worth their time
        return {**case, 'error': short(f'{type(error).__name__}: {error}'), 'rows': {}}
    finally:
        if device == 'cuda' and is_usable(device):
            torch.cuda.empty_cache()


@contextmanager
def limited(seconds: float, otherwise: Callable[[], object]) -> Iterator[None]:
    """Call a function, in another thread, if what is done here takes too long, stuck in a compiler or a device."""
    timer = threading.Timer(seconds, otherwise)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run(file: Path, device: str, rounds: int, only: int | None, again: Callable[[], object] | None = None) -> None:
    """Measure the cases that a file of results lacks.

    Args:
        file: the results, whose section ``benchmark`` gets the group of each case.
        device: what computes.
        rounds: measured runs of each case.
        only: number of cases, of all if None.
        again: called without arguments when the device is no longer usable, or when a case takes too long.
    """
    result = load(file, 'benchmark', {})
    if not result:
        result = dict(
            device=device,
            rounds=rounds,
            query_ratio=0.5,
            environment=environment(device),
            limits=limits(device, side=8192, megabytes=4096) if device == 'cuda' else {},
            groups=[],
        )
        save(file, 'benchmark', result)
    done = [{key: group[key] for key in ('suite', 'arch', 'shape', 'batch', 'dtype')} for group in result['groups']]

    def keep(group: dict) -> None:
        result['groups'].append(group)
        save(file, 'benchmark', result)

    for case in cases(only):
        if case in done:
            continue

        def give_up(case=case) -> None:
            keep({**case, 'error': f'not finished after {LIMIT} s', 'rows': {}})
            if again:
                again()

        with limited(LIMIT, give_up):
            group = measure(case, device, rounds)
        keep(group)
        print(f'\n{case["suite"]} {case["dtype"]}\n{group.get("error") or table([group])}', flush=True)
        if again and not is_usable(device):
            again()
