"""What becomes of each tensor of a checkpoint: used, adapted and named, or refused with what to do."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner import load_checkpoint
from mmpretrain.models import ImageClassifier, LoRAModel
from safetensors.torch import save_file
from timm.models import adapt_input_conv
from torch import nn

from mmdyn.models.backbones import checkpoint
from mmdyn.models.backbones.checkpoint import rgb_weights_for

DGE = dict(granularities=(1, 2, 4))
PLAIN = ['pvt', 'deit', 'lvvit', 'dpvt']
# Of other channels, depths or points than those of conftest.py.
PVT_ARCH = dict(embed_dims=(8, 24), depths=(1, 2), num_heads=(2, 3), mlp_ratios=(2, 3), sr_ratios=(2, 1))
DPVT_ARCH = dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), num_points=(3, 2))
FIRST = {
    'pvt': 'stages.0.patch_embed.proj.weight',
    'dpvt': 'stages.0.patch_embed.proj.weight',
    'deit': 'patch_embed.proj.weight',
    'lvvit': 'patch_embed.convs.0.weight',
    'cfvit': 'patch_embed.proj.weight',
}


@pytest.fixture(params=list(FIRST))
def name(request):
    """Each small backbone."""
    return request.param


@pytest.fixture
def told(monkeypatch):
    """What loading tells in the log."""
    told = []
    monkeypatch.setattr(checkpoint, 'print_log', lambda message, **_: told.append(message))
    return told


@pytest.fixture
def save(tmp_path):
    """Save tensors as the ``state_dict`` of a checkpoint, and return its path."""

    def save(state):
        torch.save(dict(state_dict=state), tmp_path / 'checkpoint.pth')
        return str(tmp_path / 'checkpoint.pth')

    return save


def classifier_of(backbone):
    return ImageClassifier(backbone, head=dict(type='LinearClsHead', num_classes=3, in_channels=16))


def in_front(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def same(model, before):
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('prefix', ['backbone.', 'model.backbone.'])
def test_forgotten_prefix(name, prefix, make_backbone, randomise, save):
    source = randomise(make_backbone(name))
    path = save({**in_front(prefix, source.state_dict()), 'head.fc.weight': torch.ones(3, 16)})
    model = make_backbone(name, init_cfg=dict(type='Pretrained', checkpoint=path))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match=rf'(?s)Nothing in the checkpoint would be loaded into this \w+\. Its names have '
        rf"'{prefix}' in front: load it by the backbone's init_cfg=.*prefix='{prefix}'\)",
    ) as error:
        model.init_weights()
    assert same(model, before)
    # What the message says works.
    assert 'checkpoint=...' in str(error.value)
    model = make_backbone(name, init_cfg=dict(type='Pretrained', checkpoint=path, prefix=prefix))
    model.init_weights()
    assert same(model, source.state_dict())


@pytest.mark.parametrize(
    'prefix, said',
    [
        (
            '',
            "Its names have 'nothing' in front, and not 'backbone.': load it by the backbone's init_cfg=dict(type="
            "'Pretrained', checkpoint=...).",
        ),
        (
            'encoder.',
            "Its names have 'encoder.' in front, and not 'backbone.': load it by the backbone's init_cfg=dict(type="
            "'Pretrained', checkpoint=..., prefix='encoder.').",
        ),
    ],
)
def test_backbone_alone_into_a_classifier(name, prefix, said, make_backbone, save):
    model, state = classifier_of(make_backbone(name)), in_front(prefix, make_backbone(name).state_dict())
    for load in (lambda: load_checkpoint(model, save(state)), lambda: model.load_state_dict(state, strict=False)):
        with pytest.raises(ValueError, match='Nothing in the checkpoint would be loaded') as error:
            load()
        assert str(error.value).endswith(said)


def test_checkpoints_without_a_backbone_are_for_the_rest(name, make_backbone, save, told):
    model = classifier_of(make_backbone(name))
    before = copy.deepcopy(model.state_dict())
    state = {'head.fc.weight': torch.ones(3, 16), 'neck.conv.weight': torch.ones(3, 3, 1, 1)}
    load_checkpoint(model, save(state))
    model.load_state_dict(state, strict=False)
    assert same(model.backbone, {key.removeprefix('backbone.'): value for key, value in before.items()})
    assert model.head.fc.weight.eq(1).all() and not told
    model.backbone.load_state_dict({}, strict=False)


def test_names_of_nobody_we_know(name, make_backbone, save):
    state = {'conv1.weight': torch.ones(64, 3, 7, 7), 'layer1.0.conv1.weight': torch.ones(64, 64, 1, 1)}
    for model, given in (
        (make_backbone(name), state),
        (classifier_of(make_backbone(name)), in_front('backbone.', state)),
    ):
        with pytest.raises(
            ValueError,
            match=r'Nothing in .*Its names are .*conv1.weight, .*layer1.0.conv1.weight, '
            rf'\.\.\., and not such as .*{FIRST[name]}\. If another program wrote it, convert it by: '
            r'python tools/model_converters/convert.py KIND SRC DST .* out of the file\.',
        ):
            load_checkpoint(model, save(given))


def test_tensors_without_a_place_are_named(name, make_backbone, save):
    """Also where loading is not strict."""
    model, state = make_backbone(name), make_backbone(name).state_dict()
    state['reuse.other.weight'] = state['gamma'] = torch.ones(1)
    with pytest.raises(
        ValueError,
        match=r'(?s)is of another arch.*take it out of the file.*\n  gamma: only in the check'
        r'point\n  reuse\.other\.weight: only in the checkpoint$',
    ):
        load_checkpoint(model, save(state))


@pytest.mark.parametrize('name', ['pvt'])
def test_what_the_model_has_no_use_for_is_told(name, make_backbone, save, told):
    model, dynamic = make_backbone(name), make_backbone(name, dge=DGE, out_type='raw')
    load_checkpoint(model, save(dynamic.state_dict()), strict=True)
    (message,) = told
    assert message.startswith('PVT: stages.1.pos_embed: fitted to img_size and extra tokens; ')
    assert message.endswith(
        '; the model has no use for cls_token, norm.bias, norm.weight, stages.*.dge.*.router.bias, '
        'stages.*.dge.*.router.weight.'
    )
    told.clear()
    load_checkpoint(make_backbone(name, dge=DGE), save(model.state_dict()), strict=True)
    assert told == [
        'PVT: the checkpoint has no stages.*.dge.*.router.bias, stages.*.dge.*.router.weight, which keep their '
        'initial values.'
    ]
    told.clear()
    load_checkpoint(model, save(model.state_dict()), strict=True)
    assert not told


@pytest.mark.parametrize('channels', [1, 2, 4, 5, 6, 7])
def test_rgb_weights_for_other_channels_are_timms(channels):
    weight = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(rgb_weights_for(weight, channels), adapt_input_conv(channels, weight))


@pytest.mark.parametrize('channels', [1, 4])
def test_rgb_checkpoint_for_images_of_other_channels(name, channels, make_backbone, randomise, save, told):
    rgb, model = randomise(make_backbone(name)), make_backbone(name, in_channels=channels)
    load_checkpoint(model, save(rgb.state_dict()), strict=True)
    expected = dict(rgb.state_dict())
    expected[FIRST[name]] = adapt_input_conv(channels, expected[FIRST[name]])
    assert all(torch.allclose(value, expected[key]) for key, value in model.state_dict().items())
    how = {1: 'takes their sum', 4: 'takes them in turns, times 3 / 4'}[channels]
    assert [FIRST[name] in message and f'in_channels={channels} {how}' in message for message in told] == [True]
    if channels == 1:
        grey = torch.randn(2, 1, 24, 24) if name == 'cfvit' else torch.randn(2, 1, 32, 32)
        torch.testing.assert_close(model.eval()(grey), rgb.eval()(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_only_rgb_weights_fit_other_channels(name, make_backbone):
    with pytest.raises(
        ValueError,
        match=rf'(?s)and in_channels, that it was trained with.*{FIRST[name]}: \(\d+, 4, .* '
        r'in the checkpoint, \(\d+, 3, .* in the model',
    ):
        make_backbone(name).load_state_dict(make_backbone(name, in_channels=4).state_dict())


def test_another_grid_with_as_many_patches(make_backbone, randomise, save):
    """8 x 8, 4 x 16 and 16 x 4 cells; the state says of which it is, also through a file."""
    square = randomise(make_backbone('deit'))
    for sides, grid in (((16, 64), (4, 16)), ((64, 16), (16, 4))):
        model = make_backbone('deit', img_size=sides)
        model.load_state_dict(square.state_dict())
        maps = square.pos_embed[:, 1:].mT.unflatten(2, (8, 8))
        expected = F.interpolate(maps, grid, mode='bilinear').flatten(2).mT
        assert model.pos_embed[:, :1].equal(square.pos_embed[:, :1])
        torch.testing.assert_close(model.pos_embed[:, 1:], expected, rtol=0, atol=1e-6)
        whole = classifier_of(make_backbone('deit', img_size=sides))
        load_checkpoint(whole, save(classifier_of(square).state_dict()))
        assert torch.equal(whole.backbone.pos_embed, model.pos_embed)
        # Of the model's own grid nothing changes.
        twin = make_backbone('deit', img_size=sides)
        load_checkpoint(twin, save(model.state_dict()), strict=True)
        assert torch.equal(twin.pos_embed, model.pos_embed)


def test_a_grid_that_is_no_square_is_known_by_the_state(make_backbone, randomise):
    wide, model = randomise(make_backbone('deit', img_size=(12, 28))), make_backbone('deit', img_size=(20, 8))
    model.load_state_dict(wide.state_dict())
    maps = wide.pos_embed[:, 1:].mT.unflatten(2, (3, 7))
    expected = F.interpolate(maps, (5, 2), mode='bilinear').flatten(2).mT
    torch.testing.assert_close(model.pos_embed[:, 1:], expected, rtol=0, atol=1e-6)


def test_a_grid_that_nothing_tells(make_backbone):
    """A state without metadata, as of init_cfg with a prefix, or of averaged weights."""
    bare = dict(make_backbone('deit').state_dict())
    model = make_backbone('deit', img_size=(16, 64))
    with pytest.raises(
        ValueError,
        match='pos_embed has 64 rows, which may be a map of 8 x 8 or the 4 x 16 of this DeiT, .*'
        'give the img_size that it was trained on: .*load the whole file, by load_from',
    ):
        model.load_state_dict(bare)
    for sides in ((32, 32), (12, 28)):  # a square of its own, or no square at all, leaves no doubt
        own = make_backbone('deit', img_size=sides)
        state = {key: value + 1 for key, value in own.state_dict().items()}
        own.load_state_dict(state)
        assert same(own, state)


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base(x) + self.down(x)


@pytest.mark.parametrize('name', ['pvt', 'deit'])
def test_adapters_alone(name, make_backbone, save):
    model = make_backbone(name, dge=DGE)
    block = next(model.named_stages())[0].blocks[0]
    block.attn.q = Adapter(block.attn.q)
    before = copy.deepcopy(model.state_dict())
    state = {key: value + 1 for key, value in before.items() if '.down.' in key}
    assert len(state) == 2
    load_checkpoint(model, save(state))
    assert same(model, {**before, **state})
    wrong = {key: value[:1] for key, value in state.items()}
    with pytest.raises(
        ValueError, match=r'attn\.q\.down\.weight: \(1, 16\) in the checkpoint, \(16, 16\) in the model'
    ):
        load_checkpoint(model, save(wrong))
    with pytest.raises(ValueError, match=r'blocks\.0\.attn\.kv\.down\.bias: only in the checkpoint'):
        load_checkpoint(model, save({**state, next(iter(state)).split('attn')[0] + 'attn.kv.down.bias': torch.ones(1)}))


def test_mmpretrains_lora_loads_what_it_saves(backbone_config, randomise, save):
    """It saves its own tensors alone."""
    module = dict(
        type='ImageClassifier',
        backbone=backbone_config('deit'),
        head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
    )
    source, target = (
        randomise(LoRAModel(module=module, alpha=4, rank=2, targets=[dict(type='.*attn.q')])) for _ in range(2)
    )
    state = source.state_dict()
    assert state and all('lora_' in key for key in state)
    load_checkpoint(target, save(state), revise_keys=[])
    loaded = target.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_safetensors(name, prefix, make_backbone, randomise, tmp_path):
    source, path = randomise(make_backbone(name)), str(tmp_path / 'model.safetensors')
    save_file({key: value.contiguous() for key, value in in_front(prefix, source.state_dict()).items()}, path)
    options = dict(prefix=prefix) if prefix else {}
    model = make_backbone(name, init_cfg=dict(type='Pretrained', checkpoint=path, **options))
    model.init_weights()
    assert same(model, source.state_dict())
    if prefix:
        whole = classifier_of(make_backbone(name))
        load_checkpoint(whole, path)
        assert same(whole.backbone, source.state_dict())


def test_safetensors_that_cannot_be_read(make_backbone, tmp_path, monkeypatch):
    model, path = make_backbone('deit'), tmp_path / 'model.safetensors'
    with pytest.raises(FileNotFoundError, match=r'There is no file .*model\.safetensors: give the path'):
        load_checkpoint(model, str(path))
    path.write_bytes(b'hello')
    with pytest.raises(ValueError, match=r'model\.safetensors is no file of safetensors, or broken .*: get it again'):
        load_checkpoint(model, str(path))
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(
        ImportError, match=r'To read .*model\.safetensors, install safetensors: pip install safetensors'
    ):
        load_checkpoint(model, str(path))


@pytest.mark.parametrize('name', PLAIN)
def test_pretrained_classifier_of_another_size_initialises_dynamic_features(
    name, tmp_path, make_backbone, randomise, resized
):
    """The features of PVT and DPVT have no class token and no norm; the routers are new."""
    classifier = randomise(make_backbone(name, out_type='raw')).state_dict()
    checkpoint = dict(
        state_dict={
            'head.fc.weight': torch.randn(3, 4),
            **{f'backbone.{key}': value for key, value in classifier.items()},
        }
    )
    torch.save(checkpoint, tmp_path / 'classifier.pth')
    model = make_backbone(
        name,
        out_type='featmap',
        dge=DGE,
        img_size=(24, 48),
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'), prefix='backbone.'),
    )
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    for key, value in model.state_dict().items():
        if key.endswith('pos_embed'):
            expected = resized(key, classifier[key], (24, 48))[:, -value.shape[1] :]
        else:
            expected = before[key] if 'router' in key else classifier[key]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    unused = {'pvt': {'cls_token', 'norm.weight', 'norm.bias'}, 'dpvt': {'norm.weight', 'norm.bias'}}
    assert set(classifier) - set(before) == unused.get(name, set())


@pytest.mark.parametrize('name', PLAIN)
@pytest.mark.parametrize('in_classifier', [False, True])
def test_dense_and_dynamic_checkpoints_load_strictly_into_each_other(
    name, in_classifier, tmp_path, make_backbone, randomise, classifier_of
):
    """Through torch and mmengine. What is loaded stays as it is, and so do routers without a counterpart."""
    part_of = classifier_of if in_classifier else lambda backbone: backbone
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


@pytest.mark.parametrize('name', PLAIN)
def test_missing_and_unexpected_tensors_are_still_reported(name, make_backbone):
    model = make_backbone(name)
    state = model.state_dict()
    lost = next(key for key in state if key.endswith('blocks.0.norm1.weight'))
    state['unknown'] = state.pop(lost)
    with pytest.raises(ValueError, match='unknown: only in the checkpoint'):
        model.load_state_dict(state)
    del state['unknown']
    with pytest.raises(RuntimeError, match=f'(?s)Missing key.*{lost}'):
        model.load_state_dict(state)


@pytest.mark.parametrize('name', PLAIN)
def test_position_embedding_of_a_checkpoint_must_be_square(name, make_backbone):
    model, state = make_backbone(name), make_backbone(name).state_dict()
    key = next(key for key in state if key.endswith('pos_embed'))
    state[key] = state[key][:, :13]
    with pytest.raises(ValueError, match='A position embedding of 13 rows is no square map with 0, 1 or 2 extra'):
        model.load_state_dict(state)


@pytest.mark.parametrize('name', PLAIN)
def test_checkpoint_with_other_granularities(name, make_backbone):
    state = make_backbone(name, dge=dict(granularities=(1, 2))).state_dict()
    with pytest.raises(
        ValueError,
        match=r'(?s)is of another architecture than this (D?PVT|DeiT|LVViT). Give the '
        r'arch and dge options, .*dge.0.router.weight: \(2, 16\) in the checkpoint, \(3, 16\) in the model',
    ):
        make_backbone(name, dge=DGE).load_state_dict(state)


@pytest.mark.parametrize(
    'name, arch, messages',
    [
        (
            'pvt',
            PVT_ARCH,
            [
                'stages.0.patch_embed.proj.weight: (8, 3, 4, 4) in the checkpoint, (16, 3, 4, 4) in the model',
                'stages.0.pos_embed: (1, 64, 8) in the checkpoint, (1, 64, 16) in the model',
                'stages.0.blocks.1.*: only in the model',
                'stages.1.blocks.1.*: only in the checkpoint',
            ],
        ),
        (
            'dpvt',
            DPVT_ARCH,
            [
                'stages.0.blocks.1.attn.offsets.bias: (12,) in the checkpoint, (16,) in the model',
                'stages.0.blocks.0.attn.attn_weight.weight: (6, 16) in the checkpoint, (8, 16) in the model',
            ],
        ),
        (
            'deit',
            dict(embed_dim=8, depth=4, num_heads=2, mlp_ratio=2),
            ['cls_token: (1, 1, 8) in the checkpoint, (1, 1, 16) in the model', 'blocks.3.*: only in the checkpoint'],
        ),
        ('deit', dict(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2), ['blocks.2.*: only in the model']),
    ],
)
def test_checkpoint_of_another_architecture(name, arch, messages, make_backbone):
    with pytest.raises(ValueError, match='The checkpoint is of another architecture than this') as error:
        make_backbone(name, dge=DGE).load_state_dict(make_backbone(name, arch=arch).state_dict())
    for message in messages:
        assert f'\n  {message}' in str(error.value)
