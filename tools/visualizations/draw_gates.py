"""Draw which granularity each region of an image got, and tell how objects and background differ.

Writes a row of pictures for each image: the image as the network sees it, with --predictions what the model predicts,
drawn by its framework, then each DGE layer whose map has more than one region. Red is the finest granularity, then
green, blue, yellow. --sheet draws all in one picture, sheet.jpg, in which each row is a column.

With --masks, files of the same names or as PNG files, the object's outline is drawn and the share of pixels that the
finest granularity serves is printed, on objects and on background, over all images; and the difference of the two, the
layer's selectivity, and how much of the variance of its choice lies within images.
"""

import argparse
import json

import numpy as np
from mmengine.config import DictAction

import mmdyn  # noqa: F401
from mmdyn.analysis.flops import build_model, dynamic_backbone, image_files, pipeline_without_annotations
from mmdyn.analysis.gates import classes_of_mask, run_with_gates
from mmdyn.engine.command import command, load_weights, only_results, output_folder, read_config
from mmdyn.visualization import (
    Selectivity,
    build_visualizer,
    draw_gates,
    draw_outline,
    granularity_of_pixels,
    labelled,
    prediction_panel,
    write_rows,
)


def chosen(layers: list, names: list[str] | None) -> list:
    """Those of an image's layers that were asked for."""
    found = [name for name, _, _ in layers]
    unknown = set(names or ()) - set(found)
    if unknown:
        raise ValueError(f'--layers {" ".join(sorted(unknown))}: no gates to draw; choose from {", ".join(found)}.')
    return [layer for layer in layers if names is None or layer[0] in names]


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--images', required=True, help='folder of images')
    parser.add_argument('--masks', help='folder of masks with the same names')
    parser.add_argument('--background', type=int, nargs='+', default=[0], help='classes of background (default: 0)')
    parser.add_argument('--ignore', type=int, help='class of pixels that do not count')
    parser.add_argument('--predictions', action='store_true', help='draw what the model predicts, too')
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score of the instances to draw')
    parser.add_argument('--out', required=True, help='folder of the pictures')
    parser.add_argument('--num', type=int, default=16, help='number of pictures')
    parser.add_argument('--side', type=int, default=160, help='height of a picture in pixels')
    parser.add_argument('--layers', nargs='+', help='names of layers to draw, e.g. stages.0.blocks.0 (default: all)')
    parser.add_argument('--sheet', action='store_true', help='draw one picture of all images')
    parser.add_argument('--json', action='store_true', help='print what --masks tells as JSON')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='changes to the config')
    args = parser.parse_args()

    cfg = read_config(args.config, args.cfg_options)
    model = build_model(cfg)
    checkpoint = load_weights(model, args.checkpoint)
    backbone = dynamic_backbone(model)
    if backbone is None or not backbone.has_dge:
        raise ValueError(f'the model of {args.config} has no DGE, so there is nothing to draw.')
    visualizer = build_visualizer(cfg, checkpoint.get('meta', {}).get('dataset_meta')) if args.predictions else None
    pipeline = pipeline_without_annotations(cfg)

    files, out = image_files(args.images), output_folder(args.out)
    drawn = set(files[:: max(1, len(files) // args.num)][: args.num])
    selectivity, rows = Selectivity(), {}
    for gated in run_with_gates(model, backbone, cfg, files if args.masks else sorted(drawn)):
        run, image, mask, counted = gated.run, gated.image, None, None
        layers = chosen(gated.layers, args.layers)
        path, (height, width) = run.path, image.shape[:2]
        if args.masks:
            classes = classes_of_mask(path, args.images, args.masks, pipeline)
            mask, counted = ~np.isin(classes, args.background), classes != args.ignore
        row = [labelled(image if mask is None else draw_outline(image, mask), path.stem, args.side)]
        if visualizer and path in drawn:
            row.append(prediction_panel(visualizer, path, run.sample, args.side, args.score_thr))
        for name, encoder, shape in layers:
            phi = granularity_of_pixels(encoder, shape, gated.size)[:height, :width]
            if mask is not None:
                is_finest = phi == min(filter(None, encoder.granularities))
                selectivity.add(name, is_finest[counted], mask[counted])
            if path in drawn:
                row.append(labelled(draw_gates(image, phi, encoder.granularities, mask), name, args.side))
        if path in drawn:
            rows['-'.join(path.relative_to(args.images).with_suffix('').parts)] = row
    write_rows(rows, out, args.sheet)
    found = selectivity.result()
    if args.json:
        return json.dumps(dict(pictures=len(drawn), out=str(out), layers=found))
    return '\n'.join(
        [
            f'{len(drawn)} pictures in {out}',
            *(
                f'{name:18} finest granularity on {of["object"]:6.1%} of the object, {of["background"]:6.1%} of '
                f'the background: selectivity {of["selectivity"]:+.3f}, {of["within_images"]:.0%} of the '
                'variance within images'
                for name, of in found.items()
            ),
        ]
    )


if __name__ == '__main__':
    main()
