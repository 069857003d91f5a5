"""The command line; what it runs is tested in tests/analysis/gpu/test_cases.py."""

import json

import pytest
import torch

from mmdyn.analysis.gpu import cases


def test_command(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(cases, 'CASES', (('cls', 'DeiT-tiny', (64, 64), 2),))
    file = tmp_path / 'results.json'
    options = ['--device', 'cpu', '--rounds', '1', '--only', '1']
    monkeypatch.setattr('sys.argv', ['benchmark_cases.py', str(file), *options])
    tool('benchmark_cases').main()
    result = json.loads(file.read_text())['benchmark']
    assert result['rounds'] == 1 and [group['arch'] for group in result['groups']] == ['DeiT-tiny']


def test_needs_a_device(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr('sys.argv', ['benchmark_cases.py', str(tmp_path / 'results.json')])
    with pytest.raises(SystemExit, match='no device: torch finds no CUDA device'):
        tool('benchmark_cases').main()
