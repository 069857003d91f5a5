"""The vanilla encoder block: attention, then a feed-forward network."""
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class FFN(nn.Module):
    """Linear, GELU, linear.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the two layers.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))

    def macs(self) -> int:
        """Multiply-adds of one query."""
        return self.fc1.weight.numel() + self.fc2.weight.numel()


def drop_path(x: Tensor, rate: float, lengths: Optional[List[int]]) -> Tensor:
    """Stochastic depth: drop the branch of whole images, packed (N, C) or not (B, n, C), and scale up the others."""
    images = len(x) if lengths is None else len(lengths)
    keep = torch.empty(images, device=x.device).bernoulli_(1 - rate) / (1 - rate)
    if lengths is None:
        return x * keep[:, None, None].type_as(x)
    return x * keep.repeat_interleave(torch.tensor(lengths, device=x.device), output_size=len(x))[:, None].type_as(x)


class EncoderBlock(nn.Module):
    """Pre-norm encoder block on queries and tokens, which may be the same tensor.

    Args:
        dim: channels.
        attn: an attention layer that takes (queries, tokens, shape, lengths, num_extra, points).
        mlp_ratio: hidden channels of the feed-forward network, in multiples of ``dim``.
        drop_path_rate: probability to drop each of the two branches of an image in training.
        norm_eps: epsilon of the norms.
        residual_scale: factor of both branches.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path_rate: float = 0., norm_eps: float = 1e-6,
                 residual_scale: float = 1.):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.ffn = FFN(dim, int(dim * mlp_ratio))
        self.drop_path_rate, self.residual_scale = drop_path_rate, residual_scale

    @property
    def uses_points(self) -> bool:
        return self.attn.uses_points

    def extra_repr(self) -> str:
        return f'drop_path_rate={self.drop_path_rate:.4f}'

    def change(self, queries: Tensor, tokens: Tensor, shape: Tuple[int, int], lengths: Optional[List[int]] = None,
               num_extra: int = 0, points: Optional[Tensor] = None) -> Tensor:
        """What the block adds to its queries, attn + ffn.

        Args:
            queries: (B, n, C), or packed (N, C) with the ``lengths`` of the images.
            tokens: (B, E + H*W, C), which keys and values come from.
            shape: (H, W).
            num_extra: E.
            points: (n, 2) or (N, 2) places of the queries, x and y in cells, where the attention layer uses them.

        Returns:
            as ``queries``.
        """
        normed = self.norm1(tokens)
        queries_normed = normed if queries is tokens else self.norm1(queries)
        attended = self._scale(self.attn(queries_normed, normed, shape, lengths, num_extra, points), lengths)
        return attended + self._scale(self.ffn(self.norm2(queries + attended)), lengths)

    def forward(self, tokens: Tensor, shape: Tuple[int, int], num_extra: int = 0) -> Tensor:
        """The dense block: every token is a query. (B, E + H*W, C) -> the same."""
        return tokens + self.change(tokens, tokens, shape, None, num_extra)

    def _scale(self, x: Tensor, lengths: Optional[List[int]]) -> Tensor:
        x = x if self.residual_scale == 1 else x * self.residual_scale
        return drop_path(x, self.drop_path_rate, lengths) if self.training and self.drop_path_rate else x

    def macs(self, shape: Tuple[int, int], num_extra: int) -> Tuple[int, int]:
        """Multiply-adds of one query (C^l of eq. 7), and those of an image that no query can save."""
        query, static = self.attn.macs(shape, num_extra)
        return query + self.ffn.macs(), static
