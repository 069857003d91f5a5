"""Queries in both directions, in training and in inference, by two programs each of which is the other's derivative."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from packaging.version import Version
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...models.dge.router import Router, choose, choose_greatest
from ...models.dge.routing import Routing, grid, route
from ...models.replaceable import Refused
from ..prepared import refuse_watchers

DTYPES = torch.float32, torch.float16, torch.bfloat16
LEAST_TRITON = '3.4'  # the first that compiles the programs; torch 2.8 brings it along
MOST_CHANNELS = 4096  # of a token, which one program holds
REGIONS, TOKENS = 1024, 4  # that one program looks at together


def power_of_two(number: int) -> int:
    """The least that is no less."""
    return 1 << (number - 1).bit_length() if number > 1 else 1


def load_programs(x: Tensor) -> ModuleType | Refused:
    """The programs for the device of a tensor, or why there are none."""
    if not x.is_cuda:
        return Refused(f'the tensors are on {x.device}, not on a GPU')
    reason = refuse_watchers()
    if reason is not None:
        return Refused(reason)
    if not find_spec('triton'):
        return Refused('there is no Triton, which torch for CUDA brings along')
    found = import_module('triton').__version__
    if Version(found) < Version(LEAST_TRITON):
        return Refused(f'the programs need Triton {LEAST_TRITON} or newer, which torch 2.8 brings along, not {found}')
    return import_module('.programs', __package__)


@dataclass(frozen=True)
class PatchRouting(Routing):
    """A routing that knows the patch of each query.

    Attributes:
        patches: (N, 3) int32: first token through all images, rows and columns; zeros for a place that is left over.
        width: W.
        programs: the module of the programs.
    """

    patches: Tensor
    width: int
    programs: ModuleType

    def _is_known(self, x: Tensor) -> bool:
        return x.dtype in DTYPES and x.shape[-1] <= MOST_CHANNELS and refuse_watchers() is None and x.numel() > 0

    def compress(self, tokens: Tensor) -> Tensor:
        return Compress.apply(tokens, self) if self._is_known(tokens) else super().compress(tokens)

    def spread(self, change: Tensor) -> Tensor:
        return Spread.apply(change, self) if self._is_known(change) else super().spread(change)

    def decompress(self, change: Tensor, tokens: Tensor) -> Tensor:
        if not (self._is_known(change) and self._is_known(tokens)):
            return super().decompress(change, tokens)
        return Decompress.apply(change, tokens, self)

    def reduce(self, tokens: Tensor, mean: bool) -> Tensor:
        """Sums or means of the tokens of each query: (B or 1, E + H*W, C) -> (N, C)."""
        tokens, channels = tokens.contiguous(), tokens.shape[-1]
        out = tokens.new_empty(len(self.patches), channels)
        image_stride = tokens.stride(0) if len(tokens) == len(self.query) else 0
        self.programs.reduce_tokens[(len(out),)](
            tokens,
            self.patches,
            out,
            tokens.shape[1],
            image_stride,
            self.width,
            channels,
            MEAN=mean,
            BLOCK=power_of_two(channels),
        )
        return out

    def hand_out(self, change: Tensor, share: bool, tokens: Tensor | None = None) -> Tensor:
        """What each token's query has, or an equal share of it, plus the token: (N, C) -> (B, E + H*W, C)."""
        change, total = change.contiguous(), self.query.numel()
        tokens = None if tokens is None else tokens.contiguous()
        out = torch.empty(
            *self.query.shape,
            change.shape[1],
            dtype=change.dtype if tokens is None else tokens.dtype,
            device=change.device,
        )
        self.programs.spread_queries[(-(-total // TOKENS),)](
            change,
            self.query,
            self.patches,
            out if tokens is None else tokens,
            out,
            len(self.patches),
            total,
            change.shape[1],
            ADD=tokens is not None,
            SHARE=share,
            TOKENS=TOKENS,
            BLOCK=power_of_two(change.shape[1]),
        )
        return out


class Compress(torch.autograd.Function):
    """:meth:`Routing.compress`: a mean's gradient goes to its tokens in equal shares."""

    @staticmethod
    def forward(ctx, tokens: Tensor, routing: PatchRouting) -> Tensor:
        ctx.routing, ctx.images = routing, len(tokens)
        return routing.reduce(tokens, mean=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_means: Tensor) -> tuple[Tensor, None]:
        of_tokens = ctx.routing.hand_out(of_means, share=True)
        return (of_tokens if len(of_tokens) == ctx.images else of_tokens.sum(0, keepdim=True)), None


class Spread(torch.autograd.Function):
    """:meth:`Routing.spread`: the gradient of a change is the sum of its tokens'."""

    @staticmethod
    def forward(ctx, change: Tensor, routing: PatchRouting) -> Tensor:
        ctx.routing = routing
        return routing.hand_out(change, share=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.routing.reduce(of_outputs, mean=False), None


class Decompress(torch.autograd.Function):
    """:meth:`Routing.decompress`: the gradient of a change is the sum of its tokens'."""

    @staticmethod
    def forward(ctx, change: Tensor, tokens: Tensor, routing: PatchRouting) -> Tensor:
        ctx.routing, ctx.dtype = routing, change.dtype
        return routing.hand_out(change, share=False, tokens=tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        return ctx.routing.reduce(of_outputs, mean=False).to(ctx.dtype), of_outputs, None


@choose.register
def choose_by_logits(
    router: Router, tokens: Tensor, shape: tuple[int, int], region: int, num_extra: int
) -> Tensor | Refused:
    """:func:`~mmdyn.models.dge.router.choose` without a table of means, which are in float32."""
    programs = load_programs(tokens)
    if isinstance(programs, Refused):
        return programs
    if type(router) is not Router or router._forward_hooks or router._forward_pre_hooks:
        return Refused('the router is another than the one that is known, or has forward hooks')
    weights = router.weight, router.bias
    if any(x.dtype not in DTYPES or x.device != tokens.device for x in (tokens, *weights)) or torch.is_grad_enabled():
        return Refused('gradients are on, or the tokens or the weights of the router are of other types or devices')
    if tokens.shape[2] > MOST_CHANNELS or not tokens.numel():
        return Refused(f'there are no tokens, or more than {MOST_CHANNELS} channels')
    return choose_greatest(
        router, logits_of(programs, router, tokens, shape, region, num_extra), shape, region, num_extra
    )


def logits_of(
    programs: ModuleType, router: Router, tokens: Tensor, shape: tuple[int, int], region: int, num_extra: int
) -> Tensor:
    """The logits of each region: (B, E + H*W, C) -> (B, rows, columns, K)."""
    (rows, columns), (options, channels) = grid(region, shape), router.weight.shape
    logits = torch.empty(len(tokens), rows, columns, options, dtype=torch.float32, device=tokens.device)
    programs.rate_regions[(rows * columns, len(tokens))](
        tokens.contiguous(),
        router.weight.contiguous(),
        router.bias.contiguous(),
        logits,
        *shape,
        num_extra,
        channels,
        SIDE=region,
        OPTIONS=options,
        BLOCK=power_of_two(channels),
    )
    return logits


@route.register
def route_by_regions(
    choice: Tensor,
    shape: tuple[int, int],
    granularities: Sequence[int],
    region: int,
    num_extra: int = 0,
    capacity: int | None = None,
) -> Routing | Refused:
    """:func:`~mmdyn.models.dge.routing.route`; an image's queries are in the order of their regions."""
    programs = load_programs(choice)
    if isinstance(programs, Refused):
        return programs
    if not 0 < len(choice) * (num_extra + math.prod(shape)) < 2**31:
        return Refused('there are no tokens, or too many to count in 32 bits')
    return routing_of(programs, choice, shape, granularities, region, num_extra, capacity)


def routing_of(
    programs: ModuleType,
    choice: Tensor,
    shape: tuple[int, int],
    granularities: Sequence[int],
    region: int,
    num_extra: int,
    capacity: int | None,
) -> PatchRouting:
    """Number the queries of a choice; one synchronisation without a capacity."""
    images, device, (rows, columns) = len(choice), choice.device, grid(region, shape)
    starts = torch.empty(images, rows * columns, dtype=torch.int32, device=device)
    totals = torch.empty(images, dtype=torch.int32, device=device)
    choice, granularities = choice.contiguous(), tuple(granularities)
    options = dict(REGION=region, GRANULARITIES=granularities)
    programs.number_queries[(images,)](choice, starts, totals, *shape, num_extra, **options, BLOCK=REGIONS)
    if capacity is None:
        lengths = totals.tolist()
        bases = totals.cumsum(0, dtype=torch.int32) - totals
    else:
        lengths = [capacity] * images
        bases = capacity * torch.arange(images, dtype=torch.int32, device=device)
    num, places = sum(lengths), num_extra + math.prod(shape) if capacity is None else capacity
    query = torch.empty(images, num_extra + math.prod(shape), dtype=torch.int32, device=device)
    patches = torch.zeros(num, 3, dtype=torch.int32, device=device)
    programs.write_queries[(rows * columns, images)](
        choice,
        starts,
        bases,
        query,
        patches,
        num,
        places,
        *shape,
        num_extra,
        **options,
        CELLS=power_of_two(region**2),
        EXTRA=power_of_two(max(num_extra, 1)),
    )
    return PatchRouting(query, lengths, patches, shape[1], programs)
