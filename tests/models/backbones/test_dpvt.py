import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models import DPVT
from mmdyn.models.layers import DeformableAttention

DGE = dict(granularities=(1, 2, 4))


def attentions(model):
    return [module for module in model.modules() if isinstance(module, DeformableAttention)]


@pytest.fixture
def make_dpvt(make_backbone, randomise):
    """A small DPVT with no parameter at a value that hides a mistake."""
    return lambda **options: randomise(make_backbone('dpvt', **options))


@pytest.mark.parametrize('size', [(32, 32), (52, 36), (9, 61)])
def test_dense_equals_a_slow_one(size, make_dpvt, slow_change):
    """Patch embedding, position embedding and blocks of two stages, written out."""
    model, images = make_dpvt(), torch.randn(2, 3, *size)
    x, expected = images, []
    for stage, side in zip(model.stages, (8, 4)):
        proj = stage.patch_embed.proj
        x = F.conv2d(x, proj.weight, proj.bias, proj.stride)
        shape = tuple(x.shape[2:])
        positions = stage.pos_embed.transpose(1, 2).unflatten(2, (side, side))
        if shape != (side, side):
            positions = F.interpolate(positions, shape, mode='bilinear', align_corners=False)
        points = torch.tensor([[column, row] for row in range(shape[0]) for column in range(shape[1])])
        tokens = stage.patch_embed.norm(x.flatten(2).transpose(1, 2)) + positions.flatten(2).transpose(1, 2)
        for block in stage.blocks:
            tokens = torch.stack([t + slow_change(block, t, t, shape, 0, points) for t in tokens])
        x = tokens.transpose(1, 2).unflatten(2, shape)
        expected.append(x)
    torch.testing.assert_close(model(images), tuple(expected), rtol=1e-4, atol=1e-4)


SIZES = [((32, 32), (8, 8), (4, 4)), ((52, 36), (13, 9), (6, 4)), ((8, 61), (2, 15), (1, 7))]


@pytest.mark.parametrize('size, first, last', SIZES)
@pytest.mark.parametrize('dge', [None, DGE])
@pytest.mark.parametrize('training', [False, True])
def test_outputs(size, first, last, dge, training, make_dpvt):
    """Without class token: the mean is that of the normed map, and so is each raw token its cell."""
    weights, images = make_dpvt(dge=dge, out_type='raw'), torch.randn(2, 3, *size)

    def run(**options):
        model = make_dpvt(dge=dge, **options).train(training)
        model.load_state_dict(weights.state_dict())
        torch.manual_seed(1)
        return model(images)

    maps, (mean,), (raw,) = run(), run(out_type='avg_featmap'), run(out_type='raw')
    assert [x.shape for x in maps] == [(2, 16, *first), (2, 24, *last)]
    tokens = F.layer_norm(maps[1].flatten(2).transpose(1, 2), (24,), weights.norm.weight, weights.norm.bias, 1e-6)
    assert raw.shape == (2, last[0] * last[1], 24)
    torch.testing.assert_close(raw, tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, tokens.mean(1), rtol=1e-5, atol=1e-5)
    for out_indices, stages in ((0, [0]), (-1, [1]), ((0, -1), [0, 1])):
        outputs = run(out_indices=out_indices)
        assert len(outputs) == len(stages) and all(torch.equal(x, maps[i]) for x, i in zip(outputs, stages))


def count(*args, **options):
    return sum(parameter.numel() for parameter in DPVT(*args, **options).parameters())


def linear(dim_in, dim_out):
    return dim_in * dim_out + dim_out


@pytest.mark.parametrize(
    'arch, depths',
    [('tiny', (2, 2, 2, 2)), ('small', (3, 4, 6, 3)), ('medium', (3, 4, 18, 3)), ('large', (3, 8, 27, 3))],
)
def test_parameters_by_hand(arch, depths):
    """4 points for each head, a norm of 2 numbers a channel before each branch and after the patches."""
    expected, dim_in = 0, 3
    for i, (depth, dim, heads, ratio) in enumerate(zip(depths, (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4))):
        patch = 2 if i else 4
        expected += linear(dim_in * patch * patch, dim) + 2 * dim + (64 // 2**i) ** 2 * dim
        attention = linear(dim, 8 * heads) + linear(dim, 4 * heads) + 2 * linear(dim, dim)
        expected += depth * (attention + 2 * 2 * dim + linear(dim, ratio * dim) + linear(ratio * dim, dim))
        dim_in = dim
    assert count(arch) == expected
    assert count(arch, out_type='avg_featmap') == count(arch, out_type='raw') == expected + 2 * 512


def test_extra_parameters_of_dge():
    """As many as PVT's."""
    assert count('small', dge=DGE) - count('small') == 12528


def test_arch_by_name_has_heads_of_64_channels_and_4_points():
    model = DPVT('tiny', img_size=64)
    assert [(attn.num_heads, attn.num_points, attn.v.in_features // attn.num_heads) for attn in attentions(model)] == [
        (heads, 4, 64) for heads in (1, 1, 2, 2, 5, 5, 8, 8)
    ]
    assert not any('cls_token' in name or '.sr.' in name for name in model.state_dict())


@pytest.mark.parametrize('dge', [None, DGE])
def test_init_weights_keeps_the_ring(dge, make_backbone):
    model = make_backbone('dpvt', dge=dge)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    for name, value in model.state_dict().items():
        if 'attn_weight' in name or name.endswith('offsets.weight'):
            assert not value.any()
        elif name.endswith('offsets.bias') or 'pos_embed' in name or 'router' in name:
            assert torch.equal(value, before[name])
        elif name.endswith(('attn.v.weight', 'attn.proj.weight', 'fc1.weight')):
            assert not torch.equal(value, before[name])
            # 4 standard deviations of the standard deviation, of what is next to normal.
            assert abs(value.std() - 0.02) < 4 * 0.02 / (2 * value.numel()) ** 0.5
    # Head 1 of 3, with 2 points.
    torch.testing.assert_close(
        model.stages[1].blocks[0].attn.offsets.bias[4:8],
        torch.tensor([-0.5, 3**0.5 / 2, -1, 3**0.5]),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize('out_type', ['cls_token', 'tokens'])
def test_there_is_no_class_token(out_type):
    with pytest.raises(ValueError, match=rf"out_type='{out_type}'.* choose from \('featmap', 'avg_featmap', 'raw'\)"):
        DPVT('tiny', 64, out_type=out_type)


def test_unknown_option():
    with pytest.raises(TypeError, match='sr_ratios'):
        DPVT('tiny', 64, sr_ratios=(8, 4, 2, 1))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(out_type='raw', out_indices=(0, 1)), "out_type='raw' returns the last stage only, but out_indices="),
        (dict(out_indices=2), 'out_indices=2: choose one or more of 0 to 1'),
        (
            dict(with_cls_token=True),
            'with_cls_token=True: DPVT has no class token, which would have no place on the map',
        ),
        (
            dict(arch=dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), num_points=(4,))),
            'must have as many numbers for each key: one for each stage',
        ),
        (
            dict(arch=dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 5), mlp_ratios=(2, 3), num_points=(4, 4))),
            '24 channels do not divide into 5 heads',
        ),
    ],
)
def test_unfit_options(options, message, make_backbone):
    with pytest.raises(ValueError, match=message):
        make_backbone('dpvt', **options)


@pytest.mark.parametrize(
    'size, message',
    [
        ((3, 32), 'Images of 3 x 32 pixels are too small for the DPVT, which needs 8 x 8: resize'),
        ((32, 7), 'Images of 32 x 7 pixels are too small for the DPVT, which needs 8 x 8: resize'),
    ],
)
def test_image_smaller_than_the_stride(size, message, make_backbone):
    with pytest.raises(ValueError, match=message):
        make_backbone('dpvt')(torch.randn(1, 3, *size))


def test_all_options_of_pvt_arrive(make_backbone):
    model = make_backbone(
        'dpvt',
        img_size=(24, 48),
        in_channels=5,
        patch_size=2,
        drop_path_rate=0.4,
        frozen_stages=1,
        with_cp=True,
        interpolate_mode='nearest',
        norm_eps=1e-3,
        embed_norm_eps=1e-2,
        dge=DGE,
    )
    assert model.stage_shapes == [(12, 24), (6, 12)] and model.stages[0].patch_embed.proj.weight.shape == (16, 5, 2, 2)
    assert [block.drop_path_rate for stage in model.stages for block in stage.blocks] == pytest.approx([0, 0.2, 0.4])
    assert model.stages[1].patch_embed.norm.eps == 1e-2
    assert (model.frozen_stages, model.interpolate_mode, model.stages[1].blocks[0].norm1.eps) == (1, 'nearest', 1e-3)
    assert all(block.with_cp for stage in model.stages for block in stage.blocks)
    assert [x.shape for x in model(torch.randn(1, 5, 24, 48))] == [(1, 16, 12, 24), (1, 24, 6, 12)]


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('source, target', [('PVT', 'DPVT'), ('DPVT', 'PVT')])
def test_pvt_is_another_architecture(source, target, strict, backbone_config):
    """All tensors that both have fit, but those of the attention layers are others."""
    configs = {'DPVT': backbone_config('dpvt'), 'PVT': backbone_config('pvt')}
    state, model = MODELS.build(configs[source]).state_dict(), MODELS.build(configs[target])
    with pytest.raises(ValueError, match=f'The checkpoint is of another architecture than this {target}') as error:
        model.load_state_dict(state, strict=strict)
    for part, owner in (('kv', 'PVT'), ('offsets', 'DPVT')):
        assert f'attn.{part}*: only in the {"model" if owner == target else "checkpoint"}' in str(error.value)


@pytest.mark.parametrize('size, first, last', SIZES)
def test_dense_cost_by_hand(size, first, last, make_backbone):
    """Multiply-adds of 2 heads of 4 points and 3 heads of 2 points; FFN ratios 2 and 3."""
    dense, dynamic = make_backbone('dpvt').eval(), make_backbone('dpvt', dge=DGE).eval()
    images = torch.randn(2, 3, *size)
    dense(images)
    dynamic(images)
    cells = [height * width for height, width in (first, last)]
    stem = cells[0] * 3 * 16 * 16 + cells[1] * 16 * 24 * 4
    # Offsets, weights, four neighbours of each point, output, FFN.
    query = [
        16 * 16 + 16 * 8 + 4 * 4 * 16 + 16 * 16 + 2 * 16 * 32,
        24 * 12 + 24 * 6 + 4 * 2 * 24 + 24 * 24 + 2 * 24 * 72,
    ]
    value = [16 * 16, 24 * 24]
    expected = stem + 2 * cells[0] * (query[0] + value[0]) + cells[1] * (query[1] + value[1])
    assert dense.cost.dense == dynamic.cost.dense == expected
    assert dense.cost.spent.tolist() == [expected] * 2
    assert [layer.per_query for layer in dense.cost.layers] == [query[0], *query]


@pytest.mark.parametrize('dge', [DGE, dict(granularities=(0, 1)), dict(DGE, routing='layer')])
def test_cost_is_what_ran(dge, make_dpvt):
    """The library counts products and convolutions; points that were sampled in addition, 4 cells each."""
    model, sampled = make_dpvt(dge=dge).eval(), []
    for attn in attentions(model):
        attn.proj.register_forward_pre_hook(
            lambda proj, args, points=attn.num_points: sampled.append(args[0].numel() * 4 * points)
        )
    with FlopCounterMode(display=False) as counter:
        model(3 * torch.randn(4, 3, 52, 36) + torch.arange(-2, 2).view(4, 1, 1, 1))
    assert len(sampled) == 3 and len(model.cost.query_ratio.unique()) > 1
    assert model.cost.spent.sum() == counter.get_total_flops() / 2 + sum(sampled)


def test_spent_falls_with_the_granularity(make_dpvt, encoders):
    """From the dense cost and three routers on to those of 1 of 4 and 1 of 16 queries."""
    model, costs = make_dpvt(dge=DGE).eval(), []
    for k in range(3):
        for encoder in encoders(model):
            encoder.router.bias.data = 1e6 * torch.eye(3)[k]
        model(torch.randn(1, 3, 32, 32))
        costs.append(model.cost)
    ratios = [cost.query_ratio.item() for cost in costs]
    assert ratios == pytest.approx([1, 1 / 4, 1 / 16])
    routers = 2 * 4 * 3 * 16 + 3 * 24
    fixed = costs[0].stem + sum(layer.static for layer in costs[0].layers)
    for cost, ratio in zip(costs, ratios):
        assert cost.spent.item() == pytest.approx(fixed + routers + ratio * (cost.dense - fixed))


@pytest.mark.parametrize('dge', [None, DGE, dict(DGE, train_mode='dense')])
def test_with_cp_has_equal_gradients_of_points(dge, make_dpvt):
    """test_base compares all gradients at the start, where points lie on integers; here they do not."""
    images, results = torch.randn(3, 3, 52, 36), []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = make_dpvt(dge=dge, with_cp=with_cp)
        torch.manual_seed(0)
        model(images)[-1].square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient.any() for name, gradient in results[0].items() if 'offsets' in name)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_saves_and_loads_as_a_whole_and_as_weights(make_dpvt, tmp_path):
    """After a training step, dense into dynamic and back."""
    dynamic, dense, images = make_dpvt(dge=DGE), make_dpvt(), torch.randn(2, 3, 52, 36)
    dynamic(images)[-1].sum().backward()
    torch.save(dynamic, tmp_path / 'model.pth')
    whole, twin = torch.load(tmp_path / 'model.pth', weights_only=False), copy.deepcopy(dynamic)
    expected = dynamic.eval()(images)
    for model in (whole, twin):
        assert all(map(torch.equal, model.eval()(images), expected))
    torch.save(dynamic.state_dict(), tmp_path / 'weights.pth')
    load_checkpoint(dense, str(tmp_path / 'weights.pth'), strict=True)
    for key, value in dense.state_dict().items():
        assert torch.equal(value, dynamic.state_dict()[key])
    routers = {key: value.clone() for key, value in whole.state_dict().items() if 'router' in key}
    for parameter in dense.parameters():
        parameter.data += 1
    whole.load_state_dict(dense.state_dict())
    for key, value in whole.state_dict().items():
        assert torch.equal(value, routers[key] if 'router' in key else dense.state_dict()[key])
