"""What all dynamic backbones have in common."""

import contextlib
import copy
import inspect
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdyn.models.dge.router import choose
from mmdyn.models.layers import EncoderBlock, deformable_sampling, packed_attention, project_patches, to_maps
from mmdyn.models.stage import run_blocks

REPLACEABLE = (run_blocks, choose, project_patches, deformable_sampling, packed_attention, to_maps)
DGE = dict(granularities=(1, 2, 4))
AUTOCAST = [None, torch.bfloat16, torch.float16]
# None is the dense model.
TRAIN_MODES = [None, 'sparse', 'dense']


def run(model, images, dtype=None, seed=0):
    torch.manual_seed(seed)
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        return model(images)


def train_step(model, images, dtype=None):
    """Gradients of all parameters by name."""
    model.zero_grad()
    run(model, images, dtype)[-1].float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('dtype', AUTOCAST)
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(32, 32), (52, 36), (20, 61)])
def test_granularity_1_everywhere_is_the_dense_model(name, dtype, training, size, make_backbone, randomise, encoders):
    dense = randomise(make_backbone(name, out_type='raw')).train(training)
    dynamic = make_backbone(name, out_type='raw', dge=DGE).train(training)
    dynamic.load_state_dict(dense.state_dict())
    for encoder in encoders(dynamic):
        encoder.router.bias.data[0] = 1e6
    images = torch.randn(2, 3, *size)
    # Residuals, enc(q) - q, are rounded once more.
    torch.testing.assert_close(run(dynamic, images, dtype)[0], run(dense, images, dtype)[0], rtol=1e-5, atol=1e-5)
    assert all((encoder.decision.choice == 0).all() for encoder in encoders(dynamic))


@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_training_repeats_with_its_seed_and_its_mode_does_not_matter(name, drop_path_rate, make_backbone):
    options = dict(out_type='raw', drop_path_rate=drop_path_rate)
    sparse = make_backbone(name, dge=dict(train_mode='sparse', **DGE), **options)
    dense = make_backbone(name, dge=dict(train_mode='dense', **DGE), **options)
    dense.load_state_dict(sparse.state_dict())
    images = torch.randn(3, 3, 52, 36)
    output = run(sparse, images)[0]
    assert torch.equal(output, run(sparse, images)[0])
    assert not torch.equal(output, run(sparse, images, seed=1)[0])
    torch.testing.assert_close(output, run(dense, images)[0], rtol=1e-5, atol=1e-5)


def test_evaluation_has_no_randomness(name, make_backbone):
    model, images = make_backbone(name, dge=DGE, drop_path_rate=0.5).eval(), torch.randn(2, 3, 52, 36)
    state = torch.get_rng_state()
    for one, other in zip(model(images), model(images)):
        assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('dge', [None, DGE, dict(granularities=(0, 1, 2), region_size=4), dict(DGE, routing='layer')])
def test_an_image_does_not_depend_on_its_batch(name, dge, make_backbone):
    model, images = make_backbone(name, dge=dge).eval(), 3 * torch.randn(5, 3, 52, 36) + torch.randn(5, 3, 1, 1)
    together = model(images)
    alone = [torch.cat(outputs) for outputs in zip(*(model(image[None]) for image in images))]
    torch.testing.assert_close(together, tuple(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('training', [False, True])
def test_channels_last_images_give_the_same(name, training, make_backbone):
    model, images = make_backbone(name, dge=DGE).train(training), torch.randn(2, 3, 52, 36)
    torch.testing.assert_close(
        run(model, images), run(model, images.to(memory_format=torch.channels_last)), rtol=1e-5, atol=1e-5
    )


def test_inference_mode_gives_the_same(name, make_backbone):
    model, images = make_backbone(name, dge=DGE).eval(), torch.randn(2, 3, 52, 36)
    with torch.inference_mode():
        inferred = model(images)
    for one, other in zip(inferred, model(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dge', [None, DGE])
def test_hooks_see_what_each_layer_returned(name, dge, make_backbone):
    """Inference overwrites tokens only where nobody looks."""
    model, images, seen = make_backbone(name, dge=dge).eval(), torch.randn(2, 3, 52, 36), []
    expected, stages = model(images), [stage for stage, _ in model.named_stages()]
    of_stage = [
        lambda stage: [stage.patch_embed],
        lambda stage: stage.blocks,
        lambda stage: stage.dge,
        lambda stage: [stage] if stage is not model else [],
    ]
    for layers_of in of_stage:
        layers = [layer for stage in stages for layer in layers_of(stage)]
        handles = [
            layer.register_forward_hook(
                lambda module, args, output: seen.append(
                    (output[0] if isinstance(output, tuple) else output, copy.deepcopy(output))
                )
            )
            for layer in layers
        ]
        with torch.no_grad():
            outputs = model(images)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
        assert len(seen) == len(layers)
        for output, kept in seen:
            assert torch.equal(output, kept[0] if isinstance(kept, tuple) else kept)
        seen.clear()
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize('dge', [None, DGE])
@pytest.mark.parametrize('grad', [False, True])
def test_hooks_fire_on_each_module_that_a_user_can_name(name, dge, grad, make_backbone):
    """All modules are called once, but for containers, which nobody calls."""
    model, images, called = make_backbone(name, dge=dge, out_type='raw').eval(), torch.randn(2, 3, 52, 36), []
    modules = {key: module for key, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    for key, module in modules.items():
        module.register_forward_hook(lambda module, args, output, key=key: called.append(key))
    with torch.set_grad_enabled(grad):
        model(images)
    assert set(called) == set(modules)
    twice = {key for key in called if called.count(key) > 1}
    assert all(key.endswith('norm1') for key in twice)  # of queries and of tokens


@torch.no_grad()
def test_hook_of_a_block_sees_packed_queries(make_backbone):
    """And the tokens that its keys come from."""
    model, seen = make_backbone('pvt', dge=DGE).eval(), []
    model.stages[0].blocks[1].register_forward_hook(lambda module, args, output: seen.append((args, output)))
    model(torch.randn(2, 3, 32, 32))
    (queries, tokens, shape, num_extra, lengths, _), output = seen[0]
    assert tokens.shape == (2, 64, 16) and shape == (8, 8) and num_extra == 0
    assert lengths == model.stages[0].dge[1].decision.queries.tolist()
    assert queries.shape == output.shape == (sum(lengths), 16)


@pytest.mark.parametrize('size', [(64, 64), (52, 36)])
@pytest.mark.parametrize('dge', [None, DGE, dict(granularities=(0, 1, 2), region_size=4), dict(routing='layer')])
@torch.no_grad()
def test_kernels_change_nothing_but_the_speed(dge, size, name, make_backbone, encoders, monkeypatch):
    """Outputs and decisions are those of the plain functions; also where some cells are in no key's patch."""
    model, images, results = make_backbone(name, dge=dge).eval(), torch.randn(2, 3, *size), []
    for plain in (False, True):
        if plain:
            for function in REPLACEABLE:
                monkeypatch.setattr(function, 'kernels', [])
        outputs = model(images)
        results.append((outputs, [tuple(encoder.decision) for encoder in encoders(model)]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_forced_choice_counts_in_place_of_the_routers(name, make_backbone, encoders):
    """Of each encoder, in inference and in training, with kernels or without."""
    model, images, results = make_backbone(name, dge=dict(granularities=(1, 2))).eval(), torch.randn(2, 3, 52, 36), []
    model(images)
    for encoder in encoders(model):
        encoder.forced = torch.randint(2, encoder.decision.choice.shape[1:])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            results.append(model(images))
        assert all((encoder.decision.choice == encoder.forced).all() for encoder in encoders(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    model.train()(images)
    assert all((encoder.decision.choice == encoder.forced).all() for encoder in encoders(model))


@pytest.mark.parametrize('dge', [None, DGE])
@torch.no_grad()
def test_threads_have_results_and_costs_of_their_own(name, dge, make_backbone):
    """Images of other sizes in 4 threads, each of which reads the cost of its own last pass."""
    model = make_backbone(name, dge=dge).eval()
    images = [torch.randn(1 + i % 3, 3, 24 + 4 * i, 36) for i in range(8)]
    assert model.last_pass is None

    @torch.no_grad()
    def run(x):
        return model(x), model.cost.spent, model.last_pass

    expected = [run(x) for x in images]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, images * 5))
    finally:
        sys.setswitchinterval(interval)
    for (outputs, spent, last_pass), (one, of_one, last) in zip(found, expected * 5):
        torch.testing.assert_close(outputs, one, rtol=1e-5, atol=1e-5)
        assert torch.equal(spent, of_one) and last_pass == last


@pytest.mark.parametrize('out_type', ['featmap', 'avg_featmap', 'raw'])
@pytest.mark.parametrize(
    'dge', [None, DGE, dict(granularities=(0, 1)), dict(DGE, train_mode='dense'), dict(routing='layer')]
)
@pytest.mark.parametrize('training', [False, True])
def test_batches_without_images(name, out_type, dge, training, make_backbone):
    """Have outputs without images, and a cost of no image; also where gradients are on."""
    model, shapes = make_backbone(name, out_type=out_type, dge=dge).train(training), []
    for images in (torch.randn(1, 3, 52, 36), torch.randn(0, 3, 52, 36)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                shapes.append([x.shape[1:] for x in model(images)])
                assert model.cost.spent.shape == model.cost.query_ratio.shape == (len(images),)
    assert shapes == shapes[:1] * 4


@pytest.mark.parametrize('dge', [None, DGE])
@torch.no_grad()
def test_builds_on_the_meta_device_and_takes_the_tensors_of_a_checkpoint(name, dge, make_backbone, backbone_config):
    model, images = make_backbone(name, dge=dge).eval(), torch.randn(2, 3, 52, 36)
    with torch.device('meta'):
        empty = MODELS.build(backbone_config(name, dge=dge)).eval()
    assert all(value.is_meta for value in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(empty(images), model(images), rtol=1e-5, atol=1e-5)


def test_routers_without_values_are_reported(name, make_backbone, backbone_config):
    """Where a dense checkpoint has none, and neither has the model."""
    with torch.device('meta'):
        empty = MODELS.build(backbone_config(name, dge=DGE))
    with pytest.raises(RuntimeError, match='(?s)Missing key.*router.weight'):
        empty.load_state_dict(make_backbone(name).state_dict(), assign=True)


@pytest.mark.parametrize('dge', [None, DGE])
@pytest.mark.parametrize('training', [False, True])
def test_fake_tensors_leave_nothing_behind(name, dge, training, make_backbone):
    """What ran under them, or failed, changes nothing for real ones of the same size."""
    model, images = make_backbone(name, dge=dge).train(training), torch.randn(2, 3, 44, 28)
    with contextlib.suppress(DataDependentOutputException), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(images))
    fresh = copy.deepcopy(model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(run(model, images), run(fresh, images), rtol=0, atol=0)
    if training:
        assert set(train_step(model, images)) == set(train_step(fresh, images))


@pytest.mark.parametrize('grad', [False, True])
def test_dense_model_compiles_as_one_graph(name, grad, make_backbone):
    model, images = make_backbone(name).eval(), torch.randn(2, 3, 32, 48)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@torch.no_grad()
def test_dynamic_model_compiles(make_backbone, encoders):
    """With breaks where the number of queries is read; in decisions, too."""
    model, images = make_backbone('deit', dge=DGE).eval(), torch.randn(2, 3, 32, 48)
    expected, decisions = model(images), [encoder.decision[:2] for encoder in encoders(model)]
    torch.testing.assert_close(torch.compile(model, backend='eager')(images), expected, rtol=1e-5, atol=1e-5)
    assert all(
        torch.equal(*pair)
        for encoder, decision in zip(encoders(model), decisions)
        for pair in zip(encoder.decision, decision)
    )
    torch.compiler.reset()


@pytest.mark.filterwarnings('ignore:There is a performance drop')  # of operators that torch does not vectorise
@torch.no_grad()
def test_transforms_of_functions_go_through_the_whole_model(name, make_backbone):
    """Each image of a vectorised call is itself, and derivatives forwards are those backwards."""
    model, (images, direction, cotangent) = make_backbone(name).eval(), torch.randn(3, 2, 3, 52, 36)

    def run_dense(x):
        return model(x)[-1]

    expected = run_dense(images)
    found = torch.func.vmap(lambda image: run_dense(image[None])[0])(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if name == 'dpvt':
        return  # torch's embedding_bag has no derivative forwards
    cotangent = cotangent.flatten()[: expected.numel()].view_as(expected)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no derivative forwards
        tangent = torch.func.jvp(run_dense, (images,), (direction,))[1]
        gradient = torch.func.vjp(run_dense, images)[1](cotangent)[0]
    torch.testing.assert_close((tangent * cotangent).sum(), (gradient * direction).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('dge', [None, DGE])
def test_images_stay_as_they_are(name, dge, make_backbone):
    """Of the size that the position embeddings have, and of another one."""
    model = make_backbone(name, dge=dge).eval()
    for size in ((32, 32), (52, 36)):
        images = torch.randn(2, 3, *size)
        before, weights = images.clone(), {key: value.clone() for key, value in model.state_dict().items()}
        with torch.inference_mode():
            first, second = model(images), model(images)
        assert torch.equal(images, before) and all(map(torch.equal, first, second))
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('dtype', AUTOCAST)
@pytest.mark.parametrize('train_mode', ['sparse', 'pair', 'dense'])
def test_all_weights_get_finite_gradients(name, dtype, train_mode, make_backbone):
    model = make_backbone(name, dge=dict(DGE, train_mode=train_mode), drop_path_rate=0.2, out_type='avg_featmap')
    gradients = train_step(model, torch.randn(4, 3, 52, 36), dtype)
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_gradients_are_finite_where_all_images_skip_a_layer(name, make_backbone, encoders):
    model, images = make_backbone(name, dge=dict(granularities=(0, 1)), out_type='raw'), torch.randn(2, 3, 52, 36)
    encoders(model)[0].router.bias.data[0] = 1e6
    gradients = train_step(model, images)
    assert (encoders(model)[0].decision.choice == 0).all()
    assert set(gradients) == {name for name, _ in model.named_parameters()}  # as distributed training expects
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize('train_mode', TRAIN_MODES)
def test_with_cp_recomputes_blocks_and_changes_no_gradient(name, train_mode, make_backbone):
    images, results, runs = torch.randn(3, 3, 52, 36), [], []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = make_backbone(
            name, dge=train_mode and dict(DGE, train_mode=train_mode), drop_path_rate=0.3, with_cp=with_cp
        )
        calls = []
        for module in model.modules():
            if isinstance(module, EncoderBlock):
                module.norm2.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        results.append(train_step(model, images))
        runs.append(len(calls))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    others = 3 * {'dense': len(DGE['granularities']) - 1}.get(train_mode, 0)  # which have no backward pass
    assert runs == [others + 3, others + 6]


def test_stochastic_depth_grows_linearly(name, make_backbone):
    model = make_backbone(name, drop_path_rate=0.4)
    rates = [module.drop_path_rate for module in model.modules() if isinstance(module, EncoderBlock)]
    assert rates == pytest.approx([0, 0.2, 0.4])


FROZEN = [
    ('pvt', -1, ()),
    ('pvt', 0, ('stages.0.patch_embed', 'stages.0.pos_embed')),
    ('pvt', 1, ('stages.0.',)),
    ('pvt', 2, ('stages.', 'cls_token', 'norm')),
    ('dpvt', -1, ()),
    ('dpvt', 0, ('stages.0.patch_embed', 'stages.0.pos_embed')),
    ('dpvt', 1, ('stages.0.',)),
    ('dpvt', 2, ('stages.', 'norm')),
    ('deit', -1, ()),
    ('deit', 0, ('patch_embed', 'pos_embed', 'cls_token')),
    ('deit', 2, ('patch_embed', 'pos_embed', 'cls_token', 'blocks.0.', 'blocks.1.', 'dge.0.', 'dge.1.')),
    ('deit', 3, ('patch_embed', 'pos_embed', 'cls_token', 'blocks.', 'dge.', 'norm')),
    ('lvvit', -1, ()),
    ('lvvit', 0, ('patch_embed', 'pos_embed', 'cls_token')),
    ('lvvit', 2, ('patch_embed', 'pos_embed', 'cls_token', 'blocks.0.', 'blocks.1.', 'dge.0.', 'dge.1.')),
    ('lvvit', 3, ('patch_embed', 'pos_embed', 'cls_token', 'blocks.', 'dge.', 'norm')),
]


@pytest.mark.parametrize('name, frozen_stages, prefixes', FROZEN)
def test_frozen_parts_get_no_gradient_and_stay_in_evaluation_mode(name, frozen_stages, prefixes, make_backbone):
    model = make_backbone(name, frozen_stages=frozen_stages, out_type='raw', dge=dict(DGE, train_mode='dense'))
    model.eval()
    model.train()
    # The mode of the lists and of the model itself changes nothing.
    modules = {
        name: module for name, module in model.named_modules() if not isinstance(module, (nn.ModuleList, type(model)))
    }
    assert {name for name in modules if not f'{name}.'.startswith(prefixes)} == {
        name for name, module in modules.items() if module.training
    }
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if not name.startswith(prefixes)}
    if trainable:
        assert set(train_step(model, torch.randn(2, 3, 32, 32))) == trainable


@pytest.mark.parametrize('img_size', [(64, 64), (24, 48)])
def test_images_of_another_size_get_resized_position_embeddings(name, img_size, make_backbone, randomise, resized):
    """As if the model had been made for them, with embeddings that were interpolated beforehand."""
    model = randomise(make_backbone(name, dge=DGE, out_type='raw')).eval()
    other = make_backbone(name, dge=DGE, out_type='raw', img_size=img_size).eval()
    other.load_state_dict(
        {
            key: resized(key, value, img_size) if key.endswith('pos_embed') else value
            for key, value in model.state_dict().items()
        }
    )
    images = torch.randn(2, 3, *img_size)
    torch.testing.assert_close(model(images), other(images), rtol=1e-5, atol=1e-5)


def test_model_wide_initialisation_leaves_routers_and_offsets_alone(name, backbone_config, encoders, classifier_of):
    model = classifier_of(backbone_config(name, dge=dict(granularities=(0, 2, 4)), out_type='raw'))
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    for key, value in model.state_dict().items():
        if 'router' in key or '.offsets.' in key or '.attn_weight.' in key:
            assert torch.equal(value, before[key])
        if key.endswith('fc1.weight'):
            assert not torch.equal(value, before[key])
    for encoder in encoders(model):
        torch.testing.assert_close(encoder.router.bias.softmax(0), torch.tensor([0.025, 0.95, 0.025]))


def test_deepcopy_is_independent(name, make_backbone, randomise):
    """Also after a training step. What is loaded into the copy is fitted to the copy."""
    model, images = make_backbone(name, dge=DGE), torch.randn(2, 3, 32, 32)
    train_step(model, images)
    twin = copy.deepcopy(model)
    before = run(model, images)[-1]
    assert torch.equal(before, run(twin, images)[-1])
    twin.load_state_dict(randomise(make_backbone(name, img_size=64)).state_dict())
    assert torch.equal(before, run(model, images)[-1])
    assert not torch.equal(before, run(twin, images)[-1])


def test_image_smaller_than_a_patch(name, make_backbone):
    with pytest.raises(
        ValueError, match='Images of 32 x 3 pixels are too small for the .*, which needs [48] x [48]: res'
    ):
        make_backbone(name)(torch.randn(1, 3, 32, 3))


def test_cost_before_any_forward_pass(name, make_backbone):
    with pytest.raises(ValueError, match='(D?PVT|DeiT|LVViT) has not run yet: call it on images before'):
        make_backbone(name).cost


@pytest.mark.parametrize('dge', [None, DGE])
def test_what_lists_attributes_passes_by_a_cost_that_is_not_there_yet(name, dge, make_backbone):
    model = make_backbone(name, dge=dge).eval()
    assert not hasattr(model, 'cost') and 'cost' not in dict(inspect.getmembers(model))
    assert not hasattr(pickle.loads(pickle.dumps(copy.deepcopy(model))), 'cost')
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert dict(inspect.getmembers(model))['cost'] == model.cost
    with pytest.raises(AttributeError, match="has no attribute 'costs'"):
        model.costs


def test_an_error_in_the_cost_is_told_as_it_is(name, make_backbone):
    model = make_backbone(name).eval()
    model(torch.randn(1, 3, 32, 32))
    next(model.named_stages())[0].blocks[0].ffn.fc2 = nn.Identity()
    with pytest.raises(AttributeError, match="'Identity' object has no attribute 'in_features'"):
        model.cost


@pytest.mark.parametrize('dge', [None, DGE])
def test_adapters_train_and_cost_what_they_add(name, dge, make_backbone, backbone_config, monkeypatch):
    """mmpretrain's, around the layers of the whole backbone; kernels or none."""
    peft = pytest.importorskip('mmpretrain.models.peft.lora')
    config, rank = backbone_config(name, dge=dge), 2
    lora = peft.LoRAModel(config, rank=rank, targets=[dict(type='.*fc1')])
    model, images = lora.module, torch.randn(2, 3, 32, 32)
    adapters = [module for module in lora.modules() if isinstance(module, peft.LoRALinear)]
    for adapter in adapters:
        nn.init.normal_(adapter.lora_up.weight)
    output = lora(images)[-1]
    (output * torch.randn_like(output)).sum().backward()
    assert all(adapter.lora_up.weight.grad.any() for adapter in adapters)
    lora.eval()
    with torch.no_grad():
        found, cost = lora(images), model.cost
        for function in REPLACEABLE:
            monkeypatch.setattr(function, 'kernels', [])
        torch.testing.assert_close(found, lora(images), rtol=1e-5, atol=1e-5)
    added = []
    for stage, _ in model.named_stages():
        for block in stage.blocks:
            block.ffn.fc1 = block.ffn.fc1.original_layer
            added.append(rank * (block.ffn.fc1.in_features + block.ffn.fc1.out_features))
    before = [layer.per_query for layer in model.cost.layers]
    assert [layer.per_query for layer in cost.layers] == [sum(pair) for pair in zip(before, added, strict=True)]


@pytest.mark.parametrize('dge', [None, DGE])
@torch.no_grad()
def test_quantised_linear_layers_run_and_cost_as_much(name, dge, make_backbone):
    """All of them are, and what they round is seen in the output."""
    model, images = make_backbone(name, dge=dge).eval(), torch.randn(2, 3, 32, 32)
    expected = model(images)[-1]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    change = (quantised(images)[-1] - expected).norm() / expected.norm()
    assert 0 < change < 0.2 and quantised.cost.dense == model.cost.dense


@torch.no_grad()
def test_maps_are_contiguous(name, make_backbone):
    """mmcv's RoIAlign takes any map for contiguous, and convolutions keep the strides of their input."""
    for dge in (None, DGE):
        maps = make_backbone(name, out_type='featmap', dge=dge).eval()(torch.randn(2, 3, 52, 36))
        assert all(out.is_contiguous() for out in maps)
