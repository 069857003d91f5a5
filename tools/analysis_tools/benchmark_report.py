"""Write benchmark.md and benchmark.png from the results of benchmark.py.

The tables have all columns for the CPU, and seconds and the ratio of times for a GPU. Of a GPU alone they have all.
With --summary it writes nothing and prints the table of the README.
"""

import argparse
from pathlib import Path

from mmdyn.analysis.report import read, summary, write_report
from mmdyn.engine.command import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', nargs='+', type=Path, help='e.g. docs/benchmark.json docs/benchmark-cuda.json')
    parser.add_argument('--out', type=Path, help="folder of the report; default: the first file's")
    parser.add_argument('--summary', action='store_true', help='print the table of the README instead')
    args = parser.parse_args()
    results = read(args.results)
    if args.summary:
        print(summary(next(iter(results.values()))))
    else:
        write_report(results, args.out or args.results[0].parent)


if __name__ == '__main__':
    main()
