"""What all dynamic backbones have in common."""
import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner import load_checkpoint
from mmpretrain.models import ImageClassifier
from torch import nn

from mmdyn.models.backbones import base
from mmdyn.models.layers import EncoderBlock

DGE = dict(granularities=(1, 2, 4))
AUTOCAST = [None, torch.bfloat16, torch.float16]
# None is the dense model.
TRAIN_MODES = [None, 'sparse', 'dense']


@pytest.fixture(params=['pvt', 'deit', 'lvvit', 'dpvt'])
def name(request):
    """Each small backbone, with a class token or not."""
    return request.param


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
    # In evaluation queries are filled up to one of a few numbers, which may change the order of sums.
    rounding = 0 if training else 1e-5
    torch.testing.assert_close(
        run(dynamic, images, dtype)[0], run(dense, images, dtype)[0], rtol=rounding, atol=rounding)
    assert all((encoder.decision.choice == 0).all() for encoder in encoders(dynamic))


@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
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
        run(model, images), run(model, images.to(memory_format=torch.channels_last)), rtol=1e-5, atol=1e-5)


def test_inference_mode_gives_the_same(name, make_backbone):
    model, images = make_backbone(name, dge=DGE).eval(), torch.randn(2, 3, 52, 36)
    with torch.inference_mode():
        inferred = model(images)
    for one, other in zip(inferred, model(images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dge', [None, DGE])
def test_hooks_see_what_each_block_returned(name, dge, make_backbone):
    """Inference overwrites tokens only where nobody looks."""
    model, images, seen = make_backbone(name, dge=dge).eval(), torch.randn(2, 3, 52, 36), []
    layers = [layer for stage, _ in model.named_stages() for layer in (stage.dge or stage.blocks)]
    expected = model(images)
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((output, output.detach().clone())))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            outputs = model(images)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(*pair) for pair in seen) and len(seen) == len(layers)
        seen.clear()


def test_hooks_on_blocks_see_what_each_returned_where_all_is_finest(name, make_backbone, encoders):
    """DGE then runs the blocks themselves."""
    model, images, seen = make_backbone(name, dge=DGE).eval(), torch.randn(2, 3, 52, 36), []
    for encoder in encoders(model):
        torch.nn.init.zeros_(encoder.router.weight)
        encoder.router.bias.data = torch.tensor([1.] + [0.] * (len(encoder.granularities) - 1))
    blocks = [block for stage, _ in model.named_stages() for block in stage.blocks]
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    with torch.no_grad():
        model(images)
    assert all(torch.equal(*pair) for pair in seen) and len(seen) == len(blocks)


@pytest.mark.parametrize('size', [(64, 64), (52, 36)])
@pytest.mark.parametrize('dge', [None, DGE, dict(granularities=(0, 1, 2), region_size=4), dict(routing='layer')])
@torch.no_grad()
def test_blocks_of_a_stage_in_one_call_are_those_one_by_one(dge, size, name, make_backbone, encoders, monkeypatch):
    """In output and decisions; also where some cells are in no key's patch."""
    model, images, results = make_backbone(name, dge=dge).eval(), torch.randn(2, 3, *size), []
    for jobs in (model._jobs, lambda *args: None):
        monkeypatch.setattr(model, '_jobs', jobs)
        outputs = model(images)
        decisions = [(encoder.decision.choice.clone(), encoder.decision.queries.clone()) for encoder in encoders(model)]
        results.append((outputs, decisions))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_call_for_each_stage(make_backbone, monkeypatch):
    """Unless hooks look at a layer, or its router is another one."""
    model, images, calls = make_backbone('pvt', dge=DGE).eval(), torch.randn(1, 3, 64, 64), []
    if not model.stages[0].blocks[0].job(torch.ones(1, 4, 16), (2, 2)):
        pytest.skip('no compiled block runs here')
    encode = base.encode
    monkeypatch.setattr(base, 'encode', lambda jobs, tokens: calls.append(len(jobs)) or encode(jobs, tokens))
    model(images)
    assert calls == [2, 1]
    handle = model.stages[0].dge[1].router.register_forward_hook(lambda *args: None)
    model(images)
    assert calls == [2, 1, 1]
    handle.remove()
    model.stages[0].blocks[0].register_forward_hook(lambda *args: None)
    model(images)
    assert calls == [2, 1, 1, 1]


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
@pytest.mark.parametrize('train_mode', ['sparse', 'dense'])
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
        model = make_backbone(name, dge=train_mode and dict(DGE, train_mode=train_mode), drop_path_rate=0.3,
                              with_cp=with_cp)
        calls = []
        for module in model.modules():
            if isinstance(module, EncoderBlock):
                module.norm2.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        results.append(train_step(model, images))
        runs.append(len(calls))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert runs == [3, 6]


def test_stochastic_depth_grows_linearly(name, make_backbone):
    model = make_backbone(name, drop_path_rate=0.4)
    rates = [module.drop_path_rate for module in model.modules() if isinstance(module, EncoderBlock)]
    assert rates == pytest.approx([0, 0.2, 0.4])


FROZEN = [
    ('pvt', -1, ()),
    ('pvt', 0, ('stages.0.patch_embed', 'stages.0.pos_embed')),
    ('pvt', 1, ('stages.0.', )),
    ('pvt', 2, ('stages.', 'cls_token', 'norm')),
    ('dpvt', -1, ()),
    ('dpvt', 0, ('stages.0.patch_embed', 'stages.0.pos_embed')),
    ('dpvt', 1, ('stages.0.', )),
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
    modules = {name: module for name, module in model.named_modules()
               if not isinstance(module, (nn.ModuleList, type(model)))}
    assert {name for name in modules if not f'{name}.'.startswith(prefixes)} == {
        name for name, module in modules.items() if module.training}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if not name.startswith(prefixes)}
    if trainable:
        assert set(train_step(model, torch.randn(2, 3, 32, 32))) == trainable


def resized(key, embedding, img_size):
    """The position embedding ``key`` of 32 x 32 images, interpolated for those of ``img_size``."""
    stride = 4 * 2**int(key.split('.')[1]) if key.startswith('stages') else 4
    side = 32 // stride
    maps = embedding[:, -side * side:].transpose(1, 2).unflatten(2, (side, side))
    maps = F.interpolate(maps, (img_size[0] // stride, img_size[1] // stride), mode='bilinear', align_corners=False)
    return torch.cat([embedding[:, :-side * side], maps.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize('img_size', [(64, 64), (24, 48)])
def test_images_of_another_size_get_resized_position_embeddings(name, img_size, make_backbone, randomise):
    """As if the model had been made for them, with embeddings that were interpolated beforehand."""
    model = randomise(make_backbone(name, dge=DGE, out_type='raw')).eval()
    other = make_backbone(name, dge=DGE, out_type='raw', img_size=img_size).eval()
    other.load_state_dict({key: resized(key, value, img_size) if key.endswith('pos_embed') else value
                           for key, value in model.state_dict().items()})
    images = torch.randn(2, 3, *img_size)
    torch.testing.assert_close(model(images), other(images), rtol=1e-5, atol=1e-5)


def test_pretrained_classifier_of_another_size_initialises_dynamic_features(name, tmp_path, make_backbone, randomise):
    """The features of PVT and DPVT have no class token and no norm; the routers are new."""
    classifier = randomise(make_backbone(name, out_type='raw')).state_dict()
    checkpoint = dict(state_dict={'head.fc.weight': torch.randn(3, 4),
                                  **{f'backbone.{key}': value for key, value in classifier.items()}})
    torch.save(checkpoint, tmp_path / 'classifier.pth')
    model = make_backbone(name, out_type='featmap', dge=DGE, img_size=(24, 48), init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'), prefix='backbone.'))
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    for key, value in model.state_dict().items():
        if key.endswith('pos_embed'):
            expected = resized(key, classifier[key], (24, 48))[:, -value.shape[1]:]
        else:
            expected = before[key] if 'router' in key else classifier[key]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    unused = {'pvt': {'cls_token', 'norm.weight', 'norm.bias'}, 'dpvt': {'norm.weight', 'norm.bias'}}
    assert set(classifier) - set(before) == unused.get(name, set())


def classifier_of(backbone):
    return ImageClassifier(backbone, head=dict(type='LinearClsHead', num_classes=3, in_channels=4),
                           init_cfg=dict(type='TruncNormal', layer='Linear', std=0.5))


@pytest.mark.parametrize('part_of', [lambda backbone: backbone, classifier_of], ids=['alone', 'in_a_classifier'])
def test_dense_and_dynamic_checkpoints_load_strictly_into_each_other(name, part_of, tmp_path, make_backbone, randomise):
    """Through torch and mmengine. What is loaded stays as it is, and so do routers without a counterpart."""
    dense, dynamic = (randomise(part_of(make_backbone(name, dge=dge))) for dge in (None, DGE))
    for source, target in ((dense, dynamic), (dynamic, dense), (dynamic, part_of(make_backbone(name, dge=DGE)))):
        state, before, twin = source.state_dict(), copy.deepcopy(target.state_dict()), copy.deepcopy(target)
        names = set(state)
        torch.save(state, tmp_path / 'source.pth')
        target.load_state_dict(state)
        load_checkpoint(twin, str(tmp_path / 'source.pth'), strict=True)
        assert set(state) == names
        for key, value in before.items():
            assert torch.equal(target.state_dict()[key], state.get(key, value))
            assert torch.equal(twin.state_dict()[key], state.get(key, value))


def test_missing_and_unexpected_tensors_are_still_reported(name, make_backbone):
    model = make_backbone(name)
    state = model.state_dict()
    lost = next(key for key in state if key.endswith('blocks.0.norm1.weight'))
    state['unknown'] = state.pop(lost)
    with pytest.raises(RuntimeError, match=rf'(?s)Missing key.*{lost}.*Unexpected key.*unknown'):
        model.load_state_dict(state)


def test_model_wide_initialisation_leaves_the_routers_alone(name, backbone_config, encoders):
    model = classifier_of(backbone_config(name, dge=dict(granularities=(0, 2, 4)), out_type='raw'))
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    for key, value in model.state_dict().items():
        if 'router' in key:
            assert torch.equal(value, before[key])
        if key.endswith('fc1.weight'):
            assert not torch.equal(value, before[key])
    for encoder in encoders(model):
        torch.testing.assert_close(encoder.router.bias.softmax(0), torch.tensor([.025, .95, .025]))


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


PVT_ARCH = dict(embed_dims=(8, 24), depths=(1, 2), num_heads=(2, 3), mlp_ratios=(2, 3), sr_ratios=(2, 1))
DPVT_ARCH = dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), num_points=(3, 2))
PVT_KEYS = 'depths.*embed_dims.*mlp_ratios.*num_heads.*sr_ratios'
DPVT_KEYS = 'depths.*embed_dims.*mlp_ratios.*num_heads.*num_points'
DEIT_KEYS = 'depth.*embed_dim.*mlp_ratio.*num_heads'


@pytest.mark.parametrize('name, options, message', [
    ('pvt', dict(arch='huge'), rf"Unknown arch 'huge': choose from .*large.*medium.*small.*tiny.*{PVT_KEYS}"),
    ('dpvt', dict(arch='huge'), rf"Unknown arch 'huge': choose from .*large.*medium.*small.*tiny.*{DPVT_KEYS}"),
    ('deit', dict(arch='huge'), rf"Unknown arch 'huge': choose from .*base.*small.*tiny.*{DEIT_KEYS}"),
    ('lvvit', dict(arch='base'), rf"Unknown arch 'base': choose from .*medium.*small.*{DEIT_KEYS}"),
    ('pvt', dict(arch=dict(depths=(1, 1), width=3)), rf"arch has the keys \['depths', 'width'\], but .*{PVT_KEYS}"),
    ('dpvt', dict(arch=PVT_ARCH), rf"arch has the keys .*'sr_ratios'\], but needs exactly .*{DPVT_KEYS}"),
    ('deit', dict(arch=dict(depth=3)), rf"arch has the keys \['depth'\], but needs exactly .*{DEIT_KEYS}"),
    ('deit', dict(arch=dict(embed_dim=16, depth=1, num_heads=3, mlp_ratio=2)), '16 channels do not divide into 3 h'),
    ('pvt', dict(img_size=7), 'img_size=7: give the side of a square, or .* of at least 8 pixels'),
    ('deit', dict(img_size=(64, 3)), r'img_size=\(64, 3\): give the side .* of at least 4 pixels'),
    ('deit', dict(img_size=(8, 8, 8)), r'img_size=\(8, 8, 8\): give the side of a square, or \(height, width\)'),
])
def test_unfit_shapes(name, options, message, make_backbone):
    with pytest.raises(ValueError, match=message):
        make_backbone(name, **options)


@pytest.mark.parametrize('options, message', [
    (dict(dge=dict(granularity=(1, 2))), r"dge has no option \['granularity'\]: it takes \['granularities', 'reg"),
    (dict(dge=dict(dim=3)), r"dge has no option \['dim'\]"),
    (dict(dge=dict(granularities=((1, 2), ) * 7)), r'are 7 sets for \d stages?: give one for each stage, or one'),
    (dict(dge=dict(granularities=())), 'leave no query: give at least one side greater than 0'),
    (dict(dge=dict(granularities=4)), 'granularities=4'),
    (dict(out_type='tokens'), r"out_type='tokens':.* choose from \('featmap', ('cls_token', )?'avg_featmap', 'raw'"),
    (dict(out_type='featmap', out_indices=3), 'out_indices=3: choose one or more of 0 to'),
    (dict(out_type='featmap', out_indices=(0, -4)), r'out_indices=\(0, -4\): choose one or more of 0 to'),
    (dict(out_type='featmap', out_indices=()), r'out_indices=\(\): choose one or more of 0 to'),
    (dict(frozen_stages=4), r'frozen_stages=4: choose from -1 \(none\) to [23]'),
    (dict(frozen_stages=-2), r'frozen_stages=-2: choose from -1 \(none\) to'),
])
def test_unfit_options(name, options, message, make_backbone):
    with pytest.raises(ValueError, match=message):
        make_backbone(name, **options)


def test_dge_must_be_a_dict(name, make_backbone):
    with pytest.raises(TypeError, match=r'dge=\(1, 2, 4\): give None for the dense model, or a dict, e.g. dict\(gr'):
        make_backbone(name, dge=(1, 2, 4))


def test_image_smaller_than_a_patch(name, make_backbone):
    with pytest.raises(ValueError, match='An input of 32 x 3 is smaller than one patch of 4 x 4'):
        make_backbone(name)(torch.randn(1, 3, 32, 3))


def test_cost_before_any_forward_pass(name, make_backbone):
    with pytest.raises(ValueError, match='(D?PVT|DeiT|LVViT) has not run yet: call it on images before'):
        make_backbone(name).cost


def test_position_embedding_of_a_checkpoint_must_be_square(name, make_backbone):
    model, state = make_backbone(name), make_backbone(name).state_dict()
    key = next(key for key in state if key.endswith('pos_embed'))
    state[key] = state[key][:, :13]
    with pytest.raises(ValueError, match='A position embedding of 13 rows is no square map with 0, 1 or 2 extra'):
        model.load_state_dict(state)


def test_checkpoint_with_other_granularities(name, make_backbone):
    state = make_backbone(name, dge=dict(granularities=(1, 2))).state_dict()
    with pytest.raises(ValueError, match=r'(?s)is of another architecture than this (D?PVT|DeiT|LVViT). Give the '
                       r'arch and dge .*dge.0.router.weight: \(2, 16\) in the checkpoint, \(3, 16\) in the model'):
        make_backbone(name, dge=DGE).load_state_dict(state)


@pytest.mark.parametrize('name, arch, messages', [
    ('pvt', PVT_ARCH, [
        'stages.0.patch_embed.proj.weight: (8, 3, 4, 4) in the checkpoint, (16, 3, 4, 4) in the model',
        'stages.0.pos_embed: (1, 64, 8) in the checkpoint, (1, 64, 16) in the model',
        'stages.0.blocks.1.*: only in the model', 'stages.1.blocks.1.*: only in the checkpoint']),
    ('dpvt', DPVT_ARCH, [
        'stages.0.blocks.1.attn.offsets.bias: (12,) in the checkpoint, (16,) in the model',
        'stages.0.blocks.0.attn.attn_weight.weight: (6, 16) in the checkpoint, (8, 16) in the model']),
    ('deit', dict(embed_dim=8, depth=4, num_heads=2, mlp_ratio=2), [
        'cls_token: (1, 1, 8) in the checkpoint, (1, 1, 16) in the model', 'blocks.3.*: only in the checkpoint']),
    ('deit', dict(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2), ['blocks.2.*: only in the model']),
])
def test_checkpoint_of_another_architecture(name, arch, messages, make_backbone):
    with pytest.raises(ValueError, match='The checkpoint is of another architecture than this') as error:
        make_backbone(name, dge=DGE).load_state_dict(make_backbone(name, arch=arch).state_dict())
    for message in messages:
        assert f'\n  {message}' in str(error.value)


@torch.no_grad()
def test_maps_are_contiguous(name, make_backbone):
    """mmcv's RoIAlign takes any map for contiguous, and convolutions keep the strides of their input."""
    for dge in (None, DGE):
        maps = make_backbone(name, out_type='featmap', dge=dge).eval()(torch.randn(2, 3, 52, 36))
        assert all(out.is_contiguous() for out in maps)
