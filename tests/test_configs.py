"""Every config loads and builds, and its entries in the metafile and the README are right."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS, MODELS, TRANSFORMS, init_default_scope
from mmpretrain.structures import DataSample
from torch import nn

import mmdyn
from mmdyn.analysis.flops import build_model, count_macs, dynamic_backbone
from mmdyn.models import CFViT

ROOT = Path(mmdyn.__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT)
    for folder in ('dge', 'dpvt', 'cfvit', 'demo')
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
SMALL = dict(
    embed_dims=(64, 128, 320, 512),
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 5, 8),
    mlp_ratios=(1, 1, 1, 1),
    sr_ratios=(8, 4, 2, 1),
)


@functools.cache
def metafile_models():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    metafiles = [yaml.safe_load((ROOT / name).read_text()) for name in index['Import']]
    return {model['Config']: model for metafile in metafiles for model in metafile['Models']}


def innermost(dataset):
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def load(name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path, quick):
    cfg = load(path.relative_to('configs'))
    model = build_model(cfg)
    backbone = dynamic_backbone(model)
    assert backbone.has_dge == ('-dge' in path.stem)
    two_stages = isinstance(backbone, CFViT)
    assert two_stages == path.stem.startswith('cf-')
    hooks = [HOOKS.build(hook) for hook in cfg.get('custom_hooks', [])]
    starts = '-pre_' in path.stem and path.stem.partition('-pre_')[0].endswith(('dense', 'plain'))
    expected = (
        ['BudgetHook'] * backbone.has_dge
        + ['GateNoiseHook'] * (path.stem == 'pvt-mini-dge_digits' or (starts and backbone.has_dge))
        + ['DenseTeacherHook'] * (starts and backbone.has_dge)
        + ['FineSelectionHook'] * two_stages
    )
    assert [type(hook).__name__ for hook in hooks] == expected
    if backbone.has_dge:
        least, most = backbone.ratio_bounds()
        assert least <= hooks[0].budget <= most
        hooks[0].prepare(SimpleNamespace(max_iters=500), model)  # which refuses targets out of reach
    if two_stages:
        assert 0 < hooks[0].begin < cfg.train_cfg.max_epochs
    assert cfg.default_hooks.loss_guard.type == 'mmdyn.LossGuardHook'
    assert cfg.default_hooks.random_state.type == 'mmdyn.RandomStateHook'
    assert cfg.default_hooks.checkpoint.max_keep_ckpts > 1
    for evaluators in (cfg.val_evaluator, cfg.test_evaluator):
        ours = [evaluator for evaluator in evaluators if evaluator.type.startswith('mmdyn.')]
        expected = ['CoarseToFineMetric'] * two_stages + ['DynamicFLOPs']
        assert [type(METRICS.build(metric)).__name__ for metric in ours] == expected and len(evaluators) > len(ours)
    pipelines = [
        innermost(loader.dataset).pipeline for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)
    ]
    for pipeline in [*pipelines, *filter(None, [cfg.get('tta_pipeline')])]:
        assert pipeline[0].type == 'LoadImageFromFile'  # the name that inferencers look for
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert innermost(loader.dataset).type.startswith('mmdyn.')  # names what is wrong with the data
    if 'neck' in cfg.model:
        widths = [stage.patch_embed.proj.out_channels for stage, _ in backbone.named_stages()]
        assert list(model.neck.in_channels) == widths
    if path.parent.name == 'demo':
        return
    assert f']({path.name})' in (ROOT / path).with_name('README.md').read_text()
    entry = metafile_models()[str(path)]
    assert entry['Name'] == path.stem
    assert entry['Metadata']['Parameters'] == sum(weight.numel() for weight in model.parameters())


def test_the_metafiles_list_configs_only():
    assert set(metafile_models()) == {str(path) for path in CONFIGS if path.parent.name != 'demo'}


@pytest.mark.parametrize(
    'name',
    [
        *(f'dge/pvt-{arch}-dge_8xb16_in1k-256px.py' for arch in ('tiny', 'small', 'medium', 'large')),
        'dge/deit-small-dge_8xb16_in1k-256px.py',
        'dpvt/dpvt-small-dge_8xb16_in1k-256px.py',
    ],
)
def test_imagenet_schedule_is_that_of_the_paper(name, quick):
    cfg = load(name)
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-3, 0.05)
    assert cfg.train_cfg.max_epochs == 300 and cfg.param_scheduler[0].end == 20
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 128
    assert cfg.custom_hooks[0] == dict(type='mmdyn.BudgetHook', budget=0.5, weight=1.0)


@pytest.mark.parametrize(
    'name',
    [
        'dge/mask-rcnn_pvt-s-dge_fpn_1x_coco.py',
        'dge/retinanet_pvt-s-dge_fpn_1x_coco.py',
        'dpvt/mask-rcnn_dpvt-m-dge_fpn_1x_coco.py',
    ],
)
def test_detection_schedule_is_that_of_the_paper(name, quick):
    cfg = load(name)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 1e-4)
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 16
    drops = cfg.param_scheduler[-1]
    assert (drops.type, drops.gamma, drops.by_epoch) == ('MultiStepLR', 0.1, True)
    epoch = -(-117266 // 16)  # iterations: images of train2017 that have boxes, 16 at a time
    for ours, paper in zip([*drops.milestones, cfg.train_cfg.max_epochs], [60e3, 80e3, 90e3], strict=True):
        assert abs(ours * epoch - paper) < 0.025 * paper
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        (resize,) = [transform for transform in loader.dataset.pipeline if transform.type == 'Resize']
        assert resize.scale == (1280, 768) and resize.keep_ratio
    metric = cfg.test_evaluator[0].metric
    assert metric == (['bbox', 'segm'] if 'mask-rcnn' in name else 'bbox')
    assert cfg.custom_hooks[0] == dict(type='mmdyn.BudgetHook', budget=0.5, weight=1.0)


@pytest.mark.parametrize(
    'name', ['dge/fpn_pvt-s-dge_8xb4-80k_ade20k-512x512.py', 'dpvt/fpn_dpvt-m-dge_8xb4-80k_ade20k-512x512.py']
)
def test_segmentation_schedule_is_that_of_the_paper(name, quick):
    cfg = load(name)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 1e-4)
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 32
    (decay,) = cfg.param_scheduler
    assert (decay.type, decay.power, decay.eta_min, decay.begin, decay.end) == ('PolyLR', 0.9, 0.0, 0, 80000)
    assert not decay.by_epoch and cfg.train_cfg.max_iters == 80000
    pipeline = {transform.type: transform for transform in cfg.train_dataloader.dataset.pipeline}
    assert (pipeline['RandomResize'].scale, pipeline['RandomResize'].ratio_range) == ((2048, 512), (0.5, 2.0))
    assert pipeline['RandomCrop'].crop_size == cfg.model.data_preprocessor.size == (512, 512)
    assert pipeline['RandomFlip'].prob == 0.5
    assert cfg.model.decode_head.num_classes == 150 and cfg.model.decode_head.norm_cfg.type == 'SyncBN'
    assert cfg.custom_hooks[0] == dict(type='mmdyn.BudgetHook', budget=0.5, weight=1.0)


@pytest.mark.parametrize(
    'name',
    [
        'dge/deit-tiny-dge_8xb16_in1k-256px.py',
        'dge/mask-rcnn_pvt-t-dge_fpn_1x_coco.py',
        'dpvt/fpn_dpvt-t-dge_8xb4-80k_ade20k-512x512.py',
        'cfvit/cf-deit-small-7x7_8xb128_in1k-224px.py',
        'demo/cf-vit-mini_digits.py',
    ],
)
def test_weight_decay_spares_tokens_embeddings_norms_and_biases(name, quick):
    from mmengine.optim import build_optim_wrapper

    cfg = load(name)
    model = build_model(cfg)
    decayed = {
        id(p)
        for group in build_optim_wrapper(model, cfg.optim_wrapper).param_groups
        for p in group['params']
        if group['weight_decay']
    }
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(('cls_token', 'pos_embed'))
        assert (id(parameter) in decayed) != spared, name


@pytest.mark.parametrize(
    'path',
    [path for path in CONFIGS if path.parent.name == 'cfvit' and '-pre_' not in path.stem],
    ids=lambda path: path.stem,
)
def test_cfvit_recipe_is_that_of_its_backbone(path, quick):
    cfg = load(path.relative_to('configs'))
    side = cfg.model.backbone.img_size
    assert path.stem.endswith(f'_8xb128_in1k-{side}px') and 8 * cfg.train_dataloader.batch_size == 1024
    lvvit, token_labels = 'lvvit' in path.stem, 'tokenlabel' in path.stem
    optimizer = cfg.optim_wrapper.optimizer
    # DeiT: 5e-4 for 512 images.
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1.6e-3 if lvvit else 1e-3, 0.05)
    warm_up, decay = cfg.param_scheduler
    assert (warm_up.end, decay.begin, decay.eta_min, cfg.train_cfg.max_epochs) == (5, 5, 1e-5, 300)
    if path.stem.startswith('cf-'):
        assert cfg.custom_hooks == [dict(type='mmdyn.FineSelectionHook', begin=200)]
        assert f'-{cfg.model.backbone.coarse_size}x{cfg.model.backbone.coarse_size}' in path.stem
    sampler = cfg.train_dataloader.sampler.type
    assert sampler == ('DefaultSampler' if lvvit else 'RepeatAugSampler')

    train, test = (
        {transform.type.split('.')[-1]: transform for transform in loader.dataset.pipeline}
        for loader in (cfg.train_dataloader, cfg.test_dataloader)
    )
    for transform in (*train.values(), *test.values()):
        TRANSFORMS.build(transform)
    assert train['TokenLabelCrop' if token_labels else 'RandomResizedCrop'].scale == side
    assert (train['RandAugment'].magnitude_level, train['RandomErasing'].erase_prob) == (9, 0.25)
    assert test['CenterCrop'].crop_size == side
    assert test['ResizeEdge'].scale == int(side / 0.9 if lvvit else side * 256 / 224)

    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))
    assert model.backbone.blocks[-1].drop_path_rate == pytest.approx(0.1)
    augments = getattr(model.data_preprocessor.batch_augments, 'augments', [])
    assert [(type(augment).__name__, augment.alpha) for augment in augments] == (
        [] if lvvit else [('Mixup', 0.8), ('CutMix', 1.0)]
    )
    preprocessor = type(model.data_preprocessor).__name__
    assert preprocessor == ('MixTokenPreprocessor' if token_labels else 'ClsDataPreprocessor')
    if token_labels:
        coarse = 2 if path.stem.startswith('cf-') else 1  # what is mixed are whole coarse patches
        assert model.data_preprocessor.patch_size == 16 * coarse


@pytest.mark.parametrize('path', [path for path in CONFIGS if path.parent.name == 'cfvit'], ids=lambda path: path.stem)
def test_cfvit_metafile_counts_both_stages(path, quick):
    model = build_model(load(path.relative_to('configs')))
    backbone = model.backbone
    side = 16 * backbone.shape[0]
    entry = metafile_models()[str(path)]['Metadata']
    assert entry['FLOPs'] == count_macs(model, (side, side))
    if isinstance(backbone, CFViT) and backbone.out_type == 'cls_token':
        # The classifier runs on the class token of each stage.
        assert entry['FLOPs'] == sum(backbone.stage_macs()) + 2 * model.head.fc.weight.numel()


STARTED = [path for path in CONFIGS if 'dense-pre' in path.stem or 'plain-pre' in path.stem]


@pytest.mark.parametrize('path', STARTED, ids=lambda path: path.stem)
def test_what_starts_from_a_model_trains_less_than_it_did(path, quick):
    cfg = load(path.relative_to('configs'))
    folder, checkpoint = cfg.load_from.split('/')[1:]
    start = load(f'{path.parent.name}/{folder}.py')  # the config that leaves the checkpoint
    unit, number = Path(checkpoint).stem.split('_')
    name = 'max_epochs' if unit == 'epoch' else 'max_iters'
    assert int(number) == start.train_cfg[name] and cfg.train_cfg[name] <= 0.34 * start.train_cfg[name]
    assert f'{cfg.train_cfg[name] // (1 if unit == "epoch" else 1000)}{"e" if unit == "epoch" else "k"}_' in path.stem
    assert all(
        scheduler.get('end', 0) <= cfg.train_cfg[name] or scheduler.type == 'LinearLR'
        for scheduler in cfg.param_scheduler
    )
    assert cfg.param_scheduler[-1].get('end', cfg.train_cfg[name]) == cfg.train_cfg[name]
    assert cfg.train_dataloader.batch_size == start.train_dataloader.batch_size
    assert cfg.optim_wrapper.optimizer.lr <= 0.1 * start.optim_wrapper.optimizer.lr
    model = cfg.model.copy()
    if 'dense-pre' in path.stem:
        assert cfg.custom_hooks[0].schedule == 'cosine'
        model.backbone = {name: value for name, value in model.backbone.items() if name != 'dge'}
        assert model == start.model  # what the checkpoint is of


@pytest.mark.parametrize('kind', ['dge', 'cfvit'])
def test_a_trained_model_starts_a_dynamic_one(kind, tmp_path):
    """With all that a classifier has, and what is new is as it was."""
    from mmengine.runner import load_checkpoint

    names = dict(
        dge=('dge/deit-tiny_8xb16_in1k-256px.py', 'dge/deit-tiny-dge-dense-pre_8xb16-30e_in1k-256px.py'),
        cfvit=('cfvit/deit-small_8xb128_in1k-224px.py', 'cfvit/cf-deit-small-7x7-plain-pre_8xb128-30e_in1k-224px.py'),
    )[kind]
    models = []
    for name in names:
        cfg, arch = load(name), dict(embed_dim=16, depth=4, num_heads=2, mlp_ratio=2)
        cfg.model.backbone.update(arch=dict(arch, family='deit') if 'cf-' in name else arch, patch_size=2, img_size=28)
        cfg.model.head.in_channels = 16
        models.append(MODELS.build(cfg.model))
    plain, dynamic = models
    torch.save(dict(state_dict=plain.state_dict()), tmp_path / 'plain.pth')
    load_checkpoint(dynamic, str(tmp_path / 'plain.pth'), strict=True)
    images = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        expected = plain.eval()(images)
        for module in dynamic.eval().modules():
            if hasattr(module, 'router'):
                module.router.bias.data[0] = 1e6
        if kind == 'dge':
            torch.testing.assert_close(dynamic(images), expected, rtol=1e-4, atol=1e-5)
    loaded = dynamic.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in plain.state_dict().items())


def test_mixed_labels_train_both_stages():
    cfg = load('cfvit/cf-deit-small-7x7_8xb128_in1k-224px.py')
    arch = dict(family='deit', embed_dim=16, depth=4, num_heads=2, mlp_ratio=2)
    cfg.model.backbone.update(arch=arch, patch_size=2, img_size=28)
    cfg.model.head.in_channels = 16
    model = MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor)).train()
    images = [torch.randint(0, 255, (3, 28, 28), dtype=torch.uint8) for _ in range(4)]
    batch = dict(inputs=images, data_samples=[DataSample().set_gt_label(label) for label in range(4)])
    batch = model.data_preprocessor(batch, training=True)
    scores = torch.stack([sample.gt_score for sample in batch['data_samples']])
    assert torch.allclose(scores.sum(1), torch.ones(4)) and (scores > 0).sum(1).max() == 2
    losses = model.loss(**batch)
    # The fine stage learns the mixed labels, smoothed; the coarse one has another loss.
    tokens, chosen = model.backbone.fine(batch['inputs'], model.backbone.coarse(batch['inputs']))
    assert set(losses) == {'loss', 'loss_coarse'} and len(chosen) == len(tokens) == 4
    sum(losses.values()).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_detector_starts_from_an_imagenet_checkpoint(tmp_path):
    cfg = load('dge/pvt-small-dge_8xb16_in1k-256px.py')
    cfg.model.backbone.update(arch=SMALL, img_size=64)
    classifier = MODELS.build(cfg.model)
    with torch.no_grad():
        for weight in classifier.parameters():
            weight += torch.rand_like(weight)
    torch.save(dict(state_dict=classifier.state_dict()), tmp_path / 'epoch_300.pth')

    cfg = load('dge/mask-rcnn_pvt-s-dge-in1k-pre_fpn_1x_coco.py')
    cfg.model.backbone.arch = SMALL
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / 'epoch_300.pth')
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    saved, loaded = classifier.backbone.state_dict(), detector.backbone.state_dict()
    assert any('.router.' in name for name in loaded)
    assert set(saved) - set(loaded) == {'cls_token', 'norm.weight', 'norm.bias'}
    for name, weight in loaded.items():
        if not name.endswith('pos_embed'):
            assert torch.equal(weight, saved[name]), name
    # 16 x 16 cells of 4 pixels, enlarged to those of an image of 256.
    maps = saved['stages.0.pos_embed'].mT.unflatten(2, (16, 16))
    enlarged = nn.functional.interpolate(maps, (64, 64), mode='bilinear')
    assert torch.allclose(loaded['stages.0.pos_embed'], enlarged.flatten(2).mT)
