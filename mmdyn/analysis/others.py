"""Models of other libraries with random weights, for benchmark.py: each as its library builds it."""

from collections.abc import Callable

import torch
from mmengine.registry import MODELS
from torch import nn

DEPTHS = dict(b0=(2, 2, 2, 2), b1=(2, 2, 2, 2), b2=(3, 4, 6, 3), b3=(3, 4, 18, 3))  # of PVTv2 and MiT
SWIN_DEPTHS = dict(tiny=(2, 2, 6, 2), small=(2, 2, 18, 2))


def of_timm(name: str) -> Callable[[str, tuple[int, int]], nn.Module]:
    """A function that builds timm's model of a size, for images of (H, W) pixels if its ``name`` needs that."""

    def build(size: str, shape: tuple[int, int]) -> nn.Module:
        import timm

        options = {} if name.startswith('pvt') else dict(img_size=shape)
        return timm.create_model(name.format(size), num_classes=0, **options)

    return build


def of_openmmlab(kind: str, options: Callable[[str], dict]) -> Callable[[str, tuple[int, int]], nn.Module]:
    """A function that builds a backbone of a size by its config."""

    def build(size: str, shape: tuple[int, int]) -> nn.Module:
        return MODELS.build(dict(type=kind, **options(size)))

    return build


def pyramid(size: str) -> dict:
    """Options of mmdet's PVTv2 and mmseg's MiT."""
    return dict(embed_dims=32 if size == 'b0' else 64, num_layers=DEPTHS[size])


# By the family's name: how it is built, and granularities that divide its windows of 7 x 7 cells.
OTHERS: dict[str, tuple[Callable[[str, tuple[int, int]], nn.Module], tuple[int, ...]]] = {
    'timm ViT': (of_timm('vit_{}_patch16_224'), (1, 2, 4)),
    'timm DINOv3': (of_timm('vit_{}_patch16_dinov3'), (1, 2, 4)),
    'mmpretrain DeiT': (
        of_openmmlab('mmpretrain.VisionTransformer', lambda size: dict(arch=f'deit-{size}')),
        (1, 2, 4),
    ),
    'timm PVTv2': (of_timm('pvt_v2_{}'), (1, 2, 4)),
    'mmdet PVTv2': (of_openmmlab('mmdet.PyramidVisionTransformerV2', pyramid), (1, 2, 4)),
    'mmseg MiT': (of_openmmlab('mmseg.MixVisionTransformer', pyramid), (1, 2, 4)),
    'timm Swin': (of_timm('swin_{}_patch4_window7_224'), (1, 7)),
    'mmdet Swin': (of_openmmlab('mmdet.SwinTransformer', lambda size: dict(depths=SWIN_DEPTHS[size])), (1, 7)),
}


def build_other(family: str, size: str, shape: tuple[int, int]) -> nn.Module:
    """A model in evaluation mode, whose weights depend on its name alone."""
    torch.manual_seed(0)
    model = OTHERS[family][0](size, shape)
    model.eval()  # of some libraries, it returns nothing
    return model
