"""Draw which regions of an image CF-ViT looked at more finely, and what each of its stages made of it.

Writes a row of pictures for each image: the image as the network sees it; the coarse patches, with the coarse stage's
class and confidence; and, where the fine stage ran, the patches that it split, the others greyed, with its class and
confidence. The title of the stage whose prediction counts is red. --sheet draws all in one picture, sheet.jpg, in which
each row is a column. With --masks, folders of the same names, the share of the object's pixels and of the background's
that lie in split regions is printed, over all images.
"""

import argparse

import cv2
import numpy as np
from mmengine.config import DictAction

import mmdyn  # noqa: F401
from mmdyn.analysis.flops import build_model, dynamic_backbone, image_files, pipeline_without_annotations, run_on_images
from mmdyn.analysis.gates import classes_of_mask, image_of
from mmdyn.engine.command import command, load_weights, only_results, output_folder, read_config
from mmdyn.models import CFViT
from mmdyn.visualization import build_visualizer, describe_stages, draw_regions, split_pixels, with_title, write_rows

RED, BLACK = (200, 0, 0), (0, 0, 0)


def row_of(run, name: str, coarse_size: int, side: int, dataset_meta: dict) -> list[np.ndarray]:
    """The pictures of an image side by side."""
    image = image_of(run)
    image = cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST if len(image) <= side else cv2.INTER_AREA)
    titles = describe_stages(run.sample, dataset_meta)
    colours = [RED if stage == run.sample.exit_stage else BLACK for stage in (0, 1)]
    regions = [None, run.sample.get('regions')]
    row = [with_title(image, name)]
    for title, colour, split in zip(titles, colours, regions):
        split = None if split is None else split.tolist()
        row.append(with_title(draw_regions(image, coarse_size, split), title, colour))
    return row


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--images', required=True, help='folder of images')
    parser.add_argument('--masks', help='folder of masks with the same names')
    parser.add_argument('--background', type=int, default=0, help='value of the background in the masks')
    parser.add_argument('--out', required=True, help='folder of the pictures')
    parser.add_argument('--num', type=int, default=16, help='number of pictures')
    parser.add_argument('--side', type=int, default=160, help='side of a picture in pixels')
    parser.add_argument('--sheet', action='store_true', help='draw one picture of all images')
    parser.add_argument('--threshold', type=float, help="confidence that stops an image, instead of the config's")
    parser.add_argument('--every-stage', action='store_true', help='run the fine stage on images that stop as well')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='changes to the config')
    args = parser.parse_args()

    cfg = read_config(args.config, args.cfg_options)
    wanted = dict(threshold=args.threshold, every_stage=args.every_stage or None)
    cfg.merge_from_dict({f'model.test_cfg.{name}': value for name, value in wanted.items() if value is not None})
    model = build_model(cfg)
    backbone = dynamic_backbone(model)
    if not isinstance(backbone, CFViT):
        raise ValueError(f'the model of {args.config} has no CFViT, so there is nothing to draw.')
    checkpoint = load_weights(model, args.checkpoint)
    dataset_meta = build_visualizer(cfg, checkpoint.get('meta', {}).get('dataset_meta')).dataset_meta
    pipeline = pipeline_without_annotations(cfg)

    files, out = image_files(args.images), output_folder(args.out)
    drawn = set(files[:: max(1, len(files) // args.num)][: args.num])
    rows, pixels, stopped = {}, np.zeros((2, 2), int), 0  # of background and object: in split regions, all
    # Each stage is a run of its own, with the same prediction.
    runs = {run.path: run for run in run_on_images(model, cfg, files if args.masks else sorted(drawn))}
    for path, run in runs.items():
        name = path.relative_to(args.images)
        stopped += run.sample.exit_stage == 0
        if args.masks and 'regions' in run.sample:
            mask = classes_of_mask(path, args.images, args.masks, pipeline) != args.background
            split = split_pixels(run.sample.regions.tolist(), backbone.coarse_size, mask.shape)
            pixels += [[(split & part).sum(), part.sum()] for part in (~mask, mask)]
        if path in drawn:
            title = '-'.join(name.with_suffix('').parts)
            rows[title] = row_of(run, title, backbone.coarse_size, args.side, dataset_meta)
    write_rows(rows, out, args.sheet)
    results = (
        f'{len(drawn)} pictures in {out}\n{stopped} of {len(runs)} images stop after the coarse stage, at a '
        f'confidence of {model.test_cfg["threshold"]:g}'
    )
    if pixels.any():
        background, objects = pixels[:, 0] / pixels[:, 1].clip(1)
        results += f'\nsplit regions hold {objects:.1%} of the object, {background:.1%} of the background'
    return results


if __name__ == '__main__':
    main()
