"""Where the kernels run, and the lane in which their tests may not be skipped."""

import ctypes
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdyn.kernels import library
from mmdyn.models.layers import Attention, DeformableAttention, EncoderBlock
from mmdyn.models.replaceable import Refused


@pytest.fixture
def require():
    """Skip a test for a reason; with MMDYN_REQUIRE_KERNELS=1 fail instead, where the processor could run it."""

    def check(refused, is_possible):
        if isinstance(refused, Refused):
            must = is_possible and os.environ.get('MMDYN_REQUIRE_KERNELS') == '1'
            (pytest.fail if must else pytest.skip)(refused.reason)

    return check


@pytest.fixture
def compiled(require):
    """For tests of functions that every processor runs."""
    require(library.library(), True)


def find_anew():
    """Forget which functions were found."""
    library.library.cache_clear(), library.runs.cache_clear()


@pytest.fixture(params=library.BUILDS)
def build(request, monkeypatch):
    """Let one of the builds be the only one."""
    monkeypatch.setattr(library, 'BUILDS', [request.param])
    find_anew()
    yield request.param
    monkeypatch.undo()
    find_anew()


@pytest.fixture
def avx(build, require):
    """For tests of functions that need AVX-512 or AVX2, with each build that the processor runs."""
    supports = dict(_cpu=torch.cpu._is_avx512_supported, _cpu_avx2=torch.cpu._is_avx2_supported)
    require(library.runs(), supports[build]())


@pytest.fixture
def half(require):
    """For tests of functions that compute in bfloat16."""
    possible = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    require(library.runs(half=True), possible and '_cpu' in library.BUILDS)


@pytest.fixture(params=[1, 3])
def threads(request):
    """More than one share their work in other ways than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def other_build(monkeypatch):
    """Let the library be found anew: none, or one with other functions."""

    def change(build):
        find_anew()
        if build is None:
            monkeypatch.setattr(library, 'find_spec', lambda name: None)
        else:
            monkeypatch.setattr(ctypes, 'CDLL', lambda path: build)

    yield change
    monkeypatch.undo()
    find_anew()


def built(run_here, *layout):
    """A library of this layout, for a processor that it runs on or not; the other functions are not to be called."""

    def write(numbers):
        numbers[:] = layout or library.LAYOUT

    return SimpleNamespace(
        _name='another build',
        layout=write,
        runs=lambda: run_here,
        runs_half=lambda: run_here,
        choose=lambda *args: 0,
        choose_within=lambda *args: 0,
        sample=lambda *args: 0,
    )


@pytest.fixture(params=['no compiler', 'no AVX', 'another version', 'another struct', 'no layout'])
def missing(request, avx, other_build):
    """Leave the models without the compiled functions; the reason."""
    version, *sizes = library.LAYOUT
    stale = r'was compiled for another version of mmdyn: install mmdyn again, by `make setup` or `pip install -e \.`'
    build, reason = {
        'no compiler': (None, r'mmdyn was installed without a C compiler: install one \(Debian: apt-get install gcc\)'),
        'no AVX': (built(0), r'the processor \(.+\) lacks AVX-512 and AVX2, or the compiler did not know them'),
        'another version': (built(1, version + 1, *sizes), stale),
        'another struct': (built(1, version, *sizes[:-1], sizes[-1] + 8), stale),
        'no layout': (SimpleNamespace(runs=lambda: 1), stale),
    }[request.param]
    other_build(build)
    return SimpleNamespace(kind=request.param, reason=reason)


@pytest.fixture
def make_block():
    """A block in evaluation mode, no parameter of which is 0 or 1."""

    def make(kind='full', dim=12, heads=3, ratio=2, **options):
        attn = dict(
            full=lambda: Attention(dim, heads),
            reduced=lambda: Attention(dim, heads, 2),
            unbiased=lambda: Attention(dim, heads, qkv_bias=False),
            deformable=lambda: DeformableAttention(dim, heads),
            points=lambda: DeformableAttention(dim, heads, 7),
        )
        block = EncoderBlock(dim, attn[kind](), ratio, **options).eval()
        with torch.no_grad():
            for parameter in block.parameters():
                parameter += (min(dim, 12) / dim) ** 0.5 * 0.3 * torch.randn_like(parameter)
        return block

    return make


@pytest.fixture
def stage_of():
    """A stage of some blocks, with encoders or without."""
    return lambda *blocks, dge=(), num_extra=0: SimpleNamespace(
        blocks=nn.ModuleList(blocks), dge=nn.ModuleList(dge), num_extra=num_extra
    )
