"""On NVIDIA's GPUs, by programs in Triton, which torch brings along."""

from . import blocks, routing, sampling

__all__ = ['blocks', 'routing', 'sampling']
