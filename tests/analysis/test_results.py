"""A list of three small rows is trained, killed, resumed and changed; whatever a run does, it does in a process."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmdyn.analysis import results as module
from mmdyn.analysis.results import (
    Row,
    Run,
    alone,
    choose,
    execute_apart,
    main_metric,
    read_rows,
    settings,
)


@HOOKS.register_module(force=True)
class KilledOnce(Hook):
    """Writes down each iteration, and kills its process in the sixth, unless that has happened."""

    def __init__(self, file):
        self.file = file

    def before_train_iter(self, runner, *args, **kwargs):
        file = Path(self.file)
        before = file.read_text() if file.exists() else ''
        killed = '5' in before
        file.write_text(f'{before}{runner.iter} ')
        if runner.iter == 5 and not killed:
            os.kill(os.getpid(), signal.SIGKILL)


def weights(results, run):
    return torch.load(results.folder(run) / 'weights.pth', weights_only=False)['state_dict']


def test_what_starts_from_another_row_has_its_weights(small):
    base = dict(name='a/base')
    results = small(base, dict(name='a/dge', parts=('still', 'dge'), start='a/base'))
    first, second = choose(results.rows, None, seeds=[3])
    assert [results.state(run) for run in (first, second)] == ['open', 'open']
    assert execute_apart(results, first) and execute_apart(results, second)
    assert [results.state(run) for run in (first, second)] == ['done', 'done']
    before, after = weights(results, first), weights(results, second)
    assert all(torch.equal(before[name], after[name]) for name in before) and set(after) - set(before)
    found = results.result(second)
    assert (found['row'], found['seed'], found['iterations']) == ('a/dge', 3, 6)
    assert 0 <= found['metrics']['accuracy/top1'] <= 100 and 'flops/query_ratio/blocks.0' in found['metrics']
    assert found['parameters'] == sum(value.numel() for value in after.values())
    left = {path.name for path in results.folder(first).iterdir() if path.is_file()}
    assert left == {'digest', 'output.txt', 'result.json', 'small.py', 'weights.pth'}


def test_seeds_differ_and_repeat(small):
    results = small(dict(name='a'), dict(name='b'))
    runs = choose(results.rows, None, seeds=[0, 1])[:3]
    assert all(execute_apart(results, run) for run in runs)
    found = {str(run): weights(results, run)['head.fc.weight'] for run in runs}
    assert torch.equal(found['a seed 0'], found['b seed 0'])
    assert not torch.equal(found['a seed 0'], found['a seed 1'])


def test_a_killed_run_goes_on_from_its_last_checkpoint(small, tmp_path):
    results = small(dict(name='a', parts=('watched',)))
    run = Run(results.rows['a'], 0)
    assert not execute_apart(results, run) and results.state(run) == 'begun' and results.result(run) is None
    assert execute_apart(results, run) and results.state(run) == 'done'
    # Two iterations an epoch: the checkpoint is of the second.
    assert (tmp_path / 'iterations').read_text().split() == ['0', '1', '2', '3', '4', '5', '4', '5']
    assert results.result(run)['iterations'] == 6


def test_rows_without_training_test_the_weights_of_another(small):
    results = small(
        dict(name='a'),
        dict(name='b', start='a', train=False, parts=(dict(test_evaluator=[dict(type='Accuracy', topk=1)]),)),
    )
    first, second = choose(results.rows, None, seeds=[0])
    assert execute_apart(results, first) and execute_apart(results, second)
    assert results.result(second)['metrics'] == {'accuracy/top1': results.result(first)['metrics']['accuracy/top1']}
    assert results.result(second)['iterations'] == 0 and not (results.folder(second) / 'weights.pth').exists()


def test_weights_are_tested_at_budgets(small):
    results = small(
        dict(name='a', parts=('dge',)), dict(name='b', start='a', parts=('dge',), train=False, budgets=(0.5, 0.8))
    )
    first, second = choose(results.rows, None, seeds=[0])
    assert execute_apart(results, first) and execute_apart(results, second)
    found = results.result(second)
    assert found['metrics']['accuracy/top1'] == results.result(first)['metrics']['accuracy/top1']
    half, most = found['budgets']
    assert (half['budget'], most['budget']) == (0.5, 0.8) and set(half['metrics']) <= set(found['metrics'])
    # One layer of four regions: its query ratios are far apart.
    assert half['metrics']['flops/query_ratio'] <= most['metrics']['flops/query_ratio'] <= 1
    assert abs(half['metrics']['flops/query_ratio'] - 0.5) < 0.2
    other = small(results.rows['a'].__dict__, dict(results.rows['b'].__dict__, budgets=(0.5,)))
    assert other.state(second) == 'done' and other.state(Run(other.rows['b'], 0)) == 'changed'


def test_what_has_changed_begins_anew_with_all_that_starts_from_it(small):
    results = small(dict(name='a'), dict(name='b', start='a', train=False))
    first, second = choose(results.rows, None, seeds=[0])
    assert execute_apart(results, first) and execute_apart(results, second)
    other = small(dict(name='a', parts=('still',)), dict(name='b', start='a', train=False))
    first, second = choose(other.rows, None, seeds=[0])
    assert [other.state(run) for run in (first, second)] == ['changed', 'changed']
    before = weights(other, first)['head.fc.weight']
    other.prepare(first)
    assert other.state(first) == 'begun' and not (other.folder(first) / 'weights.pth').exists()
    assert execute_apart(other, first) and other.state(first) == 'done'
    assert not torch.equal(weights(other, first)['head.fc.weight'], before)


def test_a_run_that_fails_says_why_in_its_file(small):
    results = small(dict(name='a', parts=(dict(model=dict(head=dict(num_classes=1))),)))
    run = Run(results.rows['a'], 0)
    assert not execute_apart(results, run) and results.state(run) == 'begun'
    assert (
        'LossGuard' in (results.folder(run) / 'output.txt').read_text()
        or 'Error' in (results.folder(run) / 'output.txt').read_text()
    )


def test_what_runs_find_is_published(small, tmp_path):
    results = small(dict(name='a/b'))
    folder = results.folder(Run(results.rows['a/b'], 1))
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text('{"row": "a/b"}')
    results.publish(Run(results.rows['a/b'], 1), tmp_path / 'out')
    assert json.loads((tmp_path / 'out/a/b-seed1.json').read_text()) == {'row': 'a/b'}


def test_missing_data_names_what_brings_them(small, tmp_path):
    results = small(dict(name='a'))
    runs = choose(results.rows, None)
    results.check_data(runs)
    (tmp_path / 'data').rename(tmp_path / 'elsewhere')
    with pytest.raises(ValueError, match=r'There is no folder .+/data/train, which a needs: ask the test\.'):
        results.check_data(runs)


def test_a_folder_is_held_by_one_process(tmp_path):
    said = rf'Another process trains in .+ \(process {os.getpid()}\): wait for it'
    with alone(tmp_path), pytest.raises(ValueError, match=said), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def rows_of(*entries):
    return {entry['name']: Row(**{'config': 'c', 'table': 't', 'label': 'l', **entry}) for entry in entries}


def test_turns_come_first_then_seeds_then_places():
    rows = rows_of(
        dict(name='late', turn=2, seeds=(0,)), dict(name='x', seeds=(0, 1)), dict(name='y', seeds=(0, 1), start='x')
    )
    assert [str(run) for run in choose(rows, None)] == ['x seed 0', 'y seed 0', 'x seed 1', 'y seed 1', 'late seed 0']


def test_what_a_row_starts_from_comes_before_it():
    rows = rows_of(
        dict(name='seg/pvt', backbone='cls/pvt', seeds=(2,)),
        dict(name='cls/pvt', start='cls/base'),
        dict(name='cls/base', turn=9),
    )
    expected = ['cls/base seed 2', 'cls/pvt seed 2', 'seg/pvt seed 2']
    assert [str(run) for run in choose(rows, ['seg'])] == expected
    assert len(choose(rows, ['seg', 'cls'], seeds=[5])) == 3


def test_only_names_beginnings():
    rows = rows_of(dict(name='a/x'), dict(name='b/x'))
    assert {run.row.name for run in choose(rows, ['b'])} == {'b/x'}
    with pytest.raises(ValueError, match='--only c: no row begins so. There are: a/x, b/x'):
        choose(rows, ['a', 'c'])


def test_rows_cannot_start_from_each_other():
    with pytest.raises(ValueError, match='Rows start from each other: a from b from a'):
        choose(rows_of(dict(name='a', start='b'), dict(name='b', start='a')), None)


GOOD = "dict(name='a', config='c', table='t', label='l')"


@pytest.mark.parametrize(
    'text, message',
    [
        ('rows = []', 'has no rows'),
        (f'rows = [{GOOD}, {GOOD}]', "two rows have the name 'a'"),
        ("rows = [dict(name='a', config='c', table='t')]", "the row 'a' has no label: a row has name, config"),
        (f'rows = [dict({GOOD}, epochs=3)]', "the row 'a' has epochs: a row has name, config"),
        (f"rows = [dict({GOOD}, start='b')]", "the row 'a' needs 'b', which is none of the rows"),
        (f"rows = [dict({GOOD}, beside='b')]", "the row 'a' needs 'b', which is none of the rows"),
        (f'rows = [dict({GOOD}, train=False)]', "the row 'a' with train=False needs a start"),
        (f'rows = [dict({GOOD}, budgets=[0.5])]', "the row 'a' has budgets, at which weights are tested: write train"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path, text, message):
    (tmp_path / 'rows.py').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / 'rows.py')


def test_a_missing_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'There is no list of rows .+ like configs/results/rows.py'):
        read_rows(tmp_path / 'rows.py')


def test_parts_are_merged_in_their_order():
    cfg = Config(dict(model=dict(a=1, b=1, c=1), one=dict(model=dict(a=2, b=2))))
    row = rows_of(dict(name='r', config='c.py', parts=('one', dict(model=dict(b=3)))))['r']
    assert settings(row, cfg).model == dict(a=2, b=3, c=1) and cfg.model.a == 1
    with pytest.raises(ValueError, match=r"The row 'r' has the part 'two', which is no dict in c\.py"):
        settings(rows_of(dict(name='r', config='c.py', parts=('two',)))['r'], cfg)


def test_the_metric_that_counts():
    assert main_metric({'coco/bbox_mAP': 0.1, 'coco/bbox_mAP_50': 0.3, 'flops/gflops': 1.0}) == 'coco/bbox_mAP_50'
    assert main_metric({'accuracy/top1': 1.0, 'cf/top1': 2.0}) == 'cf/top1'
    assert module.summary({'mIoU': 43.21, 'flops/query_ratio': 0.5, 'flops/gflops': 0.012345}) == (
        'mIoU 43.21, flops/query_ratio 0.5, flops/gflops 0.01235'
    )
