"""What train.py and test.py refuse; tests/test_mim.py and tests/test_documented_commands.py run them on all tasks."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import mmdyn
from mmdyn.analysis.flops import build_model

ROOT = Path(mmdyn.__file__).parents[1]
CONFIG = ROOT / 'configs/demo/pvt-mini_digits.py'


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(dict(state_dict=build_model(Config.fromfile(CONFIG)).state_dict()), tmp_path / 'model.pth')
    return tmp_path / 'model.pth'


@pytest.mark.parametrize(
    'tool, options, said',
    [
        ('train', ['--amp'], '--amp: mmengine trains so on a GPU alone, and torch finds none; leave it out.'),
        ('test', ['--tta', '--show-dir', '{}/shown'], "mmpretrain's hook cannot draw several views; leave one out."),
    ],
)
def test_what_is_refused(tool, options, said, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    words = [f'{tool}.py', CONFIG, *[checkpoint][: tool == 'test'], '--work-dir', tmp_path, *options]
    monkeypatch.setattr(sys, 'argv', [str(word).format(tmp_path) for word in words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f'tools/{tool}.py'), run_name='__main__')
    assert end.value.code == 2 and said in capsys.readouterr().err
