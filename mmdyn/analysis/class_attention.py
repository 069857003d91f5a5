"""What class attention tells of patches (CF-ViT paper, figure 1)."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import CFViT
from ..models.backbones.base import find_backbones
from ..models.backbones.vit import PlainViT
from ..models.cfvit.regions import take
from ..models.stage import run_blocks


def plain_classifier(model: nn.Module) -> PlainViT:
    """The backbone of a classifier that is a plain ViT without DGE, CF-ViT's included.

    Raises:
        ValueError: if the model is no such classifier.
    """
    found = [backbone for backbone in find_backbones(model) if isinstance(backbone, PlainViT)]
    if len(found) != 1 or len(found[0].dge) or not hasattr(model, 'head'):
        raise ValueError(
            'Class attention is that of a plain vision transformer that classifies: give the config of a classifier '
            'with the backbone mmdyn.DeiT, mmdyn.LVViT or mmdyn.CFViT, without dge.'
        )
    return found[0]


def coarse_tokens(backbone: PlainViT, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """(B, 3, H, W) images at half their side -> (B, E + N, C) tokens, and (h, w): CF-ViT's coarse splitting."""
    half = [side // 2 for side in images.shape[-2:]]
    images = F.interpolate(images, half, mode='bilinear', align_corners=True)
    if not isinstance(backbone, CFViT):
        return backbone.embed(images)
    patches, shape = backbone.patch_embed(images)
    class_token = backbone.cls_token.expand(len(images), -1, -1).type_as(patches)
    return torch.cat([class_token, patches], dim=1) + backbone.coarse_pos_embed, shape


def class_attention(backbone: PlainViT, tokens: Tensor) -> list[Tensor]:
    """How much the class token attends to each patch in each block: eq. 2, mean of the heads.

    Args:
        backbone: without DGE.
        tokens: (B, E + N, C), embedded.

    Returns:
        for each block (B, N).
    """
    rows: list[Tensor] = []
    run_blocks(backbone, tokens.clone(), (1, tokens.shape[1] - backbone.num_extra), class_rows=rows)
    return [row[:, backbone.num_extra :] for row in rows]


def classify_patches(model: nn.Module, tokens: Tensor, index: Tensor) -> Tensor:
    """Logits of a classifier that sees some patches alone.

    Args:
        model: a classifier.
        tokens: (B, E + N, C), embedded.
        index: (B, k) patches.

    Returns:
        (B, classes).
    """
    backbone = plain_classifier(model)
    kept = torch.cat([tokens[:, : backbone.num_extra], take(tokens[:, backbone.num_extra :], index)], dim=1)
    shape = 1, index.shape[1]
    normed = backbone.norm(run_blocks(backbone, kept, shape))
    output = backbone.output(normed) if isinstance(backbone, CFViT) else backbone._format(normed, shape)
    return model.head((output,))


@torch.no_grad()
def accuracy_of_patches(model: nn.Module, batches: Iterable[Any], count: int) -> dict[str, Any]:
    """Accuracy with the patches of the highest and of the lowest class attention of each block.

    Args:
        model: a classifier in evaluation mode.
        batches: of labelled images.
        count: patches that are kept; the paper keeps 100 of 196.

    Returns:
        in per cent ``highest`` and ``lowest``, one number for each block, and ``all``; and ``images``.

    Raises:
        ValueError: if the images have no labels, or not more than ``count`` patches.
    """
    backbone = plain_classifier(model)
    right, images = {}, 0
    for batch in batches:
        data = model.data_preprocessor(batch)
        if any('gt_label' not in sample for sample in data['data_samples']):
            raise ValueError('the images of the test set have no labels.')
        labels = torch.cat([sample.gt_label for sample in data['data_samples']])
        tokens, (rows, columns) = backbone.embed(data['inputs'])
        num = rows * columns
        if not 1 <= count < num:
            raise ValueError(f'--patches {count}: an image has {num}; give fewer than that, at least 1.')
        chosen = {'all': [torch.arange(num, device=tokens.device).expand(len(tokens), -1)]}
        orders = [score.argsort(dim=1, descending=True, stable=True) for score in class_attention(backbone, tokens)]
        chosen['highest'] = [order[:, :count].sort(1)[0] for order in orders]
        chosen['lowest'] = [order[:, -count:].sort(1)[0] for order in orders]
        for name, indices in chosen.items():
            found = [classify_patches(model, tokens, index).argmax(-1) == labels.to(tokens.device) for index in indices]
            right[name] = right.get(name, 0) + torch.stack(found).sum(1).cpu()
        images += len(labels)
    shares = {name: (100 * count / images).tolist() for name, count in right.items()}
    return dict(shares, all=shares['all'][0], images=images)
