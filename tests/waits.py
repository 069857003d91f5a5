"""Where a host would wait for an accelerator that need not be there."""

import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Waits(TorchDispatchMode):
    """Notes the operators that make a host wait, or copy from one device to another; on tensors without numbers.

    Attributes:
        reads: how many numbers were read; each is 0.
    """

    def __init__(self):
        super().__init__()
        if Version(torch.__version__) < Version('2.7') and not torch.cuda.is_available():
            pytest.skip('torch before 2.7 asks for a driver: "CUDA driver version is insufficient"')
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if '_local_scalar' in name:
            self.reads += 1
            return 0
        assert 'nonzero' not in name and 'unique' not in name, name
        out = function(*args, **(kwargs or {}))
        assert len({x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}) < 2, name
        return out
