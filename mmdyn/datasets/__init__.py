from .loading import LoadImageFromFile
from .token_labels import LoadTokenLabels, TokenLabelCrop, TokenLabelFlip

__all__ = ['LoadImageFromFile', 'LoadTokenLabels', 'TokenLabelCrop', 'TokenLabelFlip']
