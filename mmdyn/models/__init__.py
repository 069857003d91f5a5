from .backbones import DeiT, PVT

__all__ = ['DeiT', 'PVT']
