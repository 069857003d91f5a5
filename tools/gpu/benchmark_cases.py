"""Time on a GPU what matters most first, and keep each result as soon as it is known.

The cases are benchmark.py's. One that fails keeps its error, and the others go on; one that leaves the device unusable
makes the tool begin again behind it. Cases that the file of results has already are left out.
"""
import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Iterator

import torch
from results import ROOT, load, save, short

sys.path.insert(0, str(ROOT / 'tools/analysis_tools'))
import benchmark  # noqa: E402

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


def cases(only: int | None = None) -> Iterator[dict]:
    """The cases with each type, the first ``only`` of them; names and entries are those of a group of benchmark.py."""
    found = [dict(suite=suite, arch=arch, shape=list(shape), batch=batch, dtype=dtype)
             for dtype in DTYPES for suite, arch, shape, batch in CASES]
    return iter(found[:only])


def is_usable(device: str) -> bool:
    """Whether the device still computes; an access to memory that is not there ends a process's use of it."""
    try:
        return bool(torch.ones(1, device=device).item())
    except RuntimeError:
        return False


def measure(case: dict, device: str, rounds: int) -> dict:
    """The rows of a case, or its error."""
    # benchmark.py runs the cases of some suites more often.
    rounds = max(1, rounds // benchmark.SUITES[case['suite']].get('runs', 1))
    args = benchmark.parse(['--suite', case['suite'], '--device', device, '--dtype', case['dtype'], '--patterns',
                            'clustered', '--rounds', str(rounds)])
    try:
        return {**benchmark.measure(case['suite'], case['arch'], case['shape'], case['batch'], args), **case}
    except Exception as error:  # whatever it is, the other cases are worth their time
        return {**case, 'error': short(f'{type(error).__name__}: {error}'), 'rows': {}}
    finally:
        if device == 'cuda' and is_usable(device):
            torch.cuda.empty_cache()


def run(file: Path, device: str, rounds: int, only: int | None, again=None) -> None:
    """Measure the cases that a file of results lacks.

    Args:
        file: the results, whose section ``benchmark`` gets the group of each case.
        device: what computes.
        rounds: measured runs of each case.
        only: number of cases, of all if None.
        again: called without arguments when the device is no longer usable.
    """
    result = load(file, 'benchmark', {})
    if not result:
        result = dict(device=device, rounds=rounds, query_ratio=0.5, environment=benchmark.environment(device),
                      limits=benchmark.limits(device, side=8192, megabytes=4096) if device == 'cuda' else {}, groups=[])
        save(file, 'benchmark', result)
    done = [{key: group[key] for key in ('suite', 'arch', 'shape', 'batch', 'dtype')} for group in result['groups']]
    for case in cases(only):
        if case in done:
            continue
        group = measure(case, device, rounds)
        result['groups'].append(group)
        save(file, 'benchmark', result)
        print(f'\n{case["suite"]} {case["dtype"]}\n{group.get("error") or benchmark.table([group])}', flush=True)
        if again and not is_usable(device):
            again()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='results.json')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda')
    parser.add_argument('--rounds', type=int, default=20, help='runs of each case')
    parser.add_argument('--only', type=int, help='the first cases alone')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('benchmark_cases.py: no device: torch finds no CUDA device.')
    run(args.results, args.device, args.rounds, args.only,
        again=partial(os.execv, sys.executable, [sys.executable, *sys.argv]))


if __name__ == '__main__':
    main()
