"""Report on a trained model in one HTML file that needs nothing beside itself: to look at, and to send.

It shows accuracy, multiply-adds and measured time, the query ratio of each layer, and the images that cost most and
least with their gates. A slider over budgets (of CF-ViT: thresholds) moves pictures, predictions, cost and curves
together. Works offline, in light and dark, and on a phone. Writes report.html and report.json.

For a classifier, detector or segmentor with DGE, or a classifier by CF-ViT. The whole test set of the config is tested
at each point. A part of it is --cfg-options test_dataloader.dataset.indices=500.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from mmengine.config import DictAction

import mmdyn
from mmdyn.analysis.budget import model_and_loop
from mmdyn.analysis.latency import environment
from mmdyn.analysis.model_report import budget_report, gallery_of, threshold_report
from mmdyn.analysis.threshold import has_threshold
from mmdyn.engine.command import check_checkpoint, check_has, command, only_results, output_folder, read_config
from mmdyn.engine.launch import build_tester
from mmdyn.visualization import finite, report_page

PROTOCOL = (
    'Multiply-adds are those of the backbone for one image: linear layers, convolutions and both products of '
    'attention, counted from what ran. Time is that of the whole model for one image: the median of runs of the same '
    'batches, in which all points take turns.'
)


def notes(report: dict, machine: dict, batch: int) -> list[str]:
    """What the numbers mean, and what they were measured on."""
    place = ', '.join(f'{name} {value}' for name, value in machine.items() if value != 'not installed')
    kind = (
        'A budget is a query ratio on average: a price of queries that was measured on images of the test set lowers '
        'the logits of all routers. As trained, they decide by themselves.'
        if report['kind'] == 'budget'
        else 'An image stops at the coarse stage if its confidence there reaches the threshold.'
    )
    return [kind, f'{PROTOCOL} Batches have {batch} images.', f'Measured with mmdyn {mmdyn.__version__}: {place}.']


def without_pixels(report: dict) -> dict:
    """The report's numbers and words."""
    pictures = [
        {**picture, 'image': None, 'views': [{**view, 'picture': None} for view in picture['views']]}
        for picture in report['pictures']
    ]
    return dict(report, pictures=pictures)


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--images', help='folder of images to show (default: those of the test set)')
    parser.add_argument('--num', type=int, default=6, help='images to show that cost most, and least (default: 6)')
    parser.add_argument('--budgets', nargs='+', type=float, help='of DGE (default: 0.2, 0.3, ..., 1, if reachable)')
    parser.add_argument('--thresholds', nargs='+', type=float, help='of CF-ViT (default: 0, 0.1, ..., 1)')
    parser.add_argument('--calibrate', type=int, default=256, help='images that prices are measured on (default: 256)')
    parser.add_argument('--metric', help='to show (default: mIoU, or the first that the evaluator finds)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score of the instances to draw')
    parser.add_argument('--title', help='of the page (default: the name of the config)')
    parser.add_argument('--out', help='folder of the report (default: work_dirs/<name of the config>/report)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='changes to the config')
    args = parser.parse_args()

    cfg = read_config(args.config, args.cfg_options)
    check_has(cfg, 'which tells what to test on', 'test_dataloader', 'test_evaluator')
    meta = check_checkpoint(args.checkpoint).get('meta', {}).get('dataset_meta')
    given, other = ('budgets', 'thresholds') if has_threshold(cfg) else ('thresholds', 'budgets')
    if getattr(args, given):
        raise ValueError(f'--{given}: the model of {args.config} has none; it takes --{other}.')
    if args.calibrate < 1:
        raise ValueError(f'--calibrate {args.calibrate}: give the number of images, at least 1.')
    out = output_folder(args.out or Path('work_dirs') / Path(args.config).stem / 'report')
    runner = build_tester(cfg, out)
    model, loop = model_and_loop(runner, args.checkpoint)
    gallery = gallery_of(loop.dataloader.dataset, args.images, meta, args.num, args.score_thr)
    options = dict(metric=args.metric, say=partial(print, file=sys.stderr, flush=True))
    if has_threshold(cfg):
        options.update(thresholds=args.thresholds)
        report = threshold_report(cfg, model, loop.dataloader, loop.evaluator, gallery, **options)
    else:
        options.update(budgets=args.budgets, images=args.calibrate)
        report = budget_report(cfg, model, loop.dataloader, loop.evaluator, gallery, **options)

    machine = environment(next(model.parameters()).device)
    tested = len(loop.dataloader.dataset)
    report.update(
        title=args.title or Path(args.config).stem,
        subtitle=f'{Path(args.checkpoint).name}, tested on {tested} images on {machine["date"]}; the images below are '
        f'of {report["looked_at"]}.',
        notes=notes(report, machine, loop.dataloader.batch_size),
        environment=machine,
    )
    page = out / 'report.html'
    page.write_text(report_page(report), encoding='utf-8')
    (out / 'report.json').write_text(json.dumps(finite(without_pixels(report)), indent=1))
    return f'{page} ({page.stat().st_size / 1e6:.1f} MB), with its numbers in report.json'


if __name__ == '__main__':
    main()
