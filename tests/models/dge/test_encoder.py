import copy
import math
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models.dge import Bound, DynamicGrainedEncoder, check_granularities
from mmdyn.models.dge.routing import grid
from mmdyn.models.layers import Attention, DeformableAttention, EncoderBlock
from mmdyn.models.stage import run_blocks

MODES = ['eval', 'sparse', 'pair', 'dense']
# Passes for comparison of three granularities.
OTHERS = dict(eval=0, sparse=0, pair=1, dense=2)
OPTIONS = [
    dict(granularities=(1, 2, 4)),
    dict(granularities=(1, 2)),
    dict(granularities=(1, 2, 4, 8)),
    dict(granularities=(0, 1)),
    dict(granularities=(2, 4)),
    dict(granularities=(0, 1, 2), region_size=4, tau=0.5),
    dict(granularities=(1, 2, 4), region_size=8),
    dict(granularities=(1, 2, 4), routing='layer'),
    dict(granularities=(0, 1, 3), routing='layer', tau=2.0),
]
# Map, extra tokens, spatial reduction of the keys (None: deformable attention).
LAYOUTS = [
    ((8, 8), 0, 1),
    ((5, 7), 1, 1),
    ((9, 6), 2, 2),
    ((4, 4), 0, 2),
    ((13, 3), 1, 2),
    ((1, 1), 1, 1),
    ((5, 7), 0, None),
    ((1, 9), 0, None),
]
DIM = 8


def make(mode='sparse', sr_ratio=1, drop_path_rate=0.0, with_cp=False, **options):
    """An encoder, whose router chooses by the image, and a block."""
    encoder = DynamicGrainedEncoder(DIM, train_mode='sparse' if mode == 'eval' else mode, **options)
    nn.init.normal_(encoder.router.weight, std=5.0)
    nn.init.zeros_(encoder.router.bias)
    attn = Attention(DIM, 2, sr_ratio) if sr_ratio else DeformableAttention(DIM, 2, 3)
    if not sr_ratio:
        # In the beginning points depend on no query, and lie on integers, where gradients jump.
        for parameter in (*attn.offsets.parameters(), *attn.attn_weight.parameters()):
            nn.init.normal_(parameter)
    block = EncoderBlock(DIM, attn, mlp_ratio=2, drop_path_rate=drop_path_rate, with_cp=with_cp)
    return encoder.train(mode != 'eval'), block.train(mode != 'eval')


def random_choice(encoder, shape):
    return torch.randint(len(encoder.granularities), grid(encoder.region, shape))


@pytest.mark.parametrize('shape, num_extra, sr_ratio', LAYOUTS)
@pytest.mark.parametrize('options', OPTIONS, ids=lambda options: '-'.join(map(str, options.values())))
@pytest.mark.parametrize('mode', ['eval', 'sparse', 'dense'])
def test_equals_the_loops_of_the_paper(mode, options, shape, num_extra, sr_ratio, slow_dge):
    """In output, number of queries, and all gradients. In float64: only the router rounds to float32."""
    encoder, block = (module.double() for module in make(mode, sr_ratio, **options))
    weights, seen = [*block.parameters(), *encoder.parameters()], set()
    for i, batch in enumerate((1, 2, *[5] * 20)):
        if i > 2 and len(seen) == len(encoder.granularities):
            break
        tokens = torch.randn(batch, num_extra + math.prod(shape), DIM, dtype=torch.double, requires_grad=True)
        weigh_tokens, weigh_counts = torch.randn_like(tokens), torch.randn(batch)
        results = []
        for run in (encoder, partial(slow_dge, encoder)):
            torch.manual_seed(i)
            output = run(block, tokens, shape, num_extra)
            output, counts = output if isinstance(output, tuple) else (output, encoder.decision.queries)
            loss = (weigh_tokens * output).sum() + (weigh_counts * counts).sum()
            gradients = torch.autograd.grad(loss, [tokens, *weights], allow_unused=True, materialize_grads=True)
            results.append([output, counts.double(), *gradients])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        seen |= set(encoder.decision.choice.flatten().tolist())
    assert seen == set(range(len(encoder.granularities)))


@pytest.mark.parametrize('shape, num_extra, sr_ratio', [*LAYOUTS, ((23, 17), 1, 2), ((23, 17), 0, None)])
@pytest.mark.parametrize('options', OPTIONS, ids=lambda options: '-'.join(map(str, options.values())))
@torch.no_grad()
def test_inference_in_float32_equals_the_loops_of_the_paper(options, shape, num_extra, sr_ratio, slow_dge):
    """In whichever way a stage runs it."""
    encoder, block = make('eval', sr_ratio, **options)
    stage = SimpleNamespace(blocks=[block], dge=[encoder], num_extra=num_extra)
    tokens = torch.randn(3, num_extra + math.prod(shape), DIM)
    expected, counts = slow_dge(encoder, block, tokens, shape, num_extra)
    for run in (run_blocks, run_blocks.plain):
        encoder.decision = None
        output = run(stage, tokens.clone(), shape)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(encoder.decision.queries, counts)


@pytest.mark.parametrize('mode', ['eval', 'sparse', 'dense'])
@pytest.mark.parametrize(
    'options', [dict(granularities=(0, 1, 2)), dict(granularities=(1, 2, 4), routing='layer')], ids=['region', 'layer']
)
@pytest.mark.parametrize('sr_ratio, num_extra', [(2, 1), (None, 0)])
def test_a_forced_choice_counts_in_place_of_the_routers(mode, options, sr_ratio, num_extra, slow_dge):
    """Of all images; also where the router decides by layer. In training the logits have a gradient nevertheless."""
    encoder, block = (module.double() for module in make(mode, sr_ratio, **options))
    shape, results = (5, 7), []
    encoder.forced = random_choice(encoder, shape)
    tokens = torch.randn(3, num_extra + 35, DIM, dtype=torch.double, requires_grad=True)
    weigh_tokens, weigh_counts = torch.randn_like(tokens), torch.randn(3)
    leaves = [tokens, *block.parameters(), *encoder.parameters()]
    for run in (encoder, partial(slow_dge, encoder)):
        torch.manual_seed(0)
        output = run(block, tokens, shape, num_extra)
        output, counts = output if isinstance(output, tuple) else (output, encoder.decision.queries)
        loss = (weigh_tokens * output).sum() + (weigh_counts * counts).sum()
        results.append(
            [output, counts.double(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]
        )
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder.decision.choice, encoder.forced.expand(3, -1, -1))
    assert bool(results[0][-1].any()) == (mode != 'eval')
    encoder.forced = None
    encoder(block, tokens, shape, num_extra)
    assert len({tuple(choice.flatten().tolist()) for choice in encoder.decision.choice}) > 1


@pytest.mark.parametrize('train_mode', ['sparse', 'dense'])
@pytest.mark.parametrize('granularities', [(1, 2, 4), (0, 1, 2)])
def test_queries_of_a_decision_have_the_gradient_of_the_gates(train_mode, granularities):
    """Of eq. 7's sum for a layer: patches of a granularity times its soft score; of the chosen one if it alone ran."""
    encoder, block = make(train_mode, granularities=granularities)
    tokens, shape = torch.randn(2, 1 + 8 * 8, DIM), (8, 8)
    torch.manual_seed(3)
    encoder(block, tokens, shape, 1)
    found = torch.autograd.grad(encoder.decision.queries.sum(), [encoder.router.weight, encoder.router.bias])

    torch.manual_seed(3)
    side = encoder.region
    means = tokens[:, 1:].unflatten(1, (8 // side, side, 8 // side, side)).mean((2, 4))
    logits = means @ encoder.router.weight.T + encoder.router.bias
    soft = (logits - torch.empty_like(logits).exponential_().log()).softmax(-1)
    patches, choice = torch.tensor([(side // phi) ** 2 if phi else 0 for phi in granularities]), encoder.decision.choice
    scores = soft * patches
    scores = scores if train_mode == 'dense' else scores.gather(-1, choice[..., None])
    expected = torch.autograd.grad(scores.sum(), [encoder.router.weight, encoder.router.bias])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    hard = 1 + patches[choice].sum((1, 2))
    assert torch.equal(encoder.decision.queries.detach(), hard.float())
    encoder.eval()(block, tokens, shape, 1)
    assert not encoder.decision.queries.requires_grad and encoder.decision.queries.dtype == torch.long


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('grad', [False, True])
def test_a_hook_of_the_router_sees_the_means_and_decides(mode, grad):
    """(0, 0) is the only region that is not skipped, whatever the weights say."""
    encoder, block = make(mode, granularities=(0, 2))
    tokens, seen = torch.randn(3, 1 + 24, DIM), []

    def hook(router, args, logits):
        seen.append(args[0].detach())
        logits = torch.zeros_like(logits)
        logits[..., 0] = 1e6
        logits[:, 0, 0, 1] = 1e7
        return logits

    encoder.router.register_forward_hook(hook)
    stage = SimpleNamespace(blocks=[block], dge=[encoder], num_extra=1)
    with torch.set_grad_enabled(grad):
        output = run_blocks(stage, tokens.clone(), (4, 6))
    means = tokens[:, 1:].unflatten(1, (2, 2, 3, 2)).mean((2, 4))
    torch.testing.assert_close(seen, [means], rtol=1e-5, atol=1e-6)
    assert encoder.decision.choice.tolist() == [[[1, 0, 0], [0, 0, 0]]] * 3
    assert encoder.decision.queries.tolist() == [2, 2, 2]
    changed = (output != tokens).any(2)
    assert [cell for cell in range(25) if changed[:, cell].all()] == [0, 1, 2, 7, 8] and changed.sum() == 3 * 5


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('mode', MODES)
def test_hooks_of_the_block_and_its_attention_see_the_queries(mode, grad):
    """The packed ones, and before them those that training compares; what a hook of the block returns counts."""
    encoder, block = make(mode, granularities=(1, 2, 4))
    tokens, seen = torch.randn(3, 2 + 35, DIM), []
    block.register_forward_pre_hook(lambda _, args: seen.append(args))
    block.attn.register_forward_pre_hook(lambda _, args: seen.append(args))
    block.register_forward_hook(lambda _, args, output: args[0] + 1)
    stage = SimpleNamespace(blocks=[block], dge=[encoder], num_extra=2)
    with torch.set_grad_enabled(grad):
        output = run_blocks(stage, tokens.clone(), (5, 7))
    assert len(seen) == 2 * (1 + grad * OTHERS[mode])
    for of_block, of_attention in zip(seen[::2], seen[1::2]):
        for queries, keys, map_shape, num_extra, lengths, points in (of_block, of_attention):
            assert queries.shape == (sum(lengths), DIM) and keys.shape == tokens.shape and points is None
            assert map_shape == (5, 7) and num_extra == 2
        assert torch.equal(of_block[1], tokens)
        torch.testing.assert_close(of_attention[0], block.norm1(of_block[0]))
        torch.testing.assert_close(of_attention[1], block.norm1(tokens))
    assert lengths == encoder.decision.queries.tolist()
    torch.testing.assert_close(output, tokens + 1)


@pytest.mark.parametrize('mode', MODES)
def test_decisions_are_the_threads_own(mode):
    encoder, block = make(mode, granularities=(1, 2))
    start, found = threading.Barrier(2), {}

    def work(batch):
        assert encoder.decision is None
        encoder(block, torch.randn(batch, 35, DIM), (5, 7))
        start.wait(timeout=60)
        found[batch] = encoder.decision

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoder.decision is None
    assert {batch: (len(decision.choice), len(decision.queries)) for batch, decision in found.items()} == {
        2: (2, 2),
        5: (5, 5),
    }


@torch.no_grad()
@pytest.mark.parametrize('options', OPTIONS, ids=lambda options: '-'.join(map(str, options.values())))
@pytest.mark.parametrize('sr_ratio, num_extra', [(2, 1), (None, 0)])
def test_a_bound_that_is_wide_enough_changes_nothing(options, sr_ratio, num_extra):
    """For the dense block's queries, and for those of the image that has most."""
    encoder, block = (module.double() for module in make('eval', sr_ratio, **options))
    tokens, size = torch.randn(3, num_extra + 35, DIM, dtype=torch.double), num_extra + 35
    expected, queries = encoder(block, tokens, (5, 7), num_extra), encoder.decision.queries
    for share in (1.0, queries.max().item() / size):
        encoder.bound = Bound(share)
        torch.testing.assert_close(encoder(block, tokens, (5, 7), num_extra), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(encoder.decision.queries, queries)
        (surplus,) = encoder.bound.surplus
        places = min(round(share * size), encoder.query_bounds((5, 7), num_extra)[1])
        assert torch.equal(surplus, queries - places) and surplus.max() <= 0


@torch.no_grad()
def test_a_bound_tells_what_there_was_no_place_for():
    """In each pass; another thread has no bound."""
    encoder, block = make('eval')
    encoder.bound, tokens, found = Bound(0.5), torch.randn(2, 36, DIM), []
    encoder.forced = torch.tensor([[0, 0], [2, 2]])  # 16 + 12 cells, and 2 patches at the edge
    for _ in range(2):
        encoder(block, tokens, (5, 7), 1)
    assert [surplus.tolist() for surplus in encoder.bound.surplus] == [[31 - 18] * 2] * 2
    assert encoder.decision.queries.tolist() == [31] * 2
    thread = threading.Thread(target=lambda: found.append(encoder.bound))
    thread.start(), thread.join()
    assert found == [None]


def test_training_has_no_bound():
    encoder, block = make('sparse')
    encoder.bound = Bound(0.0)
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(encoder(block, torch.randn(2, 36, DIM), (5, 7), 1))
        encoder.bound = None
    assert torch.equal(*outputs)


def test_a_copy_has_no_decision():
    """Which may hold a graph, that cannot be copied."""
    encoder, block = make()
    encoder(block, torch.randn(2, 35, DIM), (5, 7))
    assert encoder.decision.queries.requires_grad
    assert copy.deepcopy(encoder).decision is None


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('sr_ratio', [1, 2, None])
@pytest.mark.parametrize('grad', [False, True])
def test_no_images(mode, sr_ratio, grad):
    encoder, block = make(mode, sr_ratio)
    with torch.set_grad_enabled(grad):
        assert encoder(block, torch.randn(0, 35, DIM), (5, 7)).shape == (0, 35, DIM)
    assert encoder.decision.choice.shape == (0, 2, 2) and encoder.decision.queries.shape == (0,)
    assert encoder.decision.queries.is_floating_point() == (mode != 'eval')


@pytest.mark.parametrize('mode', ['eval', 'sparse'])
@pytest.mark.parametrize('sr_ratio, num_extra', [(2, 1), (None, 0)])
@pytest.mark.parametrize('shape', [(5, 7), (8, 8), (1, 13)])
def test_granularity_1_is_the_block_itself(shape, mode, sr_ratio, num_extra):
    """tokens + (enc(q) - q), where q are the tokens: but for the rounding of a difference and a sum."""
    encoder, block = make(mode, sr_ratio if min(shape) > 1 else sr_ratio and 1, granularities=(1, 2, 4))
    encoder.router.bias.data[0] = 1e4
    tokens = torch.randn(2, num_extra + math.prod(shape), DIM)
    expected = block(tokens, tokens, shape, num_extra)
    torch.testing.assert_close(encoder(block, tokens, shape, num_extra), expected, rtol=1e-6, atol=1e-6)


class Recorder(nn.Module):
    """A block that changes nothing, and keeps its queries and points."""

    def __init__(self, uses_points):
        super().__init__()
        self.uses_points, self.calls = uses_points, []

    def forward(self, queries, tokens, shape, num_extra, lengths=None, points=None):
        self.calls.append((queries, points))
        return queries


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('num_extra', [0, 2])
def test_points_are_the_places_of_the_queries(mode, num_extra):
    """Where the cells hold their own x and y, so do the queries that are pooled from them."""
    encoder, _ = make(mode, granularities=(1, 2, 4))
    encoder.router.weight.data[:, :3] = 0
    tokens, blocks = torch.randn(8, num_extra + 35, DIM), [Recorder(True), Recorder(False)]
    tokens[:, num_extra:, 0], tokens[:, num_extra:, 1] = torch.arange(35) % 7, torch.arange(35) // 7
    tokens[..., 2] = torch.arange(num_extra + 35) < num_extra
    for block in blocks:
        assert torch.equal(encoder(block, tokens, (5, 7), num_extra), tokens)
    calls, without = (block.calls for block in blocks)
    assert len(calls) == len(without) == 1 + OTHERS[mode] and all(none is None for _, none in without)
    assert set(encoder.decision.choice.flatten().tolist()) == {0, 1, 2}
    for queries, points in calls:
        cells = queries[:, 2] == 0
        assert len(points) == len(queries) and (~cells).sum() == 8 * num_extra
        torch.testing.assert_close(points[cells], queries[cells][:, :2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_sparse_and_dense_training_have_the_same_output(drop_path_rate):
    """With the same seed; another seed gives another one."""
    sparse, block = make('sparse', drop_path_rate=drop_path_rate)
    dense = DynamicGrainedEncoder(DIM, train_mode='dense')
    dense.load_state_dict(sparse.state_dict())
    tokens = torch.randn(4, 1 + 5 * 7, DIM)

    def run(encoder, seed):
        torch.manual_seed(seed)
        return encoder(block, tokens, (5, 7), 1), encoder.decision

    (one, decision), (other, other_decision) = run(sparse, 3), run(dense, 3)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(decision.choice, other_decision.choice)
    torch.testing.assert_close(decision.queries, other_decision.queries, rtol=0, atol=0)
    assert torch.equal(one, run(sparse, 3)[0])
    assert not torch.equal(decision.choice, run(sparse, 4)[1].choice)


@pytest.mark.parametrize('num_extra, sr_ratio', [(1, 2), (0, None)])
@pytest.mark.parametrize(
    'options', [dict(granularities=(0, 1, 2)), dict(granularities=(1, 2, 4), routing='layer')], ids=['region', 'layer']
)
def test_a_pair_is_dense_training_on_average(options, num_extra, sr_ratio, monkeypatch):
    """Each of the others is as likely: where all regions compare with the next one, and all with the one after it."""
    encoder, block = (module.double() for module in make('pair', sr_ratio, drop_path_rate=0.3, **options))
    tokens = torch.randn(4, num_extra + 35, DIM, dtype=torch.double, requires_grad=True)
    weigh, leaves = torch.randn_like(tokens), [tokens, *block.parameters(), *encoder.parameters()]

    def gradients(mode, shift=None):
        encoder.train_mode = mode
        monkeypatch.setattr(torch, 'randint', lambda low, high, size, device: torch.full(size, shift))
        torch.manual_seed(0)
        loss = (weigh * encoder(block, tokens, (5, 7), num_extra)).sum() + encoder.decision.queries.sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    dense, pairs = gradients('dense'), [gradients('pair', shift) for shift in (1, 2)]
    assert not torch.allclose(pairs[0][-1], pairs[1][-1])
    torch.testing.assert_close([(one + other) / 2 for one, other in zip(*pairs)], list(dense), rtol=1e-5, atol=1e-5)


def test_a_pair_draws_the_other_evenly():
    encoder, block = make('pair', granularities=(1, 2, 4))
    block.register_forward_pre_hook(lambda _, args: lengths.append(args[4]))
    encoder.forced, lengths = torch.full((8, 8), 2), []
    encoder(block, torch.randn(4, 32 * 32, DIM), (32, 32))
    (compared, made), regions = lengths, 4 * 64
    assert made == [64] * 4
    # 4 or 16 queries of a region, each half of the time: four standard errors of 6 / 16
    assert sum(compared) / regions == pytest.approx(10, abs=4 * 6 / 16)


@pytest.mark.parametrize('mode', ['pair', 'dense'])
def test_comparing_keeps_no_activations(mode):
    """For the backward pass: one difference and one gate of each cell and other branch, and none of what is behind."""
    kept = {}
    for train_mode in ('sparse', mode):
        torch.manual_seed(0)
        encoder, block = make(train_mode)
        encoder.forced, storages = torch.zeros(4, 4, dtype=torch.long), {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = torch.randn(2, 16 * 16, DIM, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = encoder(block, tokens, (16, 16))
        kept[train_mode] = sum(storages.values())
        del output
    cells = 2 * 16 * 16
    assert kept[mode] - kept['sparse'] < 4 * cells * (DIM + 4) * OTHERS[mode]


def test_without_gradients_there_is_nothing_to_compare():
    encoder, block = make('dense')
    calls = []
    block.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    with torch.no_grad():
        encoder(block, torch.randn(2, 35, DIM), (5, 7))
    assert calls == [(int(encoder.decision.queries.sum()), DIM)]


@pytest.mark.parametrize('mode', ['sparse', 'dense'])
def test_a_price_in_training_lowers_logits_before_the_gates_are_drawn(mode):
    """Gumbel noise draws with the probabilities of a softmax: 3 : 1 becomes 1 : 1 at the price ln 3 of the first."""
    encoder, block = make(mode, granularities=(1, 2))
    nn.init.zeros_(encoder.router.weight)
    encoder.router.bias.data = torch.tensor([math.log(3), 0.0])
    tokens, shares = torch.randn(32, 16 * 16, DIM), []
    for price in (None, torch.tensor([math.log(3), 0.0])):
        encoder.router.training_price = price
        encoder(block, tokens, (16, 16))
        shares.append((encoder.decision.choice == 0).float().mean().item())
        expected = encoder.router.bias.data - (0 if price is None else price)
        torch.testing.assert_close(encoder.decision.logits, expected.expand(32, 8, 8, 2))
    assert shares == pytest.approx([3 / 4, 1 / 2], abs=0.04)  # 2048 regions: four standard errors
    encoder.eval()(block, tokens, (16, 16))
    assert encoder.decision.logits is None and (encoder.decision.choice == 0).all()


def test_evaluation_has_no_randomness():
    encoder, block = make('eval', drop_path_rate=0.5)
    tokens = torch.randn(3, 35, DIM)
    state = torch.get_rng_state()
    assert torch.equal(encoder(block, tokens, (5, 7)), encoder(block, tokens, (5, 7)))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_does_not_depend_on_its_batch():
    encoder, block = make('eval', sr_ratio=2)
    tokens = torch.randn(5, 2 + 35, DIM)
    together = encoder(block, tokens, (5, 7), 2)
    assert len(set(encoder.decision.queries.tolist())) > 1
    alone = torch.cat([encoder(block, image[None], (5, 7), 2) for image in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('skipped', [[False, True, False], [True, True, True]])
@pytest.mark.parametrize('num_extra', [0, 1])
@pytest.mark.parametrize('with_cp', [False, True])
def test_skipped_images_stay_as_they_are(mode, skipped, num_extra, with_cp):
    """The sign of an image's first channel decides whether it is skipped. Its extra token runs nevertheless."""
    encoder, block = make(mode, granularities=(0, 1), with_cp=with_cp)
    encoder.router.weight.data = torch.tensor([[1e4], [0.0]]) * torch.eye(DIM)[0]
    tokens = torch.rand(3, num_extra + 12, DIM) + 1
    tokens[..., 0] *= 2 * torch.tensor(skipped)[:, None] - 1
    tokens.requires_grad_()
    output = encoder(block, tokens, (3, 4), num_extra)
    output.sum().backward()
    unchanged = (output == tokens).all(-1)
    assert unchanged[:, num_extra:].all(1).tolist() == unchanged[:, num_extra:].any(1).tolist() == skipped
    assert not unchanged[:, :num_extra].any()
    assert encoder.decision.queries.tolist() == [num_extra + 12 * (not skip) for skip in skipped]
    gradients = [p.grad for p in (tokens, *block.parameters(), *encoder.parameters()) if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize('mode', MODES)
def test_with_cp_recomputes_the_block_and_changes_nothing(mode):
    results, calls = [], []
    for with_cp in (False, True):
        torch.manual_seed(0)
        encoder, block = make(mode, sr_ratio=2, drop_path_rate=0.3, with_cp=with_cp)
        block.norm1.register_forward_pre_hook(lambda *_, with_cp=with_cp: calls.append(with_cp))
        tokens = torch.randn(3, 1 + 35, DIM, requires_grad=True)
        output = encoder(block, tokens, (5, 7), 1)
        output.square().sum().backward()
        results.append([output, tokens.grad] + [p.grad for p in (*block.parameters(), *encoder.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    # Tokens and queries have a call each. What is compared has no graph, and so nothing to recompute.
    others = 2 * OTHERS[mode]
    assert calls == (others + 2) * [False] + (others + 4) * [True]


@pytest.mark.parametrize('sr_ratio', [1, None])
def test_runs_in_inference_mode_and_trains_afterwards(sr_ratio):
    """Nothing that inference mode made may be left for the backward pass of the same map."""
    encoder, block = make('eval', sr_ratio)
    tokens = torch.randn(2, 35, DIM)
    with torch.inference_mode():
        inferred = encoder(block, tokens, (5, 7))
    torch.testing.assert_close(inferred, encoder(block, tokens, (5, 7)), rtol=1e-5, atol=1e-6)
    for mode in ('sparse', 'dense'):
        encoder, block = make(mode, sr_ratio)
        encoder(block, tokens, (5, 7)).sum().backward()
        assert (block.attn.q if sr_ratio else block.attn.offsets).weight.grad.abs().sum() > 0


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_decides_as_float32(mode, dtype):
    """The change differs only by the rounding of a few operations in a row, each at most eps / 2 of its result."""
    encoder, block = make(mode, sr_ratio=2)
    tokens, outputs, choices = torch.randn(3, 1 + 35, DIM, requires_grad=True), [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast('cpu', dtype, enabled=enabled):
            outputs.append(encoder(block, tokens, (5, 7), 1))
        choices.append(encoder.decision.choice)
    assert torch.equal(*choices)
    expected, output = outputs
    assert output.dtype == torch.float32
    assert (output - expected).norm() < 4 * torch.finfo(dtype).eps * (expected - tokens).norm()
    assert torch.isfinite(torch.autograd.grad(output.sum(), tokens)[0]).all()


@pytest.mark.parametrize('mode', MODES)
def test_compiles(mode):
    """In parts: the number of queries is only known when the router has decided."""
    encoder, block = make(mode, sr_ratio=2)
    tokens, results = torch.randn(2, 1 + 35, DIM), []
    for run in (encoder, torch.compile(encoder, backend='eager')):
        torch.manual_seed(0)
        results.append(run(block, tokens, (5, 7), 1))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize('mode', MODES)
def test_synchronises_once_for_each_choice(mode):
    encoder, block = (module.cuda() for module in make(mode, sr_ratio=2))
    tokens = torch.randn(3, 1 + 35, DIM, device='cuda')
    encoder(block, tokens, (5, 7), 1)  # the first call sets up the libraries
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with pytest.warns(UserWarning, match='synchronizing') as warnings:  # noqa: PT031
            encoder(block, tokens, (5, 7), 1)
            torch.ones(1, device='cuda').item()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    # Of the choice that was made, and of each that it is compared with.
    assert len([warning for warning in warnings if 'synchronizing' in str(warning.message)]) <= 2 + OTHERS[mode]


def test_query_bounds_by_hand():
    """5 x 7: 35 cells, 3 x 4 patches of side 2, 2 x 2 of side 4."""
    assert DynamicGrainedEncoder(DIM, (1, 2, 4)).query_bounds((5, 7)) == (4, 35)
    assert DynamicGrainedEncoder(DIM, (2, 4)).query_bounds((5, 7), 2) == (6, 14)
    assert DynamicGrainedEncoder(DIM, (0, 2)).query_bounds((5, 7), 1) == (1, 13)


@pytest.mark.parametrize('options, regions', [(dict(), 4), (dict(region_size=8), 1), (dict(routing='layer'), 1)])
def test_macs_are_those_of_the_router(options, regions):
    """The library's counter sees them as the only product outside of the block."""
    (encoder, _), block = make('eval', granularities=(1, 2, 4), **options), Recorder(False)
    with FlopCounterMode(display=False) as counter:
        encoder(block, torch.randn(1, 35, DIM), (5, 7))
    assert encoder.macs((5, 7)) == counter.get_total_flops() / 2 == regions * 3 * DIM


def test_check_granularities_returns_a_tuple():
    assert check_granularities([0, 1, 3], 6) == (0, 1, 3)


@pytest.mark.parametrize(
    'granularities, region_size, message',
    [
        ((), None, r'granularities=\(\) leave no query: give at least one side greater than 0'),
        ((0,), None, r'granularities=\(0,\) leave no query'),
        ((1, 1, 2), None, r'\(1, 1, 2\) must be in ascending order without repeats: write \(1, 2\)'),
        ((4, 1, 2), None, r'\(4, 1, 2\) must be in ascending order without repeats: write \(1, 2, 4\)'),
        ((-1, 2), None, r'\(-1, 2\): each is the side of a patch in cells, an integer >= 0'),
        ((1, 2.0), None, r'\(1, 2.0\): each is the side of a patch in cells, an integer >= 0'),
        ((2, 3), None, r'\[2\] do not divide the region of 3 x 3 cells: choose sides that divide 3, or another'),
        ((1, 4), 6, r'\[4\] do not divide the region of 6 x 6 cells'),
        ((1, 4), 2, r'\[4\] do not divide the region of 2 x 2 cells'),
        ((1, 2), -4, 'region'),
        ((1, 2), 0, 'region'),
    ],
)
def test_unfit_granularities(granularities, region_size, message):
    with pytest.raises(ValueError, match=message):
        DynamicGrainedEncoder(DIM, granularities, region_size)


@pytest.mark.parametrize(
    'option, message',
    [
        (dict(routing='image'), r"dge routing='image': choose from \('region', 'layer'\)"),
        (dict(train_mode='soft'), r"dge train_mode='soft': choose from \('sparse', 'pair', 'dense'\)"),
        (dict(tau=0.0), r'dge tau=0.0: give a number in \(0, inf\), the temperature'),
    ],
)
def test_unfit_options(option, message):
    with pytest.raises(ValueError, match=message):
        DynamicGrainedEncoder(DIM, **option)
