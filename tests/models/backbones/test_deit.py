import pytest
import timm
import torch
import torch.nn.functional as F

from mmdyn.models import DeiT


def from_timm(state):
    """Names and shapes of timm's weights -> ours, without the heads."""
    converted = {}
    for name, value in state.items():
        name = name.replace('.mlp.', '.ffn.')
        if '.qkv.' in name:
            query, key, val = value.chunk(3)
            converted[name.replace('qkv', 'q')] = query
            converted[name.replace('qkv', 'kv')] = torch.cat([key, val])
        elif not name.startswith('head'):
            converted[name] = value
    return converted


@pytest.mark.parametrize('distilled', [False, True])
@pytest.mark.parametrize('size', [(64, 64), (48, 96)])
def test_dense_equals_timm(distilled, size, randomise):
    """On images of another size than 64 x 64 timm gets position embeddings that were interpolated beforehand."""
    ours = randomise(DeiT('tiny', img_size=64, distilled=distilled, out_type='raw'), std=0.05).eval()
    theirs = timm.create_model(f'deit_tiny_{"distilled_" * distilled}patch16_224', img_size=size).eval()
    randomise(theirs, std=0.05)
    state = from_timm(theirs.state_dict())
    maps = ours.pos_embed[:, 1 + distilled :].transpose(1, 2).unflatten(2, (4, 4))
    maps = F.interpolate(maps, (size[0] // 16, size[1] // 16), mode='bilinear', align_corners=False).flatten(2)
    with torch.no_grad():
        theirs.pos_embed.copy_(torch.cat([ours.pos_embed[:, : 1 + distilled], maps.transpose(1, 2)], 1))
        ours.load_state_dict({**state, 'pos_embed': ours.pos_embed})
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(ours(images), (theirs.forward_features(images),), rtol=1e-5, atol=1e-5)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize('arch, millions', [('tiny', 5.7), ('small', 22.1), ('base', 86.6)])
def test_parameters_are_those_of_the_paper_and_timm(arch, millions):
    theirs = timm.create_model(f'deit_{arch}_patch16_224')
    assert round(count(theirs) / 1e6, 1) == millions
    assert count(DeiT(arch, img_size=224)) == count(theirs) - count(theirs.head)


@pytest.mark.parametrize('arch, dim', [('tiny', 192), ('small', 384)])
def test_extra_parameters_of_dge(arch, dim):
    assert count(DeiT(arch, dge=dict())) - count(DeiT(arch)) == 12 * (dim + 1) * 3


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('distilled', [False, True])
@pytest.mark.parametrize('out_indices, blocks', [(None, [2]), (0, [0]), (-2, [1]), ((0, 1, -1), [0, 1, 2])])
def test_outputs_are_parts_of_the_raw_tokens(distilled, out_indices, blocks, grad, make_backbone):
    """The norm is that of the last block only. With hooks all is computed by torch, without them maybe not."""
    images, num_extra = torch.randn(2, 3, 52, 36), 1 + distilled
    options = dict(out_indices=out_indices, distilled=distilled, dge=dict(granularities=(1, 2)))
    raw, of_block = make_backbone('deit', out_type='raw', **options).eval(), []
    for encoder in raw.dge:
        encoder.register_forward_hook(lambda module, args, output: of_block.append(output))
    with torch.set_grad_enabled(grad):
        outputs = raw(images)
    of_block[-1] = raw.norm(of_block[-1])
    expected = [of_block[i] for i in blocks]
    assert len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))
    assert outputs[0].shape == (2, num_extra + 13 * 9, 16)

    def run(out_type):
        model = make_backbone('deit', out_type=out_type, **options).eval()
        model.load_state_dict(raw.state_dict())
        with torch.set_grad_enabled(grad):
            return model(images)

    for tokens, featmap, mean, cls_token in zip(outputs, run('featmap'), run('avg_featmap'), run('cls_token')):
        cells = tokens[:, num_extra:]
        assert featmap.shape == (2, 16, 13, 9)
        torch.testing.assert_close(featmap[:, :, 4, 2], cells[:, 4 * 9 + 2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(featmap.mean((2, 3)), mean, rtol=1e-5, atol=1e-5)
        extra = (tokens[:, 0], tokens[:, 1]) if distilled else (tokens[:, 0],)
        torch.testing.assert_close(cls_token if distilled else (cls_token,), extra, rtol=1e-5, atol=1e-5)


def test_granularities_may_be_given_for_the_one_stage(make_backbone):
    model = make_backbone('deit', dge=dict(granularities=[[1, 2]]))
    assert [encoder.granularities for encoder in model.dge] == 3 * [(1, 2)]


def test_classifier_of_one_token_initialises_a_distilled_one(make_backbone, randomise):
    """The class token's position comes from the checkpoint, the distillation token's is new."""
    saved = randomise(make_backbone('deit')).state_dict()
    model = make_backbone('deit', distilled=True)
    new = model.pos_embed[:, 1].clone()
    model.load_state_dict(saved, strict=False)
    assert torch.equal(model.pos_embed[:, 2:], saved['pos_embed'][:, 1:])
    assert torch.equal(model.pos_embed[:, 1], new)
    assert torch.equal(model.pos_embed[:, 0], saved['pos_embed'][:, 0])


def test_distillation_token_freezes_with_the_embeddings(make_backbone):
    model = make_backbone('deit', distilled=True, frozen_stages=0)
    assert not model.dist_token.requires_grad and model.norm.weight.requires_grad
