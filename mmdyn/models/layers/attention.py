"""Attention of queries over the keys and values of a dense map of tokens."""
import math
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def packed_attention(query: Tensor, key: Tensor, value: Tensor, lengths: List[int]) -> Tensor:
    """Attention of packed queries, each over the keys of its own image, without padding.

    Args:
        query: (N, heads, D), the queries of all images one after the other.
        key, value: (B, heads, M, D).
        lengths: queries of each of the B images; they sum to N.

    Returns:
        (N, heads, D).
    """
    if len(set(lengths)) == 1:
        query = query.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1)
    return torch.cat([
        F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None])[0].transpose(0, 1)
        for q, k, v in zip(query.split(lengths), key, value) if len(q)
    ])


def class_attention(query: Tensor, key: Tensor) -> Tensor:
    """Softmax of one query of each image over its keys, mean of heads: (B, heads, D), (B, heads, M, D) -> (B, M)."""
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum('bhd,bhmd->bhm', query.float() / math.sqrt(query.shape[-1]), key.float())
        return scores.softmax(-1).mean(1)


class Attention(nn.Module):
    """Multi-head attention whose keys and values are the tokens, spatially reduced if ``sr_ratio`` > 1 (PVT).

    Args:
        dim: channels.
        num_heads: heads; they divide ``dim``.
        sr_ratio: a convolution turns each sr_ratio x sr_ratio patch of the map into one key. Extra tokens stay.
        norm_eps: epsilon of the norm after the reduction.
        qkv_bias: whether queries, keys and values have a bias.

    Attributes:
        keeps_class_attention: whether a dense pass leaves its class attention behind.
        class_attention: (B, M), how much the first token of each image attended to each key, mean of the heads.
    """
    uses_points = False

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1, norm_eps: float = 1e-6, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'{dim} channels do not divide into {num_heads} heads: choose num_heads that divide {dim}.')
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim, norm_eps)
        self.keeps_class_attention, self.class_attention = False, None

    def reduce(self, tokens: Tensor, shape: Tuple[int, int], num_extra: int) -> Tensor:
        """(B, E + H*W, C) -> (B, E + (H//sr)*(W//sr), C)."""
        if self.sr_ratio == 1:
            return tokens
        if min(shape) < self.sr_ratio:
            raise ValueError(f'A map of {shape[0]} x {shape[1]} cells is too small for sr_ratio={self.sr_ratio}: use a '
                             'larger image or a smaller sr_ratio in this stage.')
        maps = tokens[:, num_extra:].transpose(1, 2).unflatten(2, shape)
        reduced = self.norm(self.sr(maps).flatten(2).transpose(1, 2))
        return torch.cat([tokens[:, :num_extra], reduced], dim=1) if num_extra else reduced

    def forward(self, queries: Tensor, tokens: Tensor, shape: Tuple[int, int], lengths: Optional[List[int]] = None,
                num_extra: int = 0, points: Optional[Tensor] = None) -> Tensor:
        """Attend from the queries to the tokens.

        Args:
            queries: (B, n, C), or packed (N, C) with the ``lengths`` of the images.
            tokens: (B, E + H*W, C).
            shape: (H, W).
            num_extra: E.
            points: unused; the content of the tokens is all that counts.

        Returns:
            as ``queries``.
        """
        heads = (self.num_heads, -1)
        query = self.q(queries).unflatten(-1, heads)
        key_value = self.kv(self.reduce(tokens, shape, num_extra))
        key, value = key_value.unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        if self.keeps_class_attention:
            # One row for each head; the other rows go through fused attention, which shows none.
            self.class_attention = class_attention(query[:, 0].detach(), key.detach())
        if lengths is None:
            out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value).transpose(1, 2)
        else:
            out = packed_attention(query, key, value, lengths)
        return self.proj(out.flatten(-2))

    def num_keys(self, shape: Tuple[int, int], num_extra: int) -> int:
        return num_extra + math.prod(side // self.sr_ratio for side in shape)

    def macs(self, shape: Tuple[int, int], num_extra: int) -> Tuple[int, int]:
        """Multiply-adds of one query, and of the keys and values of one image."""
        keys, dim = self.num_keys(shape, num_extra), self.q.in_features
        query = self.q.weight.numel() + self.proj.weight.numel() + 2 * keys * dim
        static = keys * self.kv.weight.numel()
        if self.sr_ratio > 1:
            static += (keys - num_extra) * self.sr.weight.numel()
        return query, static
