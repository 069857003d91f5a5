import json
import math
import runpy
from pathlib import Path

import pytest
import torch

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]


@pytest.fixture
def train_amp(tool):
    return tool('train_amp')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    make = runpy.run_path(str(ROOT / 'tools/dataset_tools/make_demo_dataset.py'))['make_demo_dataset']
    return make(tmp_path_factory.mktemp('data') / 'demo', cls_train=40, cls_val=10, dense_train=1, dense_val=1)


def entries(losses, ratio=0.5):
    return [dict(loss=loss, query_ratio=ratio) for loss in losses]


@pytest.mark.parametrize('losses, said', [
    (entries([2.] * 20 + [9.] * 5 + [1.] * 20), []),
    (entries([2.] * 20 + [1.7] * 20), ['the loss fell from 2.000 to 1.700 only']),
    (entries([2.] * 20 + [1.] * 20, 0.65), ['the query ratio is 0.650, the budget 0.5']),
    (entries([2.] * 20 + [math.inf] + [1.] * 20), ['the loss of iteration 21 is inf']),
    (entries([2.] * 40 + [math.nan]), ['the loss of iteration 41 is nan', 'the loss fell from 2.000 to nan only']),
])
def test_summary(train_amp, losses, said):
    found = train_amp.summary(losses, 0.5)
    assert found['wrong'] == said and found['iterations'] == len(losses) and found['first_loss'] == 2
    json.dumps(found, allow_nan=False)


def test_trains(train_amp, digits, tmp_path, monkeypatch):
    """Too short for learning, which it says."""
    monkeypatch.setattr('sys.argv', [
        'train_amp.py', str(tmp_path / 'results.json'), '--data', str(digits), '--work-dir', str(tmp_path / 'run'),
        '--device', 'cpu', '--dtype', 'float32', '--iterations', '40', '--batch', '4'])
    with pytest.raises(SystemExit) as end:
        train_amp.main()
    found = json.loads((tmp_path / 'results.json').read_text())['training']['float32']
    assert end.value.code == min(len(found['wrong']), 1)
    assert found['iterations'] == 40 and found['budget'] == 0.5 and 0 < found['query_ratio'] <= 1
    assert 1.5 < found['first_loss'] < 4 and found['seconds'] > 0


def test_amp(train_amp, tmp_path):
    cfg = train_amp.config(tmp_path, tmp_path, 'bfloat16', 200, 64)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.optim_wrapper.dtype == 'bfloat16'
    assert cfg.optim_wrapper.clip_grad and cfg.train_cfg.max_iters == 200


@pytest.mark.cuda
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_trains_on_cuda(train_amp, digits, tmp_path, dtype):
    found = train_amp.train(train_amp.config(digits, tmp_path, dtype, 40, 4))
    assert found['iterations'] == 40 and math.isfinite(found['last_loss'])


def test_a_failing_precision_does_not_stop_the_other(train_amp, tmp_path, monkeypatch):
    def train(cfg):
        if cfg.optim_wrapper.dtype == 'float16':
            raise RuntimeError('out of memory')
        return dict(wrong=[])

    monkeypatch.setattr(train_amp, 'train', train)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr('sys.argv', ['train_amp.py', str(tmp_path / 'results.json')])
    with pytest.raises(SystemExit) as end:
        train_amp.main()
    assert end.value.code == 1
    assert json.loads((tmp_path / 'results.json').read_text())['training'] == dict(
        float16=dict(wrong=['RuntimeError: out of memory']), bfloat16=dict(wrong=[]))


@pytest.mark.parametrize('args, said', [
    (['--device', 'cpu'], 'mmengine trains in half precision on accelerators only: add --dtype float32'),
    (['--iterations', '5'], '--iterations 5: give at least 40'),
    ([], 'no device: torch finds no CUDA device'),
])
def test_errors(train_amp, args, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr('sys.argv', ['train_amp.py', 'results.json', *args])
    with pytest.raises(SystemExit) as error:
        train_amp.main()
    assert said in capsys.readouterr().err + str(error.value)
