"""What a bug report tells of the machine."""

import runpy
import sys
from importlib import import_module

import pytest
import torch

import mmdyn
from mmdyn.utils import collect_env


def test_versions():
    env = collect_env()
    assert env['PyTorch'] == torch.__version__ and env['mmdyn'].startswith(f'{mmdyn.__version__} in ')
    for name in ('mmcv', 'mmpretrain', 'mmdet', 'mmseg'):
        assert env[name].endswith(f' {import_module(name).__version__}')
    assert all(isinstance(value, str) for value in env.values())


def test_what_is_missing(monkeypatch):
    monkeypatch.setattr('mmdyn.utils.env.MODULES', ('timm', 'no_such_module'))
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    env = collect_env()
    assert env['no_such_module'] == 'not installed' and env['mmcv operators'].startswith('no (')


def test_variables_of_the_environment(monkeypatch):
    monkeypatch.setenv('MALLOC_TOP_PAD_', '268435456')
    monkeypatch.setenv('SECRET', 'x')
    env = collect_env()
    assert env['MALLOC_TOP_PAD_'] == '268435456' and 'SECRET' not in env


def test_kernels_say_why_they_are_off(monkeypatch):
    pytest.importorskip('mmdyn.kernels')
    assert 'run_blocks on cpu\n  mmdyn.kernels.stage.encode_blocks: ' in collect_env()['kernels']
    with torch.backends.mkldnn.flags(enabled=False):
        assert 'encode_blocks: off, ' in collect_env()['kernels']


def test_without_kernels(monkeypatch):
    monkeypatch.setattr('mmdyn.utils.env.find_spec', lambda name: None)
    assert collect_env()['kernels'] == 'deleted: all is plain PyTorch'


def test_command(capsys):
    runpy.run_module('mmdyn', run_name='__main__')
    lines = capsys.readouterr().out.splitlines()
    assert f'PyTorch: {torch.__version__}' in lines and any(line.startswith('kernels:') for line in lines)
