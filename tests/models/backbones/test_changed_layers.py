"""What other libraries do with layers that they find by their exact type: wrap and merge them, round and count them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models.dge.router import Router

DGE = dict(granularities=(1, 2, 4))


@pytest.fixture(params=['pvt', 'pvt+dge', 'deit', 'deit+dge', 'lvvit', 'dpvt', 'dpvt+dge', 'cfvit'])
def model(request, make_backbone, randomise):
    """Each small backbone, in evaluation mode."""
    name, *dge = request.param.split('+')
    return randomise(make_backbone(name, **({'dge': DGE} if dge else {}))).eval()


@pytest.fixture
def images(model):
    side = 24 if hasattr(model, 'coarse') else 36
    return torch.randn(2, 3, side, side)


def linear_layers(model):
    """Those that libraries look for, by name."""
    return {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}


class LowRank(nn.Module):
    """A product of two matrices beside a layer, which is called as it was: how adapters are put around layers."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer = layer
        self.down, self.up = torch.randn(rank, layer.in_features), 0.1 * torch.randn(layer.out_features, rank)

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T

    def merged(self):
        layer = copy.deepcopy(self.base_layer)
        layer.weight += self.up @ self.down
        return layer


@torch.no_grad()
def test_a_layer_in_an_adapter_is_the_one_with_merged_weights(model, images):
    """Whichever it is: nothing that belongs to it, such as an activation, stays behind in the layer."""
    before, kinds = model(images)[-1], {name.rpartition('.')[2] for name in linear_layers(model)}
    assert kinds >= {'fc1', 'fc2', 'proj'}
    for kind in kinds:
        wrapped, merged = copy.deepcopy(model), copy.deepcopy(model)
        for name, layer in linear_layers(model).items():
            if name.rpartition('.')[2] == kind:
                adapter = LowRank(layer)
                wrapped.set_submodule(name, adapter)
                merged.set_submodule(name, adapter.merged())
        after = merged(images)
        torch.testing.assert_close(wrapped(images), after, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(after[-1], before, rtol=1e-2), kind


class Int8(Tensor):
    """Weights of 8 bits each and a scale for each output. It has no memory that holds what it stands for."""

    @staticmethod
    def __new__(cls, levels, scale):
        return Tensor._make_wrapper_subclass(cls, levels.shape, dtype=scale.dtype)

    def __init__(self, levels, scale):
        self.levels, self.scale = levels, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dense(self):
        return self.levels * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].levels, args[0].scale)
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return function(*args, **kwargs)


@torch.no_grad()
def test_weights_that_are_no_memory_are_what_they_stand_for(model, images):
    """And cost as much as the others."""
    before, rounded = model(images)[-1], copy.deepcopy(model)
    for name, layer in linear_layers(model).items():
        weight = Int8.of(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        rounded.get_submodule(name).weight.copy_(weight.dense())
    found = model(images)
    torch.testing.assert_close(found, rounded(images), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[-1], before)
    assert torch.equal(model.cost.spent, rounded.cost.spent)


@torch.no_grad()
def test_all_products_but_those_of_attention_are_of_layers_that_can_be_hooked(model, images):
    """As counters find them, by type; torch counts what ran."""
    products = []
    for layer in model.modules():
        if type(layer) in (nn.Linear, nn.Conv2d, Router):
            layer.register_forward_hook(
                lambda layer, _, output: products.append(layer.weight[0].numel() * output.numel())
            )
    model(images)
    counted = sum(products)
    with FlopCounterMode(display=False) as counter:
        model(images)
    of_layers = {torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.convolution}
    assert 2 * counted == sum(n for kind, n in counter.get_flop_counts()['Global'].items() if kind in of_layers) > 0
