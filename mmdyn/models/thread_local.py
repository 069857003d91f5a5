"""What a module keeps of its last forward pass, for reading afterwards."""
import threading
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

T = TypeVar('T')


class ThreadLocal(Generic[T]):
    """An attribute of modules whose value is the thread's own, so that passes in several threads do not mix.

    It is None until the thread has set it, and as an attribute of the class. Copies of a module start without a value.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def _values(self) -> 'WeakKeyDictionary[Any, T]':
        if not hasattr(self._of_thread, 'values'):
            self._of_thread.values = WeakKeyDictionary()
        return self._of_thread.values

    # Compilers would bind what they make to the modules that have a value in the meantime.
    @torch.compiler.disable
    def __get__(self, module: Any, owner: type | None = None) -> T | None:
        return None if module is None else self._values().get(module)

    @torch.compiler.disable
    def __set__(self, module: Any, value: T) -> None:
        self._values()[module] = value
