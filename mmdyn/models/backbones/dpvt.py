"""PVT with deformable attention, with and without DGE (section 4 of the DGE paper)."""

from collections.abc import Sequence

from torch import nn

from ...registry import MODELS
from ..layers import DeformableAttention
from . import pvt
from .options import OUT_TYPES


def _with_points(arch: dict) -> dict:
    return {**{name: numbers for name, numbers in arch.items() if name != 'sr_ratios'}, 'num_points': (4, 4, 4, 4)}


ARCHS = {name: _with_points(arch) for name, arch in pvt.ARCHS.items()}


@MODELS.register_module()
class DPVT(pvt.PVT):
    """DPVT and DPVT+DGE: :class:`PVT` whose queries attend to a few points of the map that they choose themselves.

    There is no class token. All options but these are those of PVT.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``, or a dict of ``embed_dims, depths, num_heads,
            mlp_ratios, num_points`` with one number for each stage.
        out_type: ``'featmap'`` returns the (B, C, h, w) maps of the stages ``out_indices``. ``'avg_featmap'`` returns
            the mean (B, C) of the last stage's tokens after a final norm, for classification, ``'raw'`` these tokens
            (B, h*w, C).
    """

    archs = ARCHS

    def __init__(
        self,
        arch: str | dict = 'small',
        img_size: int | Sequence[int] = 256,
        out_type: str = 'featmap',
        dge: dict | None = None,
        **options,
    ):
        allowed = tuple(kind for kind in OUT_TYPES if kind != 'cls_token')
        if out_type not in allowed:
            raise ValueError(f'out_type={out_type!r}: choose from {allowed}. DPVT has no class token.')
        with_cls_token = options.pop('with_cls_token', None)
        if with_cls_token not in (None, False):
            raise ValueError(
                f'with_cls_token={with_cls_token!r}: DPVT has no class token, which would have no '
                'place on the map. Leave it out.'
            )
        super().__init__(arch, img_size, out_type=out_type, dge=dge, with_cls_token=False, **options)

    def make_attention(self, stage: dict, norm_eps: float) -> nn.Module:
        return DeformableAttention(stage['embed_dims'], stage['num_heads'], stage['num_points'])
