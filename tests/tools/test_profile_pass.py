import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
spec = importlib.util.spec_from_file_location('profile_pass', ROOT / 'tools/analysis_tools/profile_pass.py')
profile_pass = importlib.util.module_from_spec(spec)
spec.loader.exec_module(profile_pass)


def test_on_the_cpu(tmp_path, capsys):
    profile_pass.main(
        ['--models', 'PVT-tiny', 'PVT-tiny+DGE', '--shape', '64', '128', '--batch', '2', '--out', str(tmp_path)]
    )
    dense, dynamic = json.loads((tmp_path / 'profile.json').read_text())
    assert dense['query_ratio'] == 1 and 0.4 < dynamic['query_ratio'] < 0.7
    for entry in (dense, dynamic):
        assert entry['shape'] == [2, 3, 64, 128] and entry['milliseconds'] > 0
        assert entry['kernels'] == entry['gaps'] == 0 and not entry['synchronisations'] and not entry['waits']
        events = json.loads(gzip.decompress((tmp_path / entry['trace']).read_bytes()))['traceEvents']
        assert any(event.get('cat') == 'cpu_op' for event in events)
    assert dynamic['trace'] == 'trace-PVT-tiny-DGE-2x64x128.json.gz'
    assert 'model: PVT-tiny+DGE\n' in capsys.readouterr().out


@pytest.mark.cuda
def test_on_cuda(tmp_path):
    profile_pass.main(['--models', 'PVT-tiny+DGE', '--shape', '64', '128', '--device', 'cuda', '--out', str(tmp_path)])
    (found,) = json.loads((tmp_path / 'profile.json').read_text())
    assert found['kernels'] > 50 and 0 < found['busy_milliseconds'] <= found['device_milliseconds']


@pytest.mark.parametrize(
    'args, said',
    [
        (['--models', 'PVT-small+CFViT'], r'--models PVT-small\+CFViT: give FAMILY-SIZE or FAMILY-SIZE\+DGE'),
        (['--models', 'ResNet-50'], '--models ResNet-50: give'),
        (['--device', 'cuda'], 'no device: torch finds no CUDA device'),
    ],
)
def test_errors(args, said, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match=said):
        profile_pass.main([*args, '--out', str(tmp_path)])
