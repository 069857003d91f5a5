"""Does class attention find the patches that count? (CF-ViT paper, figure 1)

Tests a plain vision transformer, or CF-ViT's fine stage, with the patches of the highest and of the lowest class
attention of each block alone. Draws the class attention of the last block with coarse and with fine splitting side by
side. Writes patches.json, patches.png and a row of pictures for each image; --sheet draws all in one picture,
sheet.jpg, in which each row is a column.
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import DictAction
from mmengine.dataset import pseudo_collate
from mmengine.utils import track_iter_progress

import mmdyn  # noqa: F401
from mmdyn.analysis.class_attention import accuracy_of_patches, class_attention, coarse_tokens, plain_classifier
from mmdyn.analysis.flops import image_files, pipeline_without_annotations
from mmdyn.engine.command import check_checkpoint, check_has, command, only_results, output_folder, read_config
from mmdyn.engine.launch import build_runner
from mmdyn.visualization import draw_attention, with_title, write_rows
from mmdyn.visualization.curves import draw_patches


@torch.no_grad()
def row_of(model, packed: dict, side: int) -> list[np.ndarray]:
    """An image, and the class attention of the last block with coarse and fine splitting, side by side."""
    backbone, view = plain_classifier(model), packed['inputs']
    image = np.ascontiguousarray(view.numpy()[::-1].transpose(1, 2, 0))
    inputs = model.data_preprocessor(pseudo_collate([packed]))['inputs']
    height = round(image.shape[0] * side / image.shape[1])
    image = cv2.resize(image, (side, height), interpolation=cv2.INTER_NEAREST if len(image) <= side else cv2.INTER_AREA)
    row = [with_title(image, 'image')]
    for tokens, (rows, columns) in (coarse_tokens(backbone, inputs), backbone.embed(inputs)):
        score = class_attention(backbone, tokens)[-1][0].view(rows, columns).cpu().numpy()
        row.append(with_title(draw_attention(image, score), f'{rows} x {columns}'))
    return row


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--images', help='folder of images to draw (default: those of the test set)')
    parser.add_argument('--num', type=int, default=8, help='number of pictures (default: 8)')
    parser.add_argument('--patches', type=int, default=100, help='patches that are kept (default: 100)')
    parser.add_argument('--side', type=int, default=160, help='width of a picture in pixels (default: 160)')
    parser.add_argument('--sheet', action='store_true', help='draw one picture of all images')
    parser.add_argument('--out', help='folder of the results (default: work_dirs/<name of the config>/attention)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='changes to the config')
    args = parser.parse_args()

    cfg = read_config(args.config, args.cfg_options)
    check_has(cfg, 'whose images are needed', 'test_dataloader')
    check_checkpoint(args.checkpoint)
    files = image_files(args.images) if args.images else None
    out = output_folder(args.out or Path('work_dirs') / Path(args.config).stem / 'attention')
    cfg.work_dir = str(out)
    runner = build_runner(cfg)
    plain_classifier(runner.model)
    runner.load_checkpoint(args.checkpoint, map_location='cpu')
    model, loader = runner.model.eval(), runner.build_dataloader(cfg.test_dataloader)

    found = accuracy_of_patches(model, track_iter_progress((loader, len(loader)), file=sys.stderr), args.patches)
    (out / 'patches.json').write_text(json.dumps(dict(found, patches=args.patches), indent=1))
    draw_patches({name: found[name] for name in ('highest', 'lowest')}, found['all'], args.patches, out / 'patches.png')
    if files is None:
        dataset = loader.dataset
        files = [Path(dataset.get_data_info(index)['img_path']) for index in range(len(dataset))]
    drawn = files[:: max(1, len(files) // args.num)][: args.num]
    pipeline = pipeline_without_annotations(cfg)
    rows = {
        f'{number}-{file.stem}': row_of(model, pipeline(dict(img_path=str(file), img_id=0)), args.side)
        for number, file in enumerate(drawn)
    }
    write_rows(rows, out, args.sheet)
    pairs = enumerate(zip(found['highest'], found['lowest']), 1)
    return '\n'.join(
        [
            f'{"block":>6}{"highest":>10}{"lowest":>10}',
            *(f'{block:6}{high:10.2f}{low:10.2f}' for block, (high, low) in pairs),
            f'{"all":>6}{found["all"]:10.2f}',
            f'{args.patches} patches of {found["images"]} images',
            f'{len(drawn)} pictures, patches.json and patches.png are in {out}',
        ]
    )


if __name__ == '__main__':
    main()
