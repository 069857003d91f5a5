"""Train and test what docs/results.md shows, and write that page: a list of configs with seeds, resumable run by run.

Each run is a process of its own with one thread. What is done is not done again; what was killed goes on from its last
checkpoint; what has another config than it was begun with begins anew. Rows that start from others come after them.
--time measures times of rows that are done, side by side; it needs a machine that does nothing else.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import mmdyn  # noqa: F401
from mmdyn.analysis.latency import environment
from mmdyn.analysis.results import Results, Run, alone, choose, execute_apart, import_frameworks, read_rows, summary
from mmdyn.analysis.results_report import read_times, write_page
from mmdyn.analysis.results_time import time_table
from mmdyn.engine.command import command, output_folder

ROOT = Path(__file__).parents[2]


def train(results: Results, runs: list[Run], out: Path) -> list[Run]:
    """Do the runs that are not done; those that failed, or could not begin for what they start from."""
    failed: list[Run] = []
    for place, run in enumerate(runs, 1):
        if results.state(run) == 'done':
            results.publish(run, out)
            continue
        if any(other.row.name in run.row.needs and other.seed == run.seed for other in failed):
            failed.append(run)
            continue
        print(f'[{place}/{len(runs)}] {time.strftime("%H:%M")} {run}', flush=True)
        start = time.perf_counter()
        if execute_apart(results, run):
            results.publish(run, out)
            minutes = (time.perf_counter() - start) / 60
            print(f'    {summary(results.result(run)["metrics"])}; {minutes:.1f} minutes', flush=True)
        else:
            failed.append(run)
            print(f'    failed: see {results.folder(run)}/output.txt', flush=True)
    return failed


def measure(results: Results, runs: list[Run], out: Path) -> None:
    """Time the tables of which a row has not been timed, with the first seed of each row that is done."""
    done = [run for run in runs if run.seed == run.row.seeds[0] and results.state(run) == 'done']
    for table in dict.fromkeys(run.row.table for run in done):
        times, of_table = read_times(out), [run for run in done if run.row.table == table]
        known = {name: row['digest'] for name, row in times['rows'].items()}
        if all(known.get(run.row.name) == results.digest(run) for run in of_table):
            continue
        print(f'{table}: {len(of_table)} rows', flush=True)
        with tempfile.TemporaryDirectory() as folder:
            times['rows'].update(time_table(results, of_table, Path(folder)))
        times['environment'] = dict(environment(), threads=torch.get_num_threads())
        (out / 'times.json').write_text(json.dumps(times, indent=1) + '\n')


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=Path, default=ROOT / 'configs/results/rows.py', help='the list')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='rows whose names begin so, and what they start from')
    parser.add_argument('--seeds', nargs='+', type=int, help="in place of the rows' own")
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--list', action='store_true', help='tell what is done, and do nothing')
    what.add_argument('--report', action='store_true', help='write the page of what is done, without training')
    what.add_argument('--time', action='store_true', help='time what is done, and write the page')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/results'), help='folder of the runs')
    parser.add_argument(
        '--out', type=Path, default=Path('docs'), help='folder of results.md, results.json and results/'
    )
    args = parser.parse_args()

    rows = read_rows(args.rows)
    runs = choose(rows, args.only, args.seeds)
    results, published, failed = Results(rows, args.rows.parent, args.work_dir), args.out / 'results', []
    if args.list:
        print(*(f'{results.state(run):8}{run}' for run in runs), sep='\n')
        return
    output_folder(published)
    if args.report:
        for run in runs:
            if results.state(run) == 'done':
                results.publish(run, published)
    else:
        results.check_data(runs)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the run that is going on, too
        torch.set_num_threads(1)
        import_frameworks(results)
        with alone(output_folder(args.work_dir)):
            if args.time:
                measure(results, runs, published)
            else:
                failed = train(results, runs, published)
    write_page(rows, args.out)
    print(f'{args.out}/results.md, results.json and results.png')
    if failed:
        sys.exit(f'{len(failed)} of {len(runs)} runs are not done: {", ".join(map(str, failed))}')


if __name__ == '__main__':
    main()
