from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import Waits

import mmdyn
from mmdyn.kernels.graphs import Bounded, Graphed, graphed

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


NAMES = ['pvt', 'dpvt', 'deit']


@pytest.fixture(params=NAMES)
def free(request, make_backbone):
    """A model whose routers decide, in a precision that is computed in plain PyTorch."""
    return model_of(make_backbone, request.param, DGE, budget=None).double()


@torch.no_grad()
@pytest.mark.parametrize('margin, exceeded', [(1.0, 0), (0.0, 0), (-0.01, 1)])
def test_bounded_pass_is_the_pass(margin, exceeded, free):
    """With as many places as the images need, and run again with less."""
    images = torch.randn(3, 3, 64, 64, dtype=torch.double)
    expected, cost = free(images), free.cost
    run = Bounded(free, images, margin)
    torch.testing.assert_close(run(images), expected, rtol=1e-9, atol=1e-9)
    assert run.exceeded == exceeded and torch.equal(free.cost.spent, cost.spent)
    assert all(encoder.bound is None for encoder in run.shares)


@torch.no_grad()
def test_a_bound_is_for_each_time_that_a_layer_runs(make_backbone):
    """Also where the last time had places enough."""
    model = model_of(make_backbone, 'deit', DGE, budget=None).double()
    images = torch.randn(8, 1, 3, 64, 64, dtype=torch.double).unbind()
    spent = [model(x) and model.cost.query_ratio.item() for x in images]
    least, most = images[spent.index(min(spent))], images[spent.index(max(spent))]
    run = Bounded(model, least, 0.0)
    run.model = lambda x: (model(x), model(least))
    torch.testing.assert_close(run(most)[0], model(most), rtol=1e-9, atol=1e-9)
    assert run.exceeded == 1


@torch.no_grad()
@pytest.mark.parametrize('budget', [None, 0.5])
def test_a_bounded_pass_waits_once(budget, free):
    """Behind all layers; with an exact budget it does not."""
    free.set_budget(budget)
    run = Bounded(free.float(), torch.randn(2, 3, 64, 64), 0.1)
    assert bool(run.shares) == (budget is None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: torch.empty_like(weight, device='cuda') for name, weight in free.named_parameters()}
        run.model = lambda x: torch.func.functional_call(free, weights, x)
        with Waits() as waits:
            output, surplus = run.run(torch.empty(2, 3, 64, 64, device='cuda'))
            assert output[0].device.type == 'cuda' and waits.reads == 0
            assert not run.is_exceeded(surplus) and waits.reads == (budget is None)


class Recorder:
    """In place of torch.cuda, where there is none; a replay finds the outputs that were recorded."""

    Stream = current_stream = lambda *args: SimpleNamespace(wait_stream=lambda other: None)
    stream = graph = staticmethod(lambda what: nullcontext())
    CUDAGraph = staticmethod(lambda: SimpleNamespace(replay=lambda: None))


class OnGPU(torch.Tensor):
    """A tensor that says so, but not its copies."""

    is_cuda = True

    def clone(self):
        return self.as_subclass(torch.Tensor).clone()


@torch.no_grad()
def test_what_is_recorded_and_replayed(free, monkeypatch):
    """Without a GPU: the output and the cost of the recording, and the model's own where places were missing."""
    for name in ('Stream', 'current_stream', 'stream', 'graph', 'CUDAGraph'):
        monkeypatch.setattr(torch.cuda, name, getattr(Recorder, name))
    first, other = torch.randn(2, 2, 3, 64, 64, dtype=torch.double).unbind()
    expected, spent, of_other = free(first), free.cost.spent, free(other)
    run = Graphed(free, first.as_subclass(OnGPU), 0.0)
    assert run.exceeded == 0
    free(other)
    found = run(first)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(free.cost.spent, spent)
    run._surplus.fill_(1)
    torch.testing.assert_close(run(other), of_other)
    assert run.exceeded == 1 and not torch.equal(free.cost.spent, spent)


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize('dge', [None, DGE])
@pytest.mark.parametrize('name', NAMES)
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


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize('name', NAMES)
def test_replay_with_bounds(name, make_backbone):
    """Is the pass, whether there are places enough or not, and waits once."""
    model = model_of(make_backbone, name, DGE, budget=None).cuda()
    images, results = torch.randn(16, 2, 3, 64, 64, device='cuda').unbind(), []
    for margin in (0.0, 1.0):
        run = graphed(model, images[0], margin)
        for x in images:
            replayed, spent = run(x), model.cost.spent.tolist()
            torch.testing.assert_close(replayed, model(x), rtol=1e-5, atol=1e-5)
            assert spent == model.cost.spent.tolist()
        results.append(run.exceeded)
    assert 0 < results[0] < 16 and results[1] == 0
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with pytest.warns(UserWarning, match='synchronizing') as warnings:
            run(images[0])
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len([warning for warning in warnings if 'synchronizing' in str(warning.message)]) == 1


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
    model = make_backbone('deit', dge=DGE).eval()
    with pytest.raises(
        ValueError, match=r'dge\.0 decides how many queries .* call backbone\.set_budget\(0\.5\).* or give margin=0\.1'
    ):
        graphed(model, torch.empty(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r'margin=2: give a number in \[0, 1\], the share of the dense queries'):
        graphed(model, torch.empty(1, 3, 32, 32), 2)


def test_model_with_a_margin_runs_on_a_cpu(make_backbone):
    model, images = model_of(make_backbone, 'pvt', DGE, budget=None), torch.randn(2, 3, 64, 64)
    run = graphed(model, images, 0.1)
    with torch.no_grad():
        torch.testing.assert_close(run(images), model(images), rtol=0, atol=0)
    assert run.exceeded == 0


def test_model_in_training_mode_is_refused(make_backbone):
    with pytest.raises(ValueError, match=r'in training mode: call model\.eval\(\) first'):
        graphed(make_backbone('deit').train(), torch.empty(1, 3, 32, 32))


def test_example_that_is_no_tensor_is_refused(make_backbone):
    with pytest.raises(TypeError, match='example is a tuple: give a tensor'):
        graphed(make_backbone('deit').eval(), (1, 3, 32, 32))
