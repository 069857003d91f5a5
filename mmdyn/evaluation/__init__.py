from .coarse_to_fine import CoarseToFineMetric
from .dynamic_flops import DynamicFLOPs

__all__ = ['CoarseToFineMetric', 'DynamicFLOPs']
