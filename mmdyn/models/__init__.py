from importlib import import_module

from ..registry import MODELS
from .backbones import DPVT, PVT, CFViT, DeiT, LVViT

__all__ = ['CFViT', 'DPVT', 'DeiT', 'LVViT', 'PVT']


def register_when_built(name: str, module: str) -> None:
    """Register a class whose module imports a framework, which need not be there, when it is first built."""

    def build(*args, **kwargs):
        return getattr(import_module(module, __name__), name)(*args, **kwargs)

    build.__name__ = name
    MODELS.register_module(name, module=build)


register_when_built('CoarseToFineClassifier', '.classifiers.coarse_to_fine')
register_when_built('LVViTHead', '.heads.lvvit_head')
register_when_built('MaskTTAModel', '.tta.mask_tta')
register_when_built('MixTokenPreprocessor', '.data_preprocessors.mix_token')
