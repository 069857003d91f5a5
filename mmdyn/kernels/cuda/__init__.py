"""On NVIDIA's GPUs, by programs in Triton, which torch brings along."""

from . import routing, sampling

__all__ = ['routing', 'sampling']
