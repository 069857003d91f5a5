"""Trainings of models with the backbones of other libraries, in ``mmdyn.WithDGE``."""

import pytest
import timm
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS
from mmengine.runner import Runner, load_checkpoint
from torch import nn
from torch.utils.data import DataLoader

import mmdyn
from mmdyn.models.adapters import AppliedDGE
from mmdyn.models.backbones.base import find_backbones

VIT = dict(
    type='mmpretrain.VisionTransformer',
    arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=32),
    img_size=32,
    patch_size=4,
)
TIMM_SWIN = dict(
    type='mmpretrain.TIMMBackbone',
    model_name='swin_tiny_patch4_window7_224',
    features_only=True,
    feature_cls='getter',  # by which timm leaves the model whole
    img_size=32,
    window_size=4,
    embed_dim=16,
    depths=(1, 2),
    num_heads=(1, 2),
)
PYRAMID = dict(embed_dims=16, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], out_indices=(0, 1))
PVT = dict(type='mmdet.PyramidVisionTransformerV2', mlp_ratios=[2] * 4, **PYRAMID)
MIT = dict(type='mmseg.MixVisionTransformer', mlp_ratio=2, **PYRAMID)
SWIN = dict(
    type='mmdet.SwinTransformer', embed_dims=16, depths=(2, 1), num_heads=(1, 2), window_size=4, strides=(4, 2),
    out_indices=(0, 1),
)  # fmt: skip


def images_of(framework, count=4):
    """Samples as the data pipeline of a framework gives them."""
    samples = []
    for i in range(count):
        if framework == 'mmpretrain':
            from mmpretrain.structures import DataSample

            samples.append(dict(inputs=torch.rand(3, 32, 32), data_samples=DataSample().set_gt_label(i % 3)))
        elif framework == 'mmdet':
            from mmdet.testing import demo_mm_inputs

            packed = demo_mm_inputs(1, [[3, 64, 64]], num_classes=4)
            samples.append(dict(inputs=packed['inputs'][0], data_samples=packed['data_samples'][0]))
        else:
            from mmengine.structures import PixelData
            from mmseg.structures import SegDataSample

            labels = PixelData(data=torch.randint(0, 4, (1, 64, 64)))
            meta = dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64))
            samples.append(
                dict(inputs=torch.rand(3, 64, 64), data_samples=SegDataSample(gt_sem_seg=labels, metainfo=meta))
            )
    return samples


def train(config, framework, folder, iterations=2):
    """Train with a teacher and a budget, from a dense checkpoint."""
    dense = MODELS.build({**config, 'backbone': {**config['backbone'], 'dge': None}})
    dense.init_weights()
    torch.save(dict(state_dict=dense.state_dict()), folder / 'dense.pth')
    runner = Runner(
        model=config,
        work_dir=str(folder),
        train_dataloader=DataLoader(images_of(framework), batch_size=2, collate_fn=pseudo_collate),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[
            dict(type='mmdyn.BudgetHook', budget=0.5, log_interval=1),
            dict(type='mmdyn.DenseTeacherHook', logits=0.0, checkpoint=str(folder / 'dense.pth')),
        ],
        load_from=str(folder / 'dense.pth'),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=iterations)),
        default_scope=framework,
        experiment_name=f'{framework}-{folder.name}',
        cfg=dict(model=config),
    )
    runner.train()
    return runner


@pytest.mark.parametrize(
    'framework, task, backbone',
    [
        ('mmpretrain', 'classifier_config', VIT),
        ('mmpretrain', 'classifier_config', TIMM_SWIN),
        ('mmdet', 'detector_config', PVT),
        ('mmdet', 'detector_config', SWIN),
        ('mmseg', 'segmentor_config', MIT),
    ],
    ids=['mmpretrain-vit', 'timm-swin', 'mmdet-pvt', 'mmdet-swin', 'mmseg-mit'],
)
def test_training(framework, task, backbone, request, tmp_path):
    from mmengine.registry import init_default_scope

    init_default_scope(framework)
    backbone = dict(type='mmdyn.WithDGE', backbone=backbone, dge=dict(granularities=(1, 2)), img_size=64)
    config = dict(request.getfixturevalue(task), backbone=backbone)
    if backbone['backbone'] is TIMM_SWIN:
        config['neck'] = dict(type='mmpretrain.GlobalAveragePooling')
    if framework == 'mmseg':
        config['data_preprocessor'] = dict(type='SegDataPreProcessor', size=(64, 64))
    runner = train(config, framework, tmp_path)
    (applied,) = find_backbones(runner.model)
    scalars = runner.message_hub.log_scalars
    assert isinstance(applied, AppliedDGE)
    assert 0 < scalars['train/query_ratio'].current() <= 1
    assert scalars['train/loss_budget'].current() == pytest.approx((scalars['train/query_ratio'].current() - 0.5) ** 2)
    assert scalars['train/loss_teacher_features'].current() >= 0
    # What was trained loads as what it is, and as the dense model.
    saved = torch.load(tmp_path / 'iter_2.pth')['state_dict']
    for dge in (backbone['dge'], None):
        model = MODELS.build({**config, 'backbone': {**backbone, 'dge': dge}})
        load_checkpoint(model, str(tmp_path / 'iter_2.pth'), strict=True)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, saved[name])


TIMM = dict(
    model_name='vit_tiny_patch16_224', img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3
)


def whole_classifier(folder, *hooks):
    """timm's ViT as the whole of mmpretrain's classifier, which has no backbone."""
    return Runner(
        model=dict(
            type='mmdyn.WithDGE',
            backbone=dict(type='mmpretrain.TimmClassifier', **TIMM),
            dge=dict(granularities=(1, 2)),
        ),
        data_preprocessor=dict(mean=[1.0] * 3, std=[2.0] * 3),
        work_dir=str(folder),
        train_dataloader=DataLoader(images_of('mmpretrain'), batch_size=2, collate_fn=pseudo_collate),
        train_cfg=dict(by_epoch=False, max_iters=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=list(hooks),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)),
        default_scope='mmpretrain',
        experiment_name=folder.name,
        cfg=dict(model=dict(type='mmdyn.WithDGE')),
    )


def test_a_whole_classifier_trains(tmp_path):
    runner = whole_classifier(tmp_path, dict(type='mmdyn.BudgetHook', budget=0.5))
    runner.train()
    assert type(runner.model).__name__ == 'TimmClassifier'
    assert runner.model.data_preprocessor.mean.flatten().tolist() == [1.0] * 3
    scalars = runner.message_hub.log_scalars
    assert scalars['train/loss_budget'].current() == pytest.approx((scalars['train/query_ratio'].current() - 0.5) ** 2)
    # Its checkpoint has timm's names, and the routers'; timm's alone are a start.
    saved = torch.load(tmp_path / 'iter_2.pth')['state_dict']
    plain = timm.create_model(**TIMM)
    names = [name for name in saved if 'router' not in name]
    assert names == list(plain.state_dict()) and len(saved) == len(names) + 4
    plain.load_state_dict({name: saved[name] for name in names})
    load_checkpoint(runner.model, str(tmp_path / 'iter_2.pth'), strict=True)
    runner.model.load_state_dict(plain.state_dict())


def test_a_whole_classifier_has_no_features_for_a_teacher(tmp_path):
    runner = whole_classifier(tmp_path, dict(type='mmdyn.DenseTeacherHook', checkpoint='dense.pth'))
    with pytest.raises(ValueError, match='the TimmClassifier has neither: leave out the hook'):
        runner.train()


def test_it_is_the_backbone_itself():
    model = MODELS.build(dict(type='mmdyn.WithDGE', backbone=PVT, dge=dict(granularities=(1, 2, 4), test_budget=0.5)))
    plain = MODELS.build(PVT)
    assert type(model) is type(plain)
    assert [name for name in model.state_dict() if 'router' not in name] == list(plain.state_dict())
    routers = [module for module in model.modules() if hasattr(module, 'share')]
    assert len(routers) == 4 and all(0 < router.share < 1 for router in routers)


def test_without_dge_it_tells_what_it_spends():
    model = MODELS.build(dict(type='mmdyn.WithDGE', backbone=VIT))
    model.eval()
    model(torch.rand(2, 3, 32, 32))
    cost = mmdyn.cost(model)
    assert cost.spent.tolist() == [cost.dense] * 2
    with pytest.raises(ValueError, match='budget=0.5: the VisionTransformer has no DGE'):
        mmdyn.set_budget(model, 0.5)
    with pytest.raises(ValueError, match='The VisionTransformer has no DGE, whose cost a loss could lower'):
        mmdyn.budget_loss(model, 0.5)


@pytest.mark.parametrize('backbone', [None, dict(arch='small'), nn.Identity()])
def test_something_else_than_a_config(backbone):
    with pytest.raises(ValueError, match='WithDGE: backbone=.*: give the config of a backbone'):
        MODELS.build(dict(type='mmdyn.WithDGE', backbone=backbone))
