"""Whatever the options of what is public: it is built, or ValueError or TypeError says what is wrong, in short time."""

import inspect
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from torch.utils.data import DataLoader

from mmdyn import datasets, engine, evaluation, models
from mmdyn.analysis import budget, flops, latency, passes, synthetic, threshold, trace
from mmdyn.datasets.checked import TYPES
from mmdyn.engine.command import message_for_user
from mmdyn.models import layers
from mmdyn.models.backbones.vit import PlainViT
from mmdyn.models.cfvit import FeatureReuse
from mmdyn.models.dge import DynamicGrainedEncoder, check_granularities
from mmdyn.models.dge.prices import Prices
from mmdyn.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS
from mmdyn.visualization import draw_gates, draw_regions, split_pixels

PYRAMID = dict(embed_dims=(16, 24), depths=(1, 1), num_heads=(2, 3), mlp_ratios=(2, 3))
PLAIN = dict(embed_dim=16, depth=1, num_heads=2, mlp_ratio=2)
PRICES = dict(price=[0.0, 1.0], query_ratio=[0.5, 1.0], layers={'blocks.0': [0.5, 1.0]})
WORDS = (
    *('featmap', 'cls_token', 'avg_featmap', 'raw', 'bilinear', 'bicubic', 'nearest', 'region', 'layer', 'sparse'),
    *('dense', 'average', 'exact', 'cosine', 'linear', 'mlp', 'global', 'kl', 'cpu', 'clustered', 'horizontal', 'img'),
)
INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 4, 8, 16, 32, 2**15, 2**15 + 1, 2**31, 2**63, 10**400)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(INTEGERS),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from([np.float32(0.5), np.int64(2), 1 + 1j, b'x', object, len, ...]),
    st.sampled_from(WORDS),
    st.text(max_size=3),
)
anything = st.one_of(
    scalars,
    st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(st.sampled_from(('type', 'threshold', 'nms', 'price', 1)), inner, max_size=3),
        ),
        max_leaves=6,
    ),
)


def changed(valid):
    """A dict with anything in place of some of its values, or of all of it."""
    some = st.dictionaries(st.sampled_from([*valid]), st.one_of(anything, st.lists(scalars, min_size=2, max_size=2)))
    return st.one_of(some.map(lambda new: {**valid, **new}), anything)


DGE = dict(granularities=(1, 2), region_size=2, routing='region', train_mode='sparse', tau=1.0, dense_layers=())
DGE |= dict(test_budget=0.5, budget_mode='exact', prices=PRICES)
# Options that are dicts of more.
STRUCTURED = dict(
    dge=changed(DGE),
    prices=changed(PRICES),
    test_cfg=changed(dict(threshold=0.5, every_stage=False)),
    tta_cfg=changed(dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
)


def backbone(cls, arch, *more, **options):
    """A backbone, whose options are those of several signatures."""
    return partial(cls, **{'arch': arch, **options}), (cls, *more), dict(arch=changed(arch))


def known(callable_, *more, **options):
    """What takes the options of its signature."""
    return partial(callable_, **options), (callable_, *more), {}


def spend_a_budget(**options):
    models.DeiT(PLAIN, 32, patch_size=4, dge=dict(granularities=(1, 2))).set_budget(**{'budget': 0.5, **options})


def set_price(price):
    models.DeiT(PLAIN, 32, patch_size=4, dge={}).set_price(price)


def classify(**options):
    arch = dict(PLAIN, family='deit')
    models.CoarseToFineClassifier(
        backbone=dict(type='mmdyn.CFViT', arch=arch, coarse_size=2, patch_size=4, ema_start=1),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
        **options,
    )


def dataset(name):
    """A data set that does not read yet; the other options are the framework's."""

    def build(**options):
        getattr(datasets, name)(**{'lazy_init': True, **options})

    return build, (), {**dict.fromkeys(TYPES, anything), 'metainfo': changed(dict(classes=('a',)))}


class Detector(BaseModel):
    def forward(self, inputs):
        return inputs


def measure(price):
    return budget.Spent(1 / (1 + np.exp(price)), {'a': 0.5}, 1.0)


CURVE = threshold.Curve(*(torch.linspace(0, 1, 3).double() for _ in range(6)))
PICTURE = np.zeros((8, 8, 3), np.uint8)
MODEL = models.DeiT(PLAIN, 32, patch_size=4)
MODEL.forward = lambda images, mode: models.DeiT.forward(MODEL, images)
PLAIN_OPTIONS = dict(img_size=32, patch_size=4)
TARGETS = {
    'PVT': backbone(models.PVT, dict(PYRAMID, sr_ratios=(2, 1)), **PLAIN_OPTIONS),
    'DPVT': backbone(models.DPVT, dict(PYRAMID, num_points=(2, 1)), models.PVT, **PLAIN_OPTIONS),
    'DeiT': backbone(models.DeiT, PLAIN, PlainViT, **PLAIN_OPTIONS),
    'LVViT': backbone(models.LVViT, PLAIN, PlainViT, **PLAIN_OPTIONS),
    'CFViT': backbone(models.CFViT, dict(PLAIN, family='deit'), coarse_size=2, patch_size=4, ema_start=1),
    'WithDGE': known(
        models.WithDGE,
        backbone=dict(
            type='mmpretrain.VisionTransformer',
            arch=dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16),
            img_size=32,
            patch_size=8,
        ),
    ),
    'DynamicGrainedEncoder': known(DynamicGrainedEncoder, dim=8),
    'check_granularities': known(check_granularities, granularities=(1, 2)),
    'Attention': known(layers.Attention, dim=8, num_heads=2),
    'DeformableAttention': known(layers.DeformableAttention, dim=8, num_heads=2),
    'FFN': known(layers.FFN, dim=8, hidden_dim=4),
    'PatchEmbed': known(layers.PatchEmbed, in_channels=3, dim=8, patch_size=4),
    'ConvStem': known(layers.ConvStem, in_channels=3, dim=8),
    'EncoderBlock': known(layers.EncoderBlock, dim=8, attn=layers.Attention(8, 2), mlp_ratio=2),
    'FeatureReuse': known(FeatureReuse, dim=8, mlp_ratio=2),
    'LVViTHead': known(models.LVViTHead, num_classes=3, in_channels=8),
    'MixTokenPreprocessor': known(models.MixTokenPreprocessor, num_classes=3),
    'CoarseToFineClassifier': (classify, (models.CoarseToFineClassifier,), {}),
    'MaskTTAModel': known(
        models.MaskTTAModel, tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=9), module=Detector()
    ),
    **{name: dataset(name) for name in ('CustomDataset', 'ImageNet', 'CocoDataset', 'ADE20KDataset', 'BaseSegDataset')},
    'BudgetHook': known(engine.BudgetHook),
    'DenseTeacherHook': known(engine.DenseTeacherHook),
    'FineSelectionHook': known(engine.FineSelectionHook),
    'FrozenStartHook': known(engine.FrozenStartHook),
    'GateNoiseHook': known(engine.GateNoiseHook),
    'LossGuardHook': known(engine.LossGuardHook),
    'RandomStateHook': known(engine.RandomStateHook),
    'CoarseToFineMetric': known(evaluation.CoarseToFineMetric),
    'DynamicFLOPs': known(evaluation.DynamicFLOPs),
    'GateQuality': known(evaluation.GateQuality, masks=str(Path(__file__).parent)),
    'LoadImageFromFile': known(datasets.LoadImageFromFile),
    'LoadTokenLabels': known(datasets.LoadTokenLabels, root='maps'),
    'TokenLabelCrop': known(datasets.TokenLabelCrop, scale=32),
    'TokenLabelFlip': known(datasets.TokenLabelFlip, prob=0.5),
    'set_budget': (spend_a_budget, (models.PVT.set_budget,), {}),
    'set_price': known(set_price, price=0.5),
    'Prices.read': (lambda source=None: Prices.read(source), (Prices.read,), dict(source=changed(PRICES))),
    'synthetic_choice': known(
        synthetic.synthetic_choice, regions=(4, 4), granularities=(1, 2), query_ratio=0.5, pattern='random'
    ),
    'calibrate': known(budget.calibrate, measure=measure, budgets=[0.5]),
    'evenly_spaced': known(budget.evenly_spaced, loader=DataLoader([0, 1]), most=3),
    'spend': known(budget.spend, model=models.DeiT(PLAIN, 32, patch_size=4, dge={}), batches=[]),
    'count_macs': known(flops.count_macs, model=MODEL, shape=(8, 8)),
    'family_and_size': known(passes.family_and_size, name='PVT-tiny'),
    'interleaved_times': known(latency.interleaved_times, cases={}, rounds=1),
    'most_accurate': known(threshold.most_accurate, of=CURVE, macs=1),
    'cheapest': known(threshold.cheapest, of=CURVE, top1=0.5),
    'trace_backbone': known(trace.trace_backbone, name='PVT', shape=(8, 8), folder=None),
    'arch_of': known(trace.arch_of, name='PVT-tiny'),
    'draw_gates': known(draw_gates, image=PICTURE, granularities=PICTURE[..., 0], candidates=(1, 2)),
    'draw_regions': known(draw_regions, image=PICTURE, coarse_size=2, regions=[0]),
    'split_pixels': known(split_pixels, regions=[0], coarse_size=2, size=(8, 8)),
}
# Arguments that are no options, but what a program hands over, and those of frameworks.
HANDED = {'self', 'cls', 'args', 'kwargs', 'options', 'attn', 'model', 'measure', 'batches', 'cases', 'of', 'image'}
HANDED |= {'allowed', 'mask', 'family', 'backbone', 'module', 'device', 'loader'}


def test_all_that_a_config_names_is_tried():
    registered = {name for registry in (MODELS, HOOKS, METRICS, TRANSFORMS) for name in registry.module_dict}
    own = {name for name in registered if not name.startswith('_')}
    assert own | set(DATASETS.modules) <= set(TARGETS)
    assert {name for name in layers.__all__ if inspect.isclass(getattr(layers, name))} - {'Positions'} <= set(TARGETS)


@pytest.mark.parametrize('name', TARGETS)
def test_any_value_is_taken_or_refused(name):
    build, signatures, structured = TARGETS[name]
    names = {option for of in signatures for option in inspect.signature(of).parameters} - HANDED
    names = sorted(names | set(structured))
    if not names:
        return
    strategies = {**STRUCTURED, **structured}
    values = st.fixed_dictionaries({}, optional={option: strategies.get(option, anything) for option in names})
    one = st.sampled_from(names).flatmap(
        lambda option: st.fixed_dictionaries({option: strategies.get(option, anything)})
    )

    @settings(
        max_examples=10 + 6 * len(names),
        deadline=10_000,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(one, values))
    def check(options):
        init_default_scope('mmpretrain')
        refused = None
        # Weights of any size have no memory there.
        with torch.device('meta' if isinstance(build, partial) and inspect.isclass(build.func) else 'cpu'):
            try:
                build(**options)
            except (ValueError, TypeError) as error:
                refused = error
        # On purpose, and not from somewhere below.
        assert refused is None or message_for_user(refused, {})

    check()


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('PVT', dict(drop_path_rate=-1), r'drop_path_rate=-1: give a number in \[0, 1\), the probability to drop'),
        ('PVT', dict(drop_path_rate=math.nan), r'drop_path_rate=nan: give a number in \[0, 1\)'),
        ('DeiT', dict(norm_eps=0), r'norm_eps=0: give a number in \(0, inf\), the epsilon of norms'),
        ('PVT', dict(embed_norm_eps=-1), r'embed_norm_eps=-1: give a number in \(0, inf\), the epsilon of norms'),
        ('DPVT', dict(with_cls_token=True), 'with_cls_token=True: DPVT has no class token'),
        ('LVViT', dict(distilled=True), 'distilled=True: LVViT has no distillation token'),
        ('DeiT', dict(distilled='no'), r"distilled='no': choose from \(True, False\)"),
        ('LVViT', dict(interpolate_mode='x'), r"interpolate_mode='x': choose from \('bilinear', 'bicubic',"),
        ('CFViT', dict(coarse_size=-2), 'coarse_size=-2: give an integer >= 1 and <= 32768, the rows and columns of'),
        ('DeiT', dict(patch_size=2.0), 'patch_size=2.0: give an integer >= 1 and <= 32768, the side of a patch in pix'),
        ('DeiT', dict(in_channels=0), 'in_channels=0: give an integer >= 1 and <= 32768, the channels of the images'),
        ('DeiT', dict(arch=dict(PLAIN, depth=0)), 'arch depth=0: give an integer >= 1 and <= 1000'),
        ('DeiT', dict(arch=dict(PLAIN, mlp_ratio=math.nan)), r'arch mlp_ratio=nan: give a number in \[0, 1000\], hid'),
        ('DPVT', dict(arch=dict(PYRAMID, num_points=4)), 'arch num_points=4: give a sequence with one number for each'),
        ('DeiT', dict(init_cfg='x.pth'), r"init_cfg='x.pth': give a dict such as dict\(type='Pretrained', checkpoint="),
        ('DeiT', dict(init_cfg=[{}]), r'init_cfg=\[{}\]: give dicts with the type of an initialisation'),
        ('DeiT', dict(dge=dict(budget_mode='x')), r"budget mode='x': choose from \('exact', 'average'\)"),
        ('DeiT', dict(dge=dict(prices=3)), "prices=3: give the file that was measured, e.g. 'prices.json'"),
        ('DeiT', dict(dge=dict(tau=math.inf)), r'dge tau=inf: give a number in \(0, inf\), the temperature'),
        ('set_price', dict(price=math.nan), r'price=nan: give a number in \(-inf, inf\), what each query lowers a lo'),
        ('Prices.read', dict(source=dict(PRICES, price=[0, math.inf])), 'prices must have lists of finite numbers'),
        ('BudgetHook', dict(weight=math.nan), r'BudgetHook: weight=nan: give a number in \[0, inf\)'),
        ('LossGuardHook', dict(interval='x'), "LossGuardHook: interval='x': give an integer >= 1, a number of iter"),
        ('FineSelectionHook', dict(begin=1.5), 'FineSelectionHook: begin=1.5: give an integer >= 0, an epoch; 0 spl'),
        ('DenseTeacherHook', dict(checkpoint=3), 'DenseTeacherHook: checkpoint=3: give the path of a checkpoint'),
        ('DynamicFLOPs', dict(collect_device='x'), r"DynamicFLOPs: collect_device='x': choose from \('cpu', 'gpu',"),
        ('CoarseToFineMetric', dict(topk=(1, 0)), r'CoarseToFineMetric: topk=\(1, 0\): give a positive k, or seve'),
        ('LVViTHead', dict(aux_weight=-1), r'LVViTHead: aux_weight=-1: give a number in \[0, inf\)'),
        ('MixTokenPreprocessor', dict(alpha=math.nan), r'alpha=nan: give a number in \(0, inf\), of the beta distr'),
        ('CoarseToFineClassifier', dict(test_cfg=3), r'test_cfg=3: give a dict such as dict\(threshold=0.5\)'),
        ('MaskTTAModel', dict(tta_cfg={}), r'MaskTTAModel: tta_cfg={}: give a dict such as dict\(nms=dict'),
        ('LoadImageFromFile', dict(color_type='x'), r"LoadImageFromFile: color_type='x': choose from \('color',"),
        ('LoadTokenLabels', dict(root=3), 'LoadTokenLabels: root=3: give the folder of the maps'),
        ('TokenLabelCrop', dict(patch_size=-1), 'TokenLabelCrop: patch_size=-1: give an integer >= 1'),
        ('TokenLabelFlip', dict(prob=[0.6, 0.6]), r'TokenLabelFlip: prob=\[0.6, 0.6\] and direction=horizontal: g'),
        ('TokenLabelFlip', dict(direction='up'), r"TokenLabelFlip: direction='up': choose from \('vertical',"),
        ('CustomDataset', dict(data_root=3), 'mmdyn.CustomDataset: data_root=3: give the path of a folder'),
        ('CustomDataset', {}, 'mmdyn.CustomDataset: One of `ann_file`, `data_root` and `data_prefix` must be spec'),
        ('CocoDataset', dict(metainfo=dict(classes='cat')), r"mmdyn.CocoDataset: metainfo has classes='cat': give a s"),
        ('BaseSegDataset', dict(metainfo=dict(classes=3)), 'mmdyn.BaseSegDataset: metainfo has classes=3: give a s'),
        ('calibrate', dict(budgets=[]), r'budgets=\[\]: give a list of query ratios, e.g. \[0.3, 0.5\]'),
        ('spend', {}, 'no images to measure what the model spends: give a test set that has some'),
        ('split_pixels', dict(regions=[0.5]), r'regions=\[0.5\]: give the indices of patches, a list of integers'),
    ],
)
def test_what_is_said(name, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TARGETS[name][0](**options)
