from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch.nn.parallel import DataParallel

import mmdyn  # noqa: F401
from mmdyn.engine import FineSelectionHook

ALL, HALF = 1 + 4 * 4, 1 + 4 * 2 + 2  # tokens of the fine stage, of 2 x 2 coarse patches
ARCH = dict(family='deit', embed_dim=8, depth=1, num_heads=1, mlp_ratio=1)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample

        return dict(inputs=torch.rand(3, 16, 16), data_samples=DataSample().set_gt_label(index))


@pytest.fixture
def lengths(tmp_path):
    """Train with the hook; returns the classifier and, of each pass, (epoch or 'val', tokens of the fine stage)."""

    def train(begin, max_epochs, resume=False, **backbone):
        init_default_scope('mmpretrain')
        backbone = backbone or dict(type='mmdyn.CFViT', arch=ARCH, coarse_size=2, patch_size=4, ema_start=1)
        classifier = (
            dict(type='mmdyn.CoarseToFineClassifier', test_cfg=dict(threshold=1))
            if backbone['type'] == 'mmdyn.CFViT'
            else dict(type='ImageClassifier')
        )
        model = MODELS.build(
            dict(classifier, backbone=backbone, head=dict(type='LinearClsHead', num_classes=2, in_channels=8))
        )
        loader = dict(dataset=Images(), batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
        runner = Runner(
            model,
            work_dir=str(tmp_path),
            default_scope='mmpretrain',
            train_dataloader=loader,
            val_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=max_epochs, val_interval=1),
            val_cfg=dict(),
            val_evaluator=dict(type='mmdyn.CoarseToFineMetric', topk=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            resume=resume,
            log_level='ERROR',
            custom_hooks=[dict(type='mmdyn.FineSelectionHook', begin=begin)],
        )
        seen = []
        model.backbone.blocks[0].register_forward_pre_hook(
            lambda block, inputs: seen.append((runner.epoch if block.training else 'val', inputs[0].shape[1]))
        )
        runner.train()
        return model, seen[1::2]  # each coarse stage is followed by a fine one

    return train


def test_switches_at_begin_and_leaves_evaluation_alone(lengths):
    model, seen = lengths(begin=2, max_epochs=3)
    assert seen == [(0, ALL), ('val', HALF), (1, ALL), ('val', HALF), (2, HALF), ('val', HALF)]
    assert not model.backbone.split_all


def test_from_the_start(lengths):
    assert lengths(begin=0, max_epochs=2)[1] == [(0, HALF), ('val', HALF), (1, HALF), ('val', HALF)]


@pytest.mark.parametrize('begin, wanted', [(3, [(2, ALL), (3, HALF)]), (1, [(2, HALF), (3, HALF)])])
def test_resumed_training(lengths, begin, wanted):
    lengths(begin=1, max_epochs=2)
    assert [entry for entry in lengths(begin, max_epochs=4, resume=True)[1] if entry[0] != 'val'] == wanted


def test_wrapped_model(lengths):
    model, _ = lengths(begin=1, max_epochs=2)
    hook = FineSelectionHook(begin=1)
    runner = SimpleNamespace(model=DataParallel(model), max_epochs=2, epoch=0)
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    assert model.backbone.split_all
    hook.after_train(runner)
    assert not model.backbone.split_all


@pytest.mark.parametrize('max_epochs', [2, 3])
def test_begin_that_is_not_reached(lengths, max_epochs):
    with pytest.raises(ValueError, match=f'begin=3 is not reached by max_epochs={max_epochs}'):
        lengths(begin=3, max_epochs=max_epochs)


def test_model_without_cfvit(lengths):
    arch = {key: value for key, value in ARCH.items() if key != 'family'}
    with pytest.raises(ValueError, match='found no CFViT'):
        lengths(1, 2, type='mmdyn.DeiT', arch=arch, img_size=16, patch_size=4)


def test_negative_begin():
    with pytest.raises(ValueError, match='begin=-1: give an integer >= 0, an epoch; 0 splits'):
        FineSelectionHook(begin=-1)
