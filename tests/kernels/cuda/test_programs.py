import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

pytest.importorskip('triton', '3.4')
from mmdyn.kernels.cuda import programs

POINTER, HALF, LONG = '*fp32', '*bf16', '*i64'
REGIONS = dict(REGION=4, GRANULARITIES=(0, 1, 2, 4))
# Types of the arguments of each program, and its constants.
SIGNATURES = dict(
    rate_regions=([HALF, POINTER, POINTER, POINTER, *['i32'] * 4], dict(SIDE=4, OPTIONS=3, BLOCK=64)),
    number_queries=([LONG, '*i32', '*i32', *['i32'] * 3], dict(**REGIONS, BLOCK=1024)),
    write_queries=([LONG, *['*i32'] * 4, *['i32'] * 5], dict(**REGIONS, CELLS=16, EXTRA=2)),
    reduce_tokens=([HALF, '*i32', HALF, *['i32'] * 4], dict(MEAN=True, BLOCK=64)),
    reduce_and_norm=(
        [HALF, '*i32', POINTER, POINTER, HALF, HALF, POINTER, *['i32'] * 4, 'fp32'],
        dict(BLOCK=64),
    ),
    add_and_norm=([POINTER, HALF, *[POINTER] * 3, HALF, POINTER, 'i32', 'fp32'], dict(KEEP=True, BLOCK=64)),
    spread_queries=(
        [HALF, '*i32', '*i32', POINTER, POINTER, *['i32'] * 3],
        dict(ADD=True, SHARE=True, TOKENS=4, BLOCK=64),
    ),
    sample_points=([HALF, POINTER, HALF, '*i32', HALF, *['i32'] * 4], dict(POINTS=4, BLOCK=64)),
    sample_points_backward=(
        [HALF, HALF, POINTER, HALF, '*i32', POINTER, POINTER, POINTER, *['i32'] * 4],
        dict(POINTS=4, BLOCK=64),
    ),
)


def test_all_programs_are_tried():
    jitted = {name for name, value in vars(programs).items() if hasattr(value, 'arg_names')}
    assert jitted == {*SIGNATURES, 'corners', 'store_normed', 'sum_of_patch'}  # which others call


@pytest.mark.parametrize('name', SIGNATURES)
def test_compiles_for_a_gpu(name):
    """To the machine code of an H100, which need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    program, (types, constants) = getattr(programs, name), SIGNATURES[name]
    signature = dict(zip(program.arg_names, types)) | dict.fromkeys(constants, 'constexpr')
    assert [*signature] == program.arg_names
    compiled = compile(ASTSource(program, signature, constants), target=GPUTarget('cuda', 90, 32))
    assert compiled.asm['cubin'] and f'.visible .entry {name}' in compiled.asm['ptx']


def test_results_are_those_of_the_plain_functions():
    """By Triton's interpreter, on a CPU."""
    if Version(version('triton')) < Version('3.7') and Version(numpy.__version__) >= Version('2.4'):
        pytest.skip('the interpreter of Triton before 3.7 takes no number of numpy 2.4 for the end of a loop')
    path = Path(__file__).with_name('test_interpreted.py')
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', str(path)]
    run = subprocess.run(command, env=os.environ | dict(TRITON_INTERPRET='1'), capture_output=True, text=True)
    assert run.returncode == 0 and ' passed' in run.stdout, run.stdout + run.stderr
