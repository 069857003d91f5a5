"""The encoder blocks of a stage in inference on a CPU with AVX-512 or AVX2, by csrc/block.c: one call for all of them.

Each thread works on panels of queries that stay in the cache of its core.
"""

import ctypes
import math
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.dge import Decision, DynamicGrainedEncoder
from ..models.dge.encoder import check_granularities
from ..models.dge.router import Router
from ..models.dge.routing import grid
from ..models.layers import FFN, Attention, DeformableAttention, EncoderBlock
from ..models.replaceable import Refused
from ..models.stage import Stage, run_blocks
from .library import Block, Map, Number, call, runs
from .prepared import (
    Cache,
    Prepared,
    Refusal,
    decision_of,
    refuse_context,
    refuse_tensor,
    refuse_tokens,
    refuse_watched_tokens,
)

_cache = Cache()


def computes_in_half() -> bool:
    """Whether autocast asks for bfloat16."""
    return torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.bfloat16


def refuse_processor() -> str | None:
    """Why the functions for AVX-512 and AVX2 do not run here and now; None if they do.

    Under autocast to bfloat16 the linear layers of queries compute in it, all else in float32.
    """
    half = computes_in_half()
    refused = runs(half)
    if refused is not None:
        return refused.reason
    if torch.is_autocast_enabled('cpu') and not half:
        return f'autocast to {str(torch.get_autocast_dtype("cpu")).removeprefix("torch.")} is on'
    return None if torch._C._get_mkldnn_enabled() else 'torch.backends.mkldnn is switched off'


@cache
def as_numbers(granularities: tuple[int, ...]) -> ctypes.Array:
    """Granularities, as C reads them."""
    return (Number * len(granularities))(*granularities)


class PreparedBlock(Prepared):
    """An encoder block, and the encoder that wraps it or None.

    Attributes:
        struct: what C reads, without what depends on the call.
        region: side of a region.
        has_points: whether its attention is deformable.
        granularities: the memory that the struct refers to.
    """

    def __init__(self, block: nn.Module, encoder: nn.Module | None, index: int):
        super().__init__(f'blocks.{index}')
        self.struct, self.region, self.granularities = Block(), 0, None
        self.module(block, '', EncoderBlock)
        self.prefix += '.'
        if self.attribute(block, '', 'training'):
            raise Refusal(f'blocks.{index} is in training mode')
        norms, struct = [self.child(block, '', f'norm{number}', nn.LayerNorm) for number in (1, 2)], self.struct
        dim = math.prod(self.attribute(norms[0], 'norm1', 'normalized_shape', tuple))
        struct.dim, struct.residual_scale = dim, self.attribute(block, '', 'residual_scale', int, float)
        for number, norm in enumerate(norms, 1):
            eps, addresses = self.norm(norm, f'norm{number}', dim)
            setattr(struct, f'norm{number}_eps', eps)
            self._set(f'norm{number}', addresses)
        ffn = self.child(block, '', 'ffn', FFN)
        if self.attribute(self.child(ffn, 'ffn', 'act', nn.GELU), 'ffn.act', 'approximate') != 'none':
            raise Refusal(f'{self.prefix}ffn.act approximates the GELU')
        fc1 = self.child(ffn, 'ffn', 'fc1', nn.Linear)
        struct.hidden = self.attribute(fc1, 'ffn.fc1', 'out_features', int)
        if struct.hidden < 1:
            raise Refusal(f'{self.prefix}ffn has no hidden channels')
        self._set('fc1', self.linear(ffn, 'ffn', 'fc1', struct.hidden, dim))
        self._set('fc2', self.linear(ffn, 'ffn', 'fc2', dim, struct.hidden))
        attn = self.child(block, '', 'attn', Attention, DeformableAttention)
        struct.heads = self.attribute(attn, 'attn', 'num_heads', int)
        if struct.heads < 1 or dim % struct.heads:
            raise Refusal(f'{self.prefix}attn has {struct.heads} heads for {dim} channels')
        self._set('proj', self.linear(attn, 'attn', 'proj', dim, dim))
        self.has_points = isinstance(attn, DeformableAttention)
        self._deformable(attn, dim) if self.has_points else self._softmax(attn, dim)
        if encoder is not None:
            self.prefix = ''
            self._encoder(encoder, f'dge.{index}', dim)

    def _set(self, name: str, addresses: tuple[int, int | None]) -> None:
        for kind, address in zip(('weight', 'bias'), addresses):
            setattr(self.struct, f'{name}_{kind}', address)

    def _softmax(self, attn: Attention, dim: int) -> None:
        self._set('q', self.linear(attn, 'attn', 'q', dim, dim))
        self._set('kv', self.linear(attn, 'attn', 'kv', 2 * dim, dim))
        self.struct.sr_ratio = 1
        if self.attribute(attn, 'attn', 'sr_ratio', int) != 1:
            side, addresses = self.patches(self.child(attn, 'attn', 'sr', nn.Conv2d), 'attn.sr', dim, dim)
            if side != attn.sr_ratio:
                raise Refusal(f'{self.prefix}attn.sr makes patches of another side than sr_ratio={attn.sr_ratio}')
            self.struct.sr_ratio = side
            self._set('sr', addresses)
            norm = self.child(attn, 'attn', 'norm', nn.LayerNorm)
            self.struct.sr_norm_eps, addresses = self.norm(norm, 'attn.norm', dim)
            self._set('sr_norm', addresses)

    def _deformable(self, attn: DeformableAttention, dim: int) -> None:
        self.struct.sr_ratio, self.struct.points = 1, self.attribute(attn, 'attn', 'num_points', int)
        points = self.struct.heads * self.struct.points
        if points < 1:
            raise Refusal(f'{self.prefix}attn has no points')
        self._set('offsets', self.linear(attn, 'attn', 'offsets', 2 * points, dim))
        self._set('point_weights', self.linear(attn, 'attn', 'attn_weight', points, dim))
        self._set('kv', self.linear(attn, 'attn', 'v', dim, dim))

    def _encoder(self, encoder: DynamicGrainedEncoder, path: str, dim: int) -> None:
        self.module(encoder, path, DynamicGrainedEncoder)
        if self.attribute(encoder, path, 'training') or self.attribute(encoder, path, 'routing') != 'region':
            raise Refusal(f'{path} is in training mode, or decides by layer')
        granularities = self.attribute(encoder, path, 'granularities', tuple)
        self.region = self.attribute(encoder, path, 'region', int)
        try:
            check_granularities(granularities, self.region)
        except ValueError as error:
            raise Refusal(f'{path}: {error}'.rstrip('.')) from error
        router = self.child(encoder, path, 'router', Router)
        self._set('router', self.weights(router, f'{path}.router', len(granularities), dim))
        if self.struct.router_bias is None:
            raise Refusal(f'{path}.router has no bias')
        self.granularities = as_numbers(granularities)
        self.struct.num_options, self.struct.granularities = len(granularities), ctypes.addressof(self.granularities)


# What finds out about blocks of other types.
PREPARED: dict[type, type[PreparedBlock]] = {}


class Layer(NamedTuple):
    """An encoder block of a stage, its encoder or None, and what is known of both."""

    block: nn.Module
    encoder: DynamicGrainedEncoder | None
    prepared: PreparedBlock


def layers_of(
    stage: Stage, tokens: Tensor, shape: tuple[int, int], start: int, stop: int | None, is_watched: bool = False
) -> list[Layer]:
    """The blocks of a stage that are to run, and whose class attention is asked for if ``is_watched``.

    Raises:
        Refusal: if a kernel does not know one of them, or they do not fit the tokens.
    """
    reason = refuse_context() or refuse_tokens(tokens, shape, stage.num_extra) or refuse_watched_tokens(stage)
    if reason is not None:
        raise Refusal(reason)
    layers = []
    for index in range(len(stage.blocks))[start:stop]:
        block, encoder = stage.blocks[index], stage.dge[index] if len(stage.dge) else None
        prepare = PREPARED.get(type(block), PreparedBlock)
        prepared = _cache.get(block, (encoder, index), partial(prepare, block, encoder, index))
        struct = prepared.struct
        if struct.dim != tokens.shape[2]:
            raise Refusal(f'the tokens have {tokens.shape[2]} channels, not {struct.dim}')
        if min(shape) < struct.sr_ratio:
            raise Refusal(f'blocks.{index}.attn takes no map of {shape[0]} x {shape[1]} cells')
        if is_watched and (encoder is not None or prepared.has_points):
            raise Refusal(f'blocks.{index} has DGE or deformable attention, beside which there is no class attention')
        if stage.num_extra and prepared.has_points:
            raise Refusal(f'blocks.{index}.attn takes no extra tokens')
        if encoder is not None and encoder.forced is not None:
            forced, regions = encoder.forced, grid(prepared.region, shape)
            if (
                refuse_tensor(forced, 'forced', torch.long)
                or forced.shape != regions
                or forced.numpy().view('u8').max() >= struct.num_options  # a number below 0 is large without its sign
            ):
                raise Refusal(f'dge.{index}.forced is no choice of {regions[0]} x {regions[1]} regions on the CPU')
        layers.append(Layer(block, encoder, prepared))
    if not layers:
        raise Refusal('there are no blocks to run')
    return layers


@run_blocks.register
def encode_blocks(
    stage: Stage,
    tokens: Tensor,
    shape: tuple[int, int],
    start: int = 0,
    stop: int | None = None,
    class_rows: list[Tensor] | None = None,
) -> Tensor | Refused:
    """:func:`~mmdyn.models.stage.run_blocks` in the memory of the tokens."""
    reason = refuse_processor()
    if reason is not None:
        return Refused(reason)
    try:
        layers = layers_of(stage, tokens, shape, start, stop, class_rows is not None)
        rules = [
            encoder and decision_of(encoder.router, prepared.struct.num_options, shape, stage.num_extra)
            for _, encoder, prepared in layers
        ]
    except Refusal as refusal:
        return Refused(str(refusal))
    images, extra, half, address = len(tokens), stage.num_extra, computes_in_half(), tokens.data_ptr()
    if extra and any(layer.prepared.struct.sr_ratio > 1 for layer in layers):
        return Refused('there are extra tokens, which the kernel does not put beside keys of patches')
    blocks, decisions, kept, rows = (Block * len(layers))(*(layer.prepared.struct for layer in layers)), [], [], []
    for struct, (_, encoder, prepared), rule in zip(blocks, layers, rules):
        queries, choice = torch.empty(images, dtype=torch.long, device='cpu'), None
        struct.tokens, struct.lengths = address, queries.data_ptr()
        struct.is_bfloat16 = half and struct.dim % 2 == struct.hidden % 2 == 0
        if encoder is not None:
            choice = torch.empty(images, *grid(prepared.region, shape), dtype=torch.long, device='cpu')
            struct.chosen = choice.data_ptr()
            bias, struct.budget = rule
            struct.router_bias = bias.data_ptr()
            if encoder.forced is not None:
                kept.append(choice)
                choice = encoder.forced.expand(images, -1, -1).contiguous()
        struct.map = Map(images, extra, *shape, prepared.region, 0, None if choice is None else choice.data_ptr())
        if class_rows is not None:
            keys = extra + math.prod(side // struct.sr_ratio for side in shape)
            rows.append(torch.empty(images, struct.heads, keys, dtype=torch.float32, device='cpu'))
            struct.class_rows = rows[-1].data_ptr()
        decisions.append((encoder, choice, queries))
    call('encode_blocks', blocks, len(blocks))
    for encoder, choice, queries in decisions:
        if encoder is not None:
            encoder.decision = Decision(choice, queries)
    if class_rows is not None:
        class_rows += [row.mean(1) for row in rows]
    return tokens
