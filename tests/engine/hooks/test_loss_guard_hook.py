from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel

from mmdyn.engine import LossGuardHook


class Model(BaseModel):

    def __init__(self, losses):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.losses = losses

    def forward(self, inputs, data_samples=None, mode='loss'):
        return self.losses


def watched(losses, interval=1, iteration=0):
    model = Model(losses)
    hook = LossGuardHook(interval)
    hook.before_train(SimpleNamespace(model=model, epoch=2, iter=iteration))
    return model, hook


SAMPLES = [SimpleNamespace(img_path='a.png'), SimpleNamespace(img_path='b.png')]


def test_finite_losses_pass():
    model, _ = watched(dict(loss=torch.tensor(1.), loss_rpn=[torch.tensor(2.)], accuracy=torch.tensor(float('nan'))))
    assert model(torch.zeros(1), data_samples=SAMPLES)['loss'] == 1


def test_names_loss_iteration_and_images():
    model, _ = watched(dict(loss_cls=torch.tensor(1.), loss_rpn=[torch.tensor(float('nan')), torch.tensor(0.)]),
                       iteration=7)
    with pytest.raises(ValueError, match=r'epoch 3, iteration 8: loss_rpn is nan.*still finite.*Images: a.png, b.png'):
        model(torch.zeros(1), data_samples=SAMPLES)


def test_names_the_first_spoilt_weight():
    model, _ = watched(dict(loss=torch.tensor(float('inf'))))
    model.weight.data.fill_(float('nan'))
    with pytest.raises(ValueError, match='loss is inf.*no longer finite, first weight'):
        model(torch.zeros(1))


def test_interval_evaluation_and_end_of_training():
    nan = dict(loss=torch.tensor(float('nan')))
    watched(nan, interval=2, iteration=0)[0](torch.zeros(1))
    with pytest.raises(ValueError, match='loss is nan'):
        watched(nan, interval=2, iteration=1)[0](torch.zeros(1))
    watched(nan)[0].eval()(torch.zeros(1))
    model, hook = watched(nan)
    hook.after_train(None)
    model(torch.zeros(1))
