from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample

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
    hook.before_train(SimpleNamespace(model=model, epoch=2, iter=iteration, train_loop=None, val_loop=None))
    return model, hook


SAMPLES = [SimpleNamespace(img_path='a.png'), SimpleNamespace(img_path='b.png')]


def test_finite_losses_pass():
    model, _ = watched(dict(loss=torch.tensor(1.0), loss_rpn=[torch.tensor(2.0)], accuracy=torch.tensor(float('nan'))))
    assert model(torch.zeros(1), data_samples=SAMPLES)['loss'] == 1


def test_names_loss_iteration_and_images():
    model, _ = watched(
        dict(loss_cls=torch.tensor(1.0), loss_rpn=[torch.tensor(float('nan')), torch.tensor(0.0)]), iteration=7
    )
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


@pytest.fixture
def classifier(backbone_config):
    backbone = backbone_config('pvt', out_type='cls_token')
    return MODELS.build(
        dict(type='ImageClassifier', backbone=backbone, head=dict(type='LinearClsHead', num_classes=2, in_channels=24))
    )


def loop(*classes):
    return SimpleNamespace(dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes=classes))))


def test_images_that_are_too_small(classifier):
    hook, runner = LossGuardHook(), SimpleNamespace(model=classifier)
    batch = dict(data_samples=[DataSample(metainfo=dict(img_path=name)) for name in ('a.png', 'b.png')])
    hook.before_run(runner)
    hook.before_val_iter(runner, 0, batch)
    classifier(torch.rand(2, 3, 8, 8))
    with pytest.raises(
        ValueError, match='Images of 7 x 9 pixels are too small for the PVT, which needs 8 x 8: .* Images: a.png, b.png'
    ):
        classifier(torch.rand(2, 3, 7, 9))
    hook.after_run(runner)
    with pytest.raises(ValueError, match='^((?!a.png).)*$'):
        classifier(torch.rand(2, 3, 7, 9))


def test_data_of_more_classes(classifier):
    few, many = loop('cat', 'dog'), loop('cat', 'dog', 'owl')
    runner = SimpleNamespace(model=classifier, train_loop=few, val_loop=few, test_loop=many)
    LossGuardHook().before_train(runner)
    for check, loops in (
        ('before_train', dict(train_loop=many)),
        ('before_train', dict(val_loop=many)),
        ('before_test', {}),
    ):
        with pytest.raises(ValueError, match="has 3 classes, the last of them 'owl'"):
            getattr(LossGuardHook(), check)(SimpleNamespace(**{**vars(runner), **loops}))
