"""Compare what the routers want to see finely with the foreground of images (DGE paper, tables 5 and 6).

Tests the model on the config's test set with mmdyn.GateQuality: pixel accuracy, mAP and mIoU of each layer's score of
the finest granularity against masks, beside those of a random score and, with --gradcam, of Grad-CAM. The paper's
models have the granularities {1, 2}. Prints a table, and writes gates.json and gates.png.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mmengine.config import DictAction
from mmengine.runner import Runner
from mmengine.utils import track_iter_progress

import mmdyn  # noqa: F401
from mmdyn.analysis.budget import dynamic_backbone
from mmdyn.analysis.gradcam import gradcam
from mmdyn.engine.command import check_checkpoint, check_has, command, only_results, output_folder, read_config
from mmdyn.engine.launch import build_runner
from mmdyn.evaluation.gate_quality import ForegroundMasks, as_seen, compare, summarise

METRICS = ('accuracy', 'mAP', 'mIoU')


def quality_of_gradcam(runner: Runner, masks: ForegroundMasks) -> dict[str, float]:
    """The metrics of Grad-CAM on the images of the test set."""
    counts = []
    for batch in track_iter_progress((runner.test_dataloader, len(runner.test_dataloader)), file=sys.stderr):
        data = runner.model.data_preprocessor(batch)
        scores = gradcam(runner.model, data['inputs']).cpu()
        for sample, score in zip(data['data_samples'], scores):
            mask = as_seen(masks.read(sample.img_path), sample.to_dict())
            counts.append(compare(score[: mask.shape[0], : mask.shape[1]].numpy(), mask))
    return summarise(counts)


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Plot each metric over the layers in a panel of its own, and what is no layer as lines across."""
    layers = [name for name in rows if name not in ('random', 'Grad-CAM')]
    figure = Figure(figsize=(max(9, 0.9 * len(layers)), 3.2), layout='constrained')
    for axes, metric in zip(figure.subplots(1, len(METRICS)), METRICS):
        axes.plot(layers, [rows[name][metric] for name in layers], '.-', label='score of the router')
        for name, style in (('random', ':'), ('Grad-CAM', '--')):
            if name in rows:
                axes.axhline(rows[name][metric], linestyle=style, color='0.4', label=name)
        axes.set(ylabel=f'{metric} (%)')
        axes.set_xticks(range(len(layers)), layers, rotation=60, ha='right', rotation_mode='anchor', fontsize=7)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--masks', required=True, help="folder of PNG files, or a JSON file in COCO's layout")
    parser.add_argument('--background', type=int, nargs='+', default=[0], help='classes of background (default: 0)')
    parser.add_argument('--ignore', type=int, help='class of pixels that do not count')
    parser.add_argument('--layers', nargs='+', help='names of layers, e.g. stages.0.blocks.1 (default: all)')
    parser.add_argument('--gradcam', action='store_true', help='with Grad-CAM of the predicted class, of a classifier')
    parser.add_argument('--out', help='folder of the results (default: work_dirs/<name of the config>/gate_quality)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='changes to the config')
    args = parser.parse_args()

    cfg = read_config(args.config, args.cfg_options)
    check_has(cfg, 'whose images are needed', 'test_dataloader')
    check_checkpoint(args.checkpoint)
    options = dict(background=args.background, ignore=args.ignore)
    masks = ForegroundMasks(args.masks, **options)
    out = output_folder(args.out or Path('work_dirs') / Path(args.config).stem / 'gate_quality')
    cfg.work_dir, cfg.load_from = str(out), args.checkpoint
    cfg.test_cfg = cfg.get('test_cfg') or {}
    cfg.test_evaluator = dict(type='mmdyn.GateQuality', masks=args.masks, layers=args.layers, **options)
    runner = build_runner(cfg)
    dynamic_backbone(runner.model)
    found = runner.test()
    rows: dict[str, dict[str, float]] = {}
    for name, value in found.items():
        _, layer, metric = name.split('/')
        rows.setdefault(layer, {})[metric] = value
    if args.gradcam:
        with torch.inference_mode(False):
            rows = {'random': rows.pop('random'), 'Grad-CAM': quality_of_gradcam(runner, masks), **rows}

    images = len(runner.test_dataloader.dataset)
    (out / 'gates.json').write_text(json.dumps(dict(images=images, rows=rows), indent=1))
    draw(rows, out / 'gates.png')
    return '\n'.join(
        [
            f'{"":18}' + ''.join(f'{metric:>10}' for metric in METRICS),
            *(f'{name:18}' + ''.join(f'{row[metric]:10.1f}' for metric in METRICS) for name, row in rows.items()),
            f'of {images} images; gates.json and gates.png are in {out}',
        ]
    )


if __name__ == '__main__':
    main()
