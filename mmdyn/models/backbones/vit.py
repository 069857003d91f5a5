"""Plain vision transformers: the class token and all patches of an image through one stack of blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...values import check_choice
from ..layers import (
    Attention,
    ConvStem,
    EncoderBlock,
    PatchEmbed,
    position_embedding,
    resize_position_embedding,
    to_maps,
)
from ..stage import run_blocks
from .base import DynamicBackbone, check_sides, make_blocks
from .options import (
    OUT_TYPES,
    budget_of,
    check_frozen_stages,
    check_parts,
    choose_arch,
    choose_out_indices,
    dge_of_stages,
    image_sides,
)

DEIT = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3, mlp_ratio=4),
    'small': dict(embed_dim=384, depth=12, num_heads=6, mlp_ratio=4),
    'base': dict(embed_dim=768, depth=12, num_heads=12, mlp_ratio=4),
}
LVVIT = {
    'small': dict(embed_dim=384, depth=16, num_heads=6, mlp_ratio=3),
    'medium': dict(embed_dim=512, depth=20, num_heads=8, mlp_ratio=3),
}


class PlainViT(DynamicBackbone):
    """Base of DeiT, LV-ViT and CF-ViT; see DeiT for the arguments that they share.

    Args:
        family: ``'deit'``, or ``'lvvit'`` for a convolutional stem, queries, keys and values without bias, and branches
            divided by 2.
    """

    families = {
        'deit': dict(archs=DEIT, qkv_bias=True, residual_scale=1.0, norm_eps=1e-6),
        'lvvit': dict(archs=LVVIT, qkv_bias=False, residual_scale=0.5, norm_eps=1e-5),
    }

    def __init__(
        self,
        family: str,
        arch: str | dict,
        img_size: int | Sequence[int],
        in_channels: int = 3,
        patch_size: int = 16,
        distilled: bool = False,
        dge: dict | None = None,
        out_type: str = 'cls_token',
        out_indices: int | Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        interpolate_mode: str = 'bilinear',
        norm_eps: float | None = None,
        init_cfg: dict | list[dict] | None = None,
    ):
        kind = self.families[family]
        norm_eps = kind['norm_eps'] if norm_eps is None else norm_eps
        check_parts(in_channels, patch_size, drop_path_rate, with_cp, interpolate_mode, init_cfg, norm_eps=norm_eps)
        check_choice('distilled', distilled, (True, False))
        super().__init__(frozen_stages, interpolate_mode, init_cfg)
        arch = choose_arch(arch, kind['archs'])
        dim, depth = arch['embed_dim'], arch['depth']
        check_choice('out_type', out_type, OUT_TYPES)
        check_frozen_stages(frozen_stages, depth, ', the number of blocks')
        self.out_type = out_type
        self.out_indices = choose_out_indices(out_indices, depth, [depth - 1])
        height, width = image_sides(img_size, patch_size)
        self.shape = height // patch_size, width // patch_size
        self.num_extra = 1 + int(distilled)

        self.patch_embed = (
            ConvStem(in_channels, dim, patch_size)
            if family == 'lvvit'
            else PatchEmbed(in_channels, dim, patch_size, norm=False)
        )
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        if distilled:
            self.dist_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = position_embedding(self.num_extra, self.shape, dim)
        blocks = [
            EncoderBlock(
                dim,
                Attention(dim, arch['num_heads'], qkv_bias=kind['qkv_bias']),
                arch['mlp_ratio'],
                rate,
                norm_eps,
                kind['residual_scale'],
                with_cp,
            )
            for rate in torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()
        ]
        make_blocks(self, blocks, dim, dge_of_stages(dge, {'': depth})[0])
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.freeze()
        self.show_images()
        self.set_budget(**budget_of(dge))

    @property
    def stage_shapes(self) -> list[tuple[int, int]]:
        """(h, w) of the map on images of ``img_size``."""
        return [self.shape]

    @property
    def out_channels(self) -> list[int]:
        return [self.pos_embed.shape[2]] * len(self.out_indices)

    def named_stages(self):
        yield self, ''

    def frozen_modules(self):
        if self.frozen_stages >= 0:
            yield from (self.patch_embed, self.pos_embed, self.cls_token)
            if self.num_extra > 1:
                yield self.dist_token
        yield from self.blocks[: max(self.frozen_stages, 0)]
        yield from filter(None, self.dge[: max(self.frozen_stages, 0)])
        if self.frozen_stages == len(self.blocks):
            yield self.norm

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, 3, H, W) images -> (B, E + h*w, C) tokens with their position embedding, and (h, w) of the map."""
        tokens, shape = self.patch_embed(x)
        extra = [self.cls_token, self.dist_token] if self.num_extra > 1 else [self.cls_token]
        tokens = torch.cat([*(t.expand(x.shape[0], -1, -1).type_as(tokens) for t in extra), tokens], dim=1)
        return tokens + resize_position_embedding(
            self.pos_embed, self.shape, shape, self.num_extra, self.interpolate_mode
        ), shape

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) images -> the outputs that ``out_type`` and ``out_indices`` name."""
        check_sides(self, x.shape)
        tokens, shape = self.embed(x)
        outs, start, last = [], 0, len(self.blocks) - 1
        for i in sorted({*self.out_indices, last}):
            # Outputs may share the memory of tokens, which run_blocks may overwrite.
            tokens, start = run_blocks(self, tokens.clone() if outs else tokens, shape, start, i + 1), i + 1
            if i in self.out_indices:
                outs.append(self._format(self.norm(tokens) if i == last else tokens, shape))
        self.account(x.shape[0], [shape])
        return tuple(outs)

    def _format(self, tokens: Tensor, shape: tuple[int, int]):
        cells = tokens[:, self.num_extra :]
        if self.out_type == 'cls_token':
            return (tokens[:, 0], tokens[:, 1]) if self.num_extra > 1 else tokens[:, 0]
        if self.out_type == 'featmap':
            return to_maps(cells, shape)
        return cells.mean(1) if self.out_type == 'avg_featmap' else tokens
