import pytest
import torch
from torch import nn

from mmdyn.analysis.passes import build, family_and_size, inference, round_products, training_step


def test_weights_depend_on_the_architecture_alone():
    first = build('DPVT-tiny', (64, 64)).state_dict()
    torch.rand(1)
    dynamic = build('DPVT-tiny', (64, 64), granularities=(1, 2)).state_dict()
    assert first.keys() < dynamic.keys()
    again = build('DPVT-tiny', (64, 64)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_deformable_attention_samples_between_cells():
    model = build('DPVT-tiny', (64, 64))
    assert model.stages[0].blocks[0].attn.offsets.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert not model.training


@pytest.mark.parametrize('name', ['ResNet-50', 'PVT', 'PVT-', 'PVT-small-more', ''])
def test_other_names(name):
    with pytest.raises(ValueError, match=f'^{name}: give FAMILY-SIZE with a FAMILY of PVT, DPVT, DeiT, e.g. PVT-small'):
        build(name, (64, 64))


def test_families_that_are_allowed():
    assert family_and_size('DeiT-tiny', ['DeiT']) == ('DeiT', 'tiny')
    with pytest.raises(ValueError, match='PVT-tiny: give FAMILY-SIZE with a FAMILY of DeiT, e.g. DeiT-small'):
        family_and_size('PVT-tiny', ['DeiT'])


def test_products_are_rounded_for_tf32_only():
    for to_tf32, precision in ((True, 'high'), (False, 'highest')):
        round_products(to_tf32)
        assert torch.get_float32_matmul_precision() == precision and torch.backends.cudnn.allow_tf32 == to_tf32


@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_inference(autocast):
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    out = inference(layer, x, autocast)()
    assert out.is_inference() and out.dtype == (autocast or torch.float32)
    torch.testing.assert_close(out.float(), x @ layer.weight.T + layer.bias, rtol=0, atol=0.05 if autocast else 1e-6)


def test_a_training_step_leaves_no_gradients():
    seen = []
    layer = nn.Linear(3, 2).eval()
    layer.weight.register_hook(lambda gradient: seen.append(gradient))
    training_step(nn.Sequential(layer, nn.Unflatten(1, (1, 2))), torch.ones(1, 3), None)()
    # The derivative of the mean of out^2, of two numbers, is out itself.
    expected = (layer.weight.sum(1) + layer.bias)[:, None].expand(2, 3)
    torch.testing.assert_close(seen[0], expected)
    assert layer.training and layer.weight.grad is None
