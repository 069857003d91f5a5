"""timm's PVTv2, whose feed-forward networks convolve the map."""

import math

from torch import Tensor, nn

from .adapter import AdaptedStage, Adapter, Stem
from .parts import attend, convolution, convolve, drop, heads, maps, weights


class TimmPVT(Adapter):
    """timm's ``pvt_v2.Block``."""

    block_types = ('timm.models.pvt_v2.Block',)
    part_types = dict(attn=('timm.models.pvt_v2.Attention',), mlp=('timm.models.pvt_v2.MlpWithDepthwiseConv',))
    uses_routing = True

    @classmethod
    def stages(cls, model: nn.Module) -> list[AdaptedStage]:
        embeddings = [model.patch_embed, *(stage.downsample for stage in list(model.stages)[1:])]
        return [
            AdaptedStage(list(stage.blocks), embedding.proj.out_channels, Stem([embedding], embedding.proj.stride[0]))
            for stage, embedding in zip(model.stages, embeddings)
        ]

    def unpack(self, x, feat_size):
        return x, tuple(feat_size), {}

    def encode(self, queries, tokens, shape, num_extra, lengths, routing):
        block = self.block
        attended = self.attend(block.norm1(queries), block.norm1(tokens), shape, lengths)
        queries = queries + drop(block.drop_path1, attended, lengths)
        mlp = block.mlp
        hidden = convolve(mlp.dwconv, mlp.relu(mlp.fc1(block.norm2(queries))), shape, routing)
        return queries + drop(block.drop_path2, mlp.drop(mlp.fc2(mlp.drop(mlp.act(hidden)))), lengths)

    def attend(self, queries: Tensor, tokens: Tensor, shape: tuple[int, int], lengths: list[int]) -> Tensor:
        """Attention of normed queries (N, C) to normed tokens (B, H*W, C), whose map is reduced."""
        attn = self.block.attn
        if attn.sr is not None:
            cells = maps(tokens, shape)
            reduced = convolution(attn.sr, cells if attn.pool is None else attn.pool(cells))
            tokens = attn.norm(reduced.flatten(2).transpose(1, 2))
            tokens = tokens if attn.act is None else attn.act(tokens)
        query = attn.q(queries).unflatten(-1, (attn.num_heads, -1))
        key, value = heads(attn.kv(tokens), attn.num_heads, 2)
        return attn.proj_drop(attn.proj(attend(query, key, value, lengths, attn.attn_drop.p if attn.training else 0.0)))

    def macs(self, shape, num_extra):
        attn, mlp = self.block.attn, self.block.mlp
        keys = math.prod(shape)
        if attn.pool is not None:
            keys = attn.pool.output_size**2
        elif attn.sr is not None:
            keys = math.prod(side // attn.sr.stride[0] for side in shape)
        query = sum(map(weights, (attn.q, attn.proj, mlp.fc1, mlp.fc2))) + 2 * keys * attn.q.out_features
        static = keys * (weights(attn.kv) + (0 if attn.sr is None else weights(attn.sr)))
        return query, static + math.prod(shape) * weights(mlp.dwconv)
