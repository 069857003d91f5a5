from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope

import mmdyn  # noqa: F401
from mmdyn.analysis.flops import build_model
from mmdyn.engine import BudgetHook, FineSelectionHook, GateNoiseHook, LossGuardHook
from mmdyn.models.backbones.base import check_sides, least_side
from mmdyn.models.checks import check_channels, check_classes

ARCH = dict(embed_dims=(16, 24), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))


def segmentor(in_channels, **backbone):
    return dict(
        type='EncoderDecoder',
        backbone=dict(type='mmdyn.PVT', arch=ARCH, img_size=32, dge=dict(), **backbone),
        neck=dict(type='FPN', in_channels=in_channels, out_channels=8, num_outs=len(in_channels)),
        decode_head=dict(
            type='FPNHead',
            in_channels=[8, 8],
            in_index=[0, 1],
            feature_strides=[4, 8],
            channels=8,
            num_classes=4,
            norm_cfg=dict(type='BN'),
        ),
    )


@pytest.fixture
def build():
    init_default_scope('mmseg')
    return lambda *args, **backbone: MODELS.build(segmentor(*args, **backbone))


@pytest.mark.parametrize(
    'channels, backbone, said',
    [
        (
            [16, 32],
            {},
            r'FPN takes in_channels=\[16, 32\], but the backbone PVT returns maps of \[16, 24\] channels: write '
            r'neck=dict\(in_channels=\[16, 24\]\)',
        ),
        (
            [16, 24],
            dict(out_indices=(1,)),
            r'takes in_channels=\[16, 24\], but the backbone PVT returns maps of \[24\]',
        ),
    ],
)
def test_channels_that_differ(build, channels, backbone, said):
    with pytest.raises(ValueError, match=said):
        check_channels(build(channels, **backbone))


def test_channels_that_fit(build):
    check_channels(build([16, 24]))


@pytest.mark.parametrize('hook', [BudgetHook, LossGuardHook])
def test_hooks_refuse_the_model_before_it_runs(build, hook):
    with pytest.raises(ValueError, match=r'neck=dict\(in_channels=\[16, 24\]\)'):
        hook().before_run(SimpleNamespace(model=build([16, 32])))


def test_counting_refuses_the_model():
    with pytest.raises(ValueError, match=r'neck=dict\(in_channels=\[16, 24\]\)'):
        build_model(Config(dict(model=segmentor([24, 16]), default_scope='mmseg')))


def test_models_without_such_a_neck_are_left_alone():
    check_channels(
        MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(type='mmdyn.DeiT', arch='tiny'),
                neck=None,
                head=dict(type='LinearClsHead', num_classes=3, in_channels=7),
            )
        )
    )
    init_default_scope('mmseg')
    other = segmentor([16, 24])
    other['backbone'] = dict(type='ResNet', depth=18)
    check_channels(MODELS.build(other))


class Data(BaseDataset):
    def __init__(self, *classes):
        metainfo = dict(classes=classes) if classes else {}
        super().__init__('list.txt', metainfo=metainfo, data_prefix=dict(img_path='images'))

    def load_data_list(self):
        return [dict(img_path=f'{index}.png') for index in range(3)]


class Unnamed(Data):
    def get_gt_labels(self):
        return np.array([0, 4, 1])


@pytest.mark.parametrize(
    'wrap', [lambda data: data, lambda data: RepeatDataset(data, 2), lambda data: ConcatDataset([data, data])]
)
def test_data_of_more_classes_than_a_head(build, wrap):
    model = build([16, 24])  # of 4 classes
    for classes in ('abcd', 'ab'):
        check_classes(model, wrap(Data(*classes)))
    with pytest.raises(
        ValueError,
        match='The data set Data of list.txt, images has 5 classes, the last of them '
        "'e', but decode_head, a FPNHead, has num_classes=4: write num_classes=5 there",
    ):
        check_classes(model, wrap(Data(*'abcde')))


def test_labels_without_names(build):
    with pytest.raises(ValueError, match='has 5 classes, the last of them on 1.png, but'):
        check_classes(build([16, 24]), Unnamed())
    check_classes(build([16, 24]), Data())  # nothing is known of it


def test_the_one_class_of_a_proposal_head_is_no_limit():
    model = torch.nn.Module()
    model.rpn_head = torch.nn.Identity()
    model.rpn_head.num_classes = 1
    check_classes(model, Data(*'ab'))


@pytest.mark.parametrize(
    'name, options, least',
    [
        ('pvt', {}, 8),
        ('dpvt', {}, 8),
        ('deit', {}, 4),
        ('lvvit', {}, 4),
        ('pvt', dict(patch_size=8), 16),
        ('pvt', dict(arch={**ARCH, 'sr_ratios': (8, 2)}), 32),
    ],
)
def test_least_side(make_backbone, name, options, least):
    backbone = make_backbone(name, **options).eval()
    assert least_side(backbone) == least
    for shape in ((least, least), (least, 3 * least + 1)):
        check_sides(backbone, shape, [])
        backbone(torch.rand(1, 3, *shape))
    with pytest.raises(ValueError, match=f'64 x {least - 1}.* {least} x {least}: '):
        backbone(torch.rand(1, 3, 64, least - 1))
    with pytest.raises(
        ValueError,
        match=f'Images of 64 x {least - 1} pixels are too small .*, which needs {least} x {least}.*Images: a.png',
    ):
        check_sides(backbone, (1, 3, 64, least - 1), ['a.png'])


class Dummy(BaseModel):
    def forward(self, inputs, data_samples=None, mode='tensor'):
        return {}


@pytest.mark.parametrize('hook', [BudgetHook(log_interval=1), FineSelectionHook(begin=1), GateNoiseHook()])
def test_tools_may_swap_the_model(hook, monkeypatch):
    said = []
    monkeypatch.setattr('mmdyn.models.checks.print_log', lambda message, *options, **more: said.append(message))
    runner = SimpleNamespace(model=Dummy(), max_epochs=3, max_iters=9, epoch=0, iter=0)
    hook.before_run(runner)
    hook.before_train(runner)
    hook.before_train_epoch(runner)
    hook.before_train_iter(runner, 0)
    runner.model(torch.zeros(1))
    hook.after_train_iter(runner, 0)
    hook.after_train(runner)
    assert said == [f'{type(hook).__name__} does nothing, because the Dummy has no backbone.']
