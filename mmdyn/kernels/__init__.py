"""How the models are computed faster on one kind of device.

Importing the package registers the kernels with the functions of :mod:`mmdyn.models` that they stand in for. Without it
everything is slower and nothing is different.
"""

from . import accelerators, cuda, functions, pieces, stage, timm_vit
from .graphs import graphed

__all__ = ['accelerators', 'cuda', 'functions', 'graphed', 'pieces', 'stage', 'timm_vit']
