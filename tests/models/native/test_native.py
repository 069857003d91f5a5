import os
import platform
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models import native

pytestmark = pytest.mark.skipif(native.library() is None, reason='mmdyn was installed without a compiler')


def test_is_used_in_plain_inference_alone():
    tokens = torch.randn(2, 35, 4)
    assert not native.is_used(tokens)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert native.is_used(tokens)
            assert not native.is_used(tokens.double()) and not native.is_used(tokens.bfloat16())
            assert not native.is_used(tokens.mT) and not native.is_used(tokens.to('meta'))
            with FlopCounterMode(display=False):
                assert not native.is_used(tokens)


def test_functions_of_another_version_say_how_to_compile_them(monkeypatch):
    monkeypatch.setattr(native.ctypes, 'CDLL', lambda path: object())
    with pytest.raises(ImportError, match='_native.* another version of mmdyn: .*`make setup` or `pip install -e .`'):
        native.library.__wrapped__()


def test_processors_that_the_encoder_does_not_run_on(monkeypatch):
    """Its functions are not even looked for, because other compilers leave them out."""
    names = []

    class Functions:
        def __getattr__(self, name):
            assert name not in native.ENCODER
            names.append(name)
            return lambda: 0

    monkeypatch.setattr(native.ctypes, 'CDLL', lambda path: Functions())
    assert isinstance(native.library.__wrapped__(), Functions) and set(native.FUNCTIONS) <= set(names)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='allocators differ')
def test_allocator_keeps_memory_of_the_last_pass():
    """48 MiB are 12288 pages, which the system does not hand out anew once the allocator has settled."""
    script = """
import resource
import torch
from mmdyn.models import native

def new_pages():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(3 << 20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

native.library()
print([new_pages() for _ in range(8)][-1])
"""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(('MALLOC_', 'LD_PRELOAD', 'GLIBC_'))}
    ran = subprocess.run([sys.executable, '-c', script], env=environment, check=True, capture_output=True, text=True)
    assert int(ran.stdout) < 400
