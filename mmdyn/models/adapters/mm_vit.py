"""mmpretrain's plain vision transformers: VisionTransformer, DistilledVisionTransformer and DeiT3."""

from torch import Tensor, nn

from .adapter import AdaptedStage, Adapter, Stem, name_of
from .parts import attend, drop, heads, project, weights

OF_DEIT3 = 'mmpretrain.models.backbones.deit3.DeiT3TransformerEncoderLayer'


class MMViT(Adapter):
    """mmpretrain's ``TransformerEncoderLayer`` and ``DeiT3TransformerEncoderLayer``."""

    block_types = ('mmpretrain.models.backbones.vision_transformer.TransformerEncoderLayer', OF_DEIT3)
    part_types = dict(attn=('mmpretrain.models.utils.attention.MultiheadAttention',))

    @classmethod
    def stages(cls, model: nn.Module) -> list[AdaptedStage]:
        stem = Stem([model.patch_embed], model.patch_embed.projection.stride[0])
        return [AdaptedStage(list(model.layers), model.embed_dims, stem, model.num_extra_tokens)]

    @classmethod
    def embedding(cls, model: nn.Module) -> nn.Module:
        return model.patch_embed

    @classmethod
    def map_shape(cls, embedding: nn.Module, x: Tensor, output: tuple) -> tuple[int, int]:
        return tuple(output[1])

    def encode(self, queries, tokens, shape, num_extra, lengths, routing):
        block, attn, ffn = self.block, self.block.attn, self.block.ffn
        width = attn.embed_dims
        query = project(attn.qkv, block.ln1(queries), 0, width).unflatten(-1, (attn.num_heads, -1))
        key, value = heads(project(attn.qkv, block.ln1(tokens), width, 3 * width), attn.num_heads, 2)
        attended = attend(query, key, value, lengths, attn.attn_drop if attn.training else 0.0)
        queries = queries + drop(attn.out_drop, attn.gamma1(attn.proj_drop(attn.proj(attended))), lengths)
        is_deit3 = name_of(type(block)) == OF_DEIT3  # mmpretrain's norms twice with ln1
        normed = (block.ln1 if is_deit3 else block.ln2)(queries)
        if not hasattr(ffn, 'layers'):  # a gated one, which has no stochastic depth
            return ffn(normed, identity=queries)
        return queries + drop(ffn.dropout_layer, ffn.gamma2(ffn.layers(normed)), lengths)

    def macs(self, shape, num_extra):
        qkv, keys = self.block.attn.qkv.weight, num_extra + shape[0] * shape[1]
        of_keys = 2 * qkv.numel() // 3
        return weights(self.block) - of_keys + 2 * keys * len(qkv) // 3, keys * of_keys
