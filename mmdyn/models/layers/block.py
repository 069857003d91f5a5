"""The vanilla encoder block: attention, then a feed-forward network."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...values import MOST, check_choice, check_integer, check_number
from ..tracing import image_of_each
from .macs import macs_of


class FFN(nn.Module):
    """Linear, GELU, linear.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the two layers.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        check_integer('dim', dim, 1, MOST, 'the channels')
        check_integer('hidden_dim', hidden_dim, 0, what='the channels between the two layers')
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def macs(self) -> int:
        """Multiply-adds of one query."""
        return macs_of(self.fc1) + macs_of(self.fc2)


def drop_path(x: Tensor, rate: float, lengths: list[int] | None = None) -> Tensor:
    """Stochastic depth: drop the branch of whole images, and scale up the others.

    Args:
        x: (B, n, C), or packed (N, C) with the ``lengths`` of the images.
        rate: probability to drop.
        lengths: queries of each image.
    """
    num = x.shape[0] if lengths is None else len(lengths)
    keep = torch.empty(num, device=x.device).bernoulli_(1 - rate) / (1 - rate)
    if lengths is not None:
        keep = keep[image_of_each(lengths, x.shape[0], x.device)]
    return x * keep.view(-1, *(1,) * (x.ndim - 1)).type_as(x)


class EncoderBlock(nn.Module):
    """Pre-norm encoder block on queries and tokens, which may be the same tensor.

    Args:
        dim: channels.
        attn: :class:`Attention`, or what has its ``uses_points``, ``forward`` and ``macs``.
        mlp_ratio: hidden channels of the feed-forward network, in multiples of ``dim``.
        drop_path_rate: probability to drop each of the two branches of an image in training.
        norm_eps: epsilon of the norms.
        residual_scale: factor of both branches.
        with_cp: recompute the block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        residual_scale: float = 1.0,
        with_cp: bool = False,
    ):
        super().__init__()
        check_integer('dim', dim, 1, MOST, 'the channels')
        check_number('mlp_ratio', mlp_ratio, '[0, 1000]', 'hidden channels in multiples of the others')
        check_number('drop_path_rate', drop_path_rate, '[0, 1)')
        check_number('norm_eps', norm_eps, '(0, inf)')
        check_number('residual_scale', residual_scale, '(0, inf)')
        check_choice('with_cp', with_cp, (True, False))
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.ffn = FFN(dim, int(dim * mlp_ratio))
        self.drop_path_rate, self.residual_scale, self.with_cp = drop_path_rate, residual_scale, with_cp

    @property
    def uses_points(self) -> bool:
        """Whether the places of the queries count, or the content of the tokens alone."""
        return self.attn.uses_points

    def extra_repr(self) -> str:
        return f'drop_path_rate={self.drop_path_rate:.4f}'

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        shape: tuple[int, int],
        num_extra: int = 0,
        lengths: list[int] | None = None,
        points: Tensor | None = None,
        **options,
    ) -> Tensor:
        """The queries after attention to the tokens and the feed-forward network; the dense block's are the tokens.

        Args:
            queries: (B, n, C), or packed (N, C) with the ``lengths`` of the images.
            tokens: (B, E + H*W, C), which keys and values come from.
            shape: (H, W).
            num_extra: E.
            lengths: queries of each image, where they are packed.
            points: (N, 2) places of the queries, x and y in cells, where ``uses_points``; the cells' own by default.
            options: more arguments of the attention layer.

        Returns:
            as ``queries``.
        """
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(
                self._forward, queries, tokens, shape, num_extra, lengths, points, use_reentrant=False, **options
            )
        return self._forward(queries, tokens, shape, num_extra, lengths, points, **options)

    def _forward(self, queries, tokens, shape, num_extra, lengths, points, **options) -> Tensor:
        normed = self.norm1(tokens)
        query = normed if queries is tokens else self.norm1(queries)
        queries = queries + self._branch(
            self.attn(query, normed, shape, num_extra, lengths, points, **options), lengths
        )
        return queries + self._branch(self.ffn(self.norm2(queries)), lengths)

    def _branch(self, x: Tensor, lengths: list[int] | None) -> Tensor:
        x = x if self.residual_scale == 1 else x * self.residual_scale
        return drop_path(x, self.drop_path_rate, lengths) if self.training and self.drop_path_rate else x

    def macs(self, shape: tuple[int, int], num_extra: int) -> tuple[int, int]:
        """Multiply-adds of one query (C^l of eq. 7), and those of an image that no query can save."""
        query, static = self.attn.macs(shape, num_extra)
        return query + self.ffn.macs(), static
