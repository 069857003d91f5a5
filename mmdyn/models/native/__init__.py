"""Inference in float32 on a CPU by compiled functions: a few calls instead of many operators.

Each does what plain PyTorch does elsewhere in the package, which all other cases take: routing.c what
:mod:`~mmdyn.models.dge.grains` does, sampling.c and encoder.c what the layers do.
"""
import ctypes
from functools import lru_cache
from importlib.util import find_spec
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from ..layers.linear import is_plain_inference

# The arguments of each: addresses and numbers. Those of the encoder are for processors that it runs on.
FUNCTIONS = dict(choose='aaaan', sample='aaaaana', runs='', runs_half='')
ENCODER = dict(encode_blocks='ana', encode_blocks_memory='an', project='aa', project_memory='a', transpose_tokens='annna')

# glibc keeps as much free memory as twice the largest block that it has seen freed, of up to 32 MiB, and gives the rest
# back to the system, whose fresh pages take time. It sees one of this size when the functions are loaded.
LARGEST = (32 << 20) - (16 << 10)


@lru_cache(maxsize=None)
def library() -> Optional[ctypes.CDLL]:
    """The compiled functions, or None where there was no compiler when mmdyn was installed.

    Raises:
        ImportError: if they are of another version of mmdyn; it says how to compile them again.
    """
    spec = find_spec('mmdyn.models.native._native')
    if spec is None:
        return None
    np.empty(LARGEST, np.uint8)
    functions, types = ctypes.CDLL(spec.origin), dict(a=ctypes.c_void_p, n=ctypes.c_int64)
    try:
        for name, arguments in {**FUNCTIONS, **(ENCODER if functions.runs() else {})}.items():
            function = getattr(functions, name)
            function.argtypes, function.restype = [types[kind] for kind in arguments], ctypes.c_int64
    except AttributeError as error:
        raise ImportError(f'{spec.origin} was compiled for another version of mmdyn: install mmdyn again, by '
                          '`make setup` or `pip install -e .`.') from error
    return functions


def is_plain_tensor(x: Tensor) -> bool:
    """Whether a tensor's numbers are what lies in its memory, and no mode watches operators, as torch's counter does."""
    return type(x) is Tensor and x.layout is torch.strided and not torch._C._len_torch_dispatch_stack()


def is_used(tokens: Tensor) -> bool:
    """Whether the compiled functions take these tokens: in float32 on a CPU, when nothing is recorded or traced."""
    return (is_plain_inference() and is_plain_tensor(tokens)
            and tokens.device.type == 'cpu' and tokens.dtype == torch.float32 and tokens.is_contiguous()
            and library() is not None)
