import pytest
import timm
import torch
from torch import nn

import mmdyn
from mmdyn.models.adapters.apply import applied_to
from mmdyn.models.stage import run_blocks

KERNEL = 'mmdyn.kernels.stage.encode_blocks'


@pytest.fixture
def make(randomise):
    """A small ViT with DGE whose routers choose by the image, in evaluation mode."""

    def vit(dge=dict(granularities=(1, 2, 4)), **options):  # noqa: B006
        sizes = dict(img_size=40, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=3)
        model = randomise(timm.create_model('vit_tiny_patch16_224', **{**sizes, **options})).eval()
        mmdyn.apply_dge(model, **dge)
        for stage in applied_to(model)[0].stages:
            for encoder in filter(None, stage.dge):
                nn.init.normal_(encoder.router.weight, std=5.0)
                nn.init.zeros_(encoder.router.bias)
        return model

    return vit


@pytest.fixture
def why_not():
    """Why the kernel does not take the blocks of a model; None if it does."""

    def reason(model):
        (stage,) = applied_to(model)[0].stages
        tokens = torch.randn(2, stage.num_extra + 25, 32)
        with torch.inference_mode():
            return run_blocks.why_not(stage, tokens, (5, 5)).get(KERNEL)

    return reason


def plain(model, images):
    """The outputs without kernels."""
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        return model(images)


@pytest.mark.parametrize('options', [{}, dict(qkv_bias=False), dict(reg_tokens=3), dict(drop_path_rate=0.5)])
@pytest.mark.parametrize('batch', [1, 3])
def test_equals_the_plain_path(options, batch, make, why_not, avx):
    model, images = make(**options), torch.randn(batch, 3, 40, 40)
    assert why_not(model) is None
    expected, queries = plain(model, images), mmdyn.cost(model).spent
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(mmdyn.cost(model).spent, queries)
    mmdyn.set_budget(model, 0.5)
    expected = plain(model, images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_what_the_caller_keeps_is_not_overwritten(make, avx):
    model, kept = make(dict(granularities=(1, 2), dense_layers=('blocks.1',))), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, output: kept.append((args[0], args[0].clone(), output)))
    with torch.no_grad():
        model(torch.randn(2, 3, 40, 40))
    assert len(kept) == 3
    assert all(torch.equal(before, copied) and not torch.equal(copied, after) for before, copied, after in kept)


@pytest.mark.parametrize(
    'options, reason',
    [
        (dict(init_values=0.1), 'blocks.0.ls1 is a LayerScale, not a Identity'),
        (dict(qk_norm=True), 'blocks.0.attn.q_norm is a LayerNorm'),
        (dict(act_layer='gelu_tanh'), 'blocks.0.mlp.act is a GELUTanh, not a GELU'),
        (dict(mlp_layer=timm.layers.SwiGLU), 'blocks.0.mlp is a SwiGLU, not a Mlp'),
    ],
)
def test_variants_are_refused(options, reason, make, why_not, avx):
    model = make(**options)
    assert reason in why_not(model)
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('change, reason', [
    (lambda block: block.attn.qkv.register_forward_hook(lambda *_: None), 'blocks.1.attn.qkv has forward hooks'),
    (lambda block: block.attn.proj_drop.train(), 'blocks.1.attn.proj_drop is in training mode'),
    (lambda block: setattr(block.mlp, 'fc1', nn.Sequential(block.mlp.fc1)), 'blocks.1.mlp.fc1 is a Sequential'),
    (lambda block: setattr(block.attn, 'scale', 1.0), 'blocks.1.attn scales its scores in another way'),
    (lambda block: block.norm1.double(), 'blocks.1.norm1.weight is float64, not float32'),
])  # fmt: skip
def test_changes_are_noticed(change, reason, make, why_not, avx):
    model = make()
    assert why_not(model) is None
    change(model.blocks[1])
    assert reason in why_not(model)


def test_other_families_tell_why_they_run_in_plain_pytorch(avx):
    model = timm.create_model('pvt_v2_b0', depths=(1,), embed_dims=(16,), num_heads=(1,), sr_ratios=(2,)).eval()
    (stage,) = applied_to(mmdyn.apply_dge(model))[0].stages
    with torch.inference_mode():
        reasons = run_blocks.why_not(stage, torch.randn(1, 64, 16), (8, 8))
    assert all('blocks.0 is a TimmPVT, not a EncoderBlock' in reason for reason in reasons.values())
