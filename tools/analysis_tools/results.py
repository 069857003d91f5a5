"""Train and test what docs/results.md shows: a list of configs with three seeds each, resumable run by run.

Each run is a process of its own with one thread. What is done is not done again; what was killed goes on from its last
checkpoint; what has another config than it was begun with begins anew. Rows that start from others wait for them.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import mmdyn  # noqa: F401
from mmdyn.analysis.results import Results, alone, choose, execute_apart, read_rows, summary
from mmdyn.engine.command import command, output_folder

ROOT = Path(__file__).parents[2]


def train(results: Results, runs: list) -> list:
    """Do the runs that are not done; those that failed, or could not begin for what they start from."""
    failed = []
    for place, run in enumerate(runs, 1):
        if results.state(run) == 'done':
            continue
        if any(other.row.name in run.row.needs and other.seed == run.seed for other in failed):
            failed.append(run)
            continue
        print(f'[{place}/{len(runs)}] {time.strftime("%H:%M")} {run}', flush=True)
        start = time.perf_counter()
        if execute_apart(results, run):
            minutes = (time.perf_counter() - start) / 60
            print(f'    {summary(results.result(run)["metrics"])}; {minutes:.1f} minutes', flush=True)
        else:
            failed.append(run)
            print(f'    failed: see {results.folder(run)}/output.txt', flush=True)
    return failed


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=Path, default=ROOT / 'configs/results/rows.py', help='the list')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='rows whose names begin so, and what they start from')
    parser.add_argument('--seeds', nargs='+', type=int, help="in place of the rows' own")
    parser.add_argument('--list', action='store_true', help='tell what is done, and do nothing')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/results'), help='folder of the runs')
    parser.add_argument('--out', type=Path, default=Path('docs'), help='folder of results.md and results.json')
    args = parser.parse_args()

    rows = read_rows(args.rows)
    runs = choose(rows, args.only, args.seeds)
    results = Results(rows, args.rows.parent, args.work_dir)
    if args.list:
        print(*(f'{results.state(run):8}{run}' for run in runs), sep='\n')
        return
    results.check_data(runs)
    output_folder(args.work_dir)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the run that is going on, too
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    with alone(args.work_dir):
        failed = train(results, runs)
    if failed:
        sys.exit(f'{len(failed)} of {len(runs)} runs are not done: {", ".join(map(str, failed))}')


if __name__ == '__main__':
    main()
