from types import SimpleNamespace

import pytest
import torch

from mmdyn.engine import GateNoiseHook
from mmdyn.models import PVT

ARCH = dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1))


def training(hook, max_iters=100, dge=True):
    """A runner whose model has two encoders, before its first iteration."""
    model = torch.nn.Sequential()
    model.backbone = PVT(ARCH, img_size=32, dge=dict(granularities=(1, 2, 4)) if dge else None)
    runner = SimpleNamespace(model=model, iter=0, max_iters=max_iters)
    hook.before_train(runner)
    return runner


def scales(hook, runner, iterations):
    """The noise of all encoders in some iterations."""
    found = []
    for runner.iter in iterations:
        hook.before_train_iter(runner, 0)
        noise = {stage.dge[0].noise for stage in runner.model.backbone.stages}
        found.append(noise.pop())
        assert not noise
    return found


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(), [1, 1, 1, 0.5, 0, 0]),
        (dict(begin=0.0, end=1.0), [1, 0.75, 0.6, 0.4, 0.2, 0.01]),
        (dict(begin=0.6, end=0.6), [1, 1, 1, 0, 0, 0]),
    ],
)
def test_the_noise_falls_on_a_line(options, expected):
    hook = GateNoiseHook(**options)
    assert scales(hook, training(hook), (0, 25, 40, 60, 80, 99)) == pytest.approx(expected)


def test_a_resumed_training_goes_on_where_it_was():
    hook = GateNoiseHook()
    assert scales(hook, training(hook), [70]) == pytest.approx([0.25])


def test_without_noise_the_model_chooses_as_in_inference():
    hook = GateNoiseHook()
    runner, images = training(hook), torch.randn(4, 3, 96, 96)
    backbone = runner.model.backbone
    for stage in backbone.stages:
        torch.nn.init.normal_(stage.dge[0].router.weight)
        torch.nn.init.zeros_(stage.dge[0].router.bias)
    choices = []
    for is_training in (True, False):
        scales(hook, runner, [90])
        backbone.train(is_training)(images)
        choices.append([stage.dge[0].decision.choice for stage in backbone.stages])
    for drawn, chosen in zip(*choices):
        assert torch.equal(drawn, chosen) and len(chosen.unique()) > 1


def test_the_model_is_left_as_it_was():
    hook = GateNoiseHook()
    runner = training(hook)
    assert scales(hook, runner, [99]) == [0]
    hook.after_train(runner)
    assert all(stage.dge[0].noise == 1 for stage in runner.model.backbone.stages)


@pytest.mark.parametrize('options', [dict(begin=1.0), dict(begin=-0.1), dict(end=0.0), dict(end=1.5), dict(end='late')])
def test_shares_that_are_none(options):
    with pytest.raises((ValueError, TypeError), match='GateNoiseHook: (begin|end)=.*a part of the iterations'):
        GateNoiseHook(**options)


def test_an_end_before_the_beginning():
    with pytest.raises(ValueError, match='begin=0.9 is behind end=0.5: give shares such as 0.4 and 0.8'):
        GateNoiseHook(0.9, 0.5)


def test_a_model_without_dge():
    with pytest.raises(ValueError, match='GateNoiseHook found no DGE in the model: give its backbone dge='):
        training(GateNoiseHook(), dge=False)
