from .dynamic_flops import DynamicFLOPs

__all__ = ['DynamicFLOPs']
