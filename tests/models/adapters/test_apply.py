import pytest
import timm
import torch
from mmengine.registry import MODELS
from torch import nn

import mmdyn
from mmdyn.models.adapters.apply import applied_to
from mmdyn.models.cost import CostMeter

from .conftest import FAMILIES


def small_vit(**options):
    return timm.create_model(
        'vit_tiny_patch16_224',
        **{**dict(img_size=32, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=3), **options},
    )


def test_training_in_a_plain_loop():
    """The budget lowers what is spent; the head learns."""
    model = mmdyn.apply_dge(small_vit(), granularities=(1, 2, 4)).train()
    optimizer, images, labels = torch.optim.SGD(model.parameters(), 0.1), torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(images), labels) + mmdyn.budget_loss(model, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == set(before)
    ratio = mmdyn.cost(model).query_ratio
    assert mmdyn.budget_loss(model, 0.5).item() == pytest.approx((ratio.mean().item() - 0.5) ** 2)


def test_checkpointing_counts_each_pass_once():
    """Also with timm's own, which runs blocks again in the backward pass."""
    torch.manual_seed(1)
    model, images = mmdyn.apply_dge(small_vit(drop_path_rate=0.3)).train(), torch.randn(2, 3, 32, 32)
    gradients, meter = [], CostMeter(training=True, backbones=applied_to(model))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        (model(images).square().sum() + mmdyn.budget_loss(model, 0.2)).backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert len(meter.take()) == 2
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_stochastic_depth_drops_the_branch_of_an_image():
    model = mmdyn.apply_dge(small_vit(drop_path_rate=0.9)).train()
    block, tokens, images = model.blocks[2], {}, torch.randn(16, 3, 32, 32)
    block.register_forward_hook(lambda _, args, output: tokens.update(before=args[0], after=output))
    model(images)
    unchanged = (tokens['before'] == tokens['after']).all(-1)
    of_images = unchanged.float().mean(1)
    assert block.drop_path1.drop_prob == pytest.approx(0.9)
    assert of_images.gt(0.99).sum() > 6  # an image keeps nothing of both branches with a probability of 0.81


@pytest.mark.parametrize('layer', ['attn.qkv', 'attn.proj', 'mlp.fc1', 'norm1'])
def test_hooks_and_layers_of_users_count(layer):
    """A hook that doubles what a layer returns does so with DGE."""
    model, images = small_vit().eval(), torch.randn(2, 3, 32, 32)
    model.blocks[1].get_submodule(layer).register_forward_hook(lambda _, args, output: 2 * output)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(mmdyn.apply_dge(model)(images), expected)


def test_dense_layers_are_the_blocks_own():
    model, images = small_vit().eval(), torch.randn(2, 3, 32, 32)
    mmdyn.apply_dge(model, dense_layers=('blocks.0', 'blocks.2'))
    assert [layer.dynamic for layer in mmdyn.cost(run(model, images)).layers] == [False, True, False]
    assert [name for name in model.state_dict() if 'router' in name] == [
        'mmdyn_apply_dge.0.1.router.weight',
        'mmdyn_apply_dge.0.1.router.bias',
    ]


def run(model, images):
    with torch.no_grad():
        model(images)
    return model


def test_model_inside_of_another_is_found():
    whole = nn.Sequential(small_vit(num_classes=0), nn.Linear(16, 2)).eval()
    assert mmdyn.apply_dge(whole) is whole
    assert applied_to(whole)[0].entry is whole[0]
    mmdyn.set_budget(run(whole, torch.randn(1, 3, 32, 32)), 0.5)
    assert mmdyn.cost(whole).query_ratio.tolist() == [1.0]


def test_features_of_timm():
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, patch_size=4, embed_dim=16, depth=3, num_heads=2, features_only=True
    ).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        got = mmdyn.apply_dge(model)(images)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_features_of_timm_that_take_the_model_apart():
    options = dict(depths=(1, 1), embed_dims=(16, 24), num_heads=(1, 2), sr_ratios=(2, 1), features_only=True)
    with pytest.raises(ValueError, match="taken the model apart: give feature_cls='getter'"):
        mmdyn.apply_dge(timm.create_model('pvt_v2_b0', **options, out_indices=(0, 1)))
    mmdyn.apply_dge(timm.create_model('pvt_v2_b0', **options, out_indices=(0, 1), feature_cls='getter'))


def test_granularities_of_each_stage():
    model = mmdyn.apply_dge(
        timm.create_model('pvt_v2_b0', depths=(1, 1), embed_dims=(16, 24), num_heads=(1, 2), sr_ratios=(2, 1)),
        granularities=((1, 2, 4), (1, 2)),
    )
    assert [stage.dge[0].granularities for stage in applied_to(model)[0].stages] == [(1, 2, 4), (1, 2)]


def test_a_forward_function_of_another_tool_is_given_back():
    model, calls = small_vit(), []
    block = model.blocks[0]
    own = block.forward

    def wrapped(*args, **kwargs):
        calls.append(len(args))
        return own(*args, **kwargs)

    block.forward = wrapped
    mmdyn.apply_dge(model, dense_layers=('blocks.0',))
    run(model, torch.randn(1, 3, 32, 32))
    assert calls == [1]
    assert mmdyn.remove_dge(model).blocks[0].forward is wrapped


def test_routers_of_a_checkpoint():
    """They load into a model with DGE; without, the message says what made them."""
    dynamic = mmdyn.apply_dge(small_vit())
    saved = dynamic.state_dict()
    saved['mmdyn_apply_dge.0.1.router.bias'] = torch.arange(3.0)
    other = mmdyn.apply_dge(small_vit())
    other.load_state_dict(saved)
    assert applied_to(other)[0].stages[0].dge[1].router.bias.tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match='Unexpected key.*"mmdyn_apply_dge.0.0.router.weight"'):
        small_vit().load_state_dict(saved)
    with pytest.raises(RuntimeError, match='size mismatch for mmdyn_apply_dge.0.0.router.weight'):
        mmdyn.apply_dge(small_vit(), granularities=(1, 2)).load_state_dict(saved)


def test_a_model_that_no_adapter_knows():
    with pytest.raises(ValueError, match=r'No adapter knows the blocks of a torch.nn.*Linear') as error:
        mmdyn.apply_dge(nn.Linear(2, 2))
    assert 'timm.models.vision_transformer.VisionTransformer' in str(error.value)
    assert 'docs/any-vit.md tells how to write an adapter' in str(error.value)


def test_blocks_that_no_adapter_knows():
    other = timm.models.vision_transformer.ParallelScalingBlock
    with pytest.raises(ValueError, match='a block is a timm.*ParallelScalingBlock, not a timm.*Block: TimmViT'):
        mmdyn.apply_dge(small_vit(block_fn=other))
    model = small_vit(attn_layer='diff')
    with pytest.raises(ValueError, match='attn of a block is a timm.layers.*DiffAttention, not a timm.layers'):
        mmdyn.apply_dge(model)
    assert not any('forward' in vars(module) for module in model.modules())


def test_dge_twice():
    model = mmdyn.apply_dge(small_vit())
    with pytest.raises(ValueError, match='The VisionTransformer has DGE already: call mmdyn.remove_dge'):
        mmdyn.apply_dge(model)
    mmdyn.apply_dge(mmdyn.remove_dge(model))


def test_models_of_our_own(backbone_config):
    with pytest.raises(ValueError, match=r"PVT is mmdyn's own: give it dge=dict\(granularities=\(1, 2, 4\)\)"):
        mmdyn.apply_dge(MODELS.build(backbone_config('pvt')))


def test_several_models():
    with pytest.raises(ValueError, match='has 2 vision transformers, VisionTransformer, VisionTransformer: call'):
        mmdyn.apply_dge(nn.ModuleList([small_vit(), small_vit()]))


def test_granularities_that_do_not_divide_a_window():
    model = timm.create_model(
        'swin_tiny_patch4_window7_224', img_size=56, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=7
    )
    with pytest.raises(ValueError, match=r'\[2, 4\] do not divide the windows of 7 x 7 cells of stages.0.*\[1, 7\]'):
        mmdyn.apply_dge(model, granularities=(1, 2, 4))
    mmdyn.apply_dge(model, granularities=((1, 7), (0, 1)))
    assert mmdyn.cost(run(model.eval(), torch.randn(1, 3, 56, 56))).query_ratio.tolist() == pytest.approx([1.0])


@pytest.mark.parametrize('name', FAMILIES)
def test_layers_of_users_that_encode_would_pass_by(name, make_model):
    """Attention of another class is refused, before anything is changed."""
    model, _ = make_model(name)
    blocks = [module for module in model.modules() if isinstance(getattr(module, 'attn', None), nn.Module)]
    blocks[0].attn.__class__ = type('Mine', (type(blocks[0].attn),), {})
    before = [*model.state_dict()]
    if name == 'mmdet-swin':  # whose attention is a part of that
        blocks[0].attn.w_msa.__class__ = blocks[0].attn.__class__
    with pytest.raises(ValueError, match=r'attn(\.w_msa)? of a block is a .*Mine, not a'):
        mmdyn.apply_dge(model)
    assert [*model.state_dict()] == before and not any('forward' in vars(module) for module in model.modules())


def test_maps_smaller_than_a_window(make_model):
    model, _ = make_model('mm-swin')
    mmdyn.apply_dge(model, (1, 2))
    with pytest.raises(ValueError, match='A map of 1 x 1 cells is smaller than a window of 2 x 2: use larger images'):
        model(torch.randn(1, 3, 32, 32))


def test_a_model_is_left_alone_if_it_is_refused():
    """Also by what is found out last."""
    model = small_vit()
    with pytest.raises(ValueError, match='budget=0.001 cannot be reached'):
        mmdyn.apply_dge(model, router='entropy', test_budget=0.001)
    assert not any(
        'forward' in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )
    assert not applied_to(mmdyn.remove_dge(mmdyn.apply_dge(model)))


def test_unknown_options():
    with pytest.raises(ValueError, match=r"dge has no option \['budget'\]"):
        mmdyn.apply_dge(small_vit(), budget=0.5)
    with pytest.raises(ValueError, match='must be in ascending order'):
        mmdyn.apply_dge(small_vit(), granularities=(2, 1))


def test_masks_and_dropped_patches():
    model = mmdyn.apply_dge(small_vit(patch_drop_rate=0.5)).train()
    with pytest.raises(ValueError, match=r'A block got \(1, 33, 16\) tokens.*without dropout of patches'):
        model(torch.randn(1, 3, 32, 32))
    model = mmdyn.apply_dge(small_vit())
    with pytest.raises(ValueError, match='Masks of attention'):
        model.forward_features(torch.randn(1, 3, 32, 32), attn_mask=torch.ones(65, 65, dtype=torch.bool))


@pytest.mark.parametrize(
    'call, message',
    [
        (mmdyn.remove_dge, 'has no DGE that mmdyn.apply_dge gave it'),
        (mmdyn.cost, 'has 0 backbones that tell what they spend: call mmdyn.apply_dge'),
        (lambda model: mmdyn.set_budget(model, 0.5), 'has 0 backbones'),
        (lambda model: mmdyn.budget_loss(model, 0.5), 'has 0 backbones'),
        (lambda model: mmdyn.cost(mmdyn.apply_dge(model)), 'VisionTransformer has not run yet'),
        (lambda model: mmdyn.set_budget(mmdyn.apply_dge(model), 0.001), 'of the VisionTransformer allow query ratios'),
    ],
)
def test_calls_in_the_wrong_order(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_vit())
