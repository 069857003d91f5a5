"""What is said about a model before it runs, in place of an error from inside torch."""
from torch import nn

from .backbones.base import find_backbones


def check_channels(model: nn.Module) -> None:
    """Compare the channels that a detector's or segmentor's neck takes with those that its backbone returns.

    Raises:
        ValueError: if they differ; it says both.
    """
    neck = getattr(model, 'neck', None)
    taken = getattr(neck, 'in_channels', None)
    if not isinstance(taken, (list, tuple)):
        return
    for backbone in find_backbones(model):
        given = backbone.out_channels
        if backbone is model.backbone and list(taken) != given:
            raise ValueError(f'The neck {type(neck).__name__} takes in_channels={list(taken)}, but the backbone '
                             f'{type(backbone).__name__} returns maps of {given} channels: write '
                             f'neck=dict(in_channels={given}), or choose another arch or out_indices of the backbone.')
