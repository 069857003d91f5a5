"""Pyramid Vision Transformer, with and without DGE."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...registry import MODELS
from ...values import check_choice
from ..layers import (
    Attention,
    EncoderBlock,
    PatchEmbed,
    Positions,
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

_COMMON = dict(embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), sr_ratios=(8, 4, 2, 1))
ARCHS = {
    'tiny': dict(depths=(2, 2, 2, 2), **_COMMON),
    'small': dict(depths=(3, 4, 6, 3), **_COMMON),
    'medium': dict(depths=(3, 4, 18, 3), **_COMMON),
    'large': dict(depths=(3, 8, 27, 3), **_COMMON),
}


class PVTStage(nn.Module):
    """Patch embedding, position embedding and the blocks of one resolution.

    Args:
        in_channels, dim: channels before and after the patch embedding.
        patch_size: its stride.
        shape: (h, w) that the position embedding is made for.
        blocks: the encoder blocks.
        num_extra: 1 if a class token is put in front of the tokens.
        dge: options of a DGE wrapper for each block and indices of the ``dense_layers``, or None.
        norm_eps: epsilon of the norm behind the patch embedding.
        of_tokens: whether another stage is before this one, and not the image.
        mode: how the position embedding is resized.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: int,
        shape: tuple[int, int],
        blocks: list[EncoderBlock],
        num_extra: int,
        dge: dict | None,
        norm_eps: float,
        of_tokens: bool,
        mode: str,
    ):
        super().__init__()
        self.num_extra, self.shape, self.mode = num_extra, shape, mode
        self.patch_embed = PatchEmbed(in_channels, dim, patch_size, norm_eps=norm_eps, of_tokens=of_tokens)
        self.pos_embed = position_embedding(num_extra, shape, dim)
        make_blocks(self, blocks, dim, dge)

    def embed(self, x: Tensor, cls_token: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """(B, C_in, H, W) -> (B, E + h*w, C) tokens with their position embedding, and (h, w)."""
        if not self.num_extra:
            return self.patch_embed(x, Positions(self.pos_embed, self.shape, self.mode))
        tokens, shape = self.patch_embed(x)
        tokens = torch.cat([cls_token.expand(tokens.shape[0], -1, -1).type_as(tokens), tokens], dim=1)
        return tokens + resize_position_embedding(self.pos_embed, self.shape, shape, self.num_extra, self.mode), shape

    def forward(self, x: Tensor, cls_token: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """(B, C_in, H, W) -> (B, E + h*w, C) tokens behind the last block, and (h, w)."""
        tokens, shape = self.embed(x, cls_token)
        return run_blocks(self, tokens, shape), shape


@MODELS.register_module()
class PVT(DynamicBackbone):
    """`PVT <https://arxiv.org/abs/2102.12122>`_ and PVT+DGE for classification and dense prediction.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``, or a dict of ``embed_dims, depths, num_heads,
            mlp_ratios, sr_ratios`` with one number for each stage.
        img_size: side of the images, or (height, width), that position embeddings are made for. They resize to images
            of any size.
        in_channels: channels of the images.
        patch_size: stride of the first stage; the others halve the resolution.
        dge: None for the dense model, or a dict of the options of
            :class:`~mmdyn.models.dge.DynamicGrainedEncoder`, e.g. ``dict(granularities=(1, 2, 4))``. ``test_budget``,
            ``budget_mode`` and ``prices`` set a budget for inference, see
            :meth:`~mmdyn.models.backbones.base.DynamicStages.set_budget`.
            ``dense_layers=('stages.0', 'stages.1.blocks.0')`` names those that stay dense.
        out_type: ``'featmap'`` returns the (B, C, h, w) maps of the stages ``out_indices``. The others add a final
            norm and return the last stage's class token (B, C) for ``'cls_token'``, mean (B, C) of all its tokens for
            ``'avg_featmap'``, or tokens (B, E + h*w, C) for ``'raw'``.
        with_cls_token: whether the last stage has a class token, which maps leave out. Defaults to having one for
            ``'cls_token'`` and ``'raw'``. For ``'featmap'`` the authors of DGE keep it, those of PVT do not.
        out_indices: stages to return. Defaults to all for ``'featmap'``, otherwise to the last, the only one allowed.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        frozen_stages: -1 freezes nothing, 0 the first patch and position embedding, n > 0 also the first n stages.
        with_cp: recompute the blocks in the backward pass.
        interpolate_mode: how position embeddings are resized.
        norm_eps: epsilon of the blocks' norms and of the final one.
        embed_norm_eps: epsilon of the norms behind the patch embeddings and the spatial reductions: 1e-5 as the authors
            of PVT and of DGE have it, 1e-6 in mmdet's PVT.
        init_cfg: initialisation; a ``Pretrained`` checkpoint may be of the dense or the dynamic model, of other sizes
            of images, and have a class token or not.
    """

    archs: dict[str, dict] = ARCHS

    def __init__(
        self,
        arch: str | dict = 'small',
        img_size: int | Sequence[int] = 256,
        in_channels: int = 3,
        patch_size: int = 4,
        dge: dict | None = None,
        out_type: str = 'featmap',
        out_indices: int | Sequence[int] | None = None,
        with_cls_token: bool | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        interpolate_mode: str = 'bilinear',
        norm_eps: float = 1e-6,
        embed_norm_eps: float = 1e-5,
        init_cfg: dict | list[dict] | None = None,
    ):
        check_parts(
            in_channels,
            patch_size,
            drop_path_rate,
            with_cp,
            interpolate_mode,
            init_cfg,
            norm_eps=norm_eps,
            embed_norm_eps=embed_norm_eps,
        )
        super().__init__(frozen_stages, interpolate_mode, init_cfg)
        arch = choose_arch(arch, self.archs)
        num_stages = len(arch['depths'])
        if any(len(numbers) != num_stages for numbers in arch.values()):
            raise ValueError(f'arch={arch} must have as many numbers for each key: one for each stage.')
        check_choice('out_type', out_type, OUT_TYPES)
        check_choice('with_cls_token', with_cls_token, (True, False, None))
        last = num_stages - 1
        self.out_type = out_type
        self.out_indices = choose_out_indices(
            out_indices, num_stages, range(num_stages) if out_type == 'featmap' else [last]
        )
        if out_type != 'featmap' and self.out_indices != [last]:
            raise ValueError(
                f'out_type={out_type!r} returns the last stage only, but out_indices={out_indices}: leave '
                "it out, or use out_type='featmap'."
            )
        with_cls_token = out_type in ('cls_token', 'raw') if with_cls_token is None else with_cls_token
        if out_type == 'cls_token' and not with_cls_token:
            raise ValueError(
                "out_type='cls_token' returns the class token, but with_cls_token=False: leave one of them out."
            )
        check_frozen_stages(frozen_stages, num_stages)

        height, width = image_sides(img_size, patch_size * 2**last)
        rates = torch.linspace(0, drop_path_rate, sum(arch['depths']), device='cpu').tolist()
        dims = in_channels, *arch['embed_dims']
        dges = dge_of_stages(dge, {f'stages.{i}.': depth for i, depth in enumerate(arch['depths'])})
        self.stages = nn.ModuleList()
        for i, depth in enumerate(arch['depths']):
            dim, stride = dims[i + 1], patch_size * 2**i
            of_stage = {name: numbers[i] for name, numbers in arch.items()}
            blocks = [
                EncoderBlock(
                    dim,
                    self.make_attention(of_stage, embed_norm_eps),
                    arch['mlp_ratios'][i],
                    rates.pop(0),
                    norm_eps,
                    with_cp=with_cp,
                )
                for _ in range(depth)
            ]
            self.stages.append(
                PVTStage(
                    dims[i],
                    dim,
                    2 if i else patch_size,
                    (height // stride, width // stride),
                    blocks,
                    int(i == last and with_cls_token),
                    dges[i],
                    embed_norm_eps,
                    i > 0,
                    interpolate_mode,
                )
            )
        if self.stages[-1].num_extra:
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dims[-1]), std=0.02))
        if out_type != 'featmap':
            self.norm = nn.LayerNorm(dims[-1], norm_eps)
        self.freeze()
        self.show_images()
        self.set_budget(**budget_of(dge))

    def make_attention(self, stage: dict, norm_eps: float) -> nn.Module:
        """The attention layer of a block, from the numbers that ``arch`` has for its stage."""
        return Attention(stage['embed_dims'], stage['num_heads'], stage['sr_ratios'], norm_eps)

    @property
    def stage_shapes(self) -> list[tuple[int, int]]:
        """(h, w) of each stage's map on images of ``img_size``."""
        return [stage.shape for stage in self.stages]

    @property
    def out_channels(self) -> list[int]:
        return [self.stages[i].pos_embed.shape[2] for i in self.out_indices]

    def named_stages(self):
        return ((stage, f'stages.{i}.') for i, stage in enumerate(self.stages))

    def frozen_modules(self):
        if self.frozen_stages >= 0:
            yield self.stages[0].patch_embed
            yield self.stages[0].pos_embed
        yield from self.stages[: max(self.frozen_stages, 0)]
        if self.frozen_stages == len(self.stages) and self.out_type != 'featmap':
            yield self.norm
            if self.stages[-1].num_extra:
                yield self.cls_token

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) images -> the outputs that ``out_type`` and ``out_indices`` name."""
        check_sides(self, x.shape)
        outs, shapes = [], []
        for i, stage in enumerate(self.stages):
            tokens, shape = stage(x, getattr(self, 'cls_token', None))
            shapes.append(shape)
            cells = tokens[:, stage.num_extra :]
            if self.out_type == 'featmap' and i in self.out_indices:
                outs.append(to_maps(cells, shape))
            x = cells.transpose(1, 2).unflatten(2, shape)
        self.account(x.shape[0], shapes)
        if self.out_type == 'featmap':
            return tuple(outs)
        tokens = self.norm(tokens)
        return (
            tokens[:, 0]
            if self.out_type == 'cls_token'
            else tokens.mean(1)
            if self.out_type == 'avg_featmap'
            else tokens,
        )
