"""Attention of queries over the keys and values of a dense map of tokens."""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...values import MOST, check_choice, check_integer, check_number
from ..replaceable import replaceable
from ..tracing import is_traced
from .macs import macs_of


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention: (B, heads, n, D) queries, (B, heads, M, D) keys and values -> (B, heads, n, D)."""
    if is_traced():  # the function below is one that counters do not know, and that takes no n that the images choose
        return (query / math.sqrt(query.shape[-1]) @ key.transpose(-2, -1)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


@replaceable
def packed_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Attention of packed queries, each over the keys of its own image, without padding.

    Args:
        query: (N, heads, D), the queries of all images one after the other.
        key, value: (B, heads, M, D).
        lengths: queries of each of the B images; they sum to N.

    Returns:
        (N, heads, D).
    """
    if not lengths:
        return query
    if len(lengths) == 1 or (not is_traced() and len(set(lengths)) == 1):
        query = query.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2)
        return attention(query, key, value).transpose(1, 2).flatten(0, 1)
    return torch.cat(
        [
            attention(q.transpose(0, 1)[None], k[None], v[None])[0].transpose(0, 1)
            for q, k, v in zip(query.split(lengths), key, value)
        ]
    )


def class_attention(query: Tensor, key: Tensor) -> Tensor:
    """Softmax of one query of each image over its keys, mean of heads: (B, heads, D), (B, heads, M, D) -> (B, M)."""
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum('bhd,bhmd->bhm', query.float() / math.sqrt(query.shape[-1]), key.float())
        return scores.softmax(-1).mean(1)


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError unless the heads divide the channels."""
    check_integer('dim', dim, 1, MOST, 'the channels')
    check_integer('num_heads', num_heads, 1, MOST)
    if dim % num_heads:
        raise ValueError(f'{dim} channels do not divide into {num_heads} heads: choose num_heads that divide {dim}.')


class Attention(nn.Module):
    """Multi-head attention whose keys and values are the tokens, spatially reduced if ``sr_ratio`` > 1 (PVT).

    Args:
        dim: channels.
        num_heads: heads; they divide ``dim``.
        sr_ratio: a convolution turns each sr_ratio x sr_ratio patch of the map into one key. Extra tokens stay.
        norm_eps: epsilon of the norm after the reduction.
        qkv_bias: whether queries, keys and values have a bias.
    """

    uses_points = False

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1, norm_eps: float = 1e-5, qkv_bias: bool = True):
        super().__init__()
        check_heads(dim, num_heads)
        check_integer('sr_ratio', sr_ratio, 1, MOST, 'the side of the patches that keys are made of')
        check_number('norm_eps', norm_eps, '(0, inf)')
        check_choice('qkv_bias', qkv_bias, (True, False))
        self.dim, self.num_heads, self.sr_ratio = dim, num_heads, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio).to(memory_format=torch.channels_last)  # as tokens are
            self.norm = nn.LayerNorm(dim, norm_eps)

    def reduce(self, tokens: Tensor, shape: tuple[int, int], num_extra: int) -> Tensor:
        """(B, E + H*W, C) -> (B, E + (H//sr)*(W//sr), C)."""
        if self.sr_ratio == 1:
            return tokens
        if min(shape) < self.sr_ratio:
            raise ValueError(
                f'A map of {shape[0]} x {shape[1]} cells is too small for sr_ratio={self.sr_ratio}: use a '
                'larger image or a smaller sr_ratio in this stage.'
            )
        extra, cells = tokens[:, :num_extra], tokens[:, num_extra:]
        reduced = self.norm(self.sr(cells.transpose(1, 2).unflatten(2, shape)).flatten(2).transpose(1, 2))
        return torch.cat([extra, reduced], dim=1) if num_extra else reduced

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        shape: tuple[int, int],
        num_extra: int = 0,
        lengths: list[int] | None = None,
        points: Tensor | None = None,
        class_rows: list[Tensor] | None = None,
    ) -> Tensor:
        """Attend from the queries to the tokens.

        Args:
            queries: (B, n, C), or packed (N, C) with the ``lengths`` of the images.
            tokens: (B, E + H*W, C).
            shape: (H, W).
            num_extra: E.
            lengths: queries of each image, where they are packed.
            points: not used.
            class_rows: a list that is given the class attention: (B, M), how much the first query of each image
                attends to each key, mean of the heads.

        Returns:
            as ``queries``.
        """
        query = self.q(queries).unflatten(-1, (self.num_heads, -1))
        key_value = self.kv(self.reduce(tokens, shape, num_extra))
        key, value = key_value.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if class_rows is not None:  # fused attention shows no weights
            first = query[:, 0] if lengths is None else query[[0, *accumulate(lengths)][:-1]]
            class_rows.append(class_attention(first.detach(), key.detach()))
        if lengths is None:
            attended = attention(query.transpose(1, 2), key, value).transpose(1, 2)
        else:
            attended = packed_attention(query, key, value, lengths)
        return self.proj(attended.flatten(-2))

    def macs(self, shape: tuple[int, int], num_extra: int) -> tuple[int, int]:
        """Multiply-adds of one query, and of the keys and values of one image."""
        keys = num_extra + math.prod(side // self.sr_ratio for side in shape)
        query = macs_of(self.q) + macs_of(self.proj) + 2 * keys * getattr(self.q, 'out_features', self.dim)
        static = keys * macs_of(self.kv)
        if self.sr_ratio > 1:
            static += (keys - num_extra) * macs_of(self.sr)
        return query, static
