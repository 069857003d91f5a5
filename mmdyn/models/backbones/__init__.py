from .deit import DeiT
from .dpvt import DPVT
from .pvt import PVT

__all__ = ['DPVT', 'DeiT', 'PVT']
