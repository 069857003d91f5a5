import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MessageHub

from mmdyn.engine import BudgetHook
from mmdyn.engine.collapse import CollapseWatch, count_choices, look
from mmdyn.models import PVT

ARCH = dict(embed_dims=(16, 32), depths=(2, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))


@pytest.fixture
def backbone(encoders):
    """All regions of the first layer choose granularity 4, half of the images of the others 1 and half 2."""
    model = PVT(ARCH, img_size=32, dge=dict(granularities=(1, 2, 4), routing='layer'))
    for number, encoder in enumerate(encoders(model)):
        torch.nn.init.zeros_(encoder.router.weight)
        encoder.router.bias.data = torch.tensor([0.0, 0.0, 1e4 if number == 0 else -1e4])
    return model


def test_count_choices():
    assert count_choices(torch.tensor([[[0, 2], [2, 2]], [[1, 0], [2, 0]]]), 4).tolist() == [3, 1, 4, 0]


def test_look(backbone, encoders):
    backbone.train()(torch.rand(6, 3, 32, 32))
    seen = look([backbone])
    assert list(seen) == ['stages.0.blocks.0', 'stages.0.blocks.1', 'stages.1.blocks.0']
    assert seen['stages.0.blocks.0'] == (1 / 16, {1: 0, 2: 0, 4: 1}, 0)
    ratio, shares, within = seen['stages.0.blocks.1']
    assert within == 0
    fine = sum(choice.flatten()[0].item() == 0 for choice in encoders(backbone)[1].decision.choice) / 6
    assert shares == pytest.approx({1: fine, 2: 1 - fine, 4: 0})
    assert ratio == pytest.approx(fine + (1 - fine) / 4)


def test_look_tells_how_much_of_the_choice_varies_within_images():
    """Shares of 1/4, 1/4, 3/4 and 3/4 of the regions: 3/16 within images of 1/4 in all, whatever the gates drew."""
    model = PVT(dict(ARCH, depths=(1, 1)), img_size=32, dge=dict(granularities=(1, 2, 4))).train()
    model(torch.rand(4, 3, 32, 32))
    finest, logits = torch.tensor([1, 1, 3, 3])[:, None] > torch.arange(4), torch.zeros(4, 2, 2, 3)
    logits[..., 0] = torch.where(finest.view(4, 2, 2), 1.0, -1.0)
    encoder = model.stages[0].dge[0]
    encoder.decision = encoder.decision._replace(logits=logits)
    assert look([model])['stages.0.blocks.0'].within_images == pytest.approx(3 / 4)


def test_warns_once_of_each_layer_after_long():
    watch = CollapseWatch(patience=200)
    uneven, even = {1: 0.995, 2: 0.005}, {1: 0.5, 2: 0.5}
    said = {
        i: watch.warnings(i, dict(a=uneven, b=even if i == 100 else uneven, c=even, d={2: 1.0}))
        for i in range(100, 600, 100)
    }
    assert [bool(said[iteration]) for iteration in said] == [False, False, True, True, False]
    assert (
        'for at least 200 iterations 99% or more of the regions chose granularity 1 in a (since iteration 100)'
        in said[300][0]
    )
    assert 'chose granularity 1 in b (since iteration 200)' in said[400][0] and ' a ' not in said[400][0]


@pytest.mark.parametrize(
    'granularity, advice',
    [
        (1, 'Lower budget or raise weight of BudgetHook'),
        (2, 'Raise budget or lower weight of BudgetHook'),
        (0, 'Raise budget or lower weight of BudgetHook'),
    ],
)
def test_advice(granularity, advice):
    watch, share = CollapseWatch(1), {phi: float(phi == granularity) for phi in (0, 1, 2)}
    assert not watch.warnings(1, dict(a=share, b=share))
    (said,) = watch.warnings(2, dict(a=share, b=share))
    assert said.startswith('All layers with DGE have collapsed') and advice in said


def test_another_granularity_or_a_recovery_begins_anew():
    watch = CollapseWatch(patience=100)
    for iteration, shares in enumerate(({1: 1.0, 2: 0.0}, {1: 0.0, 2: 1.0}, {1: 0.9, 2: 0.1}, {1: 0.0, 2: 1.0})):
        assert not watch.warnings(100 * iteration, dict(a=shares))
    assert 'since iteration 300' in watch.warnings(400, dict(a={1: 0.0, 2: 1.0}))[0]
    assert not watch.warnings(500, dict(a={1: 0.9, 2: 0.1}))
    assert not watch.warnings(600, dict(a={1: 0.0, 2: 1.0}))
    assert 'since iteration 600' in watch.warnings(700, dict(a={1: 0.0, 2: 1.0}))[0]


def test_the_hook_tells_the_log_the_visualizer_and_the_next_run(backbone, caplog):
    logger = logging.getLogger('test_collapse')
    hub, scalars = MessageHub.get_instance('test_collapse'), {}
    runner = SimpleNamespace(
        model=backbone.train(),
        iter=0,
        logger=logger,
        message_hub=hub,
        visualizer=SimpleNamespace(add_scalars=lambda values, step: scalars.setdefault(step, {}).update(values)),
    )

    def train(begin, end):
        hook = BudgetHook(log_interval=10, patience=20)
        hook.before_train(runner)
        for runner.iter in range(begin, end):
            if (runner.iter + 1) % 10 == 0:
                backbone(torch.rand(4, 3, 32, 32))
            hook.after_train_iter(runner, 0)
        hook.after_train(runner)

    with caplog.at_level(logging.INFO, 'test_collapse'):
        train(0, 20)
    assert list(scalars) == [10, 20] and scalars[10]['query_ratio/stages.0.blocks.0'] == 1 / 16
    assert scalars[10]['within_images/stages.0.blocks.0'] == 0
    assert [record.levelname for record in caplog.records] == ['INFO', 'INFO']
    assert (
        'query_ratio by layer in iteration 10 (share of its choice that varies within images): '
        'stages.0.blocks.0 0.062 (0.00), stages.0.'
    ) in caplog.records[0].message
    caplog.clear()
    state = hub.state_dict()
    hub.update_info('collapse', {})
    hub.load_state_dict(state)
    with caplog.at_level(logging.INFO, 'test_collapse'):
        train(20, 40)
    (warning,) = (record.message for record in caplog.records if record.levelname == 'WARNING')
    assert 'chose granularity 4 in stages.0.blocks.0 (since iteration 10)' in warning and 'blocks.1' not in warning


@pytest.mark.parametrize('name, value', [('log_interval', 0), ('patience', -1), ('patience', 1.5)])
def test_intervals_that_are_none(name, value):
    with pytest.raises(ValueError, match=f'{name}={value}: give an integer >= 1, a number of iterations'):
        BudgetHook(**{name: value})


def _worker(rank, world):
    model = PVT(ARCH, img_size=32, dge=dict(granularities=(1, 2), routing='layer'))
    for stage in model.stages:
        for encoder in stage.dge:
            torch.nn.init.zeros_(encoder.router.weight)
            encoder.router.bias.data = torch.tensor([1e4, 0.0] if rank == 0 else [0.0, 1e4])
    model.train()(torch.rand(1 + 2 * rank, 3, 32, 32))
    # One image that is fine everywhere, and three that are nowhere: nothing varies within an image.
    assert all(seen == ((1 + 3 / 4) / 4, {1: 1 / 4, 2: 3 / 4}, 0) for seen in look([model]).values())


def test_images_of_all_processes_count(run_distributed):
    run_distributed(_worker, 2)
