"""One checkpoint, every budget: accuracy over multiply-adds and over time.

A price of queries moves a router's decisions to any budget, without training. This finds the prices of some budgets on
evenly spaced images of the config's test set (without their labels), and tests the checkpoint at each. Writes the
prices, prices.json for dge=dict(test_budget=0.4, prices=...), and sweep.json, sweep.csv and sweep.png.

Modes: `average` has one price for all images. With `exact` all images spend the same, each layer what it spends on
average at that budget. With `equal` they do, and all layers have an equal share. A line `router` is what the routers
decide by themselves.
"""

import argparse
import csv
import json
import math
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.config import DictAction
from mmengine.runner import Runner

import mmdyn  # noqa: F401
from mmdyn.analysis.budget import (
    MODES,
    budgets_of,
    dynamic_backbone,
    measure_prices,
    metric_of,
    model_and_loop,
    modes_of,
    sweep,
)
from mmdyn.engine.command import (
    check_checkpoint,
    check_has,
    command,
    names_apart,
    only_results,
    output_folder,
    read_config,
)
from mmdyn.engine.launch import build_tester
from mmdyn.visualization.curves import unit_of


def sweep_checkpoint(
    runner: Runner, args: argparse.Namespace, checkpoint: str, name: str, prices_file: Path
) -> list[dict]:
    """Calibrate and test one checkpoint, called ``name`` in its rows."""
    model, loop = model_and_loop(runner, checkpoint)
    backbone = dynamic_backbone(model)
    budgets, modes = budgets_of(backbone, args.budgets), modes_of(backbone, args.modes)
    if set(modes) - {'average'}:
        for budget in budgets:  # to say what is wrong before the work
            backbone.set_budget(budget)
    prices = measure_prices(model, loop.dataloader, budgets, args.images)
    prices_file.write_text(json.dumps(dict(prices._asdict(), checkpoint=Path(checkpoint).name, images=args.images)))
    rows = []
    for found in sweep(model, loop.dataloader, loop.evaluator, budgets, modes, prices):
        rows.append(dict(checkpoint=name, **found))
        metric_of(rows, args.metric)
    return rows


def line(row: dict, metric: str) -> str:
    """A row as a line of the table."""
    budget = '' if row['budget'] is None else f'{row["budget"]:g}'
    return (
        f'{row["checkpoint"][:19]:20}{row["mode"]:>10}{budget:>8}{row["query_ratio"]:9.3f}{row["gflops"]:10.4g}'
        f'{row["milliseconds"]:9.3g}  {row.get(metric, math.nan):.4g}'
    )


def draw(rows: list[dict], metric: str, path: Path) -> None:
    """Plot accuracy over multiply-adds and over time, a curve for each checkpoint and mode."""
    figure, colours = Figure(figsize=(10, 4), layout='constrained'), {}
    curves = list(dict.fromkeys((row['checkpoint'], row['mode']) for row in rows))
    for checkpoint, mode in sorted(curves, key=lambda curve: curve[1] == 'router'):
        # As the first curve of the checkpoint, which is known before.
        same = next((colours[of, other] for of, other in colours if of == checkpoint), None)
        colours[checkpoint, mode] = same if mode == 'router' and same else f'C{len(colours)}'
    giga, unit = unit_of(row['gflops'] for row in rows)
    for axes, name, factor, label in zip(
        figure.subplots(1, 2, sharey=True),
        ('gflops', 'milliseconds'),
        (giga, 1),
        (f'multiply-adds of the backbone ({unit})', 'time of the model for an image (ms)'),
    ):
        for checkpoint, mode in curves:
            points = [
                (factor * row[name], row.get(metric, math.nan))
                for row in rows
                if (row['checkpoint'], row['mode']) == (checkpoint, mode)
            ]
            style = dict(color=colours[checkpoint, mode], label=f'{checkpoint}, {mode}')
            axes.plot(*zip(*points), '*' if mode == 'router' else '.-', **style)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel=metric)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint', nargs='+', help='one or more, whose curves are drawn together')
    parser.add_argument(
        '--budgets', nargs='+', type=float, help='query ratios (default: 0.2, 0.3, ..., 1, if reachable)'
    )
    parser.add_argument('--modes', nargs='+', choices=MODES, help='default: all')
    parser.add_argument('--images', type=int, default=256, help='that prices are measured on (default: 256)')
    parser.add_argument('--metric', help='to show (default: mIoU, or the first that the evaluator finds)')
    parser.add_argument('--out', help='folder of the results (default: work_dirs/<name of the config>/budget)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='changes to the config')
    args = parser.parse_args()

    cfg = read_config(args.config, args.cfg_options)
    check_has(cfg, 'which tells what to test on', 'test_dataloader', 'test_evaluator')
    for checkpoint in args.checkpoint:
        check_checkpoint(checkpoint)
    if args.images < 1:
        raise ValueError(f'--images {args.images}: give the number of images that prices are measured on, at least 1.')
    out = output_folder(args.out or Path('work_dirs') / Path(args.config).stem / 'budget')
    runner, rows = build_tester(cfg, out), []
    for place, (checkpoint, name) in enumerate(zip(args.checkpoint, names_apart(args.checkpoint))):
        prices = 'prices.json' if len(args.checkpoint) == 1 else f'prices_{place}_{Path(checkpoint).stem}.json'
        rows += sweep_checkpoint(runner, args, checkpoint, name, out / prices)

    metric = metric_of(rows, args.metric)
    (out / 'sweep.json').write_text(json.dumps(dict(images=args.images, metric=metric, rows=rows), indent=1))
    with open(out / 'sweep.csv', 'w', newline='') as file:
        columns = dict.fromkeys(name for row in rows for name in row if name != 'layers')
        writer = csv.DictWriter(file, columns, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, metric, out / 'sweep.png')
    return '\n'.join(
        [
            f'{"checkpoint":20}{"mode":>10}{"budget":>8}{"queries":>9}{"G":>10}{"ms":>9}  {metric}',
            *(line(row, metric) for row in rows),
            f'prices, sweep.json, sweep.csv and sweep.png are in {out}',
        ]
    )


if __name__ == '__main__':
    main()
