"""The page of results: mean and spread of each row, tables, and accuracy over multiply-adds."""

import json
import statistics
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .results import Row, main_metric

TITLES = {'cf/top1': 'top-1 %', 'accuracy/top1': 'top-1 %', 'mIoU': 'mIoU %', 'coco/bbox_mAP_50': 'box AP50 %'}
FACTORS = {'coco/bbox_mAP_50': 100.0}
HEAD = """# Results on real images

Reprinted by `make results`: it trains and tests all that is not done yet, and then writes this page, results.json and
results.png; [data.md](data.md) tells how to get the data. `make results-time`, on a machine that does nothing else,
measures the times. Each row is one of [rows.py](../configs/results/rows.py), which names its config and what it starts
from, and the folder `docs/results` has the numbers of each run.

Accuracies are means over the seeds, on all validation images, after the last iteration; in brackets, the largest less
the smallest. *MMACs* are millions of multiply-adds of the backbone for an image, and *of dense* their share of those of
the dense row; *queries* is the query ratio. *Time* is that of the whole model for an image on one thread, and *time of
dense* its ratio to the dense row, of runs in turns. *Training* is seconds of an iteration times iterations, without
those of the row that it starts from. Cells that were not measured are empty.

Where the columns are budgets, a price of queries makes the query ratio of 256 evenly spaced images that of the column;
a cell has the accuracy on all images, its spread, and the query ratio that they spent. *No budget* is what the routers
do by themselves: those that are not trained choose the finest granularity, as the dense model.
"""


def read_results(folder: Path) -> dict[str, dict[int, dict]]:
    """What runs have found, by row and seed.

    Args:
        folder: with a file ``<row>-seed<seed>.json`` of each run.
    """
    found: dict[str, dict[int, dict]] = {}
    for file in sorted(folder.glob('**/*-seed*.json')):
        result = json.loads(file.read_text())
        found.setdefault(result['row'], {})[result['seed']] = result
    return found


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """The mean, and the largest less the smallest."""
    values = list(values)
    return statistics.fmean(values), max(values) - min(values)


def measured(metrics: list[dict[str, float]]) -> dict[str, Any]:
    """What the seeds of a row reached in a test: see :func:`summarise`."""
    metric = main_metric(metrics[0])
    values = [FACTORS.get(metric, 1.0) * of_seed[metric] for of_seed in metrics]
    value, spread = mean_and_spread(values)
    dynamic = any(name.startswith('flops/query_ratio/') for name in metrics[0])
    return dict(
        metric=metric,
        value=value,
        spread=spread if len(values) > 1 else None,
        values=values,
        mmacs=1e3 * statistics.fmean(of_seed['flops/gflops'] for of_seed in metrics),
        query_ratio=statistics.fmean(of_seed['flops/query_ratio'] for of_seed in metrics) if dynamic else None,
    )


def summarise(rows: dict[str, Row], found: dict[str, dict[int, dict]], times: dict[str, dict]) -> list[dict[str, Any]]:
    """What the page says of each row of which there are results.

    Args:
        rows: of the list.
        found: results by row and seed.
        times: see :func:`~mmdyn.analysis.results_time.time_table`; those of another config than the first seed's are
            left out.

    Returns:
        for each row its name, table, label, config and seeds; ``metric``, its name; ``value`` and ``spread`` of the
        metric, and its ``values``; means of ``mmacs``, and with DGE of ``query_ratio``; ``budgets``, these by the
        budget of a test; ``of_dense``, the share of the multiply-adds of the row that it is beside; ``iterations``,
        ``parameters``; ``milliseconds`` and ``times_dense`` of an image, ``training_minutes``. What is not known is
        None.
    """
    lines = []
    for row in rows.values():
        results = [found[row.name][seed] for seed in sorted(found.get(row.name, {}))]
        if not results:
            continue
        time = times.get(row.name, {})
        if time.get('digest') != results[0]['digest']:
            time = {}
        seconds = time.get('seconds_per_iteration')
        tests = [{f'{test["budget"]:g}': test['metrics'] for test in result.get('budgets', [])} for result in results]
        lines.append(
            dict(
                name=row.name,
                table=row.table,
                label=row.label,
                config=row.config,
                seeds=[result['seed'] for result in results],
                **measured([result['metrics'] for result in results]),
                budgets={budget: measured([of_seed[budget] for of_seed in tests]) for budget in tests[0]},
                of_dense=None,
                iterations=results[0]['iterations'],
                parameters=results[0]['parameters'],
                milliseconds=time.get('milliseconds'),
                times_dense=time.get('times_dense'),
                training_minutes=seconds and seconds * results[0]['iterations'] / 60,
            )
        )
    mmacs = {line['name']: line['mmacs'] for line in lines}
    for line in lines:
        beside = rows[line['name']].beside
        line['of_dense'] = line['mmacs'] / mmacs[beside] if beside in mmacs else None
    return lines


COLUMNS = {  # title: field, format
    'MMACs': ('mmacs', '{:.1f}'),
    'of dense': ('of_dense', '{:.2f}'),
    'queries': ('query_ratio', '{:.3f}'),
    'iterations': ('iterations', '{:d}'),
    'training (min)': ('training_minutes', '{:.1f}'),
    'time (ms)': ('milliseconds', '{:.2f}'),
    'time of dense': ('times_dense', '{:.2f}'),
}


def accuracy(line: dict[str, Any]) -> str:
    """The metric of a row, with its spread in brackets."""
    spread = '' if line['spread'] is None else f' ({line["spread"]:.1f})'
    return f'{line["value"]:.1f}{spread}'


def cell(line: dict[str, Any], field: str, form: str) -> str:
    """A number of a row, or nothing."""
    return '' if line[field] is None or (field == 'iterations' and not line[field]) else form.format(line[field])


def rows_of_table(lines: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of a table, below those of its head: a row for each of the lines."""
    return [
        ['row', TITLES[lines[0]['metric']], 'seeds', *COLUMNS],
        *(
            [
                f'`{line["name"]}`: {line["label"]}',
                accuracy(line),
                str(len(line['seeds'])),
                *(cell(line, *column) for column in COLUMNS.values()),
            ]
            for line in lines
        ),
    ]


def rows_of_budgets(lines: list[dict[str, Any]]) -> list[list[str]]:
    """The same of a table whose lines were tested at budgets: a column for each."""

    def spent(test: dict[str, Any]) -> str:
        return f'{accuracy(test)} at {cell(test, "query_ratio", "{:.3f}")}'

    budgets = list(lines[0]['budgets'])
    return [
        ['row', 'seeds', f'{TITLES[lines[0]["metric"]]}, no budget', *budgets],
        *(
            [
                f'`{line["name"]}`: {line["label"]}',
                str(len(line['seeds'])),
                *map(spent, [line, *(line['budgets'][budget] for budget in budgets)]),
            ]
            for line in lines
        ),
    ]


def markdown(lines: list[dict[str, Any]], rows: dict[str, Row]) -> str:
    """The page.

    Args:
        lines: see :func:`summarise`.
        rows: all of the list, to tell which have no results yet.
    """
    parts = [HEAD, '![accuracy over multiply-adds](results.png)']
    for table in dict.fromkeys(line['table'] for line in lines):
        of_table = [line for line in lines if line['table'] == table]
        head, *body = (rows_of_budgets if of_table[0]['budgets'] else rows_of_table)(of_table)
        parts.append(f'## {table}')
        parts.append('\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [head, ['---'] * len(head), *body]))
    known = {line['name']: len(line['seeds']) for line in lines}
    absent = sum(max(len(row.seeds) - known.get(name, 0), 0) for name, row in rows.items())
    if absent:
        runs = sum(len(row.seeds) for row in rows.values())
        parts.append(f'{absent} of {runs} runs are not done yet; `results.py --list` names them.')
    return '\n\n'.join(part.strip('\n') for part in parts) + '\n'


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Plot accuracy over multiply-adds, a panel for each table."""
    tables = list(dict.fromkeys(line['table'] for line in lines))
    columns = min(3, len(tables))
    figure = Figure(figsize=(5 * columns, 4 * -(-len(tables) // columns)), layout='constrained')
    panels = figure.subplots(-(-len(tables) // columns), columns, squeeze=False).flat
    for table, axes in zip(tables, panels):
        of_table = [line for line in lines if line['table'] == table]
        for line in of_table:
            points = sorted([*line['budgets'].values(), line], key=itemgetter('mmacs'))
            at = [point['mmacs'] for point in points], [point['value'] for point in points]
            ends = [
                [point['value'] - min(point['values']) for point in points],
                [max(point['values']) - point['value'] for point in points],
            ]
            axes.errorbar(*at, yerr=ends, fmt='o-', markersize=4, capsize=2, label=line['label'])
        axes.set(title=table, xlabel='multiply-adds of the backbone (M)', ylabel=TITLES[of_table[0]['metric']])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    for axes in list(panels):
        axes.remove()
    figure.savefig(path, dpi=80)


def read_times(folder: Path) -> dict[str, Any]:
    """What was timed: ``rows``, by name, and ``environment``; empty if nothing was."""
    file = folder / 'times.json'
    return json.loads(file.read_text()) if file.is_file() else dict(rows={}, environment=None)


def write_page(rows: dict[str, Row], folder: Path) -> str:
    """Write results.json, results.md and results.png into a folder, from what its ``results`` holds.

    Args:
        rows: of the list.
        folder: of the page.

    Returns:
        the page.

    Raises:
        ValueError: if there is no result.
    """
    found, times = read_results(folder / 'results'), read_times(folder / 'results')
    lines = summarise(rows, found, times['rows'])
    if not lines:
        raise ValueError(f'There are no results in {folder / "results"} yet.')
    environments = [result['environment'] for results in found.values() for result in results.values()]
    content = dict(environment=environments[0], times_environment=times['environment'], rows=lines)
    (folder / 'results.json').write_text(json.dumps(content, indent=1) + '\n')
    page = markdown(lines, rows)
    (folder / 'results.md').write_text(page)
    draw(lines, folder / 'results.png')
    return page
