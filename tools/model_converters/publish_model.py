"""Make a checkpoint of a training ready for others.

Keeps the weights, and in their meta the config, the budget, the metrics and the versions; leaves out the optimizer and
the log. DST gets a hash of the file into its name: pvt.pth becomes pvt-1a2b3c4d.pth. Give a .safetensors file beside it
or in its place.
"""

import argparse

from mmdyn.analysis.publish import publish
from mmdyn.engine.command import command, only_results


@command
@only_results
def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='checkpoint to read')
    parser.add_argument('dst', metavar='DST', nargs='+', help='files to write, which end in .pth or .safetensors')
    parser.add_argument('--config', help='config of the model, if SRC does not hold it')
    parser.add_argument(
        '--metrics',
        help='.json file of a test, <work_dir>/<time>/<time>.json (default: those of the validation after which SRC '
        'was saved)',
    )
    args = parser.parse_args(argv)
    return '\n'.join(map(str, publish(args.src, *args.dst, config=args.config, metrics=args.metrics)))


if __name__ == '__main__':
    main()
