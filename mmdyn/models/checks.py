"""What is said about a model and its data before they run, in place of an error from inside torch."""

import logging
import re

from mmengine.logging import print_log
from torch import nn

from .backbones.base import DynamicStages, find_backbones


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
        if backbone is not model.backbone:
            continue
        given = backbone.out_channels
        if list(taken) != given:
            raise ValueError(
                f'The neck {type(neck).__name__} takes in_channels={list(taken)}, but the backbone '
                f'{type(backbone).__name__} returns maps of {given} channels: write '
                f'neck=dict(in_channels={given}), or choose another arch or out_indices of the backbone.'
            )


def check_classes(model: nn.Module, dataset) -> None:
    """Compare the classes of a data set, or its labels if they have no names, with those of the model's heads.

    Fewer classes than a head tells apart are no mistake.

    Args:
        model: of any framework.
        dataset: of mmengine's kind, or a wrapper of such.

    Raises:
        ValueError: if a head has fewer classes than the data.
    """
    heads = {
        name: module
        for name, module in model.named_modules()
        if re.fullmatch(r'(.*\.)?(?!rpn_)\w*head(\.\d+)?', name)
        and isinstance(getattr(module, 'num_classes', None), int)
    }
    if not heads:
        return
    name, head = min(heads.items(), key=lambda item: item[1].num_classes)
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if classes:
        count, last = len(classes), f'the last of them {classes[-1]!r}'
    elif hasattr(dataset, 'get_gt_labels'):  # mmpretrain's, with a list of images and labels
        labels = dataset.get_gt_labels()
        count, last = labels.max() + 1, f'the last of them on {dataset.get_data_info(int(labels.argmax()))["img_path"]}'
    else:
        return
    if count > head.num_classes:
        inner = dataset
        while hasattr(inner, 'dataset') or hasattr(inner, 'datasets'):  # the usual wrappers
            inner = getattr(inner, 'dataset', None) or inner.datasets[0]
        places = [getattr(inner, 'ann_file', ''), *(getattr(inner, 'data_prefix', None) or {}).values()]
        raise ValueError(
            f'The data set {type(inner).__name__} of {", ".join(filter(None, places))} has {count} '
            f'classes, {last}, but {name}, a {type(head).__name__}, has num_classes={head.num_classes}: '
            f'write num_classes={count} there, or leave out what does not belong to the data.'
        )


def has_backbone(model: nn.Module, who: str) -> bool:
    """Whether there is a backbone to look for; if a tool swapped the model, the log says that ``who`` does nothing."""
    found = hasattr(model, 'backbone') or bool(find_backbones(model))
    if not found:
        print_log(
            f'{who} does nothing, because the {type(model).__name__} has no backbone.',
            logger='current',
            level=logging.WARNING,
        )
    return found


def dynamic_backbones(model: nn.Module, who: str) -> list[DynamicStages]:
    """The backbones with DGE; none if a tool swapped the model, which the log says.

    Raises:
        ValueError: if no backbone has DGE.
    """
    if not has_backbone(model, who):
        return []
    found = [backbone for backbone in find_backbones(model) if backbone.has_dge]
    if not found:
        raise ValueError(
            f'{who} found no DGE in the model: give its backbone '
            'dge=dict(granularities=(1, 2, 4)), or leave out the hook.'
        )
    return found
