"""How checkpoints fit backbones of other options."""

import copy

import pytest
import torch
from mmengine.runner import load_checkpoint

DGE = dict(granularities=(1, 2, 4))
# Of other channels, depths or points than those of conftest.py.
PVT_ARCH = dict(embed_dims=(8, 24), depths=(1, 2), num_heads=(2, 3), mlp_ratios=(2, 3), sr_ratios=(2, 1))
DPVT_ARCH = dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), num_points=(3, 2))


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


def test_missing_and_unexpected_tensors_are_still_reported(name, make_backbone):
    model = make_backbone(name)
    state = model.state_dict()
    lost = next(key for key in state if key.endswith('blocks.0.norm1.weight'))
    state['unknown'] = state.pop(lost)
    with pytest.raises(RuntimeError, match=rf'(?s)Missing key.*{lost}.*Unexpected key.*unknown'):
        model.load_state_dict(state)


def test_position_embedding_of_a_checkpoint_must_be_square(name, make_backbone):
    model, state = make_backbone(name), make_backbone(name).state_dict()
    key = next(key for key in state if key.endswith('pos_embed'))
    state[key] = state[key][:, :13]
    with pytest.raises(ValueError, match='A position embedding of 13 rows is no square map with 0, 1 or 2 extra'):
        model.load_state_dict(state)


def test_checkpoint_with_other_granularities(name, make_backbone):
    state = make_backbone(name, dge=dict(granularities=(1, 2))).state_dict()
    with pytest.raises(
        ValueError,
        match=r'(?s)is of another architecture than this (D?PVT|DeiT|LVViT). Give the '
        r'arch and dge .*dge.0.router.weight: \(2, 16\) in the checkpoint, \(3, 16\) in the model',
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
