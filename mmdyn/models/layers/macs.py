"""Multiply-adds of a layer, whatever a tool put in its place."""

from torch import nn


def macs_of(layer: nn.Module) -> int:
    """Multiply-adds of one output of a linear layer or a convolution: as many as there are weights.

    Of an adapter that was put around the layer, its own weights count, too. A quantised linear layer has no parameters,
    but tells its numbers of channels.
    """
    matrices = [parameter for parameter in layer.parameters() if parameter.ndim > 1]
    return sum(matrix.numel() for matrix in matrices) or layer.in_features * layer.out_features
