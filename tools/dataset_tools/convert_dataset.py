"""Bring a public data set into the layout that configs/results reads; docs/data.md tells where to get each."""

import argparse
from pathlib import Path

from mmdyn.datasets.public import CONVERTERS
from mmdyn.engine.command import command, output_folder


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('data', choices=CONVERTERS)
    parser.add_argument('source', type=Path, help='folder of the public data set, unpacked')
    parser.add_argument('out', type=Path, help='folder to write to, e.g. data/camvid')
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f'{args.out} is not empty: give a new folder, so that nothing is mixed up.')
    counts = CONVERTERS[args.data](args.source, output_folder(args.out))
    print(f'{args.out}: ' + ', '.join(f'{count} images for {part}' for part, count in counts.items()))


if __name__ == '__main__':
    main()
