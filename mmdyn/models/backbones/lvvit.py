"""LV-ViT, a plain vision transformer whose patch tokens learn labels of their own."""

from collections.abc import Sequence

from ...registry import MODELS
from .vit import PlainViT


@MODELS.register_module()
class LVViT(PlainViT):
    """`LV-ViT <https://arxiv.org/abs/2104.10858>`_, with and without DGE.

    A stem of convolutions, queries, keys and values without bias, and residual branches divided by 2.

    Args:
        arch: ``'small'``, ``'medium'``, or a dict of ``embed_dim, depth, num_heads, mlp_ratio``.
        img_size: side of the images, or (height, width), that position embeddings are made for.
        out_type: as for :class:`DeiT`. :class:`~mmdyn.models.heads.lvvit_head.LVViTHead` takes ``'raw'``.
        options: the other options of :class:`DeiT`, without ``distilled``; ``norm_eps`` defaults to 1e-5.
    """

    def __init__(
        self, arch: str | dict = 'small', img_size: int | Sequence[int] = 224, out_type: str = 'raw', **options
    ):
        distilled = options.get('distilled', False)
        if distilled not in (None, False):
            raise ValueError(f'distilled={distilled!r}: LVViT has no distillation token: leave distilled out.')
        super().__init__('lvvit', arch, img_size, out_type=out_type, **options)
