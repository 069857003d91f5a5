"""What a bug report tells of the machine."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

import mmdyn
from mmdyn.utils import collect_env


def test_versions():
    env = collect_env()
    assert env['PyTorch'] == torch.__version__ and env['mmdyn'].startswith(f'{mmdyn.__version__} in ')
    providers = metadata.packages_distributions()  # of mmcv, say, mmcv or onedl-mmcv
    for name in ('mmengine', 'mmcv'):
        assert env[name] in [f'{provider} {metadata.version(provider)}' for provider in providers[name]]
    assert env['mmpretrain'] in map(metadata.version, providers['mmpretrain'])
    assert all(isinstance(value, str) for value in env.values())


def test_what_is_missing(monkeypatch):
    monkeypatch.setattr('mmdyn.utils.env.PACKAGES', ('timm', 'no-such-package'))
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    env = collect_env()
    assert env['no-such-package'] == 'not installed' and env['mmcv operators'].startswith('no (')


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


def test_command(tmp_path):
    command = [sys.executable, '-m', 'mmdyn']
    lines = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert f'PyTorch: {torch.__version__}' in lines and any(line.startswith('kernels:') for line in lines)
