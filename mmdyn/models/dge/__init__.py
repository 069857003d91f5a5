from .encoder import DynamicGrainedEncoder, check_granularities

__all__ = ['DynamicGrainedEncoder', 'check_granularities']
