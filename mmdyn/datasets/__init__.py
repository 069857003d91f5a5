from importlib import import_module

from ..registry import DATASETS
from .loading import LoadImageFromFile
from .token_labels import LoadTokenLabels, TokenLabelCrop, TokenLabelFlip

__all__ = ['LoadImageFromFile', 'LoadTokenLabels', 'TokenLabelCrop', 'TokenLabelFlip']

# Their modules import a framework, which is slow and need not be there.
LAZY = dict(
    ADE20KDataset='.segmentation',
    BaseSegDataset='.segmentation',
    CocoDataset='.detection',
    CustomDataset='.classification',
    ImageNet='.classification',
)


def __getattr__(name: str) -> type:
    """A data set, whose module is imported when it is first named."""
    if name in LAZY:
        return getattr(import_module(LAZY[name], __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


DATASETS.modules |= {name: f'{__name__}{module}' for name, module in LAZY.items()}
