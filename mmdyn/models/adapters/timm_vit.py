"""timm's plain vision transformers: ViT, DeiT, DeiT III, CLIP's and DINO's, with registers, layer scale and qk-norm."""

from torch import Tensor, nn

from .adapter import AdaptedStage, Adapter, Stem
from .parts import attend, drop, heads, project, weights


class TimmViT(Adapter):
    """timm's ``Block``."""

    block_types = ('timm.models.vision_transformer.Block',)
    part_types = dict(attn=('timm.layers.attention.Attention',))

    @classmethod
    def stages(cls, model: nn.Module) -> list[AdaptedStage]:
        stem = Stem([model.patch_embed], model.patch_embed.patch_size[0])
        return [AdaptedStage(list(model.blocks), model.embed_dim, stem, model.num_prefix_tokens)]

    @classmethod
    def embedding(cls, model: nn.Module) -> nn.Module:
        return model.patch_embed

    @classmethod
    def map_shape(cls, embedding: nn.Module, x: Tensor, output: Tensor) -> tuple[int, int]:
        return tuple(embedding.dynamic_feat_size(x.shape[-2:]))

    def encode(self, queries, tokens, shape, num_extra, lengths, routing):
        block = self.block
        attended = self.attend(block.norm1(queries), block.norm1(tokens), lengths)
        queries = queries + drop(block.drop_path1, block.ls1(attended), lengths)
        return queries + drop(block.drop_path2, block.ls2(block.mlp(block.norm2(queries))), lengths)

    def attend(self, queries: Tensor, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Attention of normed queries (N, C) to normed tokens (B, M, C)."""
        attn, width = self.block.attn, self.block.attn.qkv.out_features // 3
        query = attn.q_norm(project(attn.qkv, queries, 0, width).unflatten(-1, (attn.num_heads, -1)))
        key, value = heads(project(attn.qkv, tokens, width, 3 * width), attn.num_heads, 2)
        dropout = attn.attn_drop.p if attn.training else 0.0
        attended = attn.norm(attend(query, attn.k_norm(key), value, lengths, dropout))
        if getattr(attn, 'gate', None) is not None:
            attended = attended * attn.gate(queries).sigmoid()
        return attn.proj_drop(attn.proj(attended))

    def macs(self, shape, num_extra):
        qkv, keys = self.block.attn.qkv.weight, num_extra + shape[0] * shape[1]
        of_keys = 2 * qkv.numel() // 3
        return weights(self.block) - of_keys + 2 * keys * len(qkv) // 3, keys * of_keys
