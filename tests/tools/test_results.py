"""The command line: which runs it does, in which order, and what it leaves; the trainings themselves are not real."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('results', ROOT / 'tools/analysis_tools/results.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

ROWS = """
seeds = [0, 1]
rows = [
    dict(name='x/base', config='c.py', table='X', label='dense', seeds=seeds),
    dict(name='x/dge', config='c.py', table='X', label='DGE', start='x/base', beside='x/base', seeds=seeds),
]
"""
METRICS = {'accuracy/top1': 50.0, 'flops/gflops': 0.001, 'flops/query_ratio': 1.0}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the tool on two rows, whose trainings are noted in ``run.done``, and fail if they are in ``run.fail``."""
    (tmp_path / 'rows.py').write_text(ROWS)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'c.py').write_text(
        f"model = dict(backbone=dict(type='mmdyn.PVT'))\ndata_source = 'unpack it'\n"
        f'train_dataloader = dict(dataset=dict(data_root={str(tmp_path / "data")!r}))\n'
        'test_dataloader = train_dataloader'
    )

    def execute_apart(results, run_):
        call.done.append(str(run_))
        folder = results.folder(run_)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'digest').write_text(results.digest(run_))
        if str(run_) in call.fail:
            return False
        found = dict(row=run_.row.name, seed=run_.seed, digest=results.digest(run_), iterations=4, parameters=1)
        (folder / 'result.json').write_text(json.dumps(dict(found, metrics=METRICS, environment={})))
        return True

    def time_table(results, runs, folder):
        call.timed.append([str(run_) for run_ in runs])
        return {
            run_.row.name: dict(digest=results.digest(run_), milliseconds=2.0, seconds_per_iteration=30.0)
            for run_ in runs
        }

    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['results.py', '--rows', str(tmp_path / 'rows.py'), *args])
        monkeypatch.setattr(sys, 'argv', [*sys.argv, '--work-dir', str(tmp_path / 'runs'), '--out', str(tmp_path)])
        call.done, call.timed = [], []
        tool.main()

    monkeypatch.setattr(tool, 'execute_apart', execute_apart)
    monkeypatch.setattr(tool, 'time_table', time_table)
    monkeypatch.setattr(tool, 'import_frameworks', lambda results: None)
    monkeypatch.setattr(tool.signal, 'signal', lambda *args: None)
    call.fail = set()
    return call


def test_all_is_done_once(run, tmp_path, capsys):
    run()
    assert run.done == ['x/base seed 0', 'x/dge seed 0', 'x/base seed 1', 'x/dge seed 1']
    assert (tmp_path / 'results/x/dge-seed1.json').exists()
    assert '| `x/dge`: DGE | 50.0 (0.0) | 2 |' in (tmp_path / 'results.md').read_text()
    assert '[4/4]' in capsys.readouterr().out
    run()
    assert run.done == []


def test_what_starts_from_a_failed_run_does_not_begin(run, capsys):
    run.fail = {'x/base seed 0'}
    with pytest.raises(SystemExit, match='2 of 4 runs are not done: x/base seed 0, x/dge seed 0'):
        run()
    assert run.done == ['x/base seed 0', 'x/base seed 1', 'x/dge seed 1']
    assert 'failed: see' in capsys.readouterr().out
    run.fail = set()
    run()
    assert run.done == ['x/base seed 0', 'x/dge seed 0']


def test_only_and_seeds_choose(run):
    run('--only', 'x/dge', '--seeds', '7')
    assert run.done == ['x/base seed 7', 'x/dge seed 7']


def test_the_list_tells_what_is_done(run, tmp_path, capsys):
    run('--only', 'x/base', '--seeds', '0')
    capsys.readouterr()
    run('--list')
    states = ['done    x/base seed 0', 'open    x/dge seed 0', 'open    x/base seed 1', 'open    x/dge seed 1']
    assert capsys.readouterr().out.splitlines() == states and run.done == []


def test_the_report_is_of_what_is_done(run, tmp_path):
    run('--only', 'x/base', '--seeds', '0')
    for file in (tmp_path / 'results/x/base-seed0.json', tmp_path / 'results.md'):
        file.unlink()
    run('--report')
    assert run.done == [] and (tmp_path / 'results/x/base-seed0.json').exists()
    assert '3 of 4 runs are not done yet' in (tmp_path / 'results.md').read_text()


def test_tables_are_timed_with_the_first_seed_once(run, tmp_path):
    run()
    run('--time')
    assert run.timed == [['x/base seed 0', 'x/dge seed 0']] and run.done == []
    assert '| 4 | 2.0 | 2.00 |' in (tmp_path / 'results.md').read_text()  # 4 iterations of half a minute
    run('--time')
    assert run.timed == []


@pytest.mark.parametrize(
    'args, message',
    [
        (['--only', 'y'], '--only y: no row begins so. There are: x/base, x/dge.'),
        (['--rows', 'missing.py'], 'There is no list of rows missing.py: give one like configs/results/rows.py.'),
    ],
)
def test_mistakes_end_in_a_line(run, capsys, args, message):
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert error.value.code == 2 and capsys.readouterr().err == f'results.py: {message}\n'


def test_missing_data_end_in_a_line(run, tmp_path, capsys):
    (tmp_path / 'data').rmdir()
    with pytest.raises(SystemExit) as error:
        run()
    assert error.value.code == 2 and capsys.readouterr().err.endswith('which x/base needs: unpack it.\n')
