from .deit import DeiT
from .pvt import PVT

__all__ = ['DeiT', 'PVT']
