from .coarse_to_fine import CoarseToFineMetric
from .dynamic_flops import DynamicFLOPs
from .gate_quality import GateQuality

__all__ = ['CoarseToFineMetric', 'DynamicFLOPs', 'GateQuality']
