"""DeiT, a plain vision transformer, with and without DGE."""
from typing import List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from torch import Tensor

from ...registry import MODELS
from ..layers import Attention, EncoderBlock, PatchEmbed, position_embedding, resize_position_embedding
from .base import (OUT_TYPES, DynamicBackbone, choose_arch, choose_out_indices, dge_of_stages, image_sides, make_blocks)

ARCHS = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3, mlp_ratio=4),
    'small': dict(embed_dim=384, depth=12, num_heads=6, mlp_ratio=4),
    'base': dict(embed_dim=768, depth=12, num_heads=12, mlp_ratio=4),
}


@MODELS.register_module()
class DeiT(DynamicBackbone):
    """`DeiT <https://arxiv.org/abs/2012.12877>`_ and DeiT+DGE for classification, and as a plain feature extractor.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict of ``embed_dim, depth, num_heads, mlp_ratio``.
        img_size: side of the images, or (height, width), that position embeddings are made for. They resize to images
            of any size.
        in_channels: channels of the images.
        patch_size: side of the patches.
        distilled: add a distillation token; ``'cls_token'`` then returns (class token, distillation token), as
            mmpretrain's ``DeiTClsHead`` takes them.
        dge: None for the dense model, or a dict of the options of
            :class:`~mmdyn.models.dge.DynamicGrainedEncoder`, e.g. ``dict(granularities=(1, 2, 4))``.
        out_type: what to return of each block in ``out_indices``: ``'cls_token'`` (B, C), ``'featmap'`` (B, C, h, w),
            ``'avg_featmap'`` (B, C), the mean of the map, or ``'raw'`` (B, E + h*w, C), all tokens.
        out_indices: blocks to return. Defaults to the last. Only the last block's output is normed.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        frozen_stages: -1 freezes nothing, 0 the embeddings, n > 0 also the first n blocks.
        with_cp: recompute the blocks in the backward pass.
        interpolate_mode: how position embeddings are resized.
        norm_eps: epsilon of all norms.
        init_cfg: initialisation; a ``Pretrained`` checkpoint may be of the dense or the dynamic model.
    """

    def __init__(self,
                 arch: Union[str, dict] = 'small',
                 img_size: Union[int, Sequence[int]] = 256,
                 in_channels: int = 3,
                 patch_size: int = 16,
                 distilled: bool = False,
                 dge: Optional[dict] = None,
                 out_type: str = 'cls_token',
                 out_indices: Union[int, Sequence[int], None] = None,
                 drop_path_rate: float = 0.,
                 frozen_stages: int = -1,
                 with_cp: bool = False,
                 interpolate_mode: str = 'bilinear',
                 norm_eps: float = 1e-6,
                 init_cfg: Union[dict, List[dict], None] = None):
        super().__init__(frozen_stages, with_cp, interpolate_mode, init_cfg)
        arch = choose_arch(arch, ARCHS)
        dim, depth = arch['embed_dim'], arch['depth']
        if out_type not in OUT_TYPES:
            raise ValueError(f'out_type={out_type!r}: choose from {OUT_TYPES}.')
        if not -1 <= frozen_stages <= depth:
            raise ValueError(f'frozen_stages={frozen_stages}: choose from -1 (none) to {depth}, the number of blocks.')
        self.out_type = out_type
        self.out_indices = choose_out_indices(out_indices, depth, [depth - 1])
        height, width = image_sides(img_size, patch_size)
        self.shape = height // patch_size, width // patch_size
        self.num_extra = 1 + distilled

        self.patch_embed = PatchEmbed(in_channels, dim, patch_size, norm=False)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        if distilled:
            self.dist_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = position_embedding(self.num_extra, self.shape, dim)
        blocks = [
            EncoderBlock(dim, Attention(dim, arch['num_heads']), arch['mlp_ratio'], rate, norm_eps)
            for rate in torch.linspace(0, drop_path_rate, depth).tolist()
        ]
        make_blocks(self, blocks, dim, dge_of_stages(dge, 1)[0], with_cp)
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.freeze()

    @property
    def stage_shapes(self) -> List[Tuple[int, int]]:
        """(h, w) of the map on images of ``img_size``."""
        return [self.shape]

    @property
    def out_channels(self) -> List[int]:
        return [self.pos_embed.shape[2]] * len(self.out_indices)

    def named_stages(self):
        yield self, ''

    def frozen_modules(self):
        if self.frozen_stages >= 0:
            yield from (self.patch_embed, self.pos_embed, self.cls_token)
            if self.num_extra > 1:
                yield self.dist_token
        yield from self.blocks[:max(self.frozen_stages, 0)]
        yield from self.dge[:max(self.frozen_stages, 0)]
        if self.frozen_stages == len(self.blocks):
            yield self.norm

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """(B, 3, H, W) images -> the outputs that ``out_type`` and ``out_indices`` name."""
        tokens, shape = self.patch_embed(x)
        extra = [self.cls_token, self.dist_token] if self.num_extra > 1 else [self.cls_token]
        tokens = torch.cat([*(t.expand(len(x), -1, -1).type_as(tokens) for t in extra), tokens], dim=1)
        tokens = tokens + resize_position_embedding(self.pos_embed, self.shape, shape, self.num_extra,
                                                    self.interpolate_mode)
        outs = []
        for i in range(len(self.blocks)):
            tokens = self.run_block(self, i, tokens, shape)
            if i in self.out_indices:
                outs.append(self._format(self.norm(tokens) if i == len(self.blocks) - 1 else tokens, shape))
        self.account(len(x), [shape])
        return tuple(outs)

    def _format(self, tokens: Tensor, shape: Tuple[int, int]):
        cells = tokens[:, self.num_extra:]
        if self.out_type == 'cls_token':
            return (tokens[:, 0], tokens[:, 1]) if self.num_extra > 1 else tokens[:, 0]
        if self.out_type == 'featmap':
            return cells.transpose(1, 2).unflatten(2, shape).contiguous()
        return cells.mean(1) if self.out_type == 'avg_featmap' else tokens
