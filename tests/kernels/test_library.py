import os
import platform
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mmdyn.kernels import __main__ as command
from mmdyn.kernels import library
from mmdyn.models.replaceable import Refused


def test_missing_functions_have_a_reason(missing):
    found = library.runs() if missing.kind == 'no AVX' else library.library()
    assert isinstance(found, Refused) and re.search(missing.reason, found.reason)
    assert library.runs(half=True) == library.runs()


def test_processors_with_matrix_units_leave_bfloat16_to_onednn(avx, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: True)
    library.runs.cache_clear()
    try:
        assert library.runs() is None and 'matrix units' in library.runs(half=True).reason
    finally:
        library.runs.cache_clear()


@pytest.mark.parametrize(
    'required, possible, outcome',
    [('1', True, pytest.fail.Exception), ('1', False, pytest.skip.Exception), ('', True, pytest.skip.Exception)],
)
def test_lane_that_may_not_skip(required, possible, outcome, require, monkeypatch):
    monkeypatch.setenv('MMDYN_REQUIRE_KERNELS', required)
    with pytest.raises(outcome, match='no compiler'):
        require(Refused('no compiler'), possible)
    require(None, possible)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc' or 'MMDYN_SANITIZED' in os.environ, reason='allocators differ')
def test_allocator_keeps_memory_of_the_last_pass(compiled):
    """48 MiB are 12288 pages, which the system does not hand out anew once the allocator has settled."""
    script = """
import resource
import torch
from mmdyn.kernels.library import library

def new_pages():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(3 << 20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

library()
print([new_pages() for _ in range(8)][-1])
"""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'LD_PRELOAD', 'GLIBC_'))
    }
    ran = subprocess.run([sys.executable, '-c', script], env=environment, check=True, capture_output=True, text=True)
    assert int(ran.stdout) < 400


FUNCTIONS = [
    'stage.run_blocks',
    'dge.router.choose',
    'dge.encoder.encode_queries',
    'layers.embedding.project_patches',
    'layers.embedding.to_maps',
    'layers.deformable.deformable_sampling',
    'layers.attention.packed_attention',
]
COMPILED = [
    'stage.encode_blocks',
    'functions.choose_by_means',
    'functions.project_panels',
    'functions.transpose_tokens',
    'functions.sample_points',
]


def test_command_tells_which_kernels_are_on(avx):
    text = '\n'.join(command.report())
    assert '_cpu' in text and 'float32    the stages run in compiled functions' in text
    assert [name for name in FUNCTIONS if f'mmdyn.models.{name} on cpu' in text] == FUNCTIONS
    assert [name for name in COMPILED if f'  mmdyn.kernels.{name}: on' in text] == COMPILED
    for name in ('sample_by_mmcv', 'attention_of_variable_length'):
        assert re.search(rf'mmdyn.kernels.accelerators.{name}: off, .*(cpu|CPU)', text)


def test_command_tells_why_kernels_are_off(missing):
    text = '\n'.join(command.report())
    off = COMPILED[:1] if missing.kind == 'no AVX' else COMPILED
    for name in off:
        assert re.search(rf'mmdyn.kernels.{name}: off, .*{missing.reason}', text)
    assert re.search(rf'float32 +.*{missing.reason}', text)


def test_command_runs():
    ran = subprocess.run([sys.executable, '-m', 'mmdyn.kernels'], check=True, capture_output=True, text=True)
    assert ran.stdout.startswith('processor') and 'encode_blocks: ' in ran.stdout


@pytest.mark.parametrize(
    'runs, found',
    [
        (dict(_cpu=1, _cpu_avx2=1), '_cpu'),
        (dict(_cpu=0, _cpu_avx2=1), '_cpu_avx2'),
        (dict(_cpu=0, _cpu_avx2=0), '_cpu'),
        (dict(_cpu=1), '_cpu'),
        (dict(_cpu_avx2=1), '_cpu_avx2'),
        (dict(_cpu=0), '_cpu'),
    ],
)
def test_best_build_that_the_processor_runs(runs, found, monkeypatch):
    builds = {name: SimpleNamespace(runs=lambda able=able: able) for name, able in runs.items()}
    monkeypatch.setattr(library, 'build', lambda name: builds.get(name, Refused(f'no {name}')))
    assert library.library.__wrapped__() is builds[found]


def test_no_build(monkeypatch):
    monkeypatch.setattr(library, 'build', lambda name: Refused(f'no {name}'))
    assert library.library.__wrapped__() == Refused('no _cpu')
