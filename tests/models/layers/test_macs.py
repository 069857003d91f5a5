import pytest
import torch
from torch import nn

from mmdyn.models.layers import EncoderBlock, macs_of
from mmdyn.models.layers.attention import Attention


class Adapter(nn.Module):
    """A low-rank addition to a layer."""

    def __init__(self, layer, rank=3):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    'layer, expected',
    [
        (nn.Linear(6, 10), 60),
        (nn.Linear(6, 10, bias=False), 60),
        (nn.Conv2d(6, 10, 2), 240),
        (Adapter(nn.Linear(6, 10)), 60 + 6 * 3 + 3 * 10),
        (torch.ao.nn.quantized.dynamic.Linear(6, 10), 60),
    ],
)
def test_multiply_adds_by_hand(layer, expected):
    assert macs_of(layer) == expected


def test_what_adapters_add_to_a_block():
    """Rows of 12 channels and 24 hidden ones; a map of 2 x 3 cells has 6 keys."""
    block = EncoderBlock(12, Attention(12, 2), 2)
    query, static = block.macs((2, 3), 0)
    block.ffn.fc1, block.attn.q, block.attn.kv = map(Adapter, (block.ffn.fc1, block.attn.q, block.attn.kv))
    assert block.macs((2, 3), 0) == (query + 3 * (12 + 24) + 3 * (12 + 12), static + 6 * 3 * (12 + 24))
