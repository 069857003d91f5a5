from .cfvit import CFViT
from .deit import DeiT
from .dpvt import DPVT
from .lvvit import LVViT
from .pvt import PVT

__all__ = ['CFViT', 'DPVT', 'DeiT', 'LVViT', 'PVT']
