"""Train for some iterations in a precision, and check that the model learns."""

import math
import statistics
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from ...engine.launch import build_runner

END = 20  # iterations at the beginning and at the end, whose means are compared
FALL, NEAR = 0.8, 0.1  # loss at the end over that at the beginning; distance of query ratio and budget


class Record(Hook):
    """Keep the losses of each iteration, scaled or not."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses.append({name: outputs[name].item() for name in ('loss', 'query_ratio')})


def adapted(cfg: Config, data: Path, work_dir: Path, dtype: str, iterations: int, batch: int) -> Config:
    """A config of the demo's classifiers, for iterations instead of epochs and without a validation."""
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
    wrong = [
        f'the loss of iteration {i + 1} is {entry["loss"]}'
        for i, entry in enumerate(losses)
        if not math.isfinite(entry['loss'])
    ][:1]
    if not last < FALL * first:
        wrong.append(f'the loss fell from {first:.3f} to {last:.3f} only')
    if not abs(ratio - budget) < NEAR:
        wrong.append(f'the query ratio is {ratio:.3f}, the budget {budget}')
    # NaN is no JSON.
    return dict(
        iterations=len(losses),
        query_ratio=ratio,
        budget=budget,
        wrong=wrong,
        **{
            name: value if math.isfinite(value) else str(value)
            for name, value in (('first_loss', first), ('last_loss', last))
        },
    )


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
