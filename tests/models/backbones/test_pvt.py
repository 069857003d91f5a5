import pytest
import torch
from mmdet.models.backbones.pvt import PyramidVisionTransformer

from mmdyn.models import PVT

# As in BACKBONES of conftest.py, but with channels that mmdet's model can have: multiples of the heads.
SMALL = dict(embed_dims=(16, 48), depths=(2, 1), num_heads=(1, 3), mlp_ratios=(2, 3), sr_ratios=(2, 1))


def from_mmdet(state):
    """Names and shapes of mmdet's weights -> ours."""
    converted = {}
    for name, value in state.items():
        _, stage, part, *rest = name.split('.')
        if part == '0':
            target = f'patch_embed.{rest[0].replace("projection", "proj")}.{rest[1]}'
        elif rest[0] == '0':
            target = 'pos_embed'
        else:
            target = f'blocks.{int(rest[0]) - 1}.{".".join(rest[1:])}'
            for theirs, ours in (
                ('attn.attn.out_proj', 'attn.proj'),
                ('ffn.layers.0', 'ffn.fc1'),
                ('ffn.layers.3', 'ffn.fc2'),
            ):
                target = target.replace(theirs, ours)
        target = f'stages.{stage}.{target}'
        if 'attn.in_proj' in target:
            query, key, value = value.chunk(3)
            converted[target.replace('attn.in_proj_', 'q.')] = query
            converted[target.replace('attn.in_proj_', 'kv.')] = torch.cat([key, value])
        else:
            converted[target] = value.flatten(1) if '.fc' in target and 'weight' in target else value
    return converted


@pytest.mark.parametrize(
    'arch, img_size, sizes',
    [
        (SMALL, 32, [(32, 32), (48, 24), (45, 61)]),
        ('tiny', 64, [(64, 64), (70, 107)]),
    ],
)
def test_dense_equals_mmdet(arch, img_size, sizes, randomise):
    """In float64, because the maps are not normed and errors grow with them."""
    ours = PVT(arch, img_size, embed_norm_eps=1e-6).double().eval()
    numbers = (
        SMALL
        if arch is SMALL
        else dict(
            embed_dims=(64,),
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 5, 8),
            mlp_ratios=(8, 8, 4, 4),
            sr_ratios=(8, 4, 2, 1),
        )
    )
    num = len(numbers['depths'])
    theirs = PyramidVisionTransformer(
        pretrain_img_size=img_size,
        embed_dims=numbers['embed_dims'][0],
        num_stages=num,
        num_layers=numbers['depths'],
        num_heads=numbers['num_heads'],
        mlp_ratios=numbers['mlp_ratios'],
        sr_ratios=numbers['sr_ratios'],
        patch_sizes=[4, 2, 2, 2][:num],
        strides=[4, 2, 2, 2][:num],
        paddings=[0] * num,
        out_indices=range(num),
    )
    randomise(theirs.double().eval(), std=0.05)
    ours.load_state_dict(from_mmdet(theirs.state_dict()))
    with torch.no_grad():
        for size in sizes:
            images = torch.randn(2, 3, *size, dtype=torch.double)
            torch.testing.assert_close(ours(images), tuple(theirs(images)), rtol=1e-5, atol=1e-5)


def count(*args, **options):
    return sum(parameter.numel() for parameter in PVT(*args, **options).parameters())


@pytest.mark.parametrize('arch, millions', [('tiny', 13.2), ('small', 24.5), ('medium', 44.2), ('large', 61.4)])
def test_parameters_with_a_head_are_those_of_the_paper(arch, millions):
    """Table 1 of the PVT paper: at 224 x 224, with a head of 1000 classes."""
    assert round(count(arch, img_size=224, out_type='cls_token') / 1e6 + 0.513, 1) == millions


def test_parameters_at_256():
    assert round(count('small', img_size=256, out_type='cls_token') / 1e6 + 0.513, 1) == 24.6


@pytest.mark.parametrize(
    'granularities, extra', [((1, 2), 8352), ((0, 1), 8352), ((1, 2, 4), 12528), ((1, 2, 4, 8), 16704)]
)
def test_extra_parameters_of_dge(granularities, extra):
    """3 * 65 + 4 * 129 + 6 * 321 + 3 * 513 = 4176 for each granularity."""
    assert count('small', dge=dict(granularities=granularities)) - count('small') == extra


@pytest.fixture
def run_on_52_x_36(make_backbone):
    """The outputs of a model with the weights of another one, as far as it has a place for them."""
    images = torch.randn(2, 3, 52, 36)

    def run(weights, **options):
        model = make_backbone('pvt', **options).eval()
        model.load_state_dict(weights.state_dict(), strict=False)
        return model(images)

    return run


@pytest.mark.parametrize('out_indices, stages', [(None, [0, 1]), (0, [0]), (-1, [1]), ((0, -1), [0, 1]), ([-2], [0])])
def test_featmaps(out_indices, stages, make_backbone, run_on_52_x_36):
    weights = make_backbone('pvt')
    full, outputs = run_on_52_x_36(weights), run_on_52_x_36(weights, out_indices=out_indices)
    assert [output.shape for output in full] == [(2, 16, 13, 9), (2, 24, 6, 4)]
    assert len(outputs) == len(stages) and all(torch.equal(output, full[i]) for output, i in zip(outputs, stages))


def test_pooled_output_is_the_mean_of_the_normed_last_map(make_backbone, randomise, run_on_52_x_36):
    weights = randomise(make_backbone('pvt', out_type='avg_featmap'))
    expected = weights.norm(run_on_52_x_36(weights)[-1].flatten(2).transpose(1, 2)).mean(1)
    pooled = run_on_52_x_36(weights, out_type='avg_featmap')
    torch.testing.assert_close(pooled, (expected,), rtol=1e-5, atol=1e-6)


def test_cls_token_is_the_first_of_raw(make_backbone, randomise, run_on_52_x_36):
    """It exists in the last stage only."""
    weights = randomise(make_backbone('pvt', out_type='raw'))
    (raw,), (cls_token,) = (run_on_52_x_36(weights, out_type=out_type) for out_type in ('raw', 'cls_token'))
    assert raw.shape == (2, 1 + 6 * 4, 24) and torch.equal(raw[:, 0], cls_token)
    assert [stage.pos_embed.shape[1] for stage in weights.stages] == [64, 1 + 16]


@pytest.mark.parametrize('dge', [None, dict(granularities=(1, 2))])
def test_maps_with_a_class_token(dge, make_backbone, randomise, run_on_52_x_36):
    """It attends and is attended to in the last stage, whose map leaves it out."""
    weights = randomise(make_backbone('pvt', out_type='raw', dge=dge))
    tokens = weights.norm(run_on_52_x_36(weights, with_cls_token=True, dge=dge)[-1].flatten(2).mT)
    (raw,) = run_on_52_x_36(weights, out_type='raw', dge=dge)
    torch.testing.assert_close(tokens, raw[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('out_type', ['raw', 'avg_featmap'])
def test_tokens_with_and_without_a_class_token(out_type, make_backbone, randomise, run_on_52_x_36):
    weights = randomise(make_backbone('pvt', out_type='raw'))
    (kept,), (dropped,) = (run_on_52_x_36(weights, out_type=out_type, with_cls_token=there) for there in (True, False))
    last = run_on_52_x_36(weights, with_cls_token=False)[-1]
    tokens = weights.norm(last.flatten(2).mT)
    torch.testing.assert_close(dropped, tokens if out_type == 'raw' else tokens.mean(1), rtol=1e-5, atol=1e-5)
    (raw,) = run_on_52_x_36(weights, out_type='raw')
    torch.testing.assert_close(kept, raw if out_type == 'raw' else raw.mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('with_cls_token, rows', [(None, 16), (False, 16), (True, 17)])
def test_maps_have_no_class_token_unless_it_is_asked_for(with_cls_token, rows, make_backbone):
    model = make_backbone('pvt', with_cls_token=with_cls_token)
    assert hasattr(model, 'cls_token') == (rows == 17) and model.stages[1].pos_embed.shape[1] == rows


def test_each_stage_may_have_its_own_granularities(make_backbone):
    model = make_backbone('pvt', dge=dict(granularities=((1, 2, 4), (0, 1)), region_size=8, routing='layer'))
    assert [[encoder.granularities for encoder in stage.dge] for stage in model.stages] == [2 * [(1, 2, 4)], [(0, 1)]]
    assert {(encoder.region, encoder.routing) for stage in model.stages for encoder in stage.dge} == {(8, 'layer')}


@pytest.mark.parametrize(
    'options, message',
    [
        (
            dict(out_type='cls_token', out_indices=0),
            "out_type='cls_token' returns the last stage only, but out_indices=0",
        ),
        (dict(out_type='raw', out_indices=(0, 1)), "out_type='raw' returns the last stage only, but out_indices="),
        (
            dict(out_type='cls_token', with_cls_token=False),
            "out_type='cls_token' returns the class token, but with_cls_token=False: leave one of them out",
        ),
        (dict(arch=dict(SMALL, depths=(2, 1, 1))), 'must have as many numbers for each key: one for each stage'),
    ],
)
def test_unfit_options(options, message, make_backbone):
    with pytest.raises(ValueError, match=message):
        make_backbone('pvt', **options)


def test_image_smaller_than_the_reduction():
    with pytest.raises(
        ValueError, match='Images of 4 x 32 pixels are too small for the PVT, which needs 8 x 8: resize'
    ):
        PVT(SMALL, 32)(torch.randn(1, 3, 4, 32))


@pytest.mark.parametrize(
    'embed, others, options', [(1e-5, 1e-6, {}), (1e-2, 1e-3, dict(embed_norm_eps=1e-2, norm_eps=1e-3))]
)
def test_epsilon_of_each_norm(embed, others, options, make_backbone):
    """Patch embeddings and spatial reductions have one, blocks and the final norm another."""
    model = make_backbone('pvt', out_type='raw', **options)
    found = {name: module.eps for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert len(found) == 2 + 2 + 3 * 2 + 1
    for name, eps in found.items():
        assert eps == (embed if name.endswith(('patch_embed.norm', 'attn.norm')) else others), name
