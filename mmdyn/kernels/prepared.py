"""What a kernel must know of modules before it reads their memory: found out once, compared at each call.

A layer is taken only if it is exactly of the type that the kernel knows, unchanged and without hooks, and its
parameters only if type, shape and order are those that the kernel reads. All else is refused, in a sentence.
"""

import math
from collections.abc import Callable, Iterable
from itertools import repeat
from operator import attrgetter, is_
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..models.dge.budget import queries_within

_NOTHING = object()  # where a name is not in a dict
_dtypes, _shapes = attrgetter('dtype'), attrgetter('shape')


class Refusal(Exception):
    """The reason for which a kernel does not take a call."""


def refuse_watchers() -> str | None:
    """What must see all operators, so that no kernel may stand in for them; None if there is nothing."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return 'a transform of functions, such as torch.func.vmap, is on'
    if forward_ad._current_level >= 0:
        return 'forward-mode derivatives are on'
    if torch._C._len_torch_dispatch_stack():
        return "a mode watches the operators, as torch's counter of operations does"
    return None


def refuse_context() -> str | None:
    """Why no kernel for inference may stand in for modules here and now; None if one may."""
    if torch.is_grad_enabled():
        return 'gradients are on: call the model in torch.no_grad() or torch.inference_mode()'
    watchers = refuse_watchers()
    if watchers is not None:
        return watchers
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return 'there are forward hooks for all modules'
    return None


def refuse_tensor(x: Tensor, name: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the numbers of a tensor cannot be read at its address with its strides; None if they can."""
    if type(x) not in (Tensor, nn.Parameter):
        return f'{name} is a {type(x).__name__}, whose numbers may lie elsewhere'
    if x.device.type != 'cpu':
        return f'{name} is on {x.device}'
    if x.layout is not torch.strided or x.is_neg():
        return f'{name} is not dense'
    if x.dtype is not dtype:
        return f'{name} is {str(x.dtype).removeprefix("torch.")}, not {str(dtype).removeprefix("torch.")}'
    return None if x.numel() and x.data_ptr() else f'{name} is empty'


def refuse_rows(x: Tensor, name: str) -> str | None:
    """As :func:`refuse_tensor`, of a tensor without gaps."""
    return refuse_tensor(x, name) or (None if x.is_contiguous() else f'{name} is not contiguous')


def refuse_watched_tokens(stage: Any) -> str | None:
    """Why the tokens of a stage may not be overwritten; None if nobody may have kept them."""
    embedding = getattr(stage, 'patch_embed', None)
    if embedding is not None and embedding._forward_hooks:
        return 'patch_embed has forward hooks, which may keep the tokens'
    return None


def refuse_tokens(tokens: Tensor, shape: tuple[int, int], num_extra: int = 0) -> str | None:
    """Why these are no tokens (B, E + H*W, C) of maps of this shape, without gaps; None if they are."""
    reason = refuse_rows(tokens, 'the tokens')
    if reason is not None:
        return reason
    if tokens.ndim != 3:
        return f'the tokens have {tokens.ndim} dimensions, not 3'
    if not are_counts(shape, 1) or len(shape) != 2 or not are_counts([num_extra]):
        return f'a map of shape={shape} and {num_extra} extra tokens is none'
    if tokens.shape[1] != num_extra + math.prod(shape):
        return f'{tokens.shape[1]} tokens are no {num_extra} extra tokens and map of {shape[0]} x {shape[1]} cells'
    return None


def are_counts(numbers: Iterable[Any], least: int = 0) -> bool:
    """Whether all are integers, and none is less than the least."""
    return all(type(number) is int and number >= least for number in numbers)


def equal_lengths(num: int, images: int) -> list[int]:
    """Queries of each image, of which all have as many."""
    return [num // images] * images if images else []


def decision_of(router: nn.Module, options: int, shape: tuple[int, int], num_extra: int) -> tuple[Tensor, int]:
    """The bias that a router chooses with, and most queries of an image's patches, -1 if each region decides alone.

    Raises:
        Refusal: for a price or a share that cannot be read.
    """
    price, share = router.price, router.share
    if share is not None:
        if type(share) is not float or not 0 <= share <= 1:
            raise Refusal(f'router.share={share!r} is no number from 0 to 1')
        return router.bias, max(queries_within(share, shape, num_extra) - num_extra, 0)
    if price is None:
        return router.bias, -1
    reason = refuse_rows(price, 'router.price')
    if reason is not None or price.shape != (options,):
        raise Refusal(reason or f'router.price has the shape {tuple(price.shape)}, not {(options,)}')
    return router.bias - price, -1


class Prepared:
    """What is known of some modules, and whether it is still so.

    Args:
        prefix: of the modules' names in reasons.
    """

    def __init__(self, prefix: str = ''):
        self.prefix = prefix
        self._places: list[dict] = []  # where something was found,
        self._names: list[str] = []  # under which name,
        self._found: list[Any] = []  # and what
        self._modules: list[ref[nn.Module]] = []  # the cache ends with the module that it is for
        self._types: list[type] = []
        self._hooks: list[dict] = []
        self._tensors: list[Tensor] = []
        self._facts: list[list] = []

    def _look(self, place: dict, path: str, name: str) -> Any:
        if name not in place:
            path = f'{self.prefix}{path}.' if path else self.prefix
            raise Refusal(f'{path}{name} is not what it was when the layer was made')
        return self._keep(place, name)

    def _keep(self, place: dict, name: str) -> Any:
        found = place.get(name, _NOTHING)
        self._places.append(place), self._names.append(name), self._found.append(found)
        return found

    def module(self, module: nn.Module, name: str, *kinds: type) -> nn.Module:
        """A module that must be exactly of one of these kinds, as it was made."""
        name = f'{self.prefix}{name}'
        if type(module) not in kinds:
            raise Refusal(f'{name} is a {type(module).__name__}, not a {" or ".join(kind.__name__ for kind in kinds)}')
        if module._forward_hooks or module._forward_pre_hooks:
            raise Refusal(f'{name} has forward hooks')
        if self._keep(module.__dict__, 'forward') is not _NOTHING:
            raise Refusal(f'{name} has a forward function of its own')
        self._modules.append(ref(module))
        self._types.append(type(module))
        self._hooks += module._forward_hooks, module._forward_pre_hooks
        return module

    def child(self, parent: nn.Module, path: str, name: str, *kinds: type) -> nn.Module:
        """The module ``name`` of ``parent``, whose own name is ``path``."""
        return self.module(self._look(parent._modules, path, name), f'{path}.{name}' if path else name, *kinds)

    def attribute(self, module: nn.Module, path: str, name: str, *kinds: type) -> Any:
        """An attribute of these types that the kernel takes as it is: no tensor, whose value may change in place."""
        value = self._look(module.__dict__, path, name)
        if not isinstance(value, kinds or (int, float, str, tuple)):
            path = f'{self.prefix}{path}.' if path else self.prefix
            raise Refusal(f'{path}{name} is a {type(value).__name__}, with which the kernel does not compute')
        return value

    def parameter(
        self, module: nn.Module, path: str, name: str, *shape: int, order: tuple[int, ...] = ()
    ) -> int | None:
        """The address of a parameter of this shape, without gaps in this order of its dimensions; None for None."""
        tensor, name = self._look(module._parameters, path, name), f'{self.prefix}{path}.{name}'
        if tensor is None:
            return None
        reason = refuse_tensor(tensor, name)
        if reason is None and tensor.shape != shape:
            reason = f'{name} has the shape {tuple(tensor.shape)}, not {shape}'
        if reason is None and not (tensor.permute(order) if order else tensor).is_contiguous():
            reason = f'{name} lies in memory in another order'
        if reason is not None:
            raise Refusal(reason)
        self._tensors.append(tensor)
        return tensor.data_ptr()

    def weights(self, module: nn.Module, path: str, *shape: int, order: tuple[int, ...] = ()) -> tuple[int, int | None]:
        """The addresses of ``weight``, of this shape, and of ``bias``, with as many numbers as the weight has rows."""
        weight = self.parameter(module, path, 'weight', *shape, order=order)
        if weight is None:
            raise Refusal(f'{self.prefix}{path} has no weight')
        return weight, self.parameter(module, path, 'bias', shape[0])

    def linear(self, parent: nn.Module, path: str, name: str, rows: int, columns: int) -> tuple[int, int | None]:
        """The addresses of a linear layer's parameters."""
        return self.weights(self.child(parent, path, name, nn.Linear), f'{path}.{name}', rows, columns)

    def norm(self, norm: nn.Module, path: str, channels: int) -> tuple[float, tuple[int, int]]:
        """The epsilon and the addresses of a LayerNorm's parameters."""
        if self.attribute(norm, path, 'normalized_shape') != (channels,):
            raise Refusal(f'{self.prefix}{path} norms {norm.normalized_shape}, not {channels} channels')
        weight, bias = self.weights(norm, path, channels)
        if bias is None:
            raise Refusal(f'{self.prefix}{path} has no bias')
        return self.attribute(norm, path, 'eps', int, float), (weight, bias)

    def patches(
        self, conv: nn.Module, path: str, rows: int, columns: int, order: tuple[int, ...] = (0, 2, 3, 1)
    ) -> tuple[int, tuple[int, int | None]]:
        """The side and the addresses of the parameters of a convolution of patches, whose weights lie in this order."""
        size = self.attribute(conv, path, 'kernel_size', tuple)
        side = size[0] if size else 0
        for name, value in (
            ('kernel_size', (side, side)),
            ('stride', (side, side)),
            ('padding', (0, 0)),
            ('dilation', (1, 1)),
            ('groups', 1),
            ('padding_mode', 'zeros'),
        ):
            if self.attribute(conv, path, name) != value:
                raise Refusal(f'{self.prefix}{path} has {name}={getattr(conv, name)}, which does not make patches')
        return side, self.weights(conv, path, rows, columns, side, side, order=order)

    def seal(self) -> 'Prepared':
        """All is known: remember what the tensors look like."""
        self._facts = self._looks()
        return self

    def _looks(self) -> list[list]:
        tensors = self._tensors
        return [list(map(look, tensors)) for look in (Tensor.data_ptr, Tensor.stride, _shapes, _dtypes)]

    def is_current(self) -> bool:
        """Whether all is as it was."""
        modules = [found() for found in self._modules]
        return (
            all(map(is_, map(dict.get, self._places, self._names, repeat(_NOTHING)), self._found))
            and list(map(type, modules)) == self._types
            and not any(self._hooks)
            and self._looks() == self._facts
        )


class Cache:
    """What was prepared for modules, for as long as they live."""

    def __init__(self) -> None:
        self._prepared: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()

    def get(self, module: nn.Module, key: object, make: Callable[[], Prepared]) -> Prepared:
        """What ``make`` returned for a module and a key, made anew if it is not current."""
        kept = self._prepared.setdefault(module, {})
        found = kept.get(key)
        if found is None or not found.is_current():
            found = kept[key] = make().seal()
        return found


def first(reasons: Iterable[str | None]) -> str | None:
    """The first reason that there is."""
    return next((reason for reason in reasons if reason), None)
