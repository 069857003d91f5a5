"""Train and test a list of rows with several seeds, one run after the other, so that it can go on after a kill."""

import contextlib
import copy
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from ..engine.command import read_config
from ..engine.launch import build_runner
from .budget import dynamic_backbone, evaluate, measure_prices, model_and_loop, set_mode
from .latency import environment

# What of a config a result depends on.
TESTED = ('model', 'test_dataloader', 'test_evaluator')
TRAINED = (*TESTED, 'train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'custom_hooks')
CALIBRATED = 256  # images that prices are measured on
# The metric that a table shows is the first of these.
MAIN_METRICS = ('cf/top1', 'accuracy/top1', 'mIoU', 'coco/bbox_mAP_50')


@dataclass(frozen=True)
class Row:
    """What a row of the page is trained and tested by; configs/results/rows.py explains the fields."""

    name: str
    config: str
    table: str
    label: str
    parts: tuple[str | dict, ...] = ()
    start: str | None = None
    backbone: str | None = None
    train: bool = True
    budgets: tuple[float, ...] = ()
    beside: str | None = None
    turn: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def needs(self) -> list[str]:
        """The rows whose weights it starts from."""
        return [name for name in (self.start, self.backbone) if name]


class Run(NamedTuple):
    """A row with a seed."""

    row: Row
    seed: int

    def __str__(self) -> str:
        return f'{self.row.name} seed {self.seed}'


def read_rows(path: str | Path) -> dict[str, Row]:
    """The rows of a list, by name.

    Raises:
        ValueError: for a list that is missing or empty, a row with a field too few or too many, two of one name, and a
            row that starts from none of the list.
    """
    if not Path(path).is_file():
        raise ValueError(f'There is no list of rows {path}: give one like configs/results/rows.py.')
    entries, rows = Config.fromfile(path).get('rows'), {}
    if not entries:
        raise ValueError(f'{path} has no rows: write rows = [dict(name=..., config=..., table=..., label=...), ...].')
    known = [field.name for field in fields(Row)]
    for entry in entries:
        name = entry.get('name')
        wrong = [key for key in entry if key not in known]
        absent = [key for key in known[:4] if not entry.get(key)]
        if wrong or absent:
            problem = f'has no {", ".join(absent)}' if absent else f'has {", ".join(wrong)}'
            raise ValueError(f'{path}: the row {name!r} {problem}: a row has {", ".join(known)}.')
        if name in rows:
            raise ValueError(f'{path}: two rows have the name {name!r}.')
        lists = {key: tuple(entry[key]) for key in ('parts', 'seeds', 'budgets') if key in entry}
        rows[name] = Row(**{**entry, **lists})
        for other in [*rows[name].needs, *filter(None, [rows[name].beside])]:
            if other not in [row['name'] for row in entries]:
                raise ValueError(f'{path}: the row {name!r} needs {other!r}, which is none of the rows.')
        if not rows[name].train and not rows[name].start:
            raise ValueError(f'{path}: the row {name!r} with train=False needs a start, whose weights are tested.')
        if rows[name].train and rows[name].budgets:
            raise ValueError(f'{path}: the row {name!r} has budgets, at which weights are tested: write train=False.')
    return rows


def choose(rows: dict[str, Row], only: Iterable[str] | None, seeds: Iterable[int] | None = None) -> list[Run]:
    """The runs in the order of their turns, each behind those that it starts from.

    Args:
        rows: all of the list.
        only: beginnings of names; None for all rows. What they start from is added.
        seeds: in place of those of the rows.

    Raises:
        ValueError: for a beginning of no row, and for rows that start from each other.
    """
    for beginning in only or ():
        if not any(name.startswith(beginning) for name in rows):
            raise ValueError(f'--only {beginning}: no row begins so. There are: {", ".join(rows)}.')
    chosen = [row for row in rows.values() if only is None or row.name.startswith(tuple(only))]
    given = None if seeds is None else tuple(seeds)
    places = {name: place for place, name in enumerate(rows)}
    wanted = sorted(
        (Run(row, seed) for row in chosen for seed in given or row.seeds),
        key=lambda run: (run.row.turn, run.seed, places[run.row.name]),
    )
    queue: dict[tuple[str, int], Run] = {}

    def add(run: Run, behind: tuple[str, ...]) -> None:
        if run.row.name in behind:
            raise ValueError(f'Rows start from each other: {" from ".join([*behind, run.row.name])}.')
        for name in run.row.needs:
            add(Run(rows[name], run.seed), (*behind, run.row.name))
        queue.setdefault((run.row.name, run.seed), run)

    for run in wanted:
        add(run, ())
    return list(queue.values())


def settings(row: Row, cfg: Config) -> Config:
    """The config of a row: a copy with its parts merged into it.

    Raises:
        ValueError: if it has not one of the parts.
    """
    cfg = copy.deepcopy(cfg)
    for part in row.parts:
        if isinstance(part, str) and not isinstance(cfg.get(part), dict):
            raise ValueError(f'The row {row.name!r} has the part {part!r}, which is no dict in {row.config}.')
        options = cfg[part] if isinstance(part, str) else part
        cfg.merge_from_dict(copy.deepcopy(dict(options)))
    return cfg


class Results:
    """The runs of a list in a folder.

    Args:
        rows: by name.
        configs: folder of their configs.
        work_dir: where each run has a folder, with its log, its checkpoints and, when it is done, ``weights.pth`` and
            ``result.json``.

    Attributes:
        configs: the config of each row.
    """

    def __init__(self, rows: dict[str, Row], configs: str | Path, work_dir: str | Path) -> None:
        self.rows, self.work_dir = rows, Path(work_dir)
        # All read at once, so that they can be edited while runs take hours.
        files = {name: read_config(Path(configs) / name) for name in {row.config for row in rows.values()}}
        self.configs = {name: settings(row, files[row.config]) for name, row in rows.items()}

    def folder(self, run: Run) -> Path:
        """Of a run."""
        return self.work_dir / run.row.name / f'seed{run.seed}'

    def settings(self, row: Row) -> Config:
        """A copy of the config of a row."""
        return copy.deepcopy(self.configs[row.name])

    def digest(self, run: Run) -> str:
        """What a run depends on, as one number: its config, its seed, and the same of what it starts from."""
        cfg = self.configs[run.row.name]
        parts = {name: cfg.get(name) for name in (TRAINED if run.row.train else TESTED)}
        if run.row.budgets:
            parts['budgets'] = run.row.budgets
        before = [self.digest(Run(self.rows[name], run.seed)) for name in run.row.needs]
        text = json.dumps([parts, run.seed, before], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def result(self, run: Run) -> dict | None:
        """What a run has found, if it is done."""
        file = self.folder(run) / 'result.json'
        return json.loads(file.read_text()) if file.is_file() else None

    def publish(self, run: Run, folder: Path) -> None:
        """Copy what a run has found into a folder."""
        copied = folder / f'{run.row.name}-seed{run.seed}.json'
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.folder(run) / 'result.json', copied)

    def state(self, run: Run) -> str:
        """``done``, ``begun``, ``open``, or ``changed``: its config is no longer the one that it was begun with."""
        begun = self.folder(run) / 'digest'
        if not begun.is_file():
            return 'open'
        if begun.read_text() != self.digest(run):
            return 'changed'
        return 'done' if self.result(run) else 'begun'

    def check_data(self, runs: Iterable[Run]) -> None:
        """See that the data are there.

        Raises:
            ValueError: it says what brings them.
        """
        for run in runs:
            cfg = self.configs[run.row.name]
            for dataset in (cfg.train_dataloader.dataset, cfg.test_dataloader.dataset):
                prefix = dataset.get('data_prefix', '')
                for name in prefix.values() if isinstance(prefix, dict) else [prefix]:
                    folder = Path(dataset.data_root) / name
                    if not folder.is_dir():
                        brings = cfg.get('data_source', 'docs/data.md tells how to get it')
                        raise ValueError(f'There is no folder {folder}, which {run.row.name} needs: {brings}.')

    def run_settings(self, run: Run) -> Config:
        """The config that a run is built by, if it begins."""
        cfg = self.settings(run.row)
        weights = {name: str(self.folder(Run(self.rows[name], run.seed)) / 'weights.pth') for name in run.row.needs}
        cfg.load_from = weights.get(run.row.start)
        if run.row.backbone:
            start = dict(type='Pretrained', checkpoint=weights[run.row.backbone], prefix='backbone.')
            cfg.model.backbone.init_cfg = start
        cfg.work_dir, cfg.launcher, cfg.randomness = str(self.folder(run)), 'none', dict(seed=run.seed)
        # Tested once, at the end: nothing is chosen by what it reaches.
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.test_cfg = cfg.get('test_cfg') or dict()
        if not run.row.train:
            cfg.train_cfg = cfg.train_dataloader = cfg.optim_wrapper = cfg.param_scheduler = None
            cfg.custom_hooks = []
        return cfg

    def prepare(self, run: Run) -> Config:
        """The config to begin or to go on with; what an earlier run with another config left is removed."""
        folder = self.folder(run)
        if self.state(run) == 'changed':
            for file in (*folder.glob('*.pth'), *folder.glob('*.json'), folder / 'last_checkpoint'):
                file.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'digest').write_text(self.digest(run))
        cfg = self.run_settings(run)
        if run.row.train and (folder / 'last_checkpoint').is_file():
            cfg.resume, cfg.load_from = True, None
        return cfg

    def execute(self, run: Run) -> dict:
        """Train, or go on with training, then test and write down what is found."""
        cfg, folder = self.prepare(run), self.folder(run)
        runner = build_runner(cfg)
        if run.row.train:
            runner.train()
        metrics = {name: float(value) for name, value in runner.test().items()}
        at_budgets = {}
        if run.row.budgets:
            at_budgets = test_at_budgets(runner, cfg.load_from, run.row.budgets)
        result = dict(
            row=run.row.name,
            seed=run.seed,
            digest=self.digest(run),
            iterations=runner.max_iters if run.row.train else 0,
            parameters=sum(weight.numel() for weight in runner.model.parameters()),
            metrics=metrics,
            **at_budgets,
            environment=environment(),
        )
        if run.row.train:
            runner.save_checkpoint(str(folder), 'weights.pth', save_optimizer=False, save_param_scheduler=False)
        part = folder / 'result.part'
        part.write_text(json.dumps(result, indent=1) + '\n')
        part.rename(folder / 'result.json')
        for file in [*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth'), folder / 'last_checkpoint']:
            file.unlink(missing_ok=True)
        return result


def test_at_budgets(runner: Runner, weights: str, budgets: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
    """``budgets``: what weights reach at each, at prices that make it on average; metrics as those of a test."""
    model, loop = model_and_loop(runner, weights)
    prices, found = measure_prices(model, loop.dataloader, budgets, CALIBRATED), []
    for budget in budgets:
        set_mode(dynamic_backbone(model), 'average', budget, prices)
        tested = evaluate(model, loop.dataloader, loop.evaluator)
        del tested['milliseconds']  # many such processes may share a machine
        costs = {f'flops/{name}': tested.pop(name) for name in ('query_ratio', 'gflops')}
        costs |= {f'flops/query_ratio/{name}': ratio for name, ratio in tested.pop('layers').items()}
        found.append(dict(budget=budget, metrics=tested | costs))
    return dict(budgets=found)


@contextlib.contextmanager
def alone(work_dir: Path) -> Iterator[None]:
    """Hold a folder, so that no two processes train in it; a run that outlives its list holds it, too.

    Raises:
        ValueError: if another holds it.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with open(work_dir / 'lock', 'a+') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise ValueError(
                f'Another process trains in {work_dir} (process {lock.read().strip()}): wait for it, or end it.'
            ) from error
        note_process(work_dir)
        yield


def import_frameworks(results: Results) -> None:
    """Import what the configs are of, before processes are forked: each would spend seconds on it."""
    for scope in {cfg.default_scope for cfg in results.configs.values()}:
        for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization'):
            import_module(f'{scope}.{part}')


def note_process(work_dir: Path) -> None:
    """Write down who holds the folder."""
    (work_dir / 'lock').write_text(f'{os.getpid()}\n')


def in_child(results: Results, run: Run) -> None:
    """What a process of its own does for a run, with all that it prints in a file."""
    note_process(results.work_dir)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = results.folder(run) / 'output.txt'
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, 'a') as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
        torch.set_num_threads(1)
        results.execute(run)


def execute_apart(results: Results, run: Run) -> bool:
    """Do a run in a process of its own, on one thread; whether it is done.

    The process is forked, so that it need not import anything again; nothing of one run is left to the next.
    """
    process = multiprocessing.get_context('fork').Process(target=in_child, args=(results, run), daemon=True)
    process.start()
    process.join()
    note_process(results.work_dir)
    return process.exitcode == 0


def summary(metrics: dict[str, float]) -> str:
    """The metric that counts, and the queries, in a line."""
    shown = {name: metrics[name] for name in [main_metric(metrics), 'flops/query_ratio', 'flops/gflops'] if name}
    return ', '.join(f'{name} {value:.4g}' for name, value in shown.items())


def main_metric(metrics: dict[str, Any]) -> str:
    """The metric that a table shows."""
    return next(name for name in MAIN_METRICS if name in metrics)
