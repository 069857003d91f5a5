"""Time the rows of a table side by side, on a quiet machine: an image in test, and an iteration of training."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from ..engine.launch import build_runner
from .budget import evenly_spaced
from .flops import build_model
from .latency import interleaved_times, ratio
from .results import Results, Run

IMAGES = 100  # of a data set, evenly spaced
LARGE_IMAGES = 8  # if each is a batch of its own
ITERATIONS, WARMUP = 30, 5


def weights_of(results: Results, run: Run) -> Path:
    """The weights that a run is tested with."""
    return results.folder(run if run.row.train else Run(results.rows[run.row.start], run.seed)) / 'weights.pth'


def trained_model(results: Results, run: Run) -> nn.Module:
    """The model of a run that is done, in evaluation mode."""
    cfg = results.settings(run.row)
    cfg.model.backbone.pop('init_cfg', None)
    model = build_model(cfg)
    load_checkpoint(model, str(weights_of(results, run)), map_location='cpu')
    return model.eval()


def time_tests(results: Results, runs: list[Run], rounds: int = 7) -> dict[str, dict[str, float]]:
    """Time the models of a table on the same images, in turns.

    Args:
        results: where their weights are.
        runs: of one data set, all done.
        rounds: how often each runs.

    Returns:
        for each row ``milliseconds`` of the whole model for an image, the median of the rounds, and ``times_dense``,
        the median of the ratios to the row that it is beside in the same rounds, if that is among them.
    """
    cfg = results.settings(runs[0].row)
    init_default_scope(cfg.default_scope)
    loader = cfg.test_dataloader
    most = IMAGES if loader.batch_size > 1 else LARGE_IMAGES
    batches = list(evenly_spaced(Runner.build_dataloader(loader), most))
    images = sum(len(batch['data_samples']) for batch in batches)

    def test(model: nn.Module) -> None:
        with torch.inference_mode():
            for batch in batches:
                model.test_step(batch)

    cases: dict[str, Callable[[], None]] = {run.row.name: partial(test, trained_model(results, run)) for run in runs}
    times = interleaved_times(cases, rounds)
    found = {name: dict(milliseconds=1e3 * statistics.median(runs) / images) for name, runs in times.items()}
    for run in runs:
        if run.row.beside in times:
            found[run.row.name]['times_dense'] = ratio(times, run.row.name, run.row.beside)
    return found


class Enough(Exception):
    """Ends a training that has been timed."""


class TimingHook(Hook):
    """Ends a training after some iterations and keeps the seconds that each took, but for the first.

    Args:
        iterations: in all.
        warmup: of them, that are not kept; fewer, if the training is shorter.
    """

    priority = 'LOWEST'

    def __init__(self, iterations: int = ITERATIONS, warmup: int = WARMUP) -> None:
        self.iterations, self.warmup = iterations, warmup
        self.ends: list[float] = []

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        self.ends.append(time.perf_counter())
        if len(self.ends) == self.iterations:
            raise Enough

    @property
    def seconds(self) -> list[float]:
        """Of each iteration."""
        ends = self.ends[min(self.warmup, len(self.ends) - 2) :]
        return [after - before for before, after in itertools.pairwise(ends)]


def time_training(results: Results, run: Run, folder: Path, iterations: int = ITERATIONS) -> float:
    """Seconds of a training iteration, the median of some, with all that hooks do.

    A training from scratch goes on from its own weights, so that its routers choose as they do for the most part of it.
    """
    cfg = results.run_settings(run)
    cfg.load_from = cfg.load_from or str(weights_of(results, run))
    cfg.work_dir, cfg.log_level = str(folder), 'ERROR'
    hook = TimingHook(iterations)
    runner = build_runner(cfg)
    runner.register_hook(hook)
    with contextlib.suppress(Enough):
        runner.train()
    return statistics.median(hook.seconds)


def time_table(results: Results, runs: list[Run], folder: Path) -> dict[str, dict[str, Any]]:
    """All times of a table's rows: see :func:`time_tests` and :func:`time_training`.

    Args:
        results: where their weights are.
        runs: of a table, all done. Dense rows of other tables that they are beside are timed with them.
        folder: for logs.
    """
    names = {run.row.name for run in runs}
    others = [
        Run(results.rows[name], runs[0].seed)
        for name in dict.fromkeys(run.row.beside for run in runs if run.row.beside not in (None, *names))
    ]
    found: dict[str, dict[str, Any]] = time_tests(
        results, [*runs, *(run for run in others if results.state(run) == 'done')]
    )
    for run in runs:
        found[run.row.name]['digest'] = results.digest(run)
        if run.row.train:
            found[run.row.name]['seconds_per_iteration'] = time_training(results, run, folder)
    return {run.row.name: found[run.row.name] for run in runs}
