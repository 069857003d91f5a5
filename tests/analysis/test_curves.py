import json

import pytest

from mmdyn.analysis.curves import Source, joined, read_source


@pytest.fixture
def write(tmp_path):
    """Write a file below a folder of runs; several contents are lines."""

    def file(name, *contents):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(map(json.dumps, contents)))
        return path

    return file


def row(mode, gflops, top1, checkpoint='a', **others):
    return dict(checkpoint=checkpoint, mode=mode, gflops=gflops, milliseconds=10 * gflops, top1=top1, **others)


def test_sweep_of_budgets(write):
    rows = [row('router', 2, 70, layers=dict(x=0.5)), row('average', 3, 72), row('average', 1, 60), row('exact', 1, 55)]
    found = read_source(write('pvt/budget/sweep.json', dict(images=5, metric='top1', rows=rows)))
    assert [source.name for source in found] == ['pvt, average', 'pvt, exact']
    assert found[0].cost == [(1, 60), (2, 70), (3, 72)] and found[0].time == [(10, 60), (20, 70), (30, 72)]
    assert found[1].cost == [(1, 55), (2, 70)] and found[1].metric == 'top1'
    assert [source.layers for source in found] == [dict(x=0.5)] * 2


def test_sweep_of_checkpoints(write):
    rows = [row('router', 2, 70), row('router', 1, 60, 'b'), row('equal', 3, 65, 'b', mAP=1)]
    found = read_source(write('sweep.json', dict(metric='top1', rows=rows)), 'PVT')
    assert [(source.name, source.cost) for source in found] == [
        ('PVT, a, router', [(2, 70)]),
        ('PVT, b, equal', [(1, 60), (3, 65)]),
    ]


def test_sweep_of_thresholds(write):
    columns = dict(
        threshold=[0, 1], exit_share=[1, 0], top1=[60, 70], macs=[1e9, 4e9], coarse_right=[6, 0], fine_right=[0, 7]
    )
    (found,) = read_source(write('cf/threshold/curve.json', dict(coarse_macs=1, fine_macs=3, curve=columns)))
    assert found.name == 'cf' and found.cost == [(1, 60), (4, 70)] and found.stages == [(1, 6, 0), (4, 0, 7)]


def test_report(write):
    points = [row('average', 1, 60, layers=dict(x=0.2)), row('router', 2, None, layers=dict(x=0.5))]
    (found,) = read_source(write('pvt/report/report.json', dict(metric='top1', points=points, start=1)))
    assert (found.name, found.cost, found.layers, found.stages) == ('pvt', [(1, 60)], dict(x=0.5), [])


def test_log_of_a_training(write):
    lines = [
        dict(lr=1.0, loss=3.0, query_ratio=0.9, budget=1.0, epoch=1, iter=50, step=50),
        {'query_ratio/x': 0.7, 'step': 100},
        dict(lr=1.0, loss=2.0, query_ratio=0.5, budget=0.5, epoch=1, iter=100, step=100),
        {'accuracy/top1': 80.0, 'time': 0.1, 'step': 1},
        dict(lr=1.0, loss=1.0, query_ratio=0.5, budget=0.5, epoch=2, iter=150, step=150),
    ]
    (found,) = read_source(write('pvt/20260101_000000/vis_data/scalars.json', *lines))
    assert found.name == 'pvt' and found.training['loss'] == [(50, 3), (100, 2), (150, 1)]
    # A validation counts epochs.
    assert found.training['accuracy/top1'] == [(100, 80)] and found.training['query_ratio/x'] == [(100, 0.7)]
    assert found.training['budget'][0] == (50, 1) and 'step' not in found.training and found.cost == []


@pytest.mark.parametrize('cost, layers', [('flops/gflops', dict(a=0.25)), ('cf/gflops', {})])
def test_test(write, cost, layers):
    content = {cost: 2.5, 'time': 1.0, 'mIoU': 40.0, **{f'flops/query_ratio/{name}': x for name, x in layers.items()}}
    (found,) = read_source(write('fpn/test/20260101_000000/20260101_000000.json', content))
    assert found == Source('fpn', [(2.5, 40)], metric='mIoU', layers=layers)


def test_another_metric(write):
    rows = [row('router', 2, 70, mAP=0.5)]
    path = write('sweep.json', dict(metric='top1', rows=rows))
    assert read_source(path, metric='mAP')[0].cost == [(2, 0.5)]
    with pytest.raises(ValueError, match=r"no metric mIoU: choose from \['gflops', 'milliseconds', 'top1', 'mAP'\]"):
        read_source(path, metric='mIoU')


def test_points_of_a_name_are_a_curve():
    sizes = [Source('PVT', [(3, 75)], metric='top1'), Source('DGE', [(1, 1)]), Source('PVT', [(1, 70)], [(9, 70)])]
    assert joined(sizes) == [Source('PVT', [(1, 70), (3, 75)], [(9, 70)], 'top1'), Source('DGE', [(1, 1)])]


@pytest.mark.parametrize(
    'content, message',
    [
        ('{', 'x.json is no JSON file'),
        ('[1]', 'x.json is none of the files that are known: sweep.json of sweep_budget.py'),
        ('', 'x.json is none of the files'),
        ('{"a": 1}', 'x.json is none of the files'),
        ('{"flops/gflops": 1, "time": 2}', 'x.json has no accuracy beside its cost'),
    ],
)
def test_other_files(content, message, tmp_path):
    (tmp_path / 'x.json').write_text(content)
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path / 'x.json')


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match='Cannot read .*y.json: No such file or directory'):
        read_source(tmp_path / 'y.json')
