"""Attention of queries over the keys and values of a dense map of tokens."""
import math
from itertools import accumulate
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..native import encoder as compiled
from .base import AttentionBase
from .linear import PIECE, Linear, cpuinfo, few_sizes, linear, packed_pieces, uses_onednn
from .patches import PatchProjection

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None


def fused_is_slow(capability: str, vendor: str) -> bool:
    """Whether fused attention takes longer than two plain products by oneDNN on a CPU.

    It computes by MKL, which leaves AVX-512 unused on processors that are not Intel's.

    Args:
        capability: the widest instructions, in torch's words.
        vendor: as in /proc/cpuinfo, '' if it is unknown.
    """
    return capability.startswith('AVX512') and vendor not in ('', 'GenuineIntel')


FUSED_IS_SLOW = fused_is_slow(torch.backends.cpu.get_cpu_capability(), cpuinfo('vendor_id'))
# Scores of a head from which on it is.
LARGE = 2**17


def packed_attention(query: Tensor, key: Tensor, value: Tensor, lengths: List[int]) -> Tensor:
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
    if FUSED_IS_SLOW and max(lengths) * key.shape[2] >= LARGE and uses_onednn(query, key):
        return torch.cat([attention_by_linear(*image) for image in zip(query.split(lengths), key, value)])
    if len(set(lengths)) == 1:
        query = query.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1)
    if varlen_attn and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return varlen_attention(query, key, value, lengths)
    return torch.cat([
        F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None])[0].transpose(0, 1)
        for q, k, v in zip(query.split(lengths), key, value) if len(q)
    ])


def attention_by_linear(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one image's queries, some at a time, with :func:`linear` for both products.

    Args:
        query: (n, heads, D).
        key, value: (heads, M, D).

    Returns:
        (n, heads, D).
    """
    # In two steps: rows that are a power of two apart share few places of a cache.
    transposed = value.contiguous().mT.contiguous()
    out, num = torch.empty_like(query, memory_format=torch.contiguous_format), len(query)
    # The last piece begins earlier, so that it has one of a few sizes.
    pieces = [slice(max(min(rows.start, num - few_sizes(rows.stop - rows.start)), 0), rows.stop)
              for rows, _, _ in packed_pieces([num], PIECE // key.shape[1])]
    for head, (keys, values) in enumerate(zip((key / math.sqrt(query.shape[2])).contiguous(), transposed)):
        for rows in pieces:
            weights = linear(query[rows, head], keys).softmax(-1, dtype=torch.float32).to(values.dtype)
            out[rows, head] = linear(weights, values)
    return out


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, lengths: List[int]) -> Tensor:
    """:func:`packed_attention` by one fused kernel, in half precision on a GPU."""
    images, _, keys, _ = key.shape
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device, non_blocking=True)
    starts = torch.arange(0, images * keys + 1, keys, dtype=torch.int32, device=query.device)
    key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
    return varlen_attn(query, key, value, ends, starts, max(lengths), keys)


def class_attention(query: Tensor, key: Tensor) -> Tensor:
    """Softmax of one query of each image over its keys, mean of heads: (B, heads, D), (B, heads, M, D) -> (B, M)."""
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum('bhd,bhmd->bhm', query.float() / math.sqrt(query.shape[-1]), key.float())
        return scores.softmax(-1).mean(1)


def check_sr_ratio(shape: Tuple[int, int], sr_ratio: int) -> None:
    """Raise ValueError for a map of ``shape`` (H, W) that no key is made of."""
    if min(shape) < sr_ratio:
        raise ValueError(f'A map of {shape[0]} x {shape[1]} cells is too small for sr_ratio={sr_ratio}: use a larger '
                         'image or a smaller sr_ratio in this stage.')


class Attention(AttentionBase):
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

    def __init__(self, dim: int, num_heads: int, sr_ratio: int = 1, norm_eps: float = 1e-6, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f'{dim} channels do not divide into {num_heads} heads: choose num_heads that divide {dim}.')
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = PatchProjection(dim, dim, sr_ratio, of_tokens=True)
            self.norm = nn.LayerNorm(dim, norm_eps)
        self.keeps_class_attention, self.class_attention = False, None

    def reduce(self, tokens: Tensor, shape: Tuple[int, int], num_extra: int, norm: Optional[nn.Module] = None) -> Tensor:
        """(B, E + H*W, C), normed by ``norm`` first -> (B, E + (H//sr)*(W//sr), C)."""
        if self.sr_ratio == 1:
            return tokens if norm is None else norm(tokens)
        check_sr_ratio(shape, self.sr_ratio)
        extra, cells = tokens[:, :num_extra], tokens[:, num_extra:]
        reduced = self.sr(cells.transpose(1, 2).unflatten(2, shape), before=norm, after=self.norm)[0]
        if not num_extra:
            return reduced
        return torch.cat([extra if norm is None else norm(extra), reduced], dim=1)

    def keys_values(self, tokens: Tensor, shape: Tuple[int, int], num_extra: int = 0,
                    norm: Optional[nn.Module] = None) -> Tuple[Tensor, Tensor]:
        """Keys and values, (B, heads, M, D) each."""
        key_value = self.kv(self.reduce(tokens, shape, num_extra, norm))
        key, value = key_value.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value

    def compiled_layers(self, shape: Tuple[int, int], num_extra: int) -> Optional[Dict[str, nn.Module]]:
        if self.keeps_class_attention or not compiled.is_plain(self, Attention):
            return None
        own, reduce, norm = self._modules, None, None  # quicker than attributes
        if self.sr_ratio > 1:
            reduce, norm = own['sr'], own['norm']
            if num_extra or min(shape) < self.sr_ratio or not compiled.is_plain(reduce, PatchProjection):
                return None
        return dict(query=own['q'], weights=None, proj=own['proj'], reduce=reduce, norm_keys=norm, memory=own['kv'])

    def attend(self, queries: Tensor, memory: Tuple[Tensor, Tensor], shape: Tuple[int, int], lengths: List[int],
               points: Optional[Tensor] = None) -> Tensor:
        """From packed queries (N, C) of images of these ``lengths`` to their keys and values."""
        query = self.q(queries).unflatten(-1, (self.num_heads, -1))
        if self.keeps_class_attention:
            # One row for each head; the other rows go through fused attention, which shows none.
            first = query.detach()[[0, *accumulate(lengths[:-1])]]
            self.class_attention = class_attention(first, memory[0].detach())
        return self.proj(packed_attention(query, *memory, lengths).flatten(1))

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
