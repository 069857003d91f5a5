"""How redundant are the queries of a plain ViT, and what does it cost to merge them? (DGE paper, figure 2)

Measures before each block the Pearson correlation of each token with the mean of its 2 x 2 patch: a histogram, and the
spread over images by block, of --num images that are evenly spaced. Then tests the model with one query for all tokens
of a patch whose correlation is above a threshold: accuracy against multiply-adds. Writes redundancy.json and
redundancy.png.
"""

import argparse
import json
import sys
from pathlib import Path

from mmengine.config import DictAction
from mmengine.dataset import pseudo_collate

import mmdyn  # noqa: F401
from mmdyn.analysis.budget import evaluate, evenly_spaced, metric_of, model_and_loop
from mmdyn.analysis.flops import image_files, pipeline_without_annotations
from mmdyn.analysis.redundancy import measure_redundancy, merging, plain_vit
from mmdyn.engine.command import check_checkpoint, check_has, command, only_results, output_folder, read_config
from mmdyn.engine.launch import build_tester
from mmdyn.visualization.curves import draw_redundancy

THRESHOLDS = [0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5]


def line(row: dict, dense: float, metric: str) -> str:
    """A row as a line of the table."""
    threshold = 'dense' if row['threshold'] is None else f'{row["threshold"]:g}'
    costs = f'{row["query_ratio"]:10.3f}{row["gflops"]:10.4g}{row["gflops"] / dense:10.3f}'
    return f'{threshold:>10}{costs}  {row[metric]:.4g}'


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--images', help='folder of images to correlate (default: those of the test set)')
    parser.add_argument('--num', type=int, default=256, help='images to correlate (default: 256)')
    parser.add_argument(
        '--thresholds', nargs='+', type=float, default=THRESHOLDS, help='default: 0.99, 0.98, 0.95, 0.9, ..., 0.5'
    )
    parser.add_argument('--metric', help='to show (default: mIoU, or the first that the evaluator finds)')
    parser.add_argument('--out', help='folder of the results (default: work_dirs/<name of the config>/redundancy)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='changes to the config')
    args = parser.parse_args()

    cfg = read_config(args.config, args.cfg_options)
    check_has(cfg, 'which tells what to test on', 'test_dataloader', 'test_evaluator')
    check_checkpoint(args.checkpoint)
    if args.num < 1:
        raise ValueError(f'--num {args.num}: give the number of images to correlate, at least 1.')
    if not all(-1 <= threshold <= 1 for threshold in args.thresholds):
        raise ValueError(f'--thresholds {args.thresholds}: a correlation is in [-1, 1].')
    files = image_files(args.images) if args.images else None
    out = output_folder(args.out or Path('work_dirs') / Path(args.config).stem / 'redundancy')
    runner = build_tester(cfg, out)
    backbone = plain_vit(runner.model)
    model, loop = model_and_loop(runner, args.checkpoint)

    batches = evenly_spaced(loop.dataloader, args.num)
    if files:
        count = min(len(files), args.num)
        files = [files[place * len(files) // count] for place in range(count)]
        pipeline = pipeline_without_annotations(cfg)
        batches = (pseudo_collate([pipeline(dict(img_path=str(file), img_id=0))]) for file in files)
    redundancy = measure_redundancy(model, batches, args.num)
    rows, metric = [], args.metric
    for threshold in [None, *sorted(args.thresholds, reverse=True)]:
        with merging(backbone) as layers:
            for layer in layers:
                layer.threshold = 1.0 if threshold is None else threshold
            found = evaluate(model, loop.dataloader, loop.evaluator, backbone)
        rows.append(dict(threshold=threshold, **found))
        metric = metric_of(rows, metric)
        print(f'threshold {threshold}: {metric} {found[metric]:.4g}', file=sys.stderr, flush=True)

    content = {name: values.tolist() for name, values in redundancy._asdict().items()}
    (out / 'redundancy.json').write_text(json.dumps(dict(content, metric=metric, rows=rows)))
    draw_redundancy(*redundancy, rows, metric, out / 'redundancy.png')
    high = redundancy.histogram[:, redundancy.edges[:-1] >= 0.8 - 1e-9].sum(1).mean()
    return '\n'.join(
        [
            f'{"threshold":>10}{"queries":>10}{"G":>10}{"of dense":>10}  {metric}',
            *(line(row, rows[0]['gflops'], metric) for row in rows),
            f'{high:.1%} of the tokens correlate with the mean of their patch at 0.8 or more, on '
            f'{len(redundancy.of_images)} images',
            f'redundancy.json and redundancy.png are in {out}',
        ]
    )


if __name__ == '__main__':
    main()
