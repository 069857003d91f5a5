"""The vanilla encoder block: attention, then a feed-forward network."""
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..dge.grains import Grains
from ..native import encoder as compiled
from .base import AttentionBase
from .linear import Linear, add_into, by_pieces, by_pieces_of_rows


class FFN(nn.Module):
    """Linear, GELU, linear.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the two layers.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return by_pieces_of_rows(lambda rows: self.fc2(self.fc1(rows, gelu=True)), x, self.fc1.out_features)

    def macs(self) -> int:
        """Multiply-adds of one query."""
        return self.fc1.weight.numel() + self.fc2.weight.numel()


def drop_path(x: Tensor, rate: float, lengths: List[int]) -> Tensor:
    """Stochastic depth: drop the branch of whole images of these ``lengths``, packed (N, C), and scale up the others."""
    keep = torch.empty(len(lengths), device=x.device).bernoulli_(1 - rate) / (1 - rate)
    return x * keep.repeat_interleave(torch.tensor(lengths, device=x.device), output_size=len(x))[:, None].type_as(x)


class EncoderBlock(nn.Module):
    """Pre-norm encoder block on queries and tokens, which may be the same tensor.

    Args:
        dim: channels.
        attn: an :class:`~mmdyn.models.layers.base.AttentionBase`.
        mlp_ratio: hidden channels of the feed-forward network, in multiples of ``dim``.
        drop_path_rate: probability to drop each of the two branches of an image in training.
        norm_eps: epsilon of the norms.
        residual_scale: factor of both branches.
    """

    def __init__(self, dim: int, attn: AttentionBase, mlp_ratio: float, drop_path_rate: float = 0., norm_eps: float = 1e-6,
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
               num_extra: int = 0, points: Optional[Tensor] = None, into: Optional[Tensor] = None) -> Tensor:
        """What the block adds to its queries, attn + ffn.

        Args:
            queries: (B, n, C), or packed (N, C) with the ``lengths`` of the images.
            tokens: (B, E + H*W, C), which keys and values come from.
            shape: (H, W).
            num_extra: E.
            points: (n, 2) or (N, 2) places of the queries, x and y in cells, where the attention layer uses them.
            into: a tensor like ``queries``, or the queries themselves, that the change is added to in place.

        Returns:
            as ``queries``: the change, or ``into``.
        """
        packed, lengths, points = self.attn.pack(queries, shape, lengths, points)
        if self.training or not self.attn.runs_in_pieces(packed):
            normed = self.norm1(tokens)
            memory = self.attn.keys_values(normed, shape, num_extra)
            normed = normed.flatten(0, 1) if queries is tokens else self.norm1(packed)
            change = self._change(packed, normed, memory, shape, lengths, points).view_as(queries)
            return change if into is None else into.add_(change)
        memory = self.attn.keys_values(tokens, shape, num_extra, self.norm1)

        def run(rows, memory, *of_rows):
            return self._change(packed[rows], self.norm1(packed[rows]), memory, shape, *of_rows)

        return by_pieces(run, self.attn.pieces(packed, memory, lengths, points), len(packed),
                         None if into is None else into.view_as(packed)).view_as(queries)

    def job(self, tokens: Tensor, shape: Tuple[int, int], num_extra: int = 0,
            grains: Optional[Grains] = None) -> Optional[compiled.Job]:
        """The block by compiled code, in evaluation on a CPU: on all tokens, or on means of patches.

        Args:
            tokens: (B, E + H*W, C), or a tensor like them.
            shape: (H, W).
            num_extra: E.
            grains: the granularity of each region; all cells of a patch change alike.

        Returns:
            what :func:`~mmdyn.models.native.encoder.encode` takes, or None if it does not take the tokens or layers.
        """
        if self.training or not compiled.takes(tokens) or not compiled.is_plain(self, EncoderBlock):
            return None
        own = self._modules  # quicker than attributes
        attn, ffn = own['attn'], own['ffn']
        layers = attn.compiled_layers(shape, num_extra)
        if layers is None or not compiled.is_plain(ffn, FFN):
            return None
        layers = compiled.Layers(norm1=own['norm1'], norm2=own['norm2'], fc1=ffn._modules['fc1'],
                                 fc2=ffn._modules['fc2'], **layers)
        return compiled.prepare(layers, attn.num_heads, attn.num_points, self.residual_scale, tokens, shape, num_extra,
                                grains)

    def _change(self, queries: Tensor, normed: Tensor, memory: Sequence[Tensor], shape: Tuple[int, int],
                lengths: List[int], points: Optional[Tensor]) -> Tensor:
        """:meth:`change` of packed queries, with what they attend to at hand."""
        attended = self._scale(self.attn.attend(normed, memory, shape, lengths, points), lengths)
        return add_into(attended, self._scale(self.ffn(self.norm2(queries + attended)), lengths))

    def forward(self, tokens: Tensor, shape: Tuple[int, int], num_extra: int = 0, inplace: bool = False) -> Tensor:
        """The dense block: every token is a query. (B, E + H*W, C) -> the same, in the same memory if ``inplace``."""
        job = self.job(tokens, shape, num_extra)
        if job is not None:
            return compiled.encode([job], tokens if inplace else tokens.clone())
        if inplace:
            self.change(tokens, tokens, shape, None, num_extra, into=tokens)
            return tokens
        return add_into(self.change(tokens, tokens, shape, None, num_extra), tokens)

    def _scale(self, x: Tensor, lengths: List[int]) -> Tensor:
        x = x if self.residual_scale == 1 else x * self.residual_scale
        return drop_path(x, self.drop_path_rate, lengths) if self.training and self.drop_path_rate else x

    def macs(self, shape: Tuple[int, int], num_extra: int) -> Tuple[int, int]:
        """Multiply-adds of one query (C^l of eq. 7), and those of an image that no query can save."""
        query, static = self.attn.macs(shape, num_extra)
        return query + self.ffn.macs(), static
