"""Train PVT+DGE on the demo's digits for some iterations in a precision, and check that it learns.

The loss falls, no loss is NaN or infinite, and the query ratio comes near the budget.
"""

import argparse
import sys
from pathlib import Path

import torch
from mmengine.config import Config

from mmdyn.analysis.gpu.results import load, save, short
from mmdyn.analysis.gpu.training import END, adapted, train

CONFIG = Path(__file__).parents[2] / 'configs/demo/pvt-mini-dge_digits.py'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', type=Path, help='results.json')
    parser.add_argument('--data', type=Path, default=Path('data/demo'), help='what make_demo_dataset.py wrote')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/gpu'))
    parser.add_argument(
        '--dtype', choices=('float16', 'bfloat16', 'float32'), nargs='+', default=['float16', 'bfloat16']
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cuda')
    parser.add_argument('--iterations', type=int, default=200)
    parser.add_argument('--batch', type=int, default=64)
    args = parser.parse_args()
    if args.iterations < 2 * END:
        parser.error(f'--iterations {args.iterations}: give at least {2 * END}.')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('train_amp.py: no device: torch finds no CUDA device.')
    if args.device == 'cpu' and args.dtype != ['float32']:
        parser.error('--device cpu: mmengine trains in half precision on accelerators only: add --dtype float32.')
    wrong = 0
    for dtype in args.dtype:
        try:
            found = train(
                adapted(Config.fromfile(CONFIG), args.data, args.work_dir / dtype, dtype, args.iterations, args.batch)
            )
        except Exception as error:  # the other precision is worth its time
            found = dict(wrong=[short(f'{type(error).__name__}: {error}')])
        save(args.results, 'training', {**load(args.results, 'training', {}), dtype: found})
        print(f'{dtype}: {found}', flush=True)
        wrong += len(found['wrong'])
    sys.exit(min(wrong, 1))


if __name__ == '__main__':
    main()
