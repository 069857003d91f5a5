import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from torch.nn.parallel import DistributedDataParallel

import mmdyn  # noqa: F401
from mmdyn.engine import BudgetHook
from mmdyn.models.dge.budget import budget_loss, mean_over_processes

ARCH = dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))
BACKBONE = dict(type='mmdyn.PVT', arch=ARCH, img_size=32, dge=dict(granularities=(1, 2, 4)))


def classifier(**backbone):
    init_default_scope('mmpretrain')
    return MODELS.build(
        dict(
            type='ImageClassifier',
            backbone={**BACKBONE, 'out_type': 'avg_featmap', **backbone},
            head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
        )
    )


def classification_batch(images=4, side=32):
    from mmpretrain.structures import DataSample

    return dict(
        inputs=torch.rand(images, 3, side, side), data_samples=[DataSample().set_gt_label(i % 3) for i in range(images)]
    )


def watch(model, **kwargs):
    hook = BudgetHook(**kwargs)
    hook.before_train(SimpleNamespace(model=model, iter=0))
    return hook


def test_loss_is_the_weighted_squared_distance_from_the_budget():
    torch.manual_seed(0)
    model = classifier().train()
    for stage in model.backbone.stages:
        torch.nn.init.zeros_(stage.dge[0].router.bias)
    watch(model, budget=0.3, weight=2.0)
    losses = model(**classification_batch(), mode='loss')
    beta = model.backbone.cost.query_ratio.mean()
    assert beta < 1
    torch.testing.assert_close(losses['loss_budget'], 2.0 * (beta - 0.3) ** 2)
    torch.testing.assert_close(losses['query_ratio'], beta.detach())
    assert not losses['query_ratio'].requires_grad
    total, log = model.parse_losses(losses)
    torch.testing.assert_close(total, losses['loss'] + losses['loss_budget'])
    assert 'query_ratio' in log


def test_gradient_moves_the_query_ratio_towards_the_budget():
    torch.manual_seed(0)
    model = classifier().train()
    watch(model, budget=0.4, weight=1.0)
    optimizer = torch.optim.Adam(model.backbone.parameters(), lr=3e-3)
    ratios = []
    for _ in range(150):
        losses = model(**classification_batch(8), mode='loss')
        optimizer.zero_grad()
        losses['loss_budget'].backward()
        optimizer.step()
        ratios.append(losses['query_ratio'].item())
    assert ratios[0] > 2 * 0.4
    assert abs(sum(ratios[-50:]) / 50 - 0.4) < 0.05


def test_loss_of_single_layers():
    """Layers that lie as far above the budget as others below it cost nothing together, and each by itself."""
    torch.manual_seed(0)
    model = classifier().train()
    first, second = (stage.dge[0].router for stage in model.backbone.stages)
    for router, bias in ((first, [9.0, -9.0, -9.0]), (second, [-9.0, -9.0, 9.0])):
        router.bias.data.copy_(torch.tensor(bias))
    watch(model, budget=0.5, layer_weight=3.0)
    losses = model(**classification_batch(), mode='loss')
    # Maps of 8 x 8 and 4 x 4 cells: a region of 4 x 4 is all of the second, whose share is no matter of its regions.
    fine, coarse = (layer.query_ratio.mean().item() for layer in model.backbone.cost.layers)
    assert (fine, coarse) == (1.0, 1 / 16)
    assert losses['loss_layers'].item() == pytest.approx(3.0 * 0.5**2)
    assert set(model.parse_losses(losses)[1]) >= {'loss_budget', 'loss_layers'}
    losses['loss_layers'].backward()
    assert first.bias.grad.abs().sum() > 0 and second.bias.grad is None

    larger = classifier(img_size=64).train()
    larger.backbone.load_state_dict(model.backbone.state_dict(), strict=False)
    watch(larger, budget=0.5, layer_weight=3.0)
    losses = larger(**classification_batch(side=64), mode='loss')
    ratios = [layer.query_ratio.mean().item() for layer in larger.backbone.cost.layers]
    assert losses['loss_layers'].item() == pytest.approx(3.0 * sum((ratio - 0.5) ** 2 for ratio in ratios) / 2)


def test_routing_by_layer_leaves_nothing_to_the_loss_of_single_layers():
    model = classifier(dge=dict(granularities=(1, 2, 4), routing='layer')).train()
    watch(model, layer_weight=1.0)
    losses = model(**classification_batch(), mode='loss')
    assert losses['loss_layers'].item() == 0 and 'loss_layers' not in classifier_losses()


def classifier_losses():
    model = classifier().train()
    watch(model)
    return model(**classification_batch(), mode='loss')


def test_evaluation_and_finished_training_are_left_alone():
    model = classifier()
    hook = watch(model)
    batch = classification_batch()
    assert 'loss_budget' not in model.eval()(**batch, mode='loss')
    assert 'loss_budget' in model.train()(**batch, mode='loss')
    hook.after_train(None)
    assert 'loss_budget' not in model(**batch, mode='loss')


def test_passes_without_losses_do_not_enter_the_next_beta():
    model = classifier().train()
    for stage in model.backbone.stages:
        torch.nn.init.zeros_(stage.dge[0].router.bias)
    watch(model)
    model(torch.rand(3, 3, 32, 32), mode='tensor')
    losses = model(**classification_batch(), mode='loss')
    torch.testing.assert_close(losses['query_ratio'], model.backbone.cost.query_ratio.mean().detach())


def test_autocast():
    model = classifier().train()
    watch(model)
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(**classification_batch(), mode='loss')
    model.parse_losses(losses)[0].backward()
    assert losses['loss_budget'].dtype == losses['query_ratio'].dtype == torch.float32
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())


def test_gradient_accumulation():
    from mmengine.optim import OptimWrapper

    model = classifier().train()
    watch(model)
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), accumulative_counts=2)
    optimizer.initialize_count_status(model, 0, 2)
    bias = model.backbone.stages[0].dge[0].router.bias
    before = bias.detach().clone()
    log = model.train_step(classification_batch(), optimizer)
    first = bias.grad.clone()
    assert torch.equal(bias, before) and first.abs().sum() > 0
    torch.testing.assert_close(log['loss_budget'], (log['query_ratio'] - 0.5) ** 2)
    model.train_step(classification_batch(), optimizer)
    assert not torch.equal(bias, before)


def test_detector(detector_config):
    from mmdet.testing import demo_mm_inputs

    init_default_scope('mmdet')
    model = MODELS.build(detector_config).train()
    watch(model)
    data = model.data_preprocessor(demo_mm_inputs(2, [[3, 64, 64], [3, 48, 64]], num_classes=4), True)
    losses = model(**data, mode='loss')
    total, log = model.parse_losses(losses)
    total.backward()
    torch.testing.assert_close(losses['loss_budget'], (losses['query_ratio'] - 0.5) ** 2, check_stride=False)
    assert {'loss_cls', 'loss_bbox', 'loss_budget', 'query_ratio'} <= set(log)


def test_segmentor(segmentor_config):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    init_default_scope('mmseg')
    model = MODELS.build(segmentor_config).train()
    watch(model)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 4, (1, 64, 64)))) for _ in range(2)]
    losses = model(torch.rand(2, 3, 64, 64), samples, mode='loss')
    model.parse_losses(losses)[0].backward()
    assert {'decode.loss_ce', 'loss_budget', 'query_ratio'} <= set(losses)


def scheduled(model, iteration, max_iters=100, **kwargs):
    hook = BudgetHook(**kwargs)
    runner = SimpleNamespace(model=model, iter=iteration, max_iters=max_iters)
    hook.before_train(runner)
    return hook, runner


@pytest.mark.parametrize(
    'schedule, iteration, target',
    [
        ('linear', 0, 1.0),
        ('linear', 10, 0.85),
        ('linear', 25, 0.625),
        ('linear', 40, 0.4),
        ('linear', 99, 0.4),
        # 0.4 + 0.6 * (1 + cos(angle)) / 2 with the angles 45, 60, 90 and 120 degrees
        ('cosine', 0, 1.0),
        ('cosine', 10, 0.9121320),
        ('cosine', 20, 0.7),
        ('cosine', 40, 0.4),
        ('cosine', 99, 0.4),
        ('constant', 0, 0.4),
        ('constant', 99, 0.4),
    ],
)
def test_target_of_an_iteration(schedule, iteration, target):
    """It starts anew for each, as after resuming: nothing but the number of the iteration counts."""
    model = classifier().train()
    scheduled(model, iteration, budget=0.4, share=0.4, schedule=schedule)
    losses = model(**classification_batch(), mode='loss')
    wanted = (losses['query_ratio'] - target) ** 2
    torch.testing.assert_close(losses['loss_budget'], wanted, check_stride=False, rtol=1e-4, atol=1e-6)
    if schedule == 'constant':
        assert 'budget' not in losses
    else:
        assert losses['budget'].item() == pytest.approx(target) and 'budget' in model.parse_losses(losses)[1]


def test_target_moves_with_the_iterations_from_the_start():
    model = classifier().train()
    _, runner = scheduled(model, 0, max_iters=12, budget=0.5, start=0.8, share=0.5, schedule='linear')
    targets = []
    for runner.iter in range(12):
        targets.append(model(**classification_batch(), mode='loss')['budget'].item())
    assert targets == pytest.approx([0.8, 0.75, 0.7, 0.65, 0.6, 0.55, *6 * [0.5]])


def test_layers_that_were_asked_to_be_finest_have_not_collapsed():
    model = classifier().train()
    hub, said = MessageHub('moving budget'), []
    for stage in model.backbone.stages:
        stage.dge[0].router.bias.data[0] = 1e4
    hook, runner = scheduled(model, 0, log_interval=1, patience=2, schedule='linear')
    runner.logger = SimpleNamespace(info=lambda text: None, warning=said.append)
    runner.visualizer, runner.message_hub = SimpleNamespace(add_scalars=lambda *args, **kwargs: None), hub
    for runner.iter in range(43):
        model(**classification_batch(1), mode='loss')
        hook.after_train_iter(runner, 0)
        assert bool(said) == (runner.iter == 42)  # two iterations after the first with the budget
    assert 'granularity 1 in stages.0.blocks.0 (since iteration 41)' in said[0]


def drawing(model, hub='drawn', seed=0, max_iters=100, **kwargs):
    """A hook that draws budgets, and its runner."""
    hook = BudgetHook(budget=(0.25, 1.0), **kwargs)
    runner = SimpleNamespace(
        model=model, iter=0, max_iters=max_iters, seed=seed, message_hub=MessageHub(hub or 'drawn')
    )
    hook.before_train(runner)
    return hook, runner


def run(hook, runner, iterations):
    """Forward passes of a training; the log of each."""
    log = []
    for runner.iter in iterations:
        torch.manual_seed(runner.iter)  # as RandomStateHook does
        hook.before_train_iter(runner, 0)
        losses = runner.model(**classification_batch(8, 64), mode='loss')
        log.append({name: losses[name].item() for name in ('budget', 'price', 'query_ratio', 'loss_budget')})
    return log


def undecided(**backbone):
    """A classifier with 16 and 4 regions, whose routers see the images."""
    model = classifier(img_size=64, **backbone).train()
    for stage in model.backbone.stages:
        torch.nn.init.normal_(stage.dge[0].router.weight)
    return model


def test_budgets_are_drawn_evenly_and_follow_from_seed_and_iteration():
    hook, _ = drawing(classifier())
    budgets = torch.tensor([hook.target(i) for i in range(2000)])
    assert 0.25 <= budgets.min() < 0.26 and 0.99 < budgets.max() < 1
    assert budgets.mean().item() == pytest.approx(0.625, abs=0.02)  # four standard errors
    assert [drawing(classifier())[0].target(i) for i in (7, 99)] == [hook.target(i) for i in (7, 99)]
    assert drawing(classifier(), seed=1)[0].target(7) != hook.target(7)


def test_a_schedule_moves_from_the_start_to_what_is_drawn():
    drawn, (hook, _) = drawing(classifier())[0], drawing(classifier(), share=0.4, schedule='linear')
    assert hook.target(0) == 1
    assert hook.target(10) == pytest.approx(0.75 + drawn.target(10) / 4)
    assert hook.target(40) == drawn.target(40)


def test_the_price_makes_the_budget():
    hook, runner = drawing(undecided())
    log = run(hook, runner, range(60))[10:]  # the first have no price, or that of few batches
    budgets, ratios = (torch.tensor([entry[name] for entry in log]) for name in ('budget', 'query_ratio'))
    # A batch draws 160 gates.
    assert (ratios - budgets).abs().mean() < 0.04 and (ratios - budgets).mean().abs() < 0.015
    hook.after_train(runner)
    assert all(stage.dge[0].router.training_price is None for stage in runner.model.backbone.stages)


def test_loss_holds_what_is_spent_at_no_price_in_the_middle():
    """By hand: probabilities of 1/2, 1/4 and 1/4 for 1, 1/4 and 1/16 of the queries."""
    model = classifier(img_size=64).train()
    for stage in model.backbone.stages:
        torch.nn.init.zeros_(stage.dge[0].router.weight)
        stage.dge[0].router.bias.data = torch.tensor([math.log(2), 0.0, 0.0])
    log = run(*drawing(model, weight=2.0), range(3))
    assert len({entry['budget'] for entry in log}) == 3
    for entry in log:
        assert entry['loss_budget'] == pytest.approx(2 * (1 / 2 + 1 / 16 + 1 / 64 - 0.625) ** 2, rel=1e-4)


def test_a_resumed_training_has_the_price_of_one_that_was_not_killed():
    torch.manual_seed(1)
    model = undecided()
    log = run(*drawing(model, 'whole'), range(6))
    hook, runner = drawing(model, 'part')
    run(hook, runner, range(3))
    hook, resumed = drawing(model, 'resumed')
    resumed.message_hub.load_state_dict(runner.message_hub.state_dict())
    hook.before_train(resumed)
    assert run(hook, resumed, range(3, 6)) == log[3:]


def _distributed_worker(rank, world):
    ratios = [torch.tensor([0.1, 0.4, 0.3]), torch.tensor([0.9])]  # batches of different sizes
    weight = torch.nn.Parameter(torch.tensor(2.0))
    budget_loss(mean_over_processes(weight * ratios[rank]), 0.5).backward()
    dist.all_reduce(weight.grad)  # data parallel training averages the gradients of the processes
    everything = torch.cat(ratios)
    alone = torch.tensor(2.0, requires_grad=True)
    loss = ((alone * everything).mean() - 0.5) ** 2
    loss.backward()
    torch.testing.assert_close(weight.grad / world, alone.grad)
    torch.testing.assert_close(mean_over_processes(2.0 * ratios[rank]), 2.0 * everything.mean())
    of_two = torch.stack([ratios[rank], -ratios[rank]], -1)
    torch.testing.assert_close(mean_over_processes(of_two), torch.stack([everything.mean(), -everything.mean()]))

    torch.manual_seed(rank)
    model = classifier().train()
    hook = watch(model)
    parallel = DistributedDataParallel(model)
    losses = parallel(**classification_batch(2 + rank), mode='loss')
    model.parse_losses(losses)[0].backward()
    betas = [torch.zeros(()) for _ in range(world)]
    dist.all_gather(betas, losses['query_ratio'])
    assert betas[0] == betas[1]
    grads = [torch.zeros_like(model.backbone.stages[0].dge[0].router.bias) for _ in range(world)]
    dist.all_gather(grads, model.backbone.stages[0].dge[0].router.bias.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0
    hook.after_train(None)


def test_beta_is_averaged_over_processes_differentiably(run_distributed):
    run_distributed(_distributed_worker, 2)


@pytest.mark.parametrize('budget', [0, -0.5, 1.01])
def test_budget_out_of_range(budget):
    with pytest.raises(
        ValueError, match=rf'budget={budget}: give a number in \(0, 1\], the share of the cost without DGE'
    ):
        BudgetHook(budget=budget)


@pytest.mark.parametrize('budget', [(0.5, 0.5), (1.0, 0.5), (0.25, 0.5, 1.0)])
def test_range_that_is_none(budget):
    with pytest.raises(ValueError, match='give one, or the least and the greatest to draw from'):
        BudgetHook(budget=budget)


@pytest.mark.parametrize('budget', [(0, 0.5), (0.5, 1.1)])
def test_range_out_of_range(budget):
    with pytest.raises(ValueError, match=r'budget=.*: give a number in \(0, 1\], the share of the cost without DGE'):
        BudgetHook(budget=budget)


def test_range_that_the_granularities_cannot_reach():
    with pytest.raises(ValueError, match=r'budget=1.0 cannot be reached.* to 0\.25.*budget between them, or a finer'):
        drawing(classifier(dge=dict(granularities=(2, 4))))


def test_negative_weight():
    with pytest.raises(ValueError, match=r'weight=-1: give a number in \[0, inf\)'):
        BudgetHook(weight=-1)


def test_model_without_dge():
    with pytest.raises(ValueError, match='found no DGE in the model'):
        watch(classifier(dge=None))


@pytest.mark.parametrize('granularities, budget', [((1, 2), 0.2), ((2, 4), 0.5)])
def test_budget_that_the_granularities_cannot_reach(granularities, budget):
    with pytest.raises(ValueError, match=rf'budget={budget} cannot be reached.*from 0\.\d+ to \d\.\d+'):
        watch(classifier(dge=dict(granularities=granularities)), budget=budget)


def test_the_dense_model_is_within_reach_whatever_its_depth():
    """The sum of the layers' shares may differ from 1 by a rounding error."""
    arch = dict(
        embed_dims=(32, 64, 128, 192),
        depths=(1, 2, 2, 1),
        num_heads=(1, 2, 4, 6),
        mlp_ratios=(4, 4, 4, 4),
        sr_ratios=(4, 2, 1, 1),
    )
    model = classifier(arch=arch, img_size=128, dge=dict(granularities=((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2))))
    scheduled(model, 0, schedule='linear')
    scheduled(model, 0, budget=1.0)


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"schedule='step': choose from \('constant', 'linear', 'cosine'\)"):
        BudgetHook(schedule='step')


@pytest.mark.parametrize('start', [0, 1.5])
def test_start_out_of_range(start):
    with pytest.raises(ValueError, match=rf'start={start}: give a number in \(0, 1\], the share of'):
        BudgetHook(start=start, schedule='linear')


@pytest.mark.parametrize('share', [0, 1, 1.5])
def test_share_that_leaves_nothing(share):
    with pytest.raises(ValueError, match=rf'share={share}: give a number in \(0, 1\), a part of the iterations'):
        BudgetHook(share=share, schedule='linear')


@pytest.mark.parametrize('max_iters', [1, 10])
def test_schedule_that_never_reaches_the_budget(max_iters):
    with pytest.raises(ValueError, match=rf'never reaches budget=0.5: share=0.95 of the {max_iters} it'):
        scheduled(classifier(), 0, max_iters, share=0.95, schedule='cosine')
    scheduled(classifier(), 0, 21, share=0.95, schedule='cosine')


def test_start_that_the_granularities_cannot_reach():
    dge = dict(granularities=(2, 4))
    with pytest.raises(ValueError, match=r'start=1.0 cannot be reached.* to 0\.25.*start between them, or a finer g'):
        scheduled(classifier(dge=dge), 0, budget=0.2, schedule='linear')
    scheduled(classifier(dge=dge), 0, budget=0.2, start=0.25, schedule='linear')
    scheduled(classifier(dge=dge), 0, budget=0.2)
