"""Plot curves together, from what the tools and mmengine's logs have written (DGE figure 5, CF-ViT figures 5, 7, 8).

Takes sweep.json of sweep_budget.py, curve.json of sweep_threshold.py, report.json of report.py, the JSON file that a
test leaves in its folder, and vis_data/scalars.json of a training. NAME=FILE says how it is called; tests of the same
name are points of one curve. Writes what the files tell: cost.png, accuracy over multiply-adds; time.png, over time;
layers.png, the share of queries by layer; stages.png, images classified correctly at each stage; training.png, loss,
accuracy, budget and query ratio. The numbers are in curves.json.
"""

import argparse
import json
from pathlib import Path

import mmdyn  # noqa: F401
from mmdyn.analysis.curves import Source, joined, read_source
from mmdyn.engine.command import command, only_results, output_folder
from mmdyn.visualization.curves import draw_layers, draw_points, draw_stages, draw_training, unit_of


def draw(sources: list[Source], metric: str | None, out: Path) -> list[str]:
    """Draw what the sources tell; the names of the pictures."""
    of = {
        kind: {source.name: getattr(source, kind) for source in sources if getattr(source, kind)}
        for kind in ('cost', 'time', 'layers', 'stages', 'training')
    }
    metrics = sorted({source.metric for source in sources if source.metric})
    if len(metrics) > 1 and {source.metric for source in sources if source.cost} != {
        'accuracy/top1',
        'top-1 accuracy (%)',
    }:
        raise ValueError(f'The files tell different metrics, {metrics}: give --metric, or fewer files.')
    accuracy = metric or (metrics[0] if metrics else 'accuracy')
    if of['cost']:
        factor, unit = unit_of(x for points in of['cost'].values() for x, _ in points)
        costs = {name: [(x * factor, y) for x, y in points] for name, points in of['cost'].items()}
        draw_points(costs, f'multiply-adds of the backbone ({unit})', accuracy, out / 'cost.png')
    if of['time']:
        draw_points(of['time'], 'time of the model for an image (ms)', accuracy, out / 'time.png')
    if of['layers']:
        draw_layers(of['layers'], out / 'layers.png')
    if of['stages']:
        draw_stages(of['stages'], out / 'stages.png')
    if of['training']:
        known = ('accuracy/top1', 'mIoU', 'coco/bbox_mAP')
        found = {name for training in of['training'].values() for name in training}
        shown = metric or next((name for name in known if name in found), 'accuracy')
        draw_training(of['training'], shown, out / 'training.png')
    return [f'{kind}.png' for kind, told in of.items() if told]


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', help='FILE or NAME=FILE')
    parser.add_argument('--metric', help='accuracy to show (default: that of the files)')
    parser.add_argument('--out', default='work_dirs/curves', help='folder of the pictures (default: work_dirs/curves)')
    args = parser.parse_args()

    sources = []
    for given in args.files:
        name, equals, file = given.partition('=')
        sources += read_source(file if equals else given, name if equals else None, args.metric)
    sources, out = joined(sources), output_folder(args.out)
    pictures = draw(sources, args.metric, out)
    (out / 'curves.json').write_text(json.dumps([source._asdict() for source in sources], indent=1))
    return f'{", ".join(pictures)} and curves.json are in {out}'


if __name__ == '__main__':
    main()
