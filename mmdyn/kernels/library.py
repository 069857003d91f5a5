"""The functions that were compiled when mmdyn was installed, and the workspace that they compute in."""

import ctypes
import platform
import threading
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch

from ..models.replaceable import Refused

# Of the functions' arguments and structs; csrc/library.c has the same. A change of either is another version.
VERSION = 4

Number, Address, Real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """The fields of a struct that have a type."""
    return [(name, kind) for name in names.split()]


def parameters(names: str) -> list[tuple[str, type]]:
    """The addresses of layers' weights and biases."""
    return [(f'{name}_{kind}', Address) for name in names.split() for kind in ('weight', 'bias')]


class Map(ctypes.Structure):
    """As in routing.h."""

    _fields_ = [*fields(Number, 'images num_extra height width region channels'), ('choice', Address)]


class Step(ctypes.Structure):
    """As in routing.h."""

    _fields_ = [('key', ctypes.c_uint32), *fields(ctypes.c_int32, 'region option')]


class Sampling(ctypes.Structure):
    """As in sampling.h."""

    _fields_ = fields(Number, 'height width heads points channels')


class Block(ctypes.Structure):
    """As in block.h."""

    _fields_ = [
        *fields(Number, 'dim hidden heads points sr_ratio'),
        *fields(Real, 'norm1_eps norm2_eps sr_norm_eps residual_scale'),
        *parameters('norm1 q kv sr sr_norm offsets point_weights proj norm2 fc1 fc2'),
        ('is_bfloat16', Number),
        ('tokens', Address),
        ('map', Map),
        ('granularities', Address),
        *parameters('router'),
        ('num_options', Number),
        ('chosen', Address),
        ('budget', Number),
        *fields(Address, 'lengths class_rows'),
    ]


class Projection(ctypes.Structure):
    """As in projection.h."""

    _fields_ = [
        *fields(
            Number,
            'images height width outer inner length channels kv_channels image_stride row_stride '
            'column_stride outer_stride inner_stride',
        ),
        *fields(Real, 'eps_before eps_after'),
        *parameters('norm_before linear norm_after kv'),
        *fields(Address, 'input output positions'),
        *fields(Number, 'positions_height positions_width'),
        ('router', Address),
        ('num_options', Number),
        ('scores', Address),
    ]


STRUCTS = (Map, Step, Sampling, Block, Projection)
# What csrc/library.c must say: the size of each, and where its last field begins.
LAYOUT = [
    VERSION,
    *(
        number
        for struct in STRUCTS
        for number in (ctypes.sizeof(struct), getattr(struct, struct._fields_[-1][0]).offset)
    ),
]
# The arguments of each function: addresses and numbers. The encoder's are missing where compilers do not know vectors.
FUNCTIONS = dict(choose='aaaana', choose_within='aaanna', sample='aaaaana')
ENCODER = dict(
    encode_blocks='ana', encode_blocks_workspace='an', project='aa', project_workspace='a', transpose_tokens='annna'
)

# glibc keeps as much free memory as twice the largest block that it has seen freed, of up to 32 MiB, and gives the rest
# back to the system, whose fresh pages take time, in training too. It sees one of this size, which nobody writes to.
LARGEST = (32 << 20) - (16 << 10)
np.empty(LARGEST, np.uint8)


# The builds, the better one first: for AVX-512 and for AVX2.
BUILDS = ('_cpu', '_cpu_avx2')


@cache
def library() -> ctypes.CDLL | Refused:
    """The compiled functions of the best build that this processor runs, or why there are none.

    Where it runs the encoder of none, the first build has the other functions.
    """
    builds = []
    for name in BUILDS:
        builds.append(build(name))
        if not isinstance(builds[-1], Refused) and builds[-1].runs():
            return builds[-1]
    return builds[0]


def build(name: str) -> ctypes.CDLL | Refused:
    """The functions of one of the builds."""
    spec = find_spec(f'mmdyn.kernels.{name}')
    if spec is None or spec.origin is None:
        return Refused(
            'mmdyn was installed without a C compiler: install one (Debian: apt-get install gcc), then mmdyn again'
        )
    functions = ctypes.CDLL(spec.origin)
    built = (Number * len(LAYOUT))()
    try:
        functions.layout(built)
    except AttributeError:
        built[0] = 0
    if [*built] != LAYOUT:
        return Refused(
            f'{spec.origin} was compiled for another version of mmdyn: install mmdyn again, by `make setup` or '
            '`pip install -e .`'
        )
    types = dict(a=Address, n=Number)
    for name, arguments in {**FUNCTIONS, **(ENCODER if functions.runs() else {})}.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = [types[kind] for kind in arguments], Number
    return functions


@cache
def runs(half: bool = False) -> Refused | None:
    """None if this processor has the encoder's instructions, or those for bfloat16 if ``half``."""
    functions = library()
    if isinstance(functions, Refused):
        return functions
    if not functions.runs():
        return Refused(
            f'the processor ({platform.machine()}) lacks AVX-512 and AVX2, or the compiler did not know them'
        )
    if half and torch.cpu._is_amx_tile_supported():
        return Refused('the processor has matrix units, with which oneDNN computes faster in bfloat16')
    return None if not half or functions.runs_half() else Refused("the processor lacks AVX-512's bfloat16")


_kept = threading.local()


def release() -> None:
    """Give back the workspace that the calling thread keeps for the functions; the next call takes it again."""
    _kept.workspace = ()


def call(name: str, *job: object) -> None:
    """Call a function with a workspace that the thread keeps, which begins at a multiple of 64 bytes."""
    functions = library()
    numbers = getattr(functions, f'{name}_workspace')(*job)
    if numbers > len(getattr(_kept, 'workspace', ())):
        _kept.workspace = torch.empty(numbers, dtype=torch.float32, device='cpu')
        if _kept.workspace.data_ptr() % 64:
            room = torch.empty(numbers + 16, dtype=torch.float32, device='cpu')
            _kept.workspace = room[-room.data_ptr() % 64 // 4 :][:numbers]
    getattr(functions, name)(*job, _kept.workspace.data_ptr())
