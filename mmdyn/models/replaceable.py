"""The seam to the kernels: a function whose body is the reference, and that kernels may stand in for."""

from collections.abc import Callable
from functools import update_wrapper
from typing import Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

P = ParamSpec('P')
R = TypeVar('R')


class Refused(NamedTuple):
    """What a kernel returns for a call that it does not take: the reason, in a sentence without a full stop."""

    reason: str


class Replaceable(Generic[P, R]):
    """A function that asks its kernels in turn, and runs its own body if all of them refuse.

    A kernel takes the arguments of the function, and returns what the function would have returned, or
    :class:`Refused`. Compilers and tracers see the body.

    Attributes:
        plain: the body.
        kernels: those that are registered.
    """

    def __init__(self, plain: Callable[P, R]):
        self.plain = plain
        self.kernels: list[Callable[P, R | Refused]] = []
        update_wrapper(self, plain)

    def register(self, kernel: Callable[P, R | Refused]) -> Callable[P, R | Refused]:
        """Let a kernel stand in for the function; a decorator."""
        self.kernels.append(kernel)
        return kernel

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not is_recorded():
            for kernel in self.kernels:
                result = kernel(*args, **kwargs)
                if not isinstance(result, Refused):
                    return result
        return self.plain(*args, **kwargs)

    def why_not(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, str]:
        """The reasons of the kernels that refuse this call, by their names. The others run on copies of the tensors."""
        reasons = {}
        for kernel in self.kernels:
            if is_recorded():
                reasons[f'{kernel.__module__}.{kernel.__qualname__}'] = 'a compiler or tracer records the body'
                continue
            copies, options = tree_map_only(Tensor, copy_with_strides, (args, kwargs))
            result = kernel(*copies, **options)
            if isinstance(result, Refused):
                reasons[f'{kernel.__module__}.{kernel.__qualname__}'] = result.reason
        return reasons


def is_recorded() -> bool:
    """Whether a compiler or a tracer looks at what is computed, and not at the numbers."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def copy_with_strides(x: Tensor) -> Tensor:
    """A copy that lies in memory as ``x`` does, which a reason may depend on."""
    if x.layout is not torch.strided or 0 in x.stride():
        return x.clone()
    return x.new_empty_strided(x.shape, x.stride()).copy_(x)


def replaceable(function: Callable[P, R]) -> Replaceable[P, R]:
    """Let kernels be registered for a function; a decorator."""
    return Replaceable(function)
