"""An encoder block on its queries, whose norms are in one program each with what makes their input."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from ...models.dge.encoder import encode_queries, points_of
from ...models.dge.routing import Routing
from ...models.layers import FFN, Attention, DeformableAttention, EncoderBlock
from ...models.replaceable import Refused
from ..prepared import refuse_watchers
from .routing import DTYPES, MOST_CHANNELS, PatchRouting, power_of_two

HOOKS = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'


def outputs(x: Tensor, num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for N rows like those of ``x``, for their norms, and for means and inverse deviations."""
    shape = num, x.shape[-1]
    return x.new_empty(shape), x.new_empty(shape, dtype=dtype), x.new_empty(num, 2, dtype=torch.float32)


def constants(channels: int) -> dict[str, int]:
    """Of a program that norms one row: a row lies in as few warps as may be, whose sums need no barrier."""
    block = power_of_two(channels)
    return dict(BLOCK=block, num_warps=min(max(block // 256, 1), 8))


def norm_backward(of_normed: Tensor, saved: tuple[Tensor, ...]) -> list[Tensor]:
    """The derivatives of a layer norm: of its input (N, C), weight and bias."""
    x, statistics, weight, bias = saved
    mean, inverse = statistics.split(1, 1)
    found = torch.ops.aten.native_layer_norm_backward(
        of_normed.float(),
        x.float(),
        weight.shape,
        mean.contiguous(),
        inverse.contiguous(),
        weight.float(),
        bias.float(),
        [True, True, True],
    )
    return [gradient.to(like.dtype) for gradient, like in zip(found, (x, weight, bias))]


class CompressAndNorm(torch.autograd.Function):
    """:meth:`Routing.compress`, and its layer norm: (B, E + H*W, C) -> (N, C), (N, C)."""

    @staticmethod
    def forward(ctx, tokens, weight, bias, routing: PatchRouting, epsilon: float, dtype: torch.dtype):
        ctx.routing, tokens = routing, tokens.contiguous()
        queries, normed, statistics = outputs(tokens, len(routing.patches), dtype)
        routing.programs.reduce_and_norm[(len(queries),)](
            tokens,
            routing.patches,
            weight,
            bias,
            queries,
            normed,
            statistics,
            tokens.shape[1],
            tokens.stride(0),
            routing.width,
            tokens.shape[2],
            epsilon,
            **constants(tokens.shape[2]),
        )
        ctx.save_for_backward(queries, statistics, weight, bias)
        return queries, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, of_queries, of_normed):
        of_input, of_weight, of_bias = norm_backward(of_normed, ctx.saved_tensors)
        return ctx.routing.hand_out(of_queries + of_input, share=True), of_weight, of_bias, None, None, None


class AddAndNorm(torch.autograd.Function):
    """The layer norm of a sum, which is kept for a backward pass: (N, C), (N, C) -> (N, C)."""

    @staticmethod
    def forward(ctx, x, change, weight, bias, routing: PatchRouting, epsilon: float, dtype: torch.dtype, keep: bool):
        ctx.dtype, x, change = change.dtype, x.contiguous(), change.contiguous()
        total, normed, statistics = outputs(x, len(x), dtype)
        routing.programs.add_and_norm[(len(x),)](
            x,
            change,
            weight,
            bias,
            total,
            normed,
            statistics,
            x.shape[1],
            epsilon,
            KEEP=keep,
            **constants(x.shape[1]),
        )
        ctx.save_for_backward(total, statistics, weight, bias)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, of_normed):
        of_total, of_weight, of_bias = norm_backward(of_normed, ctx.saved_tensors)
        return of_total, of_total.to(ctx.dtype), of_weight, of_bias, None, None, None, None


def refuse_block(block: nn.Module, channels: int, dtype: torch.dtype) -> str | None:
    """Why the norms of a block cannot be computed without calling it; None if they can."""
    if type(block) is not EncoderBlock or {'forward', '_forward'} & block.__dict__.keys():
        return f'the block is a {type(block).__name__}, or has a forward function of its own'
    if type(block.attn) not in (Attention, DeformableAttention) or type(block.ffn) is not FFN:
        return 'the attention or the feed-forward network of the block is another than those that are known'
    if block.with_cp and torch.is_grad_enabled():
        return 'the block is computed again in the backward pass'
    of_norms = [block.norm1, block.norm2]
    if torch_module._has_any_global_hook() or any(
        getattr(module, name) for module in (block, *of_norms) for name in HOOKS
    ):
        return 'the block or its norms have hooks'
    first = [block.attn.q] if type(block.attn) is Attention else [block.attn.offsets, block.attn.attn_weight]
    if any(type(layer) is not nn.Linear for layer in (*first, block.ffn.fc1)):
        return 'the layers behind the norms are no linear ones'
    for norm in of_norms:
        if type(norm) is not nn.LayerNorm or 'forward' in norm.__dict__ or norm.normalized_shape != (channels,):
            return f'a norm of the block is a {type(norm).__name__}, or not of its channels'
        if any(x is None or x.dtype is not dtype or not x.is_contiguous() for x in (norm.weight, norm.bias)):
            return 'a norm of the block has no weight or no bias, or of another type than the tokens'
    return None


@encode_queries.register
def encode_by_programs(
    block: nn.Module, tokens: Tensor, shape: tuple[int, int], num_extra: int, routing: Routing
) -> Tensor | Refused:
    """:func:`~mmdyn.models.dge.encoder.encode_queries` by two programs, one for each norm of the queries."""
    if not isinstance(routing, PatchRouting):
        return Refused('the routing was not made by programs for a GPU')
    if tokens.dtype not in DTYPES or tokens.shape[2] > MOST_CHANNELS or len(tokens) != len(routing.query):
        return Refused(
            f'the tokens are {tokens.dtype}, have more than {MOST_CHANNELS} channels, or are of other images'
        )
    if not len(routing.patches):
        return Refused('there are no queries')
    reason = refuse_watchers() or refuse_block(block, tokens.shape[2], tokens.dtype)
    if reason is not None:
        return Refused(reason)
    device, lengths = tokens.device.type, routing.lengths
    # What linear layers would round their input to.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype

    def norm(layer: nn.LayerNorm) -> tuple:
        return layer.weight, layer.bias, routing, layer.eps, dtype

    queries, normed = CompressAndNorm.apply(tokens, *norm(block.norm1))
    points = points_of(block, routing, shape, num_extra)
    attended = block.attn(normed, block.norm1(tokens), shape, num_extra, lengths, points)
    attended, with_gradients = block._branch(attended, lengths), torch.is_grad_enabled()
    normed = AddAndNorm.apply(queries, attended, *norm(block.norm2), with_gradients)
    if with_gradients:  # whose sums may not fit into half precision
        attended = attended.to(tokens.dtype)
    return attended + block._branch(block.ffn(normed), lengths)
