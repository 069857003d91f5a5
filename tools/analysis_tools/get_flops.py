"""Count parameters and multiply-adds of a config's model, dense and as spent with DGE.

Protocol: multiply-adds of linear layers, convolutions, both matrix products of attention and the points sampled by
deformable attention, on one image, of the whole model; of a two-stage detector with 1000 proposals. Spent are those
that do not depend on the routing, the routers, and C^l of eq. 7 for each query that is used.
"""

import argparse
import json

from mmengine.config import Config

import mmdyn  # noqa: F401
from mmdyn.analysis.flops import report
from mmdyn.engine.command import command, config_with_dge, only_results, read_config


def default_shape(cfg: Config) -> tuple:
    """(H, W) of the images that the config's backbone is made for."""
    backbone = config_with_dge(cfg.model)
    if backbone.type.endswith('WithDGE') and 'img_size' not in backbone:
        backbone = backbone.backbone
    if backbone.type.endswith('CFViT'):
        return (2 * backbone.get('patch_size', 16) * backbone.get('coarse_size', 7),) * 2
    size = backbone.get('img_size', 256)
    return (size, size) if isinstance(size, int) else tuple(size)


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--checkpoint', help='weights, for --images')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help="default: the backbone's img_size")
    parser.add_argument('--query-ratio', type=float, help="default: the budget of the config's BudgetHook")
    parser.add_argument('--images', help='count what the routers choose on the images of this folder')
    parser.add_argument('--detections', type=int, default=0, help="boxes that a detector's mask head looks at")
    parser.add_argument('--layers', action='store_true', help='print each encoder block')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args()

    cfg = read_config(args.config)
    shape = tuple(args.shape or default_shape(cfg))
    budgets = [hook['budget'] for hook in cfg.get('custom_hooks', []) if hook['type'].endswith('BudgetHook')]
    ratio = args.query_ratio if args.query_ratio is not None else (budgets or [None])[0]
    result = report(cfg, shape, ratio, args.images, args.checkpoint, args.detections)
    if args.json:
        return json.dumps(result)
    sizes = f'the sizes of the images in {args.images}' if args.images else f'{shape[0]} x {shape[1]}'
    return '\n'.join(
        [
            f'{args.config} at {sizes}',
            f'parameters            {result["params"] / 1e6:10.2f} M',
            f'multiply-adds, dense  {result["flops_dense"] / 1e9:10.3f} G',
            f'multiply-adds, spent  {result["flops"] / 1e9:10.3f} G  at query ratio {result["query_ratio"]:.4f}',
            *(
                f'  {layer["name"]:20} {layer["flops_dense"] / 1e9:10.4f} G dense {layer["flops"] / 1e9:10.4f} G spent'
                f'  query ratio {layer["query_ratio"]:.4f}'
                for layer in (result['layers'] if args.layers else [])
            ),
        ]
    )


if __name__ == '__main__':
    main()
