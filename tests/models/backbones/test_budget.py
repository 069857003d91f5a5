"""Budgets that a backbone keeps in inference, whatever its routers were trained for."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import Waits

DGE = dict(granularities=(1, 2, 4))
NAMES = ['pvt', 'dpvt', 'deit']
LAYERS = ['stages.0.blocks.0', 'stages.0.blocks.1', 'stages.1.blocks.0']  # of the PVT


@pytest.fixture(params=NAMES)
def model(request, make_backbone):
    """On maps that regions hang over: 13 x 13 cells, and 6 x 6 in a second stage."""
    return make_backbone(request.param, img_size=52, dge=DGE, out_type='raw').eval()


@torch.no_grad()
def layers_of(model, images):
    model(images)
    return [layer for layer in model.cost.layers if layer.dynamic]


def queries(model, images):
    return {layer.name: layer.queries.tolist() for layer in layers_of(model, images)}


@pytest.mark.parametrize('budget', [0.3, 0.5, 0.85, 1.0])
def test_each_image_spends_an_exact_budget_in_each_layer(budget, model):
    """No more than its share, and less by fewer than the queries of a whole region."""
    model.set_budget(budget)
    images = torch.randn(4, 3, 52, 52) * torch.tensor([0, 0.1, 1, 10]).view(-1, 1, 1, 1)
    for layer in layers_of(model, images):
        allowed = round(budget * layer.dense_queries, 6)
        assert all(allowed - 16 < spent <= allowed for spent in layer.queries.tolist())
    assert (model.cost.query_ratio <= budget + 1e-6).all()


@torch.no_grad()
def test_exact_budget_compiles_as_one_graph(model):
    """Which knows the cost of each image, too."""
    model.set_budget(0.5)
    compiled, images = torch.compile(model, backend='eager', fullgraph=True), torch.randn(3, 3, 52, 52)
    expected, spent = model(images), model.cost.spent
    torch.testing.assert_close(compiled(images), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.cost.spent, spent)
    torch.compiler.reset()


@pytest.mark.parametrize('budget', [0.5, None])
def test_exact_budget_waits_for_no_accelerator(budget, model):
    """Seen on tensors without numbers, which may be of devices that are not there. Without a budget there is a wait."""
    model.set_budget(budget)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        weights = {name: torch.empty_like(weight, device='cuda') for name, weight in model.named_parameters()}
        images = torch.empty(2, 3, 52, 52, device='cuda')
        with Waits() as waits:
            out = torch.func.functional_call(model, weights, images)
    assert out[0].device.type == 'cuda' and (waits.reads > 0) == (budget is None)


def test_layers_that_cannot_spend_so_little_take_from_the_others(make_backbone):
    """The second stage needs 9 of 36 queries at least; so the others get less."""
    model = make_backbone('pvt', img_size=52, dge=dict(granularities=((1, 2, 4), (1, 2)))).eval()
    budget = model.ratio_bounds()[0] + 0.01
    model.set_budget(budget)
    layers = layers_of(model, torch.randn(2, 3, 52, 52))
    assert layers[-1].queries.tolist() == [9, 9] and budget < 9 / 36
    assert all(layer.query_ratio.max() < budget for layer in layers[:-1])
    assert (model.cost.query_ratio <= budget).all() and (model.cost.query_ratio > budget - 0.1).all()


def test_shares_of_layers_are_those_that_were_measured(model):
    names = [layer.name for layer in layers_of(model, torch.randn(1, 3, 52, 52))]
    weights = [layer.per_query * layer.dense_queries for layer in model.cost.layers]
    ratios = torch.linspace(0.3, 0.8, len(names)).tolist()
    budget = sum(weight * ratio for weight, ratio in zip(weights, ratios)) / sum(weights)
    prices = dict(price=[0.1], query_ratio=[budget], layers={name: [ratio] for name, ratio in zip(names, ratios)})
    model.set_budget(budget, prices=prices)
    for layer, ratio in zip(layers_of(model, torch.randn(3, 3, 52, 52)), ratios):
        assert all(
            ratio * layer.dense_queries - 16 < spent <= ratio * layer.dense_queries + 1e-3
            for spent in layer.queries.tolist()
        )


def test_average_budget_is_a_shift_of_the_routers_biases(model, encoders):
    """By lambda C^l (S / phi)^2, where C^l is relative to the layers' mean."""
    images = torch.randn(3, 3, 52, 52)
    layers, price = layers_of(model, images), 0.5
    mean = sum(layer.per_query for layer in layers) / len(layers)
    shifted = copy.deepcopy(model)
    for encoder, layer in zip(encoders(shifted), layers):
        encoder.router.bias.data -= price * layer.per_query / mean * torch.tensor([16.0, 4.0, 1.0])
    names = [layer.name for layer in layers]
    prices = dict(price=[price], query_ratio=[0.5], layers={name: [0.5] for name in names})
    before = queries(model, images)
    model.set_budget(0.5, 'average', prices)
    assert queries(model, images) == queries(shifted, images) != before
    model.set_price(None)
    assert queries(model, images) == before
    model.set_price(price)
    assert queries(model, images) == queries(shifted, images)


def test_average_budget_of_a_routing_by_layer(make_backbone):
    model = make_backbone('pvt', dge=dict(routing='layer', **DGE)).eval()
    images, (least, most) = torch.randn(2, 3, 32, 32), model.ratio_bounds()
    for price, ratio in ((1e6, least), (-1e6, most)):
        model.set_price(price)
        layers_of(model, images)
        assert model.cost.query_ratio.tolist() == pytest.approx([ratio, ratio])


def test_routers_decide_again_without_a_budget(model):
    images = torch.randn(2, 3, 52, 52)
    before = queries(model, images)
    model.set_budget(0.4)
    assert queries(model, images) != before
    model.set_budget(None)
    assert queries(model, images) == before


def test_training_and_checkpoints_know_nothing_of_budgets(model, make_backbone):
    images, state = torch.randn(2, 3, 52, 52), {name: x.clone() for name, x in model.state_dict().items()}
    outputs = []
    for change in (lambda: None, lambda: model.set_budget(0.4), lambda: model.set_price(0.3)):
        change()
        torch.manual_seed(1)
        outputs.append(model.train()(images)[0])
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items()) and len(state) == len(
            model.state_dict()
        )
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize('name', NAMES)
def test_budget_of_a_config(name, make_backbone):
    model = make_backbone(name, dge=dict(test_budget=0.5, **DGE)).eval()
    images = torch.randn(2, 3, 32, 32)
    found = queries(model, images)
    model.set_budget(None)
    assert queries(model, images) != found
    model.set_budget(0.5)
    assert queries(model, images) == found
    names = [layer.name for layer in layers_of(model, images)]
    prices = dict(price=[0.2], query_ratio=[0.5], layers={name: [0.5] for name in names})
    torch.manual_seed(0)
    other = make_backbone(name, dge=dict(test_budget=0.5, budget_mode='average', prices=prices, **DGE)).eval()
    other.load_state_dict(model.state_dict())
    model.set_price(0.2)
    assert queries(model, images) == queries(other, images)


def test_budget_of_a_copy_on_another_device_goes_with_it(model):
    model.set_price(0.3)
    moved = copy.deepcopy(model).to('meta')
    assert all(module.price.device.type == 'meta' for module in moved.modules() if hasattr(module, 'price'))


@pytest.mark.parametrize(
    'budget, options, message',
    [
        (
            0.01,
            {},
            r'budget=0.01 cannot be reached: on images of img_size the granularities of the PVT allow query ratios '
            r'from '
            r'0\.\d{4} to 1\.0000. Choose a budget between them',
        ),
        (1.1, {}, 'budget=1.1 cannot be reached'),
        ('half', {}, "budget='half': give a query ratio, a number such as 0.4, or None"),
        (True, {}, 'budget=True: give a query ratio'),
        (0.5, dict(mode='median'), r"budget mode='median': choose from \('exact', 'average'\)"),
        (0.5, dict(mode='average'), "An average budget needs prices that were measured: give prices='prices.json'"),
        (0.5, dict(mode='average', prices='none.json'), "prices='none.json' cannot be read: No such file"),
        (
            0.5,
            dict(prices=dict(price=[1], query_ratio=[0.5], layers=dict(head=[0.5]))),
            r"The prices are of the layers \['head'\], but those of the PVT with DGE are \['stages.0.*measure them",
        ),
        (
            0.5,
            dict(prices=dict(price=[1], query_ratio=[0.2], layers={name: [0.2] for name in LAYERS})),
            'is outside of the query ratios from 0.2000 to 0.2',
        ),
    ],
)
def test_budgets_that_cannot_be_kept(budget, options, message, make_backbone):
    model = make_backbone('pvt', dge=DGE)
    with pytest.raises(ValueError, match=message):
        model.set_budget(budget, **options)
    config = {dict(mode='budget_mode').get(name, name): value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        make_backbone('pvt', dge=dict(test_budget=budget, **config, **DGE))


def test_models_that_take_no_budget(make_backbone, backbone_config):
    for name in ('pvt', 'cfvit'):
        dense = MODELS.build(backbone_config(name))
        with pytest.raises(ValueError, match=r'budget=0.5: the \w+ has no DGE: give it dge=dict'):
            dense.set_budget(0.5)
        with pytest.raises(ValueError, match=r'price=0.5: the \w+ has no DGE'):
            dense.set_price(0.5)
        dense.set_budget(None), dense.set_price(None)
    with pytest.raises(
        ValueError, match="exact budget needs regions that choose, but routing='layer' makes one decision"
    ):
        make_backbone('deit', dge=dict(routing='layer', test_budget=0.5, **DGE))


@pytest.mark.parametrize('name', NAMES)
def test_budget_of_a_model_without_numbers(name, backbone_config, encoders):
    """Under the meta device, on which no number can be read."""
    config = backbone_config(name, dge=dict(test_budget=0.4, **DGE))
    with torch.device('meta'):
        model = MODELS.build(config)
        model.set_price(0.1)
        assert all(encoder.router.price.device.type == 'meta' for encoder in encoders(model))
        model.set_budget(0.4)
    other = MODELS.build(config)
    assert [encoder.router.share for encoder in encoders(model)] == [
        encoder.router.share for encoder in encoders(other)
    ]
