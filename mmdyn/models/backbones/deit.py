"""DeiT, a plain vision transformer, with and without DGE."""

from collections.abc import Sequence

from ...registry import MODELS
from .vit import PlainViT


@MODELS.register_module()
class DeiT(PlainViT):
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
            ``dense_layers=('blocks.0', 'blocks.1')`` names those that stay dense.
        out_type: what to return of each block in ``out_indices``: ``'cls_token'`` (B, C), ``'featmap'`` (B, C, h, w),
            ``'avg_featmap'`` (B, C), the mean of the map, or ``'raw'`` (B, E + h*w, C), all tokens.
        out_indices: blocks to return. Defaults to the last. Only the last block's output is normed.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        frozen_stages: -1 freezes nothing, 0 the embeddings, n > 0 also the first n blocks.
        with_cp: recompute the blocks in the backward pass.
        interpolate_mode: how position embeddings are resized.
        norm_eps: epsilon of all norms. Defaults to 1e-6.
        init_cfg: initialisation; a ``Pretrained`` checkpoint may be of the dense or the dynamic model.
    """

    def __init__(self, arch: str | dict = 'small', img_size: int | Sequence[int] = 256, **options):
        super().__init__('deit', arch, img_size, **options)
