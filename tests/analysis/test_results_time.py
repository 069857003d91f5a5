from types import SimpleNamespace

import pytest

from mmdyn.analysis import results_time
from mmdyn.analysis.results import Run
from mmdyn.analysis.results_time import Enough, TimingHook, time_table, weights_of


def test_the_first_iterations_do_not_count(monkeypatch):
    clock = iter([0.0, 5.0, 6.0, 8.0, 11.0])
    monkeypatch.setattr(results_time, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    hook = TimingHook(iterations=5, warmup=2)
    for _ in range(4):
        hook.after_train_iter(None)
    with pytest.raises(Enough):
        hook.after_train_iter(None)
    assert hook.seconds == [2.0, 3.0]


def test_a_short_training_keeps_its_last_iteration():
    hook = TimingHook(iterations=9, warmup=5)
    hook.ends = [1.0, 3.0, 6.0]
    assert hook.seconds == [3.0]


def test_rows_of_a_table_are_timed_side_by_side(small, tmp_path):
    results = small(
        dict(name='a'), dict(name='b', start='a', beside='a', parts=('dge',)), dict(name='c', start='a', train=False)
    )
    runs = [Run(row, 0) for row in results.rows.values()]
    for run in runs:
        results.execute(run)
    assert weights_of(results, runs[2]) == weights_of(results, runs[0])
    before = {run.row.name: sorted(results.folder(run).iterdir()) for run in runs}
    times = time_table(results, runs, tmp_path / 'other')
    assert set(times) == {'a', 'b', 'c'}
    assert set(times['a']) == {'milliseconds', 'digest', 'seconds_per_iteration'}
    assert set(times['b']) == set(times['a']) | {'times_dense'} and set(times['c']) == {'milliseconds', 'digest'}
    assert all(times[run.row.name]['digest'] == results.digest(run) for run in runs)
    assert 0 < times['b']['times_dense'] < 100 and 0 < times['a']['seconds_per_iteration'] < 60
    assert before == {run.row.name: sorted(results.folder(run).iterdir()) for run in runs}


def test_the_dense_row_of_another_table_is_timed_with_those_beside_it(small, monkeypatch, tmp_path):
    results = small(dict(name='a'), dict(name='b', beside='a'), dict(name='c', beside='d'), dict(name='d'))
    timed = []

    def time_tests(results, runs):
        timed.append([run.row.name for run in runs])
        return {run.row.name: dict(milliseconds=1.0) for run in runs}

    monkeypatch.setattr(results_time, 'time_tests', time_tests)
    monkeypatch.setattr(results_time, 'time_training', lambda *args: 0.5)
    monkeypatch.setattr(results, 'state', lambda run: 'open' if run.row.name == 'd' else 'done')
    times = time_table(results, [Run(results.rows[name], 0) for name in ('b', 'c')], tmp_path)
    assert timed == [['b', 'c', 'a']] and set(times) == {'b', 'c'}
