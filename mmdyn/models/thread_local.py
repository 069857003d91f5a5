"""What a module keeps of its last forward pass, for reading afterwards."""

import threading
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_map_only

from .tracing import is_exported

T = TypeVar('T')


class ThreadLocal(Generic[T]):
    """An attribute of modules whose value is the thread's own, so that passes in several threads do not mix.

    It is None until the thread has set it, and as an attribute of the class. Copies of a module start without a value.
    Compilers follow attributes, but no tables of threads: a compiled pass's value is the module's, for all threads.
    An export is no pass, and leaves no value; a pass that torch.jit traces does, with integers for its sizes.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def __set_name__(self, owner: type, name: str) -> None:
        self._compiled = f'_compiled_{name}'

    def _values(self) -> 'WeakKeyDictionary[Any, T]':
        if not hasattr(self._of_thread, 'values'):
            self._of_thread.values = WeakKeyDictionary()
        return self._of_thread.values

    def __get__(self, module: Any, owner: type | None = None) -> T | None:
        if module is None:
            return None
        if torch.compiler.is_compiling() or self._compiled in module.__dict__:
            return getattr(module, self._compiled, None)
        return self._values().get(module)

    def __set__(self, module: Any, value: T) -> None:
        if is_exported():
            return
        if torch.jit.is_tracing():
            value = tree_map_only(torch.Tensor, lambda x: x if x.ndim else x.item(), value)
        if torch.compiler.is_compiling():
            setattr(module, self._compiled, value)
            return
        module.__dict__.pop(self._compiled, None)
        self._values()[module] = value
