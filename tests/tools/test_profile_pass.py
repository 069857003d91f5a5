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


def event(name, cat, ts, dur):
    return dict(ph='X', name=name, cat=cat, ts=ts, dur=dur)


def test_counts_by_hand():
    """Microseconds: the host's pass lasts from 100 to 1100; the device works from 200 to 1500 and idles 50 and 400."""
    events = [
        dict(ph='M', name='process_name'),
        event(profile_pass.PASS, 'user_annotation', 100, 1000),
        event(profile_pass.PASS, 'gpu_user_annotation', 200, 1300),
        event('before', 'kernel', 50, 20),
        event('product', 'kernel', 200, 100), event('copy', 'gpu_memcpy', 350, 50), event('norm', 'kernel', 380, 120),
        event('product', 'kernel', 900, 600), event('small', 'kernel', 950, 10),
        event('cudaLaunchKernel', 'cuda_runtime', 110, 5), event('cudaLaunchKernelExC', 'cuda_runtime', 120, 5),
        event('cuLaunchKernel', 'cuda_driver', 130, 5), event('cudaMemcpyAsync', 'cuda_runtime', 140, 5),
        event('cudaStreamSynchronize', 'cuda_runtime', 150, 5), event('cudaStreamSynchronize', 'cuda_runtime', 160, 5),
        event('cudaDeviceSynchronize', 'cuda_runtime', 1200, 300),
    ]
    found = profile_pass.count(events)
    assert found == dict(
        kernels=4, copies=1, launches=3, milliseconds=1., device_milliseconds=1.3,
        busy_milliseconds=pytest.approx(0.85), gap_milliseconds=0.45, gaps=2, largest_gap_milliseconds=0.4, synchronisations={'cudaStreamSynchronize': 2},
        top_kernels=[['product', 2, 0.7], ['norm', 1, 0.12], ['small', 1, 0.01]])


def test_a_trace_has_one_pass():
    with pytest.raises(ValueError, match='has 0 ranges .*: give one of a single pass'):
        profile_pass.count([])


def test_on_the_cpu(tmp_path, capsys):
    profile_pass.main(['--models', 'PVT-tiny', 'PVT-tiny+DGE', '--shape', '64', '128', '--batch', '2', '--out',
                       str(tmp_path)])
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
    found, = json.loads((tmp_path / 'profile.json').read_text())
    assert found['kernels'] > 50 and 0 < found['busy_milliseconds'] <= found['device_milliseconds']


def test_lines_that_wait_are_found():
    """Where nothing waits there are none; a CPU never does."""
    assert profile_pass.waits(lambda: torch.ones(1).item(), 'cpu') == {}
    assert profile_pass.place(str(ROOT / 'mmdyn/models/dge/encoder.py')) == 'mmdyn/models/dge/encoder.py'
    assert profile_pass.place(torch.__file__).startswith('torch/')


@pytest.mark.cuda
def test_line_that_waits_on_cuda():
    value = torch.ones(1, device='cuda')
    assert list(profile_pass.waits(lambda: value.item(), 'cuda').values()) == [1]
    assert not profile_pass.waits(lambda: value + 1, 'cuda')


@pytest.mark.parametrize('args, said', [
    (['--models', 'PVT-small+CFViT'], r'--models PVT-small\+CFViT: give FAMILY-SIZE or FAMILY-SIZE\+DGE'),
    (['--models', 'ResNet-50'], '--models ResNet-50: give'),
    (['--device', 'cuda'], 'no device: torch finds no CUDA device'),
])
def test_errors(args, said, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match=said):
        profile_pass.main([*args, '--out', str(tmp_path)])
