"""The command line; what it runs is tested in tests/analysis/gpu/test_training.py."""

import json

import pytest
import torch


@pytest.fixture
def train_amp(tool):
    return tool('train_amp')


@pytest.mark.parametrize('wrong', [[], ['the loss fell from 2.000 to 1.900 only']])
def test_command(train_amp, tmp_path, monkeypatch, wrong):
    configs = []

    def train(cfg):
        configs.append(cfg)
        return dict(wrong=wrong)

    monkeypatch.setattr(train_amp, 'train', train)
    options = ['--device', 'cpu', '--dtype', 'float32', '--iterations', '50', '--batch', '4', '--work-dir']
    monkeypatch.setattr('sys.argv', ['train_amp.py', str(tmp_path / 'results.json'), *options, str(tmp_path / 'run')])
    with pytest.raises(SystemExit) as end:
        train_amp.main()
    assert end.value.code == len(wrong)
    assert json.loads((tmp_path / 'results.json').read_text())['training'] == dict(float32=dict(wrong=wrong))
    assert configs[0].work_dir == str(tmp_path / 'run/float32') and configs[0].train_cfg.max_iters == 50
    assert configs[0].train_dataloader.batch_size == 4
    assert configs[0].train_dataloader.dataset.data_root == 'data/demo/imagenet'


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
        float16=dict(wrong=['RuntimeError: out of memory']), bfloat16=dict(wrong=[])
    )


@pytest.mark.parametrize(
    'args, said',
    [
        (['--device', 'cpu'], 'mmengine trains in half precision on accelerators only: add --dtype float32'),
        (['--iterations', '5'], '--iterations 5: give at least 40'),
        ([], 'no device: torch finds no CUDA device'),
    ],
)
def test_errors(train_amp, args, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr('sys.argv', ['train_amp.py', 'results.json', *args])
    with pytest.raises(SystemExit) as error:
        train_amp.main()
    assert said in capsys.readouterr().err + str(error.value)
