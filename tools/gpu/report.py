"""Publish what gpu_check.sh found: benchmark-gpu.json and the page benchmark-gpu.md, which is made of it alone."""

import argparse
import json
from pathlib import Path

from mmdyn.analysis.gpu.report import markdown

ROOT = Path(__file__).parents[2]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', type=Path, help='results.json of gpu_check.sh')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs', help='folder; default: docs')
    args = parser.parse_args(argv)
    try:
        results = json.loads(args.results.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f'report.py: {args.results} is no results.json of tools/gpu_check.sh: {error}') from error
    (args.out / 'benchmark-gpu.json').write_text(json.dumps(results, indent=1) + '\n')
    (args.out / 'benchmark-gpu.md').write_text(markdown(results))
    print(f'benchmark-gpu.json and benchmark-gpu.md are in {args.out}')


if __name__ == '__main__':
    main()
