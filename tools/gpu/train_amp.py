"""Train PVT+DGE on the demo's digits for some iterations in a precision, and check that it learns.

The loss falls, no loss is NaN or infinite, and the query ratio comes near the budget.
"""
import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import mmdyn  # noqa: F401
import torch
from mmdyn.engine.launch import build_runner
from mmengine.config import Config
from mmengine.hooks import Hook
from results import ROOT, load, save, short

CONFIG = ROOT / 'configs/demo/pvt-mini-dge_digits.py'
END = 20  # iterations at the beginning and at the end, whose means are compared
FALL, NEAR = 0.8, 0.1  # loss at the end over that at the beginning; distance of query ratio and budget


class Record(Hook):
    """Keep the losses of each iteration, scaled or not."""
    priority = 'VERY_LOW'

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses.append({name: outputs[name].item() for name in ('loss', 'query_ratio')})


def config(data: Path, work_dir: Path, dtype: str, iterations: int, batch: int) -> Config:
    """The demo's config, for iterations instead of epochs and without a validation."""
    cfg = Config.fromfile(CONFIG)
    cfg.work_dir, cfg.train_dataloader.dataset.data_root = str(work_dir), str(data / 'imagenet')
    cfg.train_dataloader.batch_size = batch
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations)
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=END)]
    for part in ('val', 'test'):
        for what in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{part}_{what}'] = None
    if dtype != 'float32':
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype, loss_scale='dynamic')
    return cfg


def summary(losses: list, budget: float) -> dict:
    """What became of the losses, and what is wrong with it.

    Args:
        losses: ``loss`` and ``query_ratio`` of each iteration.
        budget: the query ratio that was aimed at.
    """
    first, last = (statistics.mean(entry['loss'] for entry in part) for part in (losses[:END], losses[-END:]))
    ratio = statistics.mean(entry['query_ratio'] for entry in losses[-END:])
    wrong = [f'the loss of iteration {i + 1} is {entry["loss"]}' for i, entry in enumerate(losses)
             if not math.isfinite(entry['loss'])][:1]
    if not last < FALL * first:
        wrong.append(f'the loss fell from {first:.3f} to {last:.3f} only')
    if not abs(ratio - budget) < NEAR:
        wrong.append(f'the query ratio is {ratio:.3f}, the budget {budget}')
    # NaN is no JSON.
    return dict(iterations=len(losses), query_ratio=ratio, budget=budget, wrong=wrong,
                **{name: value if math.isfinite(value) else str(value)
                   for name, value in (('first_loss', first), ('last_loss', last))})


def train(cfg: Config) -> dict:
    """Train, and return the summary with seconds of an iteration."""
    torch.manual_seed(0)
    runner, record = build_runner(cfg), Record()
    runner.register_hook(record)
    start = time.perf_counter()
    runner.train()
    seconds = (time.perf_counter() - start) / len(record.losses)
    budget = next(hook['budget'] for hook in cfg.custom_hooks if hook['type'] == 'mmdyn.BudgetHook')
    return {**summary(record.losses, budget), 'seconds': seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', type=Path, help='results.json')
    parser.add_argument('--data', type=Path, default=Path('data/demo'), help='what make_demo_dataset.py wrote')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/gpu'))
    parser.add_argument('--dtype', choices=('float16', 'bfloat16', 'float32'), nargs='+',
                        default=['float16', 'bfloat16'])
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
            found = train(config(args.data, args.work_dir / dtype, dtype, args.iterations, args.batch))
        except Exception as error:  # the other precision is worth its time
            found = dict(wrong=[short(f'{type(error).__name__}: {error}')])
        save(args.results, 'training', {**load(args.results, 'training', {}), dtype: found})
        print(f'{dtype}: {found}', flush=True)
        wrong += len(found['wrong'])
    sys.exit(min(wrong, 1))


if __name__ == '__main__':
    main()
