import json
import threading

import pytest

from mmdyn.analysis.gpu import cases


@pytest.fixture
def two(monkeypatch):
    """Two small cases of each precision."""
    monkeypatch.setattr(cases, 'CASES', (('cls', 'DeiT-tiny', (64, 64), 2), ('train', 'PVT-tiny', (64, 128), 1)))
    monkeypatch.setattr(cases, 'DTYPES', ('bfloat16', 'float32'))
    monkeypatch.setattr(cases, 'environment', lambda device: dict(gpu='Some GPU'))


def groups(file):
    return json.loads(file.read_text())['benchmark']['groups']


def test_most_important_first():
    found = list(cases.cases())
    assert len(found) == len(cases.CASES) * len(cases.DTYPES)
    assert found[0] == dict(suite='det', arch='PVT-small', shape=[800, 1280], batch=1, dtype='float16')
    assert [case['dtype'] for case in found] == sorted((case['dtype'] for case in found), key=cases.DTYPES.index)
    assert list(cases.cases(2)) == found[:2]
    assert dict(suite='cfvit', arch='DeiT-small', shape=[224, 224], batch=1024, dtype='float16') in found


def test_measures_and_goes_on_where_it_was(two, tmp_path, capsys):
    file = tmp_path / 'results.json'
    cases.run(file, 'cpu', 1, only=1)
    (first,) = groups(file)
    assert {key: first[key] for key in ('suite', 'arch', 'shape', 'batch', 'dtype')} == dict(
        suite='cls', arch='DeiT-tiny', shape=[64, 64], batch=2, dtype='bfloat16'
    )
    assert list(first['rows']) == ['dense', 'DGE clustered', 'DGE finest', 'timm']
    assert 0 < first['rows']['timm']['max_difference'] < 0.1
    cases.run(file, 'cpu', 1, only=2)
    again, second = groups(file)
    assert again == first and list(second['rows']) == ['dense', 'DGE sparse', 'DGE pair', 'DGE dense']
    result = json.loads(file.read_text())['benchmark']
    assert result['device'] == 'cpu' and result['environment'] == dict(gpu='Some GPU')
    assert capsys.readouterr().out.count('| DGE clustered ') == 1


def test_errors_do_not_stop_the_others(two, tmp_path, monkeypatch):
    """After a failure that the device does not survive, the process is exchanged."""
    begun = []

    def measure(suite, *args):
        if suite == 'cls':
            raise RuntimeError('CUDA error: an illegal memory access\nmore')
        return dict(rows=dict(dense=dict(seconds=1.0)))

    monkeypatch.setattr(cases.benchmark, 'measure', measure)
    cases.run(tmp_path / 'results.json', 'cpu', 1, None, again=lambda: begun.append(True))
    failed, good, *_ = groups(tmp_path / 'results.json')
    assert failed['error'] == 'RuntimeError: CUDA error: an illegal memory access' and not failed['rows']
    assert good['rows'] and not begun and len(groups(tmp_path / 'results.json')) == 4
    monkeypatch.setattr(cases, 'is_usable', lambda device: False)
    cases.run(tmp_path / 'others.json', 'cpu', 1, 1, again=lambda: begun.append(True))
    assert begun == [True]


def test_a_case_that_does_not_end_is_given_up(two, tmp_path, monkeypatch):
    """The process, which may be stuck, is exchanged, and finds the case among those that are done."""
    file, begun = tmp_path / 'results.json', threading.Event()
    monkeypatch.setattr(cases, 'LIMIT', 0.1)
    monkeypatch.setattr(cases.benchmark, 'measure', lambda *args: begun.wait(60) and dict(rows={}))
    cases.run(file, 'cpu', 1, 1, again=begun.set)
    first, _ = groups(file)
    assert first['error'] == 'not finished after 0.1 s' and first['dtype'] == 'bfloat16'
    monkeypatch.setattr(cases.benchmark, 'measure', lambda *args: dict(rows={}))
    cases.run(file, 'cpu', 1, 2)
    assert [group['suite'] for group in groups(file)[2:]] == ['train']


def test_as_many_runs_of_each_case(two, monkeypatch):
    """Those of cls run five times as often as they are told."""
    monkeypatch.setattr(cases.benchmark, 'measure', lambda *args: dict(runs=args[-1].rounds))
    runs = [cases.measure(case, 'cpu', 20)['runs'] for case in cases.cases(2)]
    assert runs == [4, 20]
