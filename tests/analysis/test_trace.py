import re
from pathlib import Path

import pytest
import torch

import mmdyn
from mmdyn.analysis import trace

ROOT = Path(mmdyn.__file__).parents[1]


def event(name, cat, ts, dur):
    return dict(ph='X', name=name, cat=cat, ts=ts, dur=dur)


def test_counts_by_hand():
    """Microseconds: the host's pass lasts from 100 to 1100; the device works from 200 to 1500 and idles 50 and 400."""
    events = [
        dict(ph='M', name='process_name'),
        event(trace.PASS, 'user_annotation', 100, 1000),
        event(trace.PASS, 'gpu_user_annotation', 200, 1300),
        event('before', 'kernel', 50, 20),
        event('product', 'kernel', 200, 100),
        event('copy', 'gpu_memcpy', 350, 50),
        event('norm', 'kernel', 380, 120),
        event('product', 'kernel', 900, 600),
        event('small', 'kernel', 950, 10),
        event('cudaLaunchKernel', 'cuda_runtime', 110, 5),
        event('cudaLaunchKernelExC', 'cuda_runtime', 120, 5),
        event('cuLaunchKernel', 'cuda_driver', 130, 5),
        event('cudaMemcpyAsync', 'cuda_runtime', 140, 5),
        event('cudaStreamSynchronize', 'cuda_runtime', 150, 5),
        event('cudaStreamSynchronize', 'cuda_runtime', 160, 5),
        event('cudaDeviceSynchronize', 'cuda_runtime', 1200, 300),
    ]
    found = trace.count(events)
    assert found == dict(
        kernels=4,
        copies=1,
        launches=3,
        milliseconds=1.0,
        device_milliseconds=1.3,
        busy_milliseconds=pytest.approx(0.85),
        gap_milliseconds=0.45,
        gaps=2,
        largest_gap_milliseconds=0.4,
        synchronisations={'cudaStreamSynchronize': 2},
        top_kernels=[['product', 2, 0.7], ['norm', 1, 0.12], ['small', 1, 0.01]],
    )


def test_a_trace_has_one_pass():
    with pytest.raises(ValueError, match='has 0 ranges .*: give one of a single pass'):
        trace.count([])


def test_lines_that_wait_are_found():
    """Where nothing waits there are none; a CPU never does."""
    assert trace.waits(lambda: torch.ones(1).item(), 'cpu') == {}
    assert trace.place(str(ROOT / 'mmdyn/models/dge/encoder.py')) == 'mmdyn/models/dge/encoder.py'
    assert trace.place(torch.__file__).startswith('torch/')


@pytest.mark.cuda
def test_line_that_waits_on_cuda():
    value = torch.ones(1, device='cuda')
    assert list(trace.waits(lambda: value.item(), 'cuda').values()) == [1]
    assert not trace.waits(lambda: value + 1, 'cuda')


@pytest.mark.parametrize(
    'name, expected', [('PVT-small', ('PVT-small', False)), ('DPVT-tiny+DGE', ('DPVT-tiny', True))]
)
def test_names(name, expected):
    assert trace.arch_of(name) == expected


@pytest.mark.parametrize(
    'name', ['ResNet-50', 'PVT', 'PVT-small+', 'PVT-small+CFViT', 'PVT-small-more', 'PVT-small+DGE+DGE']
)
def test_other_names(name):
    with pytest.raises(ValueError, match=rf'^{re.escape(name)}: give FAMILY-SIZE or FAMILY-SIZE\+DGE with a FAMILY of'):
        trace.arch_of(name)
