"""Layer-wise decay of the learning rate, as mmpretrain's constructor asks for it."""

import re

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

BACKBONES = ['pvt', 'dpvt', 'deit', 'lvvit', 'cfvit']
DGE = [None, dict(granularities=(1, 2))]


def options_of(name, dge):
    """Options of a backbone for classification; CF-ViT has no DGE."""
    out_type = dict(pvt='cls_token', dpvt='avg_featmap').get(name)
    return {**({'out_type': out_type} if out_type else {}), **({} if name == 'cfvit' else {'dge': dge})}


def depths_of(model, prefix=''):
    return {name: model.get_layer_depth(prefix + name, prefix) for name, _ in model.named_parameters()}


def test_pyramid_by_hand(make_backbone):
    """Two blocks in the first stage and one in the second: 3 depths of blocks, and one before and behind them."""
    found = depths_of(make_backbone('pvt', out_type='cls_token', dge=dict(granularities=(1, 2))), 'backbone.')
    expected = {
        'stages.0.patch_embed': 0,
        'stages.0.pos_embed': 0,
        'stages.0.blocks.0': 1,
        'stages.0.dge.0': 1,
        'stages.0.blocks.1': 2,
        'stages.0.dge.1': 2,
        'stages.1.patch_embed': 2,
        'stages.1.pos_embed': 2,
        'cls_token': 2,
        'stages.1.blocks.0': 3,
        'stages.1.dge.0': 3,
        'norm': 4,
    }
    for name, depth in found.items():
        (part,) = [part for part in expected if f'{name}.'.startswith(f'{part}.')]
        assert depth == (expected[part], 5)
    assert {part for part in expected for name in found if f'{name}.'.startswith(f'{part}.')} == set(expected)


def test_plain_by_hand(make_backbone):
    model = make_backbone('deit', distilled=True)
    found = {re.sub(r'(blocks\.\d|\w+).*', r'\1', name): depth for name, (depth, _) in depths_of(model).items()}
    assert found == {
        'cls_token': 0,
        'dist_token': 0,
        'pos_embed': 0,
        'patch_embed': 0,
        'blocks.0': 1,
        'blocks.1': 2,
        'blocks.2': 3,
        'norm': 4,
    }
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (4, 5)


@pytest.mark.parametrize('dge', DGE)
@pytest.mark.parametrize('backbone', BACKBONES)
def test_all_depths(backbone, dge, make_backbone):
    """Blocks in the order in which they run; routers with them; what a stage begins with before its blocks."""
    model = make_backbone(backbone, **options_of(backbone, dge))
    num = 2 + sum(len(stage.blocks) for stage, _ in model.named_stages())
    depths = depths_of(model)
    assert all(0 <= depth < num and most == num for depth, most in depths.values())
    last = 0
    for stage, prefix in model.named_stages():
        own = {name.removeprefix(prefix): depths[name][0] for name in depths if name.startswith(prefix)}
        begins = [own[name] for name in own if re.match(r'patch_embed|\w*pos_embed', name)]
        assert begins and set(begins) == {last}
        for index in range(len(stage.blocks)):
            last += 1
            of_block = {own[name] for name in own if re.match(rf'(blocks|dge)\.{index}\.', name)}
            assert of_block == {last}
    behind = [depths[name][0] for name in depths if re.match('norm|reuse', name)]
    assert behind and set(behind) == {num - 1}


@pytest.mark.parametrize('dge', DGE)
@pytest.mark.parametrize('backbone', BACKBONES)
def test_constructor_of_mmpretrain(backbone, dge, backbone_config):
    is_lvvit = backbone == 'lvvit'
    model = MODELS.build(
        dict(
            type='mmdyn.CoarseToFineClassifier' if backbone == 'cfvit' else 'ImageClassifier',
            backbone=backbone_config(backbone, **options_of(backbone, dge)),
            head=dict(
                type='mmdyn.LVViTHead' if is_lvvit else 'LinearClsHead',
                num_classes=3,
                in_channels=24 if backbone in ('pvt', 'dpvt') else 16,
            ),
        )
    )
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.05),
            constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    )
    groups = {group['param_name']: group for group in wrapper.optimizer.param_groups}
    assert set(groups) == {name for name, _ in model.named_parameters()}
    num = 2 + sum(len(stage.blocks) for stage, _ in model.backbone.named_stages())
    stage = 'stages.0.' if backbone in ('pvt', 'dpvt') else ''
    rates = {
        'head.fc.weight': 0.1,
        'backbone.norm.weight': 0.1,
        f'backbone.{stage}blocks.1.ffn.fc1.bias': 0.1 * 0.5 ** (num - 3),
        f'backbone.{stage}patch_embed.proj.weight': 0.1 * 0.5 ** (num - 1),
        f'backbone.{stage}pos_embed': 0.1 * 0.5 ** (num - 1),
    }
    if dge and backbone != 'cfvit':
        rates[f'backbone.{stage}dge.1.router.weight'] = 0.1 * 0.5 ** (num - 3)
    for name, rate in rates.items():
        torch.testing.assert_close(groups[name]['lr'], rate)
