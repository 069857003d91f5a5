from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmdyn  # noqa: F401
from mmdyn.analysis.flops import build_model
from mmdyn.engine import BudgetHook, LossGuardHook
from mmdyn.models.checks import check_channels

ARCH = dict(embed_dims=(16, 24), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))


def segmentor(in_channels, **backbone):
    return dict(
        type='EncoderDecoder', backbone=dict(type='mmdyn.PVT', arch=ARCH, img_size=32, dge=dict(), **backbone),
        neck=dict(type='FPN', in_channels=in_channels, out_channels=8, num_outs=len(in_channels)),
        decode_head=dict(type='FPNHead', in_channels=[8, 8], in_index=[0, 1], feature_strides=[4, 8], channels=8,
                         num_classes=4, norm_cfg=dict(type='BN')))


@pytest.fixture
def build():
    init_default_scope('mmseg')
    return lambda *args, **backbone: MODELS.build(segmentor(*args, **backbone))


@pytest.mark.parametrize('channels, backbone, said', [
    ([16, 32], {}, r'FPN takes in_channels=\[16, 32\], but the backbone PVT returns maps of \[16, 24\] channels: write '
                   r'neck=dict\(in_channels=\[16, 24\]\)'),
    ([16, 24], dict(out_indices=(1, )), r'takes in_channels=\[16, 24\], but the backbone PVT returns maps of \[24\]'),
])
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
    check_channels(MODELS.build(dict(
        type='ImageClassifier', backbone=dict(type='mmdyn.DeiT', arch='tiny'), neck=None,
        head=dict(type='LinearClsHead', num_classes=3, in_channels=7))))
    init_default_scope('mmseg')
    other = segmentor([16, 24])
    other['backbone'] = dict(type='ResNet', depth=18)
    check_channels(MODELS.build(other))
