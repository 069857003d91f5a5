"""What holds for each family: the dense model, the loops, the counted operations."""

import copy
import pickle
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmdyn
from mmdyn.models.adapters.apply import applied_to

from .conftest import FAMILIES, MODELS_OF


def granularities_of(name):
    return (1, 2) if name == 'mm-swin' else (1, 2, 4)


@pytest.mark.parametrize('name', MODELS_OF)
def test_finest_granularity_is_the_dense_model(name, make_model, tensors):
    model, size = make_model(name)
    images, weights = torch.randn(2, 3, *size), model.state_dict()
    with torch.no_grad():
        expected = tensors(model(images))
        assert mmdyn.apply_dge(model, granularities_of(name)) is model
        got = tensors(model(images))
        assert mmdyn.cost(model).query_ratio.tolist() == pytest.approx([1.0, 1.0])
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        # Names are those of before, and of the routers; what was saved before loads.
        new = [key for key in model.state_dict() if key not in weights]
        assert list(model.state_dict()) == [*weights, *new] and new
        assert all(key.startswith('mmdyn_apply_dge.') and '.router.' in key for key in new)
        model.load_state_dict(weights)
        assert mmdyn.remove_dge(model) is model
        assert list(model.state_dict()) == list(weights)
        assert all(torch.equal(one, other) for one, other in zip(tensors(model(images)), expected))
    assert not any('forward' in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    'name, granularities',
    [*((name, granularities_of(name)) for name in MODELS_OF), *((name, (0, 1, 2)) for name in FAMILIES)],
)
def test_random_routing_equals_loops(name, granularities, apply_random, slow_adapters):
    """Each block, on what it was given; images of one batch choose differently, sizes are odd, regions are skipped."""
    if name == 'rope-mixed':
        pytest.importorskip('timm', '1.0.31')  # the first whose rotations may be of another type than float32
    model, size = apply_random(name, granularities)
    model.double()
    (applied,), seen, encode = applied_to(model), {}, getattr(slow_adapters, MODELS_OF[name][0])

    def watch(block):
        def note(_, args, kwargs, output):
            seen[block] = block.unpack(*args, **kwargs), output

        return block.block.register_forward_hook(note, with_kwargs=True)

    handles = [watch(block) for stage in applied.stages for block in stage.blocks]
    with torch.no_grad():
        model(torch.randn(2, 3, *size).double())
        for handle in handles:
            handle.remove()
        for block, ((tokens, shape, context), output) in seen.items():
            encoder = block.encoder
            expected = slow_adapters.slow_adapted(
                encode,
                block.block,
                tokens,
                encoder.decision.choice,
                encoder.granularities,
                encoder.region,
                shape,
                block.num_extra,
                context,
            )
            torch.testing.assert_close(output.reshape(tokens.shape), expected, rtol=1e-7, atol=1e-7)
    choices = [block.encoder.decision.choice for block in seen]
    assert any(len(choice.unique()) > 1 for choice in choices)
    assert any(not torch.equal(*choice) for choice in choices)


@pytest.mark.parametrize('name', [name for name in MODELS_OF if 'padded' not in name])
def test_counted_are_the_operations_that_run(name, make_model, apply_random):
    """As torch counts them, of the dense model and with DGE; padded windows have more in the library itself."""

    def count(model, images):
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
            model(images)
        return counter.get_total_flops() // 2

    if name == 'rope-mixed':
        pytest.importorskip('timm', '1.0.31')  # the first that makes rotations without matrix products
    model, size = make_model(name)
    size = (64, 32) if name == 'mmdet-swin' else size
    images = torch.randn(2, 3, *size)
    dense = count(model, images)
    model, _ = apply_random(name, granularities_of(name))
    spent, cost = count(model, images), mmdyn.cost(model)
    assert 2 * cost.dense == dense
    assert cost.spent.sum().item() == spent
    assert (cost.query_ratio < 1).all()


@pytest.mark.parametrize('name', [name for name in MODELS_OF if 'padded' not in name])
def test_dense_cost_is_that_of_fvcore(name, make_model, count_by_fvcore):
    """Of the model as its library has it; norms, pooling and resized position embeddings are left out."""
    if name == 'rope-mixed':
        pytest.importorskip('timm', '1.0.31')  # the first that makes rotations without matrix products
    model, size = make_model(name)
    images = torch.randn(1, 3, *((64, 32) if name == 'mmdet-swin' else size))
    counts = count_by_fvcore(model, images)
    mmdyn.apply_dge(model, granularities_of(name))
    with torch.no_grad():
        model(images)
    assert mmdyn.cost(model).dense == sum(
        count for kind, count in counts.items() if not re.search('norm|pool|upsample', kind)
    )


@pytest.mark.parametrize('name', MODELS_OF)
@pytest.mark.parametrize('train_mode', ['sparse', 'dense'])
def test_gradients_reach_routers(name, train_mode, apply_random, tensors):
    model, size = apply_random(name, granularities_of(name), train_mode=train_mode, std=0.5)
    model.train()
    loss = sum(tensor.square().mean() for tensor in tensors(model(torch.randn(2, 3, *size))))
    (loss + mmdyn.budget_loss(model, 0.5)).backward()
    routers = {name: weight for name, weight in model.named_parameters() if '.router.' in name}
    assert routers and all(weight.grad.abs().max() > 0 for weight in routers.values())


@pytest.mark.parametrize('name', FAMILIES)
def test_copies_are_models_of_their_own(name, apply_random, tensors):
    model, size = apply_random(name)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = tensors(model(images))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(*pair) for pair in zip(tensors(copied(images)), expected))
            for router in applied_to(copied)[0].parameters():
                router.zero_()  # whose first option is the finest
            copied(images)
            assert mmdyn.cost(copied).query_ratio.item() == pytest.approx(1.0)
            model(images)
            assert mmdyn.cost(model).query_ratio.item() < 1
            mmdyn.remove_dge(copied)
            assert not applied_to(copied)


@pytest.mark.parametrize('name', FAMILIES)
def test_nothing_but_extra_tokens(name, apply_random, tensors):
    """Where all regions are skipped, cells stay what the embeddings made of them."""
    model, size = apply_random(name, (0, 1))
    for encoder in applied_to(model)[0].modules():
        if hasattr(encoder, 'router'):
            encoder.router.weight.data.zero_()  # so that the first option is chosen
    with torch.no_grad():
        assert all(tensor.isfinite().all() for tensor in tensors(model(torch.randn(2, 3, *size))))
    extra = applied_to(model)[0].stages[0].num_extra
    assert all(layer.queries.tolist() == [extra, extra] for layer in mmdyn.cost(model).layers)


@pytest.mark.parametrize('name', ['vit', 'dinov3', 'timm-pvtv2', 'timm-swin'])
def test_dropout_and_autocast(name, make_model, tensors):
    """Of attention, of layers and of branches, in bfloat16."""
    model, size = make_model(name, attn_drop_rate=0.2, proj_drop_rate=0.2, drop_path_rate=0.2)
    mmdyn.apply_dge(model, (1, 2)).train()
    images = torch.randn(2, 3, *size)
    with torch.autocast('cpu', torch.bfloat16):
        first, second = (tensors(model(images)) for _ in range(2))
    assert not any(torch.equal(*pair) for pair in zip(first, second))
    sum(tensor.square().mean() for tensor in first).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)
    with torch.no_grad():
        for model_in in (model.eval(), model.bfloat16()):
            outputs = tensors(model_in(images.to(next(model_in.parameters()).dtype)))
            assert all(tensor.isfinite().all() for tensor in outputs)


@pytest.mark.parametrize('name', ['mit', 'mmdet-swin'])
def test_blocks_that_are_recomputed(name, make_model, tensors):
    """By their option ``with_cp``: the same gradients."""
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model, size = make_model(name, with_cp=with_cp)
        mmdyn.apply_dge(model, (1, 2)).train()
        torch.manual_seed(1)
        sum(tensor.square().mean() for tensor in tensors(model(torch.randn(2, 3, *size)))).backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None})
    assert len(gradients[0]) > 20
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('name', FAMILIES)
def test_exact_budget_in_inference(name, apply_random):
    model, size = apply_random(name, img_size=MODELS_OF[name][3])
    mmdyn.set_budget(model, 0.5)
    with torch.no_grad():
        model(torch.randn(3, 3, *size))
    ratio = mmdyn.cost(model).query_ratio
    assert (ratio <= 0.5 + 1e-6).all() and (ratio > 0.25).all()
