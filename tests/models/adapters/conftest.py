"""Small models of each family that an adapter knows."""

import pytest
import timm
import torch
from mmengine.registry import MODELS
from torch import nn

import mmdyn
from mmdyn.models.dge.router import Router

VIT = dict(img_size=40, patch_size=8, embed_dim=16, depth=2, num_heads=2)
MM_VIT = dict(
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
    img_size=40,
    patch_size=8,
    out_type='raw',
)
TIMM_PVT = dict(depths=(2, 1), embed_dims=(16, 24), num_heads=(2, 3), sr_ratios=(2, 1), mlp_ratios=(2, 2))
MM_PVT = dict(embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], sr_ratios=[2, 1, 1, 1])
MM_SWIN = dict(embed_dims=8, depths=(2, 2), num_heads=(1, 2), window_size=4, strides=(4, 2), out_indices=(0, 1))
TIMM_SWIN = dict(window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2))
# The adapter's module, the name in timm or the type in OpenMMLab, options, and (H, W) of images.
MODELS_OF = {
    'vit': ('timm_vit', 'vit_tiny_patch16_224', VIT, (40, 40)),
    'deit-distilled': ('timm_vit', 'deit_tiny_distilled_patch16_224', VIT, (40, 40)),
    'deit3': ('timm_vit', 'deit3_small_patch16_224', VIT, (40, 40)),
    'clip': ('timm_vit', 'vit_base_patch16_clip_224', VIT, (40, 40)),
    'dinov2-registers': ('timm_vit', 'vit_small_patch14_reg4_dinov2', VIT, (40, 40)),
    'qk-norm': (
        'timm_vit',
        'vit_tiny_patch16_224',
        dict(VIT, qk_norm=True, scale_attn_norm=True, dynamic_img_size=True),
        (48, 24),
    ),
    'eva02': ('timm_eva', 'eva02_tiny_patch14_224', VIT, (40, 40)),
    'dinov3': ('timm_eva', 'vit_small_patch16_dinov3', dict(VIT, dynamic_img_size=True), (48, 24)),
    'rope-mixed': ('timm_eva', 'vit_small_patch16_rope_mixed_224', VIT, (40, 40)),
    'mm-vit': ('mm_vit', 'mmpretrain.VisionTransformer', MM_VIT, (48, 32)),
    'mm-deit': ('mm_vit', 'mmpretrain.DistilledVisionTransformer', MM_VIT, (40, 40)),
    'mm-deit3': ('mm_vit', 'mmpretrain.DeiT3', MM_VIT, (40, 40)),
    'mm-dinov2': (
        'mm_vit',
        'mmpretrain.VisionTransformer',
        dict(MM_VIT, layer_scale_init_value=0.3, layer_cfgs=dict(ffn_type='swiglu_fused')),
        (40, 40),
    ),
    'timm-pvtv2': ('timm_pvt', 'pvt_v2_b0', TIMM_PVT, (37, 45)),
    'timm-pvtv2-linear': ('timm_pvt', 'pvt_v2_b2_li', TIMM_PVT, (64, 64)),
    'mm-pvt': (
        'mm_pyramid',
        'mmdet.PyramidVisionTransformer',
        dict(MM_PVT, pretrain_img_size=64, mlp_ratios=[2] * 4),
        (64, 96),
    ),
    'mm-pvtv2': ('mm_pyramid', 'mmdet.PyramidVisionTransformerV2', dict(MM_PVT, mlp_ratios=[2] * 4), (37, 45)),
    'mit': ('mm_pyramid', 'mmseg.MixVisionTransformer', dict(MM_PVT, mlp_ratio=2), (37, 45)),
    'timm-swin': ('timm_swin', 'swin_tiny_patch4_window7_224', dict(TIMM_SWIN, img_size=64), (64, 64)),
    'timm-swin-padded': (
        'timm_swin',
        'swin_tiny_patch4_window7_224',
        dict(TIMM_SWIN, img_size=72, strict_img_size=False, always_partition=True),
        (72, 40),
    ),
    'mmdet-swin': ('mm_swin', 'mmdet.SwinTransformer', MM_SWIN, (46, 30)),
    'mmseg-swin': ('mm_swin', 'mmseg.SwinTransformer', MM_SWIN, (32, 64)),
    'mm-swin': (
        'mm_swin',
        'mmpretrain.SwinTransformer',
        dict(arch=dict(embed_dims=8, depths=(2, 2, 1, 1), num_heads=(1, 2, 2, 2)), img_size=64, window_size=2),
        (64, 64),
    ),
}
# One of each adapter.
FAMILIES = ['vit', 'eva02', 'mm-vit', 'timm-pvtv2', 'mm-pvtv2', 'mit', 'timm-swin', 'mmdet-swin']


@pytest.fixture
def make_model(randomise):
    """A small model by name, and the size of its images; no weight is at a value that hides a mistake."""

    def make(name, **options):
        _, kind, known, size = MODELS_OF[name]
        if '.' in kind:
            model = MODELS.build(dict(type=kind, **known, **options))
        else:
            model = timm.create_model(kind, **{'num_classes': 0, **known, **options})
        randomise(model).eval()  # of some libraries, it returns nothing
        return model, size

    return make


@pytest.fixture
def apply_random(make_model):
    """A small model with DGE whose routers choose by the image, and the size of its images."""

    def apply(name, granularities=(1, 2), std=10.0, **options):
        model, size = make_model(name)
        mmdyn.apply_dge(model, granularities, **options)
        for module in model.modules():
            if isinstance(module, Router):
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        return model, size

    return apply


@pytest.fixture
def tensors():
    """The tensors of what a model returns."""

    def of(output):
        return [output] if isinstance(output, torch.Tensor) else [tensor for part in output for tensor in of(part)]

    return of
