"""Draw what several models predict for the same images, side by side (DGE paper, figures 7 and 8).

Give a config and a checkpoint for each model: dense and dynamic, of any task. Writes a row of pictures for each image:
the image, then each model's prediction below its name and the multiply-adds that its backbone spent, with --gates
followed by the gates of its layers. --sheet draws all in one picture, sheet.jpg, in which each row is a column.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import DictAction

import mmdyn  # noqa: F401
from mmdyn.analysis.flops import build_model, dynamic_backbone, image_files
from mmdyn.analysis.gates import run_with_gates
from mmdyn.engine.command import command, load_weights, names_apart, only_results, output_folder, read_config
from mmdyn.models import CFViT
from mmdyn.visualization import (
    build_visualizer,
    draw_gates,
    granularity_of_pixels,
    labelled,
    prediction_panel,
    write_rows,
)


def panels(
    config: str, checkpoint: str, name: str, files: list[Path], args: argparse.Namespace
) -> list[list[np.ndarray]]:
    """The pictures of a model, called ``name``, for each image."""
    cfg = read_config(config, args.cfg_options)
    model = build_model(cfg)
    meta = load_weights(model, checkpoint).get('meta', {}).get('dataset_meta')
    backbone = dynamic_backbone(model)
    if backbone is None or isinstance(backbone, CFViT):
        raise ValueError(
            f'the model of {config} has no backbone of mmdyn that looks at an image once; the stages of CF-ViT are '
            'drawn by draw_regions.py.'
        )
    visualizer, rows = build_visualizer(cfg, meta), []
    for gated in run_with_gates(model, backbone, cfg, files):
        run, (height, width) = gated.run, gated.image.shape[:2]
        title = f'{name}, {run.cost.spent.item() / 1e9:.3g} G'
        row = [prediction_panel(visualizer, run.path, run.sample, args.side, args.score_thr, title)]
        for layer, encoder, shape in gated.layers if args.gates else ():
            phi = granularity_of_pixels(encoder, shape, gated.size)[:height, :width]
            row.append(labelled(draw_gates(gated.image, phi, encoder.granularities), layer, args.side))
        rows.append(row)
    return rows


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', help='CONFIG CHECKPOINT, once or more')
    parser.add_argument('--images', required=True, help='folder of images')
    parser.add_argument('--out', required=True, help='folder of the pictures')
    parser.add_argument('--num', type=int, default=8, help='number of pictures (default: 8)')
    parser.add_argument('--side', type=int, default=256, help='height of a picture in pixels (default: 256)')
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score of the instances to draw')
    parser.add_argument('--gates', action='store_true', help='draw the gates of layers with DGE, too')
    parser.add_argument('--sheet', action='store_true', help='draw one picture of all images')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='changes to all configs')
    args = parser.parse_args()

    if len(args.models) % 2:
        raise ValueError(f'{len(args.models)} names of files: give a config and a checkpoint for each model.')
    files, out = image_files(args.images), output_folder(args.out)
    files = files[:: max(1, len(files) // args.num)][: args.num]
    rows = [[labelled(cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB), file.stem, args.side)] for file in files]
    configs, checkpoints = args.models[::2], args.models[1::2]
    names = names_apart(configs if len(set(configs)) == len(configs) else checkpoints)
    for config, checkpoint, name in zip(configs, checkpoints, names):
        rows = [row + more for row, more in zip(rows, panels(config, checkpoint, name, files, args), strict=True)]
    write_rows({f'{number}-{file.stem}': row for number, (file, row) in enumerate(zip(files, rows))}, out, args.sheet)
    return f'{len(files)} pictures in {out}'


if __name__ == '__main__':
    main()
