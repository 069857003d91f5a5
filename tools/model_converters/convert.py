"""Convert a checkpoint of another program into one that mmdyn's classifiers and backbones load.

KIND says who wrote SRC: vtpack (the DGE authors, PVT, DPVT and DeiT), pvt (the PVT authors), deit (the DeiT authors,
timm), lvvit (the LV-ViT authors), cfvit (the CF-ViT authors, on DeiT or LV-ViT, of any coarse grid), mmdet-pvt (mmdet's
PyramidVisionTransformer, alone or in a detector), mmpretrain-deit (mmpretrain's VisionTransformer and
DistilledVisionTransformer classifiers). SRC is a file of torch.save or of safetensors. DST serves as load_from and,
with prefix='backbone.', as init_cfg. DST of deit and lvvit starts a training of CF-ViT as well.
"""

import argparse
import sys

from mmdyn.analysis.conversion import KINDS, convert


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kind', metavar='KIND', choices=sorted(KINDS), help=', '.join(sorted(KINDS)))
    parser.add_argument('src', metavar='SRC', help='checkpoint to read')
    parser.add_argument('dst', metavar='DST', help='checkpoint to write')
    parser.add_argument('--config', help='config of the model that has to load DST')
    parser.add_argument('--allow-partial', action='store_true', help='go on without missing and unexpected tensors')
    try:
        print(*convert(**vars(parser.parse_args(argv))), sep='\n')
    except ValueError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
