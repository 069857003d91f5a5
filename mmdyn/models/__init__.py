from ..registry import MODELS
from .backbones import DPVT, PVT, DeiT

__all__ = ['DPVT', 'DeiT', 'PVT', 'build_mask_tta_model']


@MODELS.register_module('MaskTTAModel')
def build_mask_tta_model(*args, **kwargs):
    """The MaskTTAModel of ``mmdyn.models.tta``, imported when first built, because it imports mmdet."""
    from .tta import MaskTTAModel
    return MaskTTAModel(*args, **kwargs)
