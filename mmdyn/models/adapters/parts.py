"""Layers of other libraries, on packed queries."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dge import Routing
from ..layers import packed_attention
from ..layers.block import drop_path


def weights(module: nn.Module) -> int:
    """Numbers in the weights of a module's linear layers and convolutions: multiply-adds where each runs once."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer or convolution is only its parameters: a user's hook or layer has to be called."""
    known = type(layer) in (nn.Linear, nn.Conv2d) or type(layer).__module__ == 'mmcv.cnn.bricks.wrappers'
    return known and not (layer._forward_hooks or layer._forward_pre_hooks or 'forward' in vars(layer))


def project(layer: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
    """The outputs ``start`` to ``stop`` of a linear layer, such as the queries of fused queries, keys and values."""
    if not is_plain(layer):
        return layer(x)[..., start:stop]
    return F.linear(x, layer.weight[start:stop], None if layer.bias is None else layer.bias[start:stop])


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of 1 x 1 cells on packed queries: (N, C_in) -> (N, C_out)."""
    if not is_plain(conv):
        return conv(x.T[None, :, :, None])[0, :, :, 0].T
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def drop(layer: nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    """A layer of dropout; stochastic depth drops all queries (N, C) of an image together."""
    if type(layer).__name__ != 'DropPath':
        return layer(x)
    return drop_path(x, layer.drop_prob, lengths) if layer.training and layer.drop_prob else x


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], dropout: float = 0.0) -> Tensor:
    """Attention of packed queries (N, heads, D), each over the keys (B, heads, M, D) of its own image -> (N, C)."""
    if not dropout:
        return packed_attention(query, key, value, lengths).flatten(1)
    parts = [
        F.scaled_dot_product_attention(q.transpose(0, 1), k, v, dropout_p=dropout).transpose(0, 1)
        for q, k, v in zip(query.split(lengths), key, value)
    ]
    return torch.cat(parts).flatten(1)


def heads(x: Tensor, num: int, parts: int) -> Iterable[Tensor]:
    """(B, M, parts * C) -> as many tensors (B, heads, M, C / heads)."""
    return x.unflatten(-1, (parts, num, -1)).permute(2, 0, 3, 1, 4).unbind()


def maps(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), with the channels side by side in memory as they are."""
    return tokens.transpose(1, 2).unflatten(2, shape)


def convolution(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of :func:`maps`.

    On a CPU, the weights are shown in the order of the maps' memory: with others, torch would reorder the maps, and
    convolve each channel by itself many times slower.
    """
    if x.device.type != 'cpu' or not is_plain(conv):
        return conv(x)
    weight, (rows, columns) = conv.weight, conv.kernel_size
    if weight.shape[1] > 1:
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif weight.is_contiguous():  # no order is another one, but the strides tell
        weight = weight.as_strided(weight.shape, (rows * columns, 1, columns, 1))
    return conv._conv_forward(x, weight, conv.bias)


def convolve(conv: nn.Module, x: Tensor, shape: tuple[int, int], routing: Routing) -> Tensor:
    """A convolution inside of a feed-forward network: of the map in which each query's value is at all of its cells.

    Cells that no query serves are 0, as what is beyond the edge is.

    Args:
        conv: that keeps the map's shape.
        x: (N, C) of the packed queries.
        shape: (H, W).
        routing: which cells each query stands for.

    Returns:
        (N, C) the means of the cells of each query.
    """
    return routing.compress(convolution(conv, maps(routing.spread(x), shape)).flatten(2).transpose(1, 2))
