"""timm's plain vision transformers with rotary position embeddings: EVA-02, DINOv3, ROPE-ViT and others of ``Eva``."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dge import Routing
from .parts import attend, drop, heads, project, weights
from .timm_vit import TimmViT


class TimmEva(TimmViT):
    """timm's ``EvaBlock``.

    A query's rotation is the mean of those of its cells. So its score with a key is the mean of the scores that its
    content would have at each of them.
    """

    block_types = ('timm.models.eva.EvaBlock',)
    part_types = dict(attn=('timm.models.eva.EvaAttention', 'timm.layers.attention.AttentionRope'))
    uses_routing = True

    def unpack(self, x, rope=None, **kwargs):
        tokens, shape, context = super().unpack(x, **kwargs)
        return tokens, shape, context if rope is None else dict(rope=rope)

    def encode(self, queries, tokens, shape, num_extra, lengths, routing, rope=None):
        block = self.block
        attended = self.attend(block.norm1(queries), block.norm1(tokens), num_extra, lengths, routing, rope)
        attended = attended if block.gamma_1 is None else block.gamma_1 * attended
        queries = queries + drop(block.drop_path1, attended, lengths)
        change = block.mlp(block.norm2(queries))
        return queries + drop(block.drop_path2, change if block.gamma_2 is None else block.gamma_2 * change, lengths)

    def attend(self, queries, tokens, num_extra, lengths, routing, rope):
        """Attention of normed queries (N, C) to normed tokens (B, M, C)."""
        attn = self.block.attn
        query, key, value = self.project(queries, tokens)
        query, key = attn.q_norm(query), attn.k_norm(key)
        if rope is not None:
            half, dtype = getattr(attn, 'rotate_half', False), value.dtype
            query = rotate(query, mean_rotations(rope, routing), half).to(dtype)
            key = torch.cat([key[:, :, :num_extra], rotate(key[:, :, num_extra:], rope, half)], dim=2).to(dtype)
        groups = attn.num_heads // key.shape[1]
        key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
        attended = attn.norm(attend(query, key, value, lengths, attn.attn_drop.p if attn.training else 0.0))
        if getattr(attn, 'gate', None) is not None:
            attended = attended * attn.gate(queries).sigmoid()
        return attn.proj_drop(attn.proj(attended))

    def project(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, heads, D), and keys and values (B, heads, M, D)."""
        attn = self.block.attn
        if attn.qkv is None:
            width = attn.q_proj.out_features // attn.num_heads
            key, value = (
                layer(tokens).unflatten(-1, (-1, width)).transpose(1, 2) for layer in (attn.k_proj, attn.v_proj)
            )
            return attn.q_proj(queries).unflatten(-1, (-1, width)), key, value
        width = attn.qkv.out_features // 3
        query, keys_values = project(attn.qkv, queries, 0, width), project(attn.qkv, tokens, width, 3 * width)
        if getattr(attn, 'q_bias', None) is not None:
            query, keys_values = query + attn.q_bias, keys_values + torch.cat([attn.k_bias, attn.v_bias])
        return query.unflatten(-1, (attn.num_heads, -1)), *heads(keys_values, attn.num_heads, 2)

    def macs(self, shape, num_extra):
        attn, keys = self.block.attn, num_extra + math.prod(shape)
        if attn.qkv is None:
            width, of_keys = attn.q_proj.out_features, weights(attn.k_proj) + weights(attn.v_proj)
        else:
            width, of_keys = attn.qkv.out_features // 3, 2 * weights(attn.qkv) // 3
        return weights(self.block) - of_keys + 2 * keys * width, keys * of_keys


def mean_rotations(rope: Tensor, routing: Routing) -> Tensor:
    """(H*W, 2 * D) or (heads, H*W, 2 * D) sines and cosines of cells -> (N, 1 or heads, 2 * D) of packed queries.

    Extra tokens are not rotated.
    """
    of_cells = rope[None] if rope.ndim == 2 else rope
    num_extra = routing.query.shape[1] - of_cells.shape[1]
    sine, cosine = of_cells.chunk(2, -1)
    of_tokens = torch.cat(
        [F.pad(sine, (0, 0, num_extra, 0)), F.pad(cosine, (0, 0, num_extra, 0), value=1.0)], dim=-1
    ).transpose(0, 1)
    return routing.compress(of_tokens.flatten(1)[None]).unflatten(-1, of_tokens.shape[1:])


def rotate(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """timm's rotation of (..., D) by sines and cosines (..., 2 * D)."""
    from timm.layers import apply_rot_embed_cat

    return apply_rot_embed_cat(x, rope, half=half)
