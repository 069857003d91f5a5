from importlib import import_module

from ..registry import MODELS
from .adapters import WithDGE
from .backbones import DPVT, PVT, CFViT, DeiT, LVViT

__all__ = ['CFViT', 'DPVT', 'DeiT', 'LVViT', 'PVT', 'WithDGE']


# Their modules import a framework, which need not be there.
LAZY = dict(
    CoarseToFineClassifier='.classifiers.coarse_to_fine',
    LVViTHead='.heads.lvvit_head',
    MaskTTAModel='.tta.mask_tta',
    MixTokenPreprocessor='.data_preprocessors.mix_token',
)


def __getattr__(name: str) -> type:
    """A class whose module is imported when it is first named."""
    if name in LAZY:
        return getattr(import_module(LAZY[name], __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def register_when_built(name: str) -> None:
    """Register a class whose module is imported when it is first built."""

    def build(*args, **kwargs):
        return __getattr__(name)(*args, **kwargs)

    build.__name__ = name
    MODELS.register_module(name, module=build)


for _name in LAZY:
    register_when_built(_name)
