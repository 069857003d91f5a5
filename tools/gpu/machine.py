"""Print and keep what the results of a GPU depend on: card, driver and versions."""

import argparse
from pathlib import Path

from mmdyn.analysis.gpu.machine import machine
from mmdyn.analysis.gpu.results import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', type=Path, help='results.json')
    found = machine()
    save(parser.parse_args().results, 'machine', found)
    print(*(f'{name}: {value}' for name, value in found.items()), sep='\n')


if __name__ == '__main__':
    main()
