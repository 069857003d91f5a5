import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmdyn.models import LVViT
from mmdyn.models.layers import EncoderBlock


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize('arch, dim, depth, heads', [('small', 384, 16, 6), ('medium', 512, 20, 8)])
def test_parameters_by_hand(arch, dim, depth, heads):
    """Both linear classifiers included; norms have 2 parameters a channel, queries, keys and values no bias."""
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='mmdyn.LVViT', arch=arch),
            head=dict(type='mmdyn.LVViTHead', num_classes=1000, in_channels=dim),
        )
    )
    stem = 64 * (3 * 49 + 64 * 9 + 64 * 9 + 3 * 2) + dim * (64 * 8 * 8 + 1)
    attention, ffn, norm = 3 * dim * dim + dim * dim + dim, 2 * 3 * dim * dim + 3 * dim + dim, 2 * dim
    expected = stem + dim + 197 * dim + depth * (attention + ffn + 2 * norm) + norm + 2 * 1000 * (dim + 1)
    assert count(model) == expected
    if arch == 'small':
        assert round(expected / 1e6, 2) == 26.15  # the paper's number
    assert {block.attn.num_heads for block in model.backbone.blocks} == {heads}


@pytest.mark.parametrize('size', [(32, 32), (20, 44)])
@torch.no_grad()
def test_equals_a_slow_one(size, make_backbone, randomise, slow_vit):
    """Branches halved; the position embedding is interpolated for images of another size."""
    model = randomise(make_backbone('lvvit'), std=0.3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.double()
    images = torch.randn(2, 3, *size, dtype=torch.double)
    maps = model.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
    maps = nn.functional.interpolate(maps, (size[0] // 4, size[1] // 4), mode='bilinear').flatten(2).transpose(1, 2)
    (outputs,) = model(images)
    for image, output in zip(images, outputs, strict=True):
        tokens = torch.cat(
            [model.cls_token[0] + model.pos_embed[0, :1], slow_vit.patches(model.patch_embed, image, 4) + maps[0]]
        )
        expected = slow_vit.norm(model.norm, slow_vit.blocks(model.blocks, tokens, 'lvvit')[0], 'lvvit')
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_both_branches_are_halved_and_queries_keys_and_values_have_no_bias(make_backbone):
    model = make_backbone('lvvit')
    assert not [name for name, _ in model.named_parameters() if name.endswith(('q.bias', 'kv.bias'))]
    block, tokens = model.blocks[0], torch.randn(2, 7, 16)
    for layer, value in ((block.attn.proj, 1.0), (block.ffn.fc2, 10.0)):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, value)
    torch.testing.assert_close(block(tokens, tokens, (2, 3), 1), tokens + 5.5, rtol=0, atol=1e-6)


@pytest.mark.parametrize('dge', [None, dict(granularities=(1, 2))])
@pytest.mark.parametrize('out_indices, blocks', [(None, [2]), ((0, -1), [0, 2])])
def test_outputs_are_parts_of_the_raw_tokens(dge, out_indices, blocks, make_backbone):
    """The norm is that of the last block only; all tokens are the default."""
    images, options = torch.randn(2, 3, 52, 36), dict(out_indices=out_indices, dge=dge)
    raw, of_block = make_backbone('lvvit', **options).eval(), []
    for layer in raw.dge or raw.blocks:
        layer.register_forward_hook(lambda module, args, output: of_block.append(output))
    outputs = raw(images)
    of_block[-1] = raw.norm(of_block[-1])
    expected = [of_block[i] for i in blocks]
    assert len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))
    assert outputs[0].shape == (2, 1 + 13 * 9, 16)

    def run(out_type):
        model = make_backbone('lvvit', out_type=out_type, **options).eval()
        model.load_state_dict(raw.state_dict())
        return model(images)

    for tokens, featmap, mean, cls_token in zip(outputs, run('featmap'), run('avg_featmap'), run('cls_token')):
        assert featmap.shape == (2, 16, 13, 9)
        assert torch.equal(featmap[:, :, 4, 2], tokens[:, 1 + 4 * 9 + 2])
        torch.testing.assert_close(mean, tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-6)
        assert torch.equal(cls_token, tokens[:, 0])


def test_dge_adds_routers_and_shares_the_dense_weights():
    dense, dynamic = LVViT('small'), LVViT('small', dge=dict(granularities=(1, 2, 4)))
    assert count(dynamic) - count(dense) == 16 * (384 + 1) * 3
    dynamic.load_state_dict(dense.state_dict())
    assert len([module for module in dynamic.modules() if isinstance(module, EncoderBlock)]) == 16


def test_multiply_adds_by_hand():
    """With the classifiers of all 197 tokens they are the 6.6G that table 2 of the CF-ViT paper has for LV-ViT-S."""
    stem = 112**2 * 64 * (3 * 49 + 64 * 9 + 64 * 9) + 196 * 384 * 64 * 64
    block = 197 * (4 * 384**2 + 2 * 3 * 384**2) + 2 * 197**2 * 384
    model = LVViT('small').eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    assert model.cost.dense == model.cost.spent.item() == stem + 16 * block
    assert round((model.cost.dense + 197 * 384 * 1000) / 1e9, 1) == 6.6


def test_no_distillation_token():
    with pytest.raises(ValueError, match='LVViT has no distillation token'):
        LVViT(distilled=True)
