"""Write benchmark.md and benchmark.png from the results of benchmark.py.

The tables have all columns for the CPU, and seconds and the ratio of times for a GPU. Of a GPU alone they have all.
"""

import argparse
from pathlib import Path

from mmdyn.analysis.report import read, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', nargs='+', type=Path, help='e.g. docs/benchmark.json docs/benchmark-cuda.json')
    parser.add_argument('--out', type=Path, help="folder of the report; default: the first file's")
    args = parser.parse_args()
    try:
        write_report(read(args.results), args.out or args.results[0].parent)
    except ValueError as error:
        raise SystemExit(f'benchmark_report.py: {error}') from None


if __name__ == '__main__':
    main()
