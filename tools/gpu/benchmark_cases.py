"""Time on a GPU what matters most first, and keep each result as soon as it is known.

The cases are benchmark.py's. One that fails keeps its error, and the others go on; one that leaves the device unusable
makes the tool begin again behind it. Cases that the file of results has already are left out.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import torch

from mmdyn.analysis.gpu.cases import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', type=Path, help='results.json')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda')
    parser.add_argument('--rounds', type=int, default=20, help='runs of each case')
    parser.add_argument('--only', type=int, help='the first cases alone')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('benchmark_cases.py: no device: torch finds no CUDA device.')
    run(
        args.results,
        args.device,
        args.rounds,
        args.only,
        again=partial(os.execv, sys.executable, [sys.executable, *sys.argv]),
    )


if __name__ == '__main__':
    main()
