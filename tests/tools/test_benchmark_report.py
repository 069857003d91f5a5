"""The command line; the report itself is tested in tests/analysis/test_report.py."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('benchmark_report', ROOT / 'tools/analysis_tools/benchmark_report.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

ROW = dict(seconds=0.25, spread=0.5, time_ratio=1, macs_ratio=1, efficiency=1, peak_memory=3e6, memory_ratio=1)
RESULT = dict(
    command='some command',
    device='cpu',
    dtype='float32',
    rounds=7,
    query_ratio=0.4,
    environment={},
    limits={},
    groups=[dict(suite='det', arch='PVT-tiny', shape=[64, 96], batch=1, rows=dict(dense=ROW))],
)


@pytest.mark.parametrize('out', [None, 'out'])
def test_command(out, monkeypatch, tmp_path, capsys):
    (tmp_path / 'results').mkdir()
    file = tmp_path / 'results/benchmark.json'
    file.write_text(json.dumps(RESULT))
    options = ['--out', str(tmp_path / out)] if out else []
    monkeypatch.setattr(sys, 'argv', ['benchmark_report.py', str(file), *options])
    tool.main()
    folder = tmp_path / out if out else file.parent
    assert '| PVT-tiny 1 x 64 x 96 | dense |   0.250 ' in (folder / 'benchmark.md').read_text()
    assert (folder / 'benchmark.png').stat().st_size and str(folder) in capsys.readouterr().out


def test_summary(monkeypatch, tmp_path, capsys):
    file = tmp_path / 'benchmark.json'
    group = dict(suite='peers', arch='PVT-small', shape=[224, 224], batch=1, rows=dict(dense=ROW))
    file.write_text(json.dumps({**RESULT, 'groups': [group]}))
    monkeypatch.setattr(sys, 'argv', ['benchmark_report.py', str(file), '--summary'])
    tool.main()
    assert '\n| PVT-S | 224x224 | - (mmdet) | - | - | 0.250 | - | - |\n' in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]


def test_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['benchmark_report.py', str(tmp_path / 'missing.json')])
    with pytest.raises(SystemExit, match=r'benchmark_report\.py: .*missing\.json is no result of benchmark\.py'):
        tool.main()
