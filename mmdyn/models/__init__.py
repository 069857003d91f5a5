from .backbones import DPVT, PVT, DeiT

__all__ = ['DPVT', 'DeiT', 'PVT']
