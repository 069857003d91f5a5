"""Options that the backbones have in common."""

import pytest
import torch

PVT_ARCH = dict(embed_dims=(8, 24), depths=(1, 2), num_heads=(2, 3), mlp_ratios=(2, 3), sr_ratios=(2, 1))
PVT_KEYS = 'depths.*embed_dims.*mlp_ratios.*num_heads.*sr_ratios'
DPVT_KEYS = 'depths.*embed_dims.*mlp_ratios.*num_heads.*num_points'
DEIT_KEYS = 'depth.*embed_dim.*mlp_ratio.*num_heads'


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('pvt', dict(arch='huge'), rf"Unknown arch 'huge': choose from .*large.*medium.*small.*tiny.*{PVT_KEYS}"),
        ('dpvt', dict(arch='huge'), rf"Unknown arch 'huge': choose from .*large.*medium.*small.*tiny.*{DPVT_KEYS}"),
        ('deit', dict(arch='huge'), rf"Unknown arch 'huge': choose from .*base.*small.*tiny.*{DEIT_KEYS}"),
        ('lvvit', dict(arch='base'), rf"Unknown arch 'base': choose from .*medium.*small.*{DEIT_KEYS}"),
        ('pvt', dict(arch=dict(depths=(1, 1), width=3)), rf"arch has the keys \['depths', 'width'\], but .*{PVT_KEYS}"),
        ('dpvt', dict(arch=PVT_ARCH), rf"arch has the keys .*'sr_ratios'\], but needs exactly .*{DPVT_KEYS}"),
        (
            'pvt',
            dict(arch=dict(PVT_ARCH, depths=(2, 1, 1))),
            'must have as many numbers for each key: one for each stage',
        ),
        ('deit', dict(arch=dict(depth=3)), rf"arch has the keys \['depth'\], but needs exactly .*{DEIT_KEYS}"),
        (
            'deit',
            dict(arch=dict(embed_dim=16, depth=1, num_heads=3, mlp_ratio=2)),
            '16 channels do not divide into 3 h',
        ),
        ('pvt', dict(img_size=7), 'img_size=7: give the side of a square, or .* of at least 8 pixels'),
        ('deit', dict(img_size=(64, 3)), r'img_size=\(64, 3\): give the side .* of at least 4 pixels'),
        ('deit', dict(img_size=(8, 8, 8)), r'img_size=\(8, 8, 8\): give the side of a square, or \(height, width\)'),
    ],
)
def test_unfit_shapes(name, options, message, make_backbone):
    with pytest.raises(ValueError, match=message):
        make_backbone(name, **options)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(dge=dict(granularity=(1, 2))), r"dge has no option \['granularity'\]: it takes \['budget_mode', 'dens"),
        (dict(dge=dict(dim=3)), r"dge has no option \['dim'\]"),
        (dict(dge=dict(granularities=((1, 2),) * 7)), r'are 7 sets for \d stages?: give one for each stage, or one'),
        (dict(dge=dict(granularities=())), 'leave no query: give at least one side greater than 0'),
        (dict(dge=dict(granularities=4)), 'granularities=4'),
        (
            dict(dge=dict(dense_layers=('blocks.9',))),
            r"dge dense_layers=\('blocks.9',\): give a sequence of names of layers, (stages.0.)?blocks.0 to .",
        ),
        (dict(dge=dict(dense_layers='blocks.0')), r"dge dense_layers='blocks.0': give a sequence of names"),
        (dict(dge=dict(dense_layers=2)), 'dge dense_layers=2: give a sequence of names'),
        (
            dict(out_type='tokens'),
            r"out_type='tokens':.* choose from \('featmap', ('cls_token', )?'avg_featmap', 'raw'",
        ),
        (dict(out_type='featmap', out_indices=3), 'out_indices=3: choose one or more of 0 to'),
        (dict(out_type='featmap', out_indices=(0, -4)), r'out_indices=\(0, -4\): choose one or more of 0 to'),
        (dict(out_type='featmap', out_indices=()), r'out_indices=\(\): choose one or more of 0 to'),
        (dict(frozen_stages=4), r'frozen_stages=4: choose from -1 \(none\) to [23]'),
        (dict(frozen_stages=-2), r'frozen_stages=-2: choose from -1 \(none\) to'),
    ],
)
def test_unfit_options(name, options, message, make_backbone):
    with pytest.raises(ValueError, match=message):
        make_backbone(name, **options)


def test_dge_must_be_a_dict(name, make_backbone):
    with pytest.raises(TypeError, match=r'dge=\(1, 2, 4\): give None for the dense model, or a dict, e.g. dict\(gr'):
        make_backbone(name, dge=(1, 2, 4))


def test_names_of_stages_are_allowed_where_there_are_some(make_backbone):
    allowed = 'stages.0.blocks.0 to stages.1.blocks.0, or whole stages, stages.0 to stages.1.$'
    with pytest.raises(ValueError, match=allowed):
        make_backbone('pvt', dge=dict(dense_layers=['stages.2']))
    with pytest.raises(ValueError, match=r"dense_layers=\['stages.0'\]: give .* layers, blocks.0 to blocks.2.$"):
        make_backbone('deit', dge=dict(dense_layers=['stages.0']))


@pytest.mark.parametrize(
    'name, layers',
    [
        ('pvt', ('stages.0', 'stages.1')),
        ('pvt', ('stages.0.blocks.0', 'stages.0.blocks.1', 'stages.1')),
        ('deit', ('blocks.0', 'blocks.1', 'blocks.2')),
    ],
)
def test_one_layer_must_be_dynamic(name, layers, make_backbone):
    with pytest.raises(ValueError, match='leave no layer dynamic: write dge=None for the dense model'):
        make_backbone(name, dge=dict(dense_layers=layers))


@pytest.mark.parametrize(
    'name, layers, dense',
    [
        ('pvt', (), []),
        ('pvt', ('stages.0',), ['stages.0.blocks.0', 'stages.0.blocks.1']),
        ('pvt', ['stages.0.blocks.1'], ['stages.0.blocks.1']),
        ('dpvt', ('stages.1', 'stages.0.blocks.0'), ['stages.0.blocks.0', 'stages.1.blocks.0']),
        ('deit', ('blocks.0', 'blocks.2'), ['blocks.0', 'blocks.2']),
    ],
)
@pytest.mark.parametrize('training', [False, True])
def test_dense_layers(training, name, layers, dense, make_backbone):
    """What is left are routers in the other layers, of the same names, and dense layers that cost what they cost."""
    dge = dict(granularities=(1, 2))
    model, whole = make_backbone(name, dge=dict(dge, dense_layers=layers)), make_backbone(name, dge=dge)
    names = [layer.replace('blocks', 'dge') for layer in dense]
    assert set(whole.state_dict()) - set(model.state_dict()) == {
        f'{layer}.router.{weight}' for layer in names for weight in ('weight', 'bias')
    }
    model.load_state_dict(whole.state_dict())
    images = torch.randn(2, 3, 52, 36)
    with torch.set_grad_enabled(training):
        found = model.train(training)(images)
    cost = model.cost
    assert [layer.name for layer in cost.layers if not layer.dynamic] == dense
    assert all((layer.query_ratio == 1).all() and layer.router == 0 for layer in cost.layers if not layer.dynamic)
    if training:
        sum(out.sum() for out in found).backward()
        return
    # Where they are to be dense, let the routers of the other model choose the finest granularity.
    for layer in names:
        whole.get_submodule(layer).router.bias.data[0] = 1e6
    with torch.no_grad():
        expected = whole.eval()(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cost.dense == whole.cost.dense and (cost.spent < whole.cost.spent).all() == bool(dense)


def test_dense_layers_beside_frozen_ones(make_backbone):
    model = make_backbone('deit', dge=dict(dense_layers=['blocks.0']), frozen_stages=2).train()
    assert [encoder.router.weight.requires_grad for encoder in model.dge if encoder] == [False, True]
    assert [encoder.training for encoder in model.dge if encoder] == [False, True]


def test_a_budget_in_inference_is_that_of_the_dynamic_layers(make_backbone):
    model = make_backbone('pvt', dge=dict(granularities=(1, 2), dense_layers=['stages.0.blocks.0'], test_budget=0.5))
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, 32, 32))
    dense, *dynamic = model.cost.layers
    assert (dense.query_ratio == 1).all() and all(layer.dynamic for layer in dynamic)
    # A region of 2 x 2 cells has 4 queries or 1: one of 16 regions is 3 / 64 of a map's queries, one of 4 is 3 / 16.
    torch.testing.assert_close(model.cost.query_ratio, torch.full((2,), 0.5), rtol=0, atol=3 / 16)
    assert (model.cost.query_ratio <= 0.5 + 1e-6).all()
