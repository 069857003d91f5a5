"""Labels of the tokens of both stages, from the labels of all fine patches, as pure tensor functions."""

import torch
from torch import Tensor

from .regions import fine_sequence, select, split, take


def coarse_targets(labels: Tensor, columns: int) -> Tensor:
    """The mean label of each coarse patch's four fine ones: (B, 4 * N, classes) -> (B, N, classes).

    Args:
        labels: of the fine patches, row by row.
        columns: columns of coarse patches.

    Raises:
        ValueError: if the labels do not form twice the ``columns`` and rows.
    """
    num = columns**2
    if labels.shape[1] != 4 * num:
        raise ValueError(
            f'Token labels of {labels.shape[1]} patches do not fit {2 * columns} x {2 * columns} fine '
            'patches: give TokenLabelCrop the patch_size of the backbone and a scale of its img_size.'
        )
    patches = split(torch.arange(num, device=labels.device)[None], columns).expand(labels.shape[0], -1)
    return take(labels, patches).unflatten(1, (num, 4)).mean(2)


def fine_targets(labels: Tensor, chosen: Tensor, columns: int) -> Tensor:
    """Labels in the order of :func:`fine_sequence`, without that of the class token.

    Args:
        labels: (B, 4 * N, classes) of the fine patches, row by row.
        chosen: (B, k) coarse patches that were split, by their place.
        columns: columns of coarse patches.

    Returns:
        (B, 4 * k + N - k, classes).
    """
    is_chosen = torch.zeros(labels.shape[0], columns**2, device=labels.device).scatter(1, chosen, 1.0)
    _, rest = select(is_chosen, chosen.shape[1])
    return fine_sequence(labels[:, :0], labels, coarse_targets(labels, columns), chosen, rest, columns)
