"""Feature reuse: what the coarse stage found out goes into the fine tokens (CF-ViT paper, figure 4)."""

from torch import Tensor, nn

from ...values import MOST, check_choice, check_integer, check_number
from ..layers import FFN, macs_of

KINDS = ('mlp', 'linear')


class FeatureReuse(nn.Module):
    """A norm and an MLP on the coarse stage's output tokens.

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the MLP in multiples of ``dim``.
        kind: ``'mlp'``, or ``'linear'`` for one linear layer (table 5).
        norm_eps: epsilon of the norm.
    """

    def __init__(self, dim: int, mlp_ratio: float, kind: str = 'mlp', norm_eps: float = 1e-6):
        super().__init__()
        check_integer('dim', dim, 1, MOST, 'the channels')
        check_number('mlp_ratio', mlp_ratio, '[0, 1000]', 'hidden channels in multiples of the others')
        check_choice('kind', kind, KINDS)
        check_number('norm_eps', norm_eps, '(0, inf)')
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.mlp = FFN(dim, int(dim * mlp_ratio)) if kind == 'mlp' else nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, C)."""
        return self.mlp(self.norm(tokens))

    def macs(self) -> int:
        """Multiply-adds of one token."""
        return self.mlp.macs() if isinstance(self.mlp, FFN) else macs_of(self.mlp)
