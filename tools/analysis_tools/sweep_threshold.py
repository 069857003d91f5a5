"""Tell what CF-ViT's confidence threshold trades: accuracy against multiply-adds of the backbone.

Runs both stages on each image of the config's test set once, and from that tells what every threshold would do. Writes
curve.json, curve.csv and curve.png. With --flops or --top1, finds the threshold to write into the config's
model.test_cfg.
"""

import argparse
import csv
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mmengine.config import DictAction

import mmdyn  # noqa: F401
from mmdyn.analysis.threshold import (
    Curve,
    cheapest,
    check_has_threshold,
    curve,
    most_accurate,
    operating_points,
    run_both_stages,
)
from mmdyn.engine.command import check_checkpoint, check_has, command, only_results, output_folder, read_config
from mmdyn.engine.launch import build_runner
from mmdyn.visualization.curves import label_points, stack_stages, unit_of

UNITS = dict(K=1e3, M=1e6, G=1e9)


def macs(text: str) -> int:
    """Multiply-adds such as 2.0G."""
    try:
        return round(float(text[:-1]) * UNITS[text[-1]])
    except (ValueError, KeyError, IndexError):
        raise argparse.ArgumentTypeError(f'{text!r}: give a number and K, M or G, e.g. 2.0G') from None


def line(point: dict) -> str:
    """A point as a line of the table."""
    return f'{point["threshold"]:10.6g}{point["exit_share"]:10.1%}{point["top1"]:10.2f}{point["macs"] / 1e9:18.4g}'


def draw(swept: Curve, chosen: dict, path: Path) -> None:
    """Plot accuracy over multiply-adds, with tenths of the threshold and the chosen points, and each stage's part."""
    figure = Figure(figsize=(10, 4), layout='constrained')
    axes, stages = figure.subplots(1, 2)
    factor, unit = unit_of(swept.macs / 1e9)
    axes.plot(swept.macs / 1e9 * factor, swept.top1)
    tens = [swept.point(index) for index in reversed(tenths(swept))]
    points = [(point['macs'] / 1e9 * factor, point['top1'], f'{point["threshold"]:g}') for point in tens]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], '.', color='C0')
    label_points(axes, points)
    axes.grid(alpha=0.3)
    for name, point in chosen.items():
        axes.plot(
            point['macs'] / 1e9 * factor,
            point['top1'],
            'o',
            mfc='none',
            label=f'{name}: threshold {point["threshold"]:.6g}',
        )
    if chosen:
        axes.legend(loc='lower right')
    axes.set(xlabel=f'multiply-adds of the backbone ({unit})', ylabel='top-1 accuracy (%)')
    stack_stages(stages, list(zip(swept.macs / 1e9, swept.coarse_right, swept.fine_right)))
    figure.savefig(path, dpi=150)


def tenths(swept: Curve) -> range:
    """Indices of the thresholds 0, 0.1, ..., 1."""
    return range(0, len(swept.threshold), (len(swept.threshold) - 1) // 10)


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', help='folder of the results (default: work_dirs/<name of the config>/threshold)')
    parser.add_argument('--flops', type=macs, help='find the most accurate threshold within this budget, e.g. 2.0G')
    parser.add_argument('--top1', type=float, help='find the cheapest threshold of at least this accuracy, e.g. 79.8')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='changes to the config')
    args = parser.parse_args()

    cfg = read_config(args.config, args.cfg_options)
    check_checkpoint(args.checkpoint)
    out = output_folder(args.out or Path('work_dirs') / Path(args.config).stem / 'threshold')
    check_has_threshold(cfg)
    check_has(cfg, 'whose images are needed', 'test_dataloader')
    cfg.load_from, cfg.work_dir = args.checkpoint, str(out)
    runner, chosen, unreachable = build_runner(cfg), {}, []
    runner.load_or_resume()
    run = run_both_stages(runner.model.eval(), runner.build_dataloader(cfg.test_dataloader))
    swept = curve(**run, thresholds=torch.arange(1001, dtype=torch.double) / 1000)
    every = curve(**run, thresholds=operating_points(run['coarse_scores']))
    for name, wanted, find in (('flops', args.flops, most_accurate), ('top1', args.top1, cheapest)):
        try:
            if wanted is not None:
                chosen[name] = every.point(find(every, wanted))
        except ValueError as error:
            unreachable.append(f'--{name}: {error}')

    columns = {name: values.tolist() for name, values in swept._asdict().items()}
    (out / 'curve.json').write_text(
        json.dumps(
            dict(
                images=len(run['labels']),
                coarse_macs=run['coarse_macs'],
                fine_macs=run['fine_macs'],
                chosen=chosen,
                curve=columns,
            )
        )
    )
    with open(out / 'curve.csv', 'w', newline='') as file:
        csv.writer(file).writerows([columns, *zip(*columns.values())])
    draw(swept, chosen, out / 'curve.png')

    results = '\n'.join(
        [
            f'{"threshold":>10}{"exit":>10}{"top-1":>10}{"multiply-adds, G":>18}',
            *(line(swept.point(index)) for index in tenths(swept)),
            *(f'--{name} is met by\n{line(point)}' for name, point in chosen.items()),
            f'curve.json, curve.csv and curve.png are in {out}',
        ]
    )
    if unreachable:
        print(results)
        raise ValueError('\n'.join(unreachable))
    return results


if __name__ == '__main__':
    main()
