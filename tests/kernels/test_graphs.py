import pytest
import torch

import mmdyn
from mmdyn.kernels.graphs import graphed

DGE = dict(granularities=(1, 2, 4))


def test_is_mmdyns():
    assert mmdyn.graphed is graphed


def model_of(make_backbone, name, dge, budget=0.5):
    model = make_backbone(name, img_size=64, dge=dge, out_type='featmap').eval()
    if dge:
        model.set_budget(budget)
    return model


@torch.no_grad()
@pytest.mark.parametrize('dge', [None, DGE])
def test_returns_what_the_model_does_on_a_cpu(dge, make_backbone):
    model = model_of(make_backbone, 'pvt', dge)
    run = graphed(model, torch.empty(2, 3, 64, 64))
    for images in torch.randn(3, 2, 3, 64, 64):
        torch.testing.assert_close(run(images), model(images), rtol=0, atol=0)
    assert not any(x.requires_grad for x in run(images))


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize('dge', [None, DGE])
@pytest.mark.parametrize('name', ['pvt', 'dpvt', 'deit'])
def test_replay_is_the_pass(name, dge, make_backbone):
    """Of inputs other than the recorded one, with weights that changed in place, and with what each image spent."""
    model = model_of(make_backbone, name, dge).cuda()
    run = graphed(model, torch.zeros(2, 3, 64, 64, device='cuda'))
    kept = run(torch.randn(2, 3, 64, 64, device='cuda'))
    before = [x.clone() for x in kept]
    next(model.parameters()).mul_(1.5)
    for images in torch.randn(3, 2, 3, 64, 64, device='cuda'):
        replayed, spent = run(images), model.cost.spent.tolist()
        torch.testing.assert_close(replayed, model(images), rtol=1e-5, atol=1e-5)
        assert spent == model.cost.spent.tolist()
        run = graphed(model, images)  # the pass between took the place of the recorded costs
    torch.testing.assert_close(list(kept), before, rtol=0, atol=0)


@pytest.mark.cuda
def test_replay_does_not_wait(make_backbone):
    run = graphed(model_of(make_backbone, 'pvt', DGE).cuda(), torch.zeros(2, 3, 64, 64, device='cuda'))
    images = torch.randn(2, 3, 64, 64, device='cuda')
    torch.cuda.set_sync_debug_mode('error')
    try:
        run(images)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize(
    'images, message',
    [
        (torch.empty(1, 3, 64, 64), r'an input of shape \(2, 3, 64, 64\), but this one has \(1, 3, 64, 64\)'),
        (torch.empty(2, 3, 64, 64).double(), 'an input of dtype torch.float32, but this one has torch.float64'),
        (torch.empty(2, 3, 64, 64, device='meta'), 'an input of device cpu, but this one has meta'),
    ],
)
def test_other_inputs_are_refused(images, message, make_backbone):
    run = graphed(model_of(make_backbone, 'pvt', DGE), torch.empty(2, 3, 64, 64))
    with pytest.raises(ValueError, match=message):
        run(images)


def test_model_whose_shapes_are_not_known_is_refused(make_backbone):
    with pytest.raises(ValueError, match=r'dge\.0 decides how many queries .* call backbone\.set_budget\(0\.5\)'):
        graphed(make_backbone('deit', dge=DGE).eval(), torch.empty(1, 3, 32, 32))


def test_model_in_training_mode_is_refused(make_backbone):
    with pytest.raises(ValueError, match=r'in training mode: call model\.eval\(\) first'):
        graphed(make_backbone('deit').train(), torch.empty(1, 3, 32, 32))


def test_example_that_is_no_tensor_is_refused(make_backbone):
    with pytest.raises(TypeError, match='example is a tuple: give a tensor'):
        graphed(make_backbone('deit').eval(), (1, 3, 32, 32))
