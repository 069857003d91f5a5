from itertools import pairwise

import pytest
import torch
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmdyn.engine import FrozenStartHook

DIM = 4


class Model(nn.Module):
    """With a router and a head beside what waits."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict(dict(block=nn.Linear(DIM, DIM), router=nn.Linear(DIM, DIM)))
        self.head = nn.Linear(DIM, 1)
        self.seen = []

    def train_step(self, data, optim_wrapper):
        self.seen.append({name: weight.detach().clone() for name, weight in self.named_parameters()})
        loss = self.head(self.backbone['router'](self.backbone['block'](data))).pow(2).mean()
        optim_wrapper.update_params(loss)
        return dict(loss=loss)


def runner_of(tmp_path, hook, max_iters=6, resume=False, is_grouped=True):
    optimizer = dict(type='AdamW', lr=0.1, weight_decay=0.5)
    return Runner(
        model=Model(),
        work_dir=str(tmp_path),
        train_dataloader=DataLoader(torch.randn(60, DIM), batch_size=2),
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        optim_wrapper=dict(optimizer=optimizer, paramwise_cfg=dict(bias_decay_mult=0.0) if is_grouped else None),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, end=6, by_epoch=False),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)),
        custom_hooks=[hook],
        resume=resume,
        default_scope='mmengine',
        log_level='ERROR',
    )


def changes(model):
    """In which iterations the parameters of each name changed."""
    states = [*model.seen, {name: weight.detach() for name, weight in model.named_parameters()}]
    return {
        name: [not torch.equal(before[name], after[name]) for before, after in pairwise(states)] for name in states[0]
    }


def test_only_routers_and_heads_learn_in_the_first_iterations(tmp_path):
    """Weight decay waits, too; then all learn at the rates of the schedule."""
    runner = runner_of(tmp_path, FrozenStartHook(iters=4))
    runner.train()
    for name, changed in changes(runner.model).items():
        assert changed == ([False] * 4 + [True] * 2 if 'block' in name else [True] * 6)
    plain = runner_of(tmp_path / 'plain', dict(type='IterTimerHook'))
    plain.train()
    rates = [[group['lr'] for group in r.optim_wrapper.param_groups] for r in (runner, plain)]
    assert rates[0] == rates[1] and rates[0][0] > 0


def test_the_number_of_the_iteration_counts_after_resuming(tmp_path):
    runner_of(tmp_path, FrozenStartHook(iters=4), max_iters=3).train()
    runner = runner_of(tmp_path, FrozenStartHook(iters=4), resume=True)
    runner.train()
    assert changes(runner.model)['backbone.block.weight'] == [False, True, True]


def test_names_of_ones_own(tmp_path):
    runner = runner_of(tmp_path, FrozenStartHook(iters=6, trained='block'))
    runner.train()
    assert {name for name, changed in changes(runner.model).items() if any(changed)} == {
        'backbone.block.weight',
        'backbone.block.bias',
    }


def test_one_group_for_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match='parameters that wait and that learn in one group.*paramwise_cfg'):
        runner_of(tmp_path, FrozenStartHook(iters=1), is_grouped=False).train()


def test_names_that_no_parameter_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trained=\('gate',\) are in no name .* such as backbone.block.weight"):
        runner_of(tmp_path, FrozenStartHook(iters=1, trained=['gate'])).train()


@pytest.mark.parametrize('iters', [0, -1, 0.5, None, 'all'])
def test_iterations_are_checked(iters):
    with pytest.raises(ValueError, match=r'iters=.*: give an integer >= 1, a number of iterations'):
        FrozenStartHook(iters=iters)


@pytest.mark.parametrize('trained', [3, [3]])
def test_names_are_checked(trained):
    with pytest.raises(TypeError, match=r"trained=3: give parts of names, e\.g\. \('\.router', 'head'\)"):
        FrozenStartHook(iters=1, trained=trained)
