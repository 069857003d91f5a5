"""Means, spreads and shares against numbers worked out by hand, and the page of two rows."""

import json

import pytest

from mmdyn.analysis.results import Row
from mmdyn.analysis.results_report import (
    HEAD,
    accuracy,
    draw,
    markdown,
    mean_and_spread,
    read_results,
    read_times,
    summarise,
    write_page,
)

ROWS = {
    row.name: row
    for row in (
        Row('a/dense', 'a.py', 'Task A', 'dense'),
        Row('a/dge', 'a.py', 'Task A', 'DGE 0.5', beside='a/dense'),
        Row('b/dense', 'b.py', 'Task B', 'dense', seeds=(0,)),
    )
}


def result(row, seed, metrics, iterations=120):
    return dict(
        row=row, seed=seed, digest=f'{row} {seed}', iterations=iterations, parameters=7, metrics=metrics, environment={}
    )


def dense(seed, top1):
    return result('a/dense', seed, {'accuracy/top1': top1, 'flops/gflops': 0.02, 'flops/query_ratio': 1.0})


def dynamic(seed, top1, ratio):
    costs = {'flops/gflops': 0.02 * ratio, 'flops/query_ratio': ratio, 'flops/query_ratio/stages.0': ratio}
    return result('a/dge', seed, {'accuracy/top1': top1, **costs})


FOUND = {
    'a/dense': {0: dense(0, 30.0), 1: dense(1, 33.0), 2: dense(2, 31.5)},
    'a/dge': {0: dynamic(0, 30.0, 0.5), 1: dynamic(1, 31.0, 0.75)},
}


def test_the_spread_is_the_largest_less_the_smallest():
    assert mean_and_spread([1.0, 4.0, 2.5]) == (2.5, 3.0) and mean_and_spread(iter([2.0])) == (2.0, 0.0)


def test_rows_are_summed_up():
    first, second = summarise(ROWS, FOUND, {})
    assert (first['value'], first['spread'], first['seeds']) == (31.5, 3.0, [0, 1, 2])
    assert (second['value'], second['spread'], second['seeds']) == (30.5, 1.0, [0, 1])
    assert first['mmacs'] == pytest.approx(20) and second['mmacs'] == pytest.approx(12.5)
    assert second['of_dense'] == pytest.approx(0.625) and first['of_dense'] is None
    assert second['query_ratio'] == pytest.approx(0.625) and first['query_ratio'] is None  # it has no dynamic layers
    assert (second['milliseconds'], second['training_minutes']) == (None, None)


def test_average_precisions_are_per_cent():
    metrics = {'coco/bbox_mAP_50': 0.5, 'flops/gflops': 1.0, 'flops/query_ratio': 1.0}
    (line,) = summarise(ROWS, {'b/dense': {0: result('b/dense', 0, metrics)}}, {})
    assert line['value'] == 50 and line['spread'] is None and accuracy(line) == '50.0'


def test_times_count_for_the_weights_that_they_were_measured_with():
    times = {
        'a/dense': dict(digest='a/dense 0', milliseconds=2.0, seconds_per_iteration=0.5),
        'a/dge': dict(digest='another', milliseconds=1.0, times_dense=0.5, seconds_per_iteration=0.7),
    }
    first, second = summarise(ROWS, FOUND, times)
    assert (first['milliseconds'], first['times_dense'], first['training_minutes']) == (2.0, None, 1.0)
    assert (second['milliseconds'], second['times_dense'], second['training_minutes']) == (None, None, None)


def test_the_page_has_a_row_for_each_and_what_is_not_done(tmp_path):
    for results in FOUND.values():
        for seed, found in results.items():
            file = tmp_path / f'results/{found["row"]}-seed{seed}.json'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
    (tmp_path / 'results/times.json').write_text(
        json.dumps(dict(rows={'a/dge': dict(digest='a/dge 0', milliseconds=1.5, times_dense=0.75)}, environment={}))
    )
    page = write_page(ROWS, tmp_path)
    assert page == (tmp_path / 'results.md').read_text() and page.startswith(HEAD)
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in page.splitlines() if line.startswith('| `')]
    assert rows == [
        ['`a/dense`: dense', '31.5 (3.0)', '3', '20.0', '', '', '120', '', '', ''],
        ['`a/dge`: DGE 0.5', '30.5 (1.0)', '2', '12.5', '0.62', '0.625', '120', '', '1.50', '0.75'],
    ]
    assert 'Task B' not in page and page.endswith('2 of 7 runs are not done yet; `results.py --list` names them.\n')
    content = json.loads((tmp_path / 'results.json').read_text())
    assert [row['name'] for row in content['rows']] == ['a/dense', 'a/dge']
    assert (tmp_path / 'results.png').read_bytes().startswith(b'\x89PNG')


def test_a_table_of_budgets(tmp_path):
    rows = {
        row.name: row
        for row in (
            Row('a/dense', 'a.py', 'Task A', 'dense'),
            Row(
                'r/random', 'a.py', 'Routers', 'random', start='a/dense', train=False, budgets=(0.5, 0.9), seeds=(0, 1)
            ),
        )
    }
    tested = {
        seed: dict(
            dynamic(seed, 30.0, 1.0),
            row='r/random',
            budgets=[
                dict(budget=0.5, metrics=dynamic(seed, top1, 0.4)['metrics']),
                dict(budget=0.9, metrics=dynamic(seed, top1 + 8, 0.8)['metrics']),
            ],
        )
        for seed, top1 in enumerate([20.0, 21.0])
    }
    (line,) = lines = summarise(rows, {'r/random': tested}, {})
    half = line['budgets']['0.5']
    assert (half['value'], half['spread'], half['mmacs']) == (20.5, 1.0, pytest.approx(8.0))
    assert markdown(lines, rows).splitlines()[-5:] == [
        '| row | seeds | top-1 %, no budget | 0.5 | 0.9 |',
        '| --- | --- | --- | --- | --- |',
        '| `r/random`: random | 2 | 30.0 (0.0) at 1.000 | 20.5 (1.0) at 0.400 | 28.5 (1.0) at 0.800 |',
        '',
        '3 of 5 runs are not done yet; `results.py --list` names them.',
    ]
    draw(lines, tmp_path / 'drawn.png')
    assert (tmp_path / 'drawn.png').read_bytes().startswith(b'\x89PNG')


def test_a_list_that_is_done_says_nothing_of_what_is_not():
    rows = {'b/dense': ROWS['b/dense']}
    found = {'b/dense': {0: result('b/dense', 0, {'mIoU': 40.0, 'flops/gflops': 1.0, 'flops/query_ratio': 1.0}, 0)}}
    page = markdown(summarise(rows, found, {}), rows)
    assert 'Not done' not in page and '| `b/dense`: dense | 40.0 | 1 | 1000.0 |  |  |  |  |  |  |' in page
    assert '| row | mIoU % |' in page


def test_nothing_done_is_said(tmp_path):
    with pytest.raises(ValueError, match=r'There are no results in .+/results yet'):
        write_page(ROWS, tmp_path)
    assert read_results(tmp_path) == {} and read_times(tmp_path) == dict(rows={}, environment=None)
