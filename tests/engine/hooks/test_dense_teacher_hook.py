import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel

from mmdyn.engine import BudgetHook, DenseTeacherHook
from mmdyn.models.cost import CostMeter
from mmdyn.models.stage import run_blocks


def build(config, **backbone):
    return MODELS.build({**config, 'backbone': {**config['backbone'], **backbone}})


def batch(images=4):
    from mmpretrain.structures import DataSample

    return dict(
        inputs=torch.rand(images, 3, 32, 32), data_samples=[DataSample().set_gt_label(i % 3) for i in range(images)]
    )


@pytest.fixture
def dense_of(randomise, tmp_path):
    """The dense model of a config, as random as a trained one, and the file of its weights."""

    def make(config, name='dense.pth'):
        dense = randomise(build(config, dge=None))
        torch.save(dict(state_dict=dense.state_dict()), tmp_path / name)
        return dense.eval(), str(tmp_path / name)

    return make


def watch(model, config, load_from, iteration=0, hub=None, **options):
    """Let a hook watch a model, as a training does that starts from a file."""
    hook = DenseTeacherHook(**options)
    runner = SimpleNamespace(
        model=model,
        iter=iteration,
        message_hub=hub or MessageHub('teacher'),
        cfg=ConfigDict(model=config, load_from=load_from),
    )
    hook.before_train(runner)
    return hook


def slow_distance(features, wanted):
    """Of maps (C, h, w) or vectors (C)."""
    total, count = 0.0, 0
    for one, other in zip(
        features.flatten(1).T if features.ndim > 1 else [features], wanted.flatten(1).T if wanted.ndim > 1 else [wanted]
    ):
        normal = [(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in (one, other)]
        total, count = total + ((normal[0] - normal[1]) ** 2).sum(), count + len(one)
    return total / count


@pytest.mark.parametrize('tau', [1.0, 2.0])
def test_losses_of_a_classifier(tau, classifier_config, dense_of):
    dense, path = dense_of(classifier_config)
    model = build(classifier_config).train()
    watch(model, classifier_config, path, logits=0.7, features=0.3, tau=tau)
    kept = {}
    model.backbone.register_forward_hook(lambda *args: kept.update(features=args[-1]))
    data = batch()
    losses = model(**data, mode='loss')
    with torch.no_grad():
        wanted = dense.extract_feat(data['inputs'])
        logits, targets = model.head(kept['features']), dense.head(wanted)
    divergence = 0.0
    for student, teacher in zip(logits / tau, targets / tau):
        q, p = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (student.tolist(), teacher.tolist()))
        divergence += tau**2 * sum(b * math.log(b / a) for a, b in zip(q, p)) / 4
    assert losses['loss_teacher_logits'].item() == pytest.approx(0.7 * divergence, rel=1e-4)
    distance = sum(slow_distance(a, b) for a, b in zip(kept['features'][0], wanted[0])) / 4
    torch.testing.assert_close(losses['loss_teacher_features'], 0.3 * distance, rtol=1e-4, atol=1e-6)
    total, log = model.parse_losses(losses)
    torch.testing.assert_close(total, sum(value for name, value in losses.items()))
    assert {'loss_teacher_features', 'loss_teacher_logits'} < set(log)


@pytest.fixture(params=['deit', 'lvvit'])
def stages_config(request):
    """A small CF-ViT."""
    numbers = dict(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2)
    head = 'LinearClsHead' if request.param == 'deit' else 'mmdyn.LVViTHead'
    backbone = dict(type='mmdyn.CFViT', arch=dict(family=request.param, **numbers), coarse_size=2, patch_size=8)
    return dict(
        type='mmdyn.CoarseToFineClassifier',
        backbone=dict(backbone, ema_start=1),
        head=dict(type=head, num_classes=3, in_channels=16),
        test_cfg=dict(threshold=0.7),
    )


def plain_of(config, randomise, path):
    """The plain model of a CF-ViT's architecture, built by hand, and the file of its weights."""
    kind, options = ('LVViT', dict(out_type='raw')) if 'LVViT' in config['head']['type'] else ('DeiT', {})
    arch = {name: value for name, value in config['backbone']['arch'].items() if name != 'family'}
    backbone = dict(type=f'mmdyn.{kind}', arch=arch, img_size=32, patch_size=8, **options)
    plain = randomise(MODELS.build(dict(type='mmpretrain.ImageClassifier', backbone=backbone, head=config['head'])))
    torch.save(dict(state_dict=plain.state_dict()), path)
    return plain.eval()


def test_a_plain_model_teaches_both_stages_of_cf_vit(stages_config, randomise, tmp_path):
    """On class tokens and logits; the losses are the means of the two stages."""
    plain = plain_of(stages_config, randomise, tmp_path / 'plain.pth')
    model, data = MODELS.build(stages_config).train(), batch()
    watch(model, stages_config, str(tmp_path / 'plain.pth'), logits=0.7, features=0.3)
    losses = model(**data, mode='loss')
    with torch.no_grad():
        wanted = plain.extract_feat(data['inputs'])
        stages = model.backbone(data['inputs'])
        log_p = plain.head(wanted).log_softmax(-1)
        expected = [(log_p.exp() * (log_p - model.head((out,)).log_softmax(-1))).sum() / 4 for out in stages]
    torch.testing.assert_close(losses['loss_teacher_logits'], 0.7 * sum(expected) / 2, rtol=1e-4, atol=1e-6)
    tokens = [out if out.ndim == 2 else out[:, 0] for out in (*stages, wanted[0])]
    distances = [sum(slow_distance(a, b) for a, b in zip(of_stage, tokens[2])) / 4 for of_stage in tokens[:2]]
    torch.testing.assert_close(losses['loss_teacher_features'], 0.3 * sum(distances) / 2, rtol=1e-4, atol=1e-6)
    model.parse_losses(losses)[0].backward()
    assert torch.isfinite(model.backbone.coarse_pos_embed.grad).all()


def test_a_checkpoint_of_cf_vit_is_none_of_the_plain_model(stages_config, tmp_path):
    model = MODELS.build(stages_config)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'stages.pth')
    with pytest.raises(ValueError, match='is no checkpoint of the plain model'):
        watch(model.train(), stages_config, str(tmp_path / 'stages.pth'))


def test_nothing_is_to_be_learnt_where_the_model_is_the_dense_one(classifier_config, dense_of, encoders):
    _, path = dense_of(classifier_config)
    model = build(classifier_config).train()
    model.load_state_dict(torch.load(path)['state_dict'], strict=False)
    for encoder, side in zip(encoders(model), (2, 1)):
        encoder.forced = torch.zeros(side, side, dtype=torch.long)
    watch(model, classifier_config, path)
    losses = model(**batch(), mode='loss')
    assert losses['loss_teacher_features'] < 1e-6 and losses['loss_teacher_logits'].abs() < 1e-6


@pytest.mark.parametrize('framework', ['mmdet', 'mmseg'])
def test_feature_maps_of_any_dense_task(framework, request, dense_of):
    config = request.getfixturevalue('detector_config' if framework == 'mmdet' else 'segmentor_config')
    init_default_scope(framework)
    dense, path = dense_of(config)
    model = build(config).train()
    watch(model, config, path, features=0.5)
    if framework == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        data = model.data_preprocessor(demo_mm_inputs(2, [[3, 64, 64], [3, 48, 64]], num_classes=4), True)
    else:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 4, (1, 64, 64)))) for _ in range(2)]
        data = dict(inputs=torch.rand(2, 3, 64, 64), data_samples=samples)
    kept = {}
    model.neck.register_forward_hook(lambda *args: kept.update(maps=args[-1]))
    losses = model(**data, mode='loss')
    assert 'loss_teacher_logits' not in losses
    with torch.no_grad():
        wanted = dense.extract_feat(data['inputs'])
    levels = [sum(slow_distance(a, b) for a, b in zip(*level)) / 2 for level in zip(kept['maps'], wanted, strict=True)]
    assert len(levels) == 2
    torch.testing.assert_close(losses['loss_teacher_features'], 0.5 * sum(levels) / 2, rtol=1e-4, atol=1e-6)
    model.parse_losses(losses)[0].backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_weights_of_zero_leave_a_loss_out(classifier_config, dense_of):
    _, path = dense_of(classifier_config)
    for left, option in (('loss_teacher_features', 'logits'), ('loss_teacher_logits', 'features')):
        model = build(classifier_config).train()
        watch(model, classifier_config, path, **{option: 0.0})
        assert [name for name in model(**batch(), mode='loss') if 'teacher' in name] == [left]


def test_the_teacher_is_no_part_of_the_model_and_its_costs(classifier_config, dense_of):
    _, path = dense_of(classifier_config)
    model = build(classifier_config).train()
    names, meters = list(model.state_dict()), [CostMeter(training) for training in (True, False)]
    hook = watch(model, classifier_config, path)
    losses = model(**batch(), mode='loss')
    assert list(model.state_dict()) == names
    assert [len(meter.take()) for meter in meters] == [1, 0]
    losses['loss_teacher_features'].backward()
    assert all(weight.grad is None for weight in hook._teacher.parameters())
    assert all(weight.grad is not None for name, weight in model.named_parameters() if 'stages' in name)


def test_the_teacher_runs_as_in_inference(classifier_config, dense_of):
    """So that the kernels, which refuse gradients and modules in training, may stand in for its parts."""
    _, path = dense_of(classifier_config)
    model, seen = build(classifier_config).train(), []
    hook = watch(model, classifier_config, path)
    teacher = hook._teacher.backbone
    teacher.register_forward_hook(lambda *args: seen.append((torch.is_grad_enabled(), args[0].training)))
    model(**batch(), mode='loss')
    assert seen == [(False, False)]
    stage = teacher.stages[0]
    with torch.no_grad():
        reasons = run_blocks.why_not(stage, torch.rand(1, 64, 16), (8, 8))
    student = run_blocks.why_not(model.backbone.stages[0], torch.rand(1, 64, 16), (8, 8))
    assert all('training' not in reason and 'gradients' not in reason for reason in reasons.values())
    assert len(student) == len(run_blocks.kernels) and all('gradients' in reason for reason in student.values())


def test_evaluation_and_finished_training_are_left_alone(classifier_config, dense_of):
    _, path = dense_of(classifier_config)
    model = build(classifier_config)
    hook = watch(model, classifier_config, path)
    assert 'loss_teacher_features' not in model.eval()(**batch(), mode='loss')
    assert 'loss_teacher_features' in model.train()(**batch(), mode='loss')
    hook.after_train(None)
    assert 'loss_teacher_features' not in model(**batch(), mode='loss')
    assert not model.backbone._forward_hooks


def test_autocast(classifier_config, dense_of):
    _, path = dense_of(classifier_config)
    model = build(classifier_config).train()
    watch(model, classifier_config, path)
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(**batch(), mode='loss')
    assert losses['loss_teacher_features'].dtype == losses['loss_teacher_logits'].dtype == torch.float32
    model.parse_losses(losses)[0].backward()
    assert all(torch.isfinite(weight.grad).all() for name, weight in model.named_parameters() if 'router' not in name)


def test_gradient_accumulation_is_that_of_the_mean(classifier_config, dense_of):
    _, path = dense_of(classifier_config)
    grads = []
    for counts, batches in ((2, 2), (1, 1)):
        torch.manual_seed(3)
        model = build(classifier_config, dge=dict(granularities=(1,))).train()
        watch(model, classifier_config, path)
        data = batch(8)
        optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), accumulative_counts=counts)
        optimizer.initialize_count_status(model, 0, counts)
        before = model.head.fc.weight.detach().clone()
        for inputs, samples in zip(
            data['inputs'].chunk(batches), (data['data_samples'][: 8 // batches], data['data_samples'][8 // batches :])
        ):
            model.train_step(dict(inputs=inputs, data_samples=samples), optimizer)
        grads.append(before - model.head.fc.weight.detach())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_the_given_checkpoint_comes_before_the_one_that_the_training_started_from(classifier_config, dense_of):
    _, start = dense_of(classifier_config)
    dense, given = dense_of(classifier_config, 'given.pth')
    hook = watch(build(classifier_config), classifier_config, start, checkpoint=given)
    assert torch.equal(hook._teacher.head.fc.weight, dense.head.fc.weight)


class Images(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b', 'c'))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample

        return dict(inputs=torch.rand(3, 32, 32), data_samples=DataSample().set_gt_label(index % 3))


def runner_of(model, work_dir, epochs, load_from=None, resume=False):
    return Runner(
        model,
        work_dir=str(work_dir),
        default_scope='mmpretrain',
        log_level='ERROR',
        load_from=load_from,
        resume=resume,
        train_dataloader=dict(dataset=Images(), batch_size=4, sampler=dict(type='DefaultSampler', shuffle=True)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3), accumulative_counts=2),
        custom_hooks=[
            dict(type='EMAHook'),
            dict(type='mmdyn.DenseTeacherHook'),
            dict(type='mmdyn.BudgetHook', share=0.2, schedule='linear'),
        ],
        experiment_name=f'{work_dir}{resume}'.replace('/', '-'),
        cfg=dict(model=model, load_from=load_from),
    )


def test_a_resumed_training_has_the_same_teacher(classifier_config, dense_of, tmp_path):
    dense, path = dense_of(classifier_config)
    runner = runner_of(classifier_config, tmp_path / 'run', 1, load_from=path)
    runner.train()
    saved = torch.load(tmp_path / 'run/epoch_1.pth', weights_only=False)
    own = set(build(classifier_config).state_dict())
    assert set(saved['state_dict']) == own and set(saved['ema_state_dict']) - {'steps'} == {f'module.{n}' for n in own}
    assert len(saved['optimizer']['param_groups'][0]['params']) == len([*runner.model.parameters()])
    # The start is not named any more.
    again = runner_of(classifier_config, tmp_path / 'run', 2, resume=True)
    teachers = []
    (hook,) = (hook for hook in again.hooks if isinstance(hook, DenseTeacherHook))
    after = hook.after_train
    hook.after_train = lambda runner: (teachers.append(hook._teacher), after(runner))
    again.train()
    assert again.iter == 4 and torch.equal(teachers[0].head.fc.weight, dense.head.fc.weight)
    assert not torch.equal(again.model.head.fc.weight, dense.head.fc.weight)
    assert 'loss_teacher_features' in str(list(again.message_hub.log_scalars))


def test_without_a_checkpoint(classifier_config):
    with pytest.raises(
        ValueError, match="starts from no checkpoint.*write load_from='<checkpoint of the dense model>'"
    ):
        watch(build(classifier_config), classifier_config, None)


def test_checkpoint_of_another_architecture(classifier_config, dense_of):
    other = dict(classifier_config['backbone'], arch=dict(classifier_config['backbone']['arch'], depths=(1, 2)))
    _, path = dense_of(dict(classifier_config, backbone=other))
    with pytest.raises(
        ValueError,
        match=rf'{re.escape(path)} is no checkpoint of the plain model. Give one of the '
        r'same architecture[^$]*another architecture than this PVT',
    ):
        watch(build(classifier_config), classifier_config, path)


def test_checkpoint_of_other_classes(classifier_config, dense_of):
    _, path = dense_of(dict(classifier_config, head=dict(classifier_config['head'], num_classes=5)))
    with pytest.raises(ValueError, match=r'is no checkpoint of the plain model[^$]*size mismatch for head.fc.weight'):
        watch(build(classifier_config), classifier_config, path)


def test_checkpoint_of_the_backbone_alone(classifier_config, dense_of, tmp_path):
    dense, _ = dense_of(classifier_config)
    state = {name: value for name, value in dense.state_dict().items() if name.startswith('backbone')}
    torch.save(dict(state_dict=state), tmp_path / 'backbone.pth')
    with pytest.raises(ValueError, match=r'with neck and heads\.[^$]*missing keys in source state_dict: head.fc'):
        watch(build(classifier_config), classifier_config, str(tmp_path / 'backbone.pth'))


def test_model_without_dge(classifier_config):
    with pytest.raises(ValueError, match='found no DGE and no CFViT in the model, which then is its own dense twin'):
        watch(build(classifier_config, dge=None), classifier_config, 'x.pth')


def test_model_that_no_config_tells_of(classifier_config):
    model = build(classifier_config)
    with pytest.raises(ValueError, match='from the config of the model, but the Runner got a ImageClassifier'):
        watch(model, model, 'x.pth')


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(logits=-1.0), r'logits=-1.0: give a number in \[0, inf\), the weight of a loss'),
        (dict(features=-0.5), r'features=-0.5: give a number in \[0, inf\), the weight of a loss'),
        (dict(logits=0.0, features=0.0), 'one has to be greater than 0'),
    ],
)
def test_weights_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        DenseTeacherHook(**options)


@pytest.mark.parametrize('tau', [0, -1])
def test_temperature_that_is_none(tau):
    with pytest.raises(ValueError, match=rf'tau={tau}: give a number in \(0, inf\), the temperature'):
        DenseTeacherHook(tau=tau)


def _distributed_worker(rank, world):
    from pathlib import Path
    from tempfile import gettempdir

    config = dict(
        type='ImageClassifier',
        head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
        backbone=dict(
            type='mmdyn.DeiT',
            img_size=32,
            patch_size=8,
            dge=dict(granularities=(1, 2)),
            arch=dict(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2),
        ),
    )
    init_default_scope('mmpretrain')
    path = Path(gettempdir()) / f'dense-{dist.get_rank()}-of-{id(config)}.pth'
    torch.manual_seed(0)
    torch.save(dict(state_dict=build(config, dge=None).state_dict()), path)
    model = build(config).train()
    watch(model, config, str(path))
    path.unlink()
    parallel = DistributedDataParallel(model)
    torch.manual_seed(rank)
    BudgetHook().before_train(SimpleNamespace(model=model, iter=0))
    losses = parallel(**batch(2), mode='loss')
    model.parse_losses(losses)[0].backward()
    for weight in model.parameters():
        grads = [torch.zeros_like(weight) for _ in range(world)]
        dist.all_gather(grads, weight.grad)
        assert torch.equal(*grads)


def test_distributed(run_distributed):
    run_distributed(_distributed_worker, 2)
