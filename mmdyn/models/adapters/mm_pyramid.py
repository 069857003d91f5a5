"""mmdet's PVT and PVTv2, and mmseg's MixVisionTransformer (SegFormer)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import AdaptedStage, Adapter, Stem
from .parts import attend, convolution, convolve, drop, heads, maps, pointwise, weights


class MMPyramid(Adapter):
    """mmdet's ``PVTEncoderLayer``."""

    block_types = ('mmdet.models.backbones.pvt.PVTEncoderLayer',)
    part_types = {
        'attn': ('mmdet.models.backbones.pvt.SpatialReductionAttention',),
        'attn.attn': ('torch.nn.modules.activation.MultiheadAttention',),
        'ffn': ('mmdet.models.backbones.pvt.MixFFN',),
    }
    uses_routing = True

    @classmethod
    def stages(cls, model: nn.Module) -> list[AdaptedStage]:
        return [
            AdaptedStage(
                [block for block in blocks if hasattr(block, 'attn')],  # the first may be a position embedding
                embedding.projection.out_channels,
                Stem([embedding], embedding.projection.stride[0]),
            )
            for embedding, blocks, _ in model.layers
        ]

    def unpack(self, x, hw_shape):
        return x, tuple(hw_shape), {}

    def encode(self, queries, tokens, shape, num_extra, lengths, routing):
        block, attn, ffn = self.block, self.block.attn, self.block.ffn
        attended = attn.proj_drop(self.attend(block.norm1(queries), block.norm1(tokens), shape, lengths))
        queries = queries + drop(attn.dropout_layer, attended, lengths)
        hidden = block.norm2(queries)
        for layer in ffn.layers:  # convolutions of one cell, dropout, activation, and maybe a convolution of the map
            if not isinstance(layer, nn.Conv2d):
                hidden = layer(hidden)
            elif layer.kernel_size == (1, 1):
                hidden = pointwise(layer, hidden)
            else:
                hidden = convolve(layer, hidden, shape, routing)
        return queries + drop(ffn.dropout_layer, hidden, lengths)

    def attend(self, queries: Tensor, tokens: Tensor, shape: tuple[int, int], lengths: list[int]) -> Tensor:
        """Attention of normed queries (N, C) to normed tokens (B, H*W, C), whose map is reduced."""
        attn, inner, width = self.block.attn, self.block.attn.attn, self.block.attn.attn.embed_dim
        if attn.sr_ratio > 1:
            tokens = attn.norm(convolution(attn.sr, maps(tokens, shape)).flatten(2).transpose(1, 2))
        weight, bias = inner.in_proj_weight, inner.in_proj_bias
        of_query, of_keys = (None, None) if bias is None else (bias[:width], bias[width:])
        query = F.linear(queries, weight[:width], of_query).unflatten(-1, (inner.num_heads, -1))
        key, value = heads(F.linear(tokens, weight[width:], of_keys), inner.num_heads, 2)
        return inner.out_proj(attend(query, key, value, lengths, inner.dropout if inner.training else 0.0))

    def macs(self, shape, num_extra):
        attn, width = self.block.attn, self.block.attn.attn.embed_dim
        keys = math.prod(side // attn.sr_ratio for side in shape)
        convolutions = [layer for layer in self.block.ffn.layers if isinstance(layer, nn.Conv2d)]
        of_map = sum(weights(layer) for layer in convolutions if layer.kernel_size != (1, 1))
        query = 2 * width**2 + 2 * keys * width + sum(map(weights, convolutions)) - of_map
        static = keys * (2 * width**2 + (weights(attn.sr) if attn.sr_ratio > 1 else 0))
        return query, static + math.prod(shape) * of_map


class MiT(MMPyramid):
    """mmseg's ``TransformerEncoderLayer`` of SegFormer."""

    block_types = ('mmseg.models.backbones.mit.TransformerEncoderLayer',)
    part_types = {
        **MMPyramid.part_types,
        'attn': ('mmseg.models.backbones.mit.EfficientMultiheadAttention',),
        'ffn': ('mmseg.models.backbones.mit.MixFFN',),
    }
