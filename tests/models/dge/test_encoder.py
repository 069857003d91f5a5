import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models.dge import DynamicGrainedEncoder, check_granularities
from mmdyn.models.dge.encoder import Router, straight_through_gates
from mmdyn.models.dge.grains import candidate_centres, patch_groups, region_table
from mmdyn.models.layers import Attention, DeformableAttention, EncoderBlock, base
from mmdyn.models.native import encoder as compiled

MODES = ['eval', 'sparse', 'dense']
OPTIONS = [
    dict(granularities=(1, 2, 4)),
    dict(granularities=(1, 2)),
    dict(granularities=(1, 2, 4, 8)),
    dict(granularities=(0, 1)),
    dict(granularities=(2, 4)),
    dict(granularities=(0, 1, 2), region_size=4, tau=0.5),
    dict(granularities=(1, 2, 4), region_size=8),
    dict(granularities=(1, 2, 4), routing='layer'),
    dict(granularities=(0, 1, 3), routing='layer', tau=2.),
]
# Map, extra tokens, spatial reduction of the keys (None: deformable attention).
LAYOUTS = [((8, 8), 0, 1), ((5, 7), 1, 1), ((9, 6), 2, 2), ((4, 4), 0, 2), ((13, 3), 1, 2), ((1, 1), 1, 1),
           ((5, 7), 0, None), ((1, 9), 0, None)]
DIM = 8


def make(mode='sparse', sr_ratio=1, drop_path_rate=0., **options):
    """An encoder, whose router chooses by the image, and a block."""
    encoder = DynamicGrainedEncoder(DIM, train_mode='sparse' if mode == 'eval' else mode, **options)
    torch.nn.init.normal_(encoder.router.weight, std=5.)
    torch.nn.init.zeros_(encoder.router.bias)
    attn = Attention(DIM, 2, sr_ratio) if sr_ratio else DeformableAttention(DIM, 2, 3)
    if not sr_ratio:
        # In the beginning points depend on no query, and lie on integers, where gradients jump.
        for parameter in (*attn.offsets.parameters(), *attn.attn_weight.parameters()):
            torch.nn.init.normal_(parameter)
    block = EncoderBlock(DIM, attn, mlp_ratio=2, drop_path_rate=drop_path_rate)
    return encoder.train(mode != 'eval'), block.train(mode != 'eval')


def gates_of_region(encoder, means, noise):
    """Eq. 1 to 6 for one region: {index of a granularity that runs: gate}."""
    logits = encoder.router.weight @ means + encoder.router.bias
    if not encoder.training:
        return {logits.argmax().item(): 1}
    soft = ((logits + noise) / encoder.tau).softmax(0)
    chosen = soft.argmax().item()
    run = [chosen] if encoder.train_mode == 'sparse' else range(len(soft))
    return {k: (k == chosen) + soft[k] - soft[k].detach() for k in run}


def centre(area, width):
    """Mean x and y of cells, given as indices."""
    return [sum(cell % width for cell in area) / len(area), sum(cell // width for cell in area) / len(area)]


def dge_by_loops(encoder, block, tokens, shape, num_extra, slow_change):
    """Section 3.2, one image, one region and one patch after the other: the output, and eq. 7's number of queries."""
    (height, width), side, phis = shape, encoder.region, encoder.granularities
    regions = list(itertools.product(range(0, height, side), range(0, width, side)))
    noise = torch.zeros(len(tokens), 1 if encoder.routing == 'layer' else len(regions), len(phis))
    if encoder.training:
        noise = -torch.log(torch.empty_like(noise).exponential_())
    outputs, counts = [], []
    for image, image_noise in zip(tokens, noise):
        cells = image[num_extra:].unflatten(0, shape)
        # Extra tokens are queries of their own.
        queries, areas, gates = list(image[:num_extra]), [[extra] for extra in range(num_extra)], [1] * num_extra
        for region_noise, (top, left) in zip(image_noise.expand(len(regions), -1), regions):
            # Slices end with the map, so what hangs over its edge is left out of the means.
            region = cells if encoder.routing == 'layer' else cells[top:top + side, left:left + side]
            for k, gate in gates_of_region(encoder, region.mean((0, 1)), region_noise).items():
                steps = range(0, side, phis[k]) if phis[k] else []
                for row, column in itertools.product(steps, steps):
                    # The cells of the patch that lie in the map, as indices of tokens.
                    area = [num_extra + r * width + c for r in range(top + row, min(top + row + phis[k], height))
                            for c in range(left + column, min(left + column + phis[k], width))]
                    if area:
                        queries.append(image[area].mean(0))
                        areas.append(area)
                        gates.append(gate)
        output = list(image)
        if queries:
            points = tokens.new_tensor([centre(area, width) for area in areas]) if block.uses_points else None
            change = slow_change(block, torch.stack(queries), image, shape, num_extra, points)
            for area, gate, patch in zip(areas, gates, change):
                for token in area:
                    output[token] = output[token] + gate * patch
        outputs.append(torch.stack(output))
        counts.append(torch.as_tensor(sum(gates)))
    return torch.stack(outputs), torch.stack(counts)


@pytest.mark.parametrize('shape, num_extra, sr_ratio', LAYOUTS)
@pytest.mark.parametrize('options', OPTIONS, ids=lambda options: '-'.join(map(str, options.values())))
@pytest.mark.parametrize('mode', MODES)
def test_equals_the_loops_of_the_paper(mode, options, shape, num_extra, sr_ratio, slow_change):
    """In output, number of queries, and all gradients. In float64: only the router rounds to float32."""
    encoder, block = (module.double() for module in make(mode, sr_ratio, **options))
    weights, seen = [*block.parameters(), *encoder.parameters()], set()
    for i, batch in enumerate((1, 2, 5, 5, 5)):
        if i > 2 and len(seen) == len(encoder.granularities):
            break
        tokens = torch.randn(batch, num_extra + math.prod(shape), DIM, dtype=torch.double, requires_grad=True)
        weigh_tokens, weigh_counts = torch.randn_like(tokens), torch.randn(batch)
        results = []
        for run in (encoder, lambda *args: dge_by_loops(encoder, *args, slow_change)):
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
@pytest.mark.parametrize('is_compiled', [False, True])
@pytest.mark.parametrize('rows', [10, 10**6])
@torch.no_grad()
def test_inference_in_float32_equals_the_loops_of_the_paper(rows, is_compiled, options, shape, num_extra, sr_ratio,
                                                            slow_change, monkeypatch):
    """By the compiled encoder where there is one, and without it, about 10 queries at a time or all."""
    if not is_compiled:
        monkeypatch.setattr(compiled, 'takes', lambda rows: False)
    monkeypatch.setattr(base, 'ROWS', rows)
    encoder, block = make('eval', sr_ratio, **options)
    tokens = torch.randn(3, num_extra + math.prod(shape), DIM)
    output = encoder(block, tokens, shape, num_extra)
    expected, counts = dge_by_loops(encoder, block, tokens, shape, num_extra, slow_change)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder.decision.queries, counts)
    overwritten = tokens.clone()
    assert encoder(block, overwritten, shape, num_extra, inplace=True) is overwritten
    assert torch.equal(overwritten, output)


def test_tokens_with_a_gradient_are_not_overwritten():
    encoder, block = make('eval', granularities=(1, 2, 4))
    tokens = torch.randn(2, 35, DIM, requires_grad=True)
    before = tokens.detach().clone()
    output = encoder(block, tokens, (5, 7), inplace=True)
    assert torch.equal(tokens, before) and torch.equal(output, encoder(block, tokens, (5, 7)))
    output.sum().backward()


def test_gates_follow_the_distribution_of_the_logits():
    """Gumbel noise makes the hard choice a sample of softmax(logits), whatever the temperature (eq. 4)."""
    logits = torch.tensor([1., 0., -2.])
    gates, choice = straight_through_gates(logits.expand(100_000, 3), tau=0.3)
    assert torch.equal(gates, torch.nn.functional.one_hot(choice, 3).float())
    frequency, expected = gates.mean(0), logits.softmax(0)
    assert ((frequency - expected).abs() < 4 * (expected * (1 - expected) / 100_000).sqrt()).all()


def test_gates_have_the_gradient_of_the_soft_score():
    """d softmax(x / tau)_0 = s_0 (1[k=0] - s_k) / tau (eq. 5)."""
    logits = torch.randn(3, requires_grad=True)
    torch.manual_seed(1)
    gates, _ = straight_through_gates(logits, tau=0.5)
    torch.manual_seed(1)
    soft = ((logits.detach() - torch.empty(3).exponential_().log()) / 0.5).softmax(0)
    gates[0].backward()
    torch.testing.assert_close(logits.grad, soft[0] * (torch.tensor([1., 0., 0.]) - soft) / 0.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('granularities, probabilities', [((1, 2, 4), [.95, .025, .025]), ((1, 2), [.95, .05]),
                                                          ((0, 1), [.05, .95]), ((0, 2, 4), [.025, .95, .025]),
                                                          ((1, ), [1.])])
def test_router_starts_with_the_finest_granularity(granularities, probabilities):
    router = Router(4096, granularities)
    torch.testing.assert_close(router(torch.zeros(4096)).softmax(0), torch.tensor(probabilities))
    # The standard deviation of a sample of n has itself one of std / sqrt(2 n).
    assert abs(router.weight.std() - 0.01) < 4 * 0.01 / (2 * router.weight.numel())**0.5


def test_router_computes_in_float32_under_autocast():
    router, regions = make()[0].router, torch.randn(2, 4, DIM)
    expected = regions @ router.weight.T + router.bias
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(router(regions), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('mode', ['eval', 'sparse'])
@pytest.mark.parametrize('sr_ratio, num_extra', [(2, 1), (None, 0)])
def test_granularity_1_is_the_block_itself(mode, sr_ratio, num_extra):
    encoder, block = make(mode, sr_ratio, granularities=(1, 2, 4))
    encoder.router.bias.data[0] = 1e4
    tokens = torch.randn(2, num_extra + 5 * 7, DIM)
    assert torch.equal(encoder(block, tokens, (5, 7), num_extra), block(tokens, (5, 7), num_extra))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('num_extra', [0, 2])
@pytest.mark.parametrize('with_cp', [False, True])
def test_points_are_the_places_of_the_queries(mode, num_extra, with_cp):
    """Where the cells hold their own x and y, so do the queries that are pooled from them."""
    encoder, _ = make(mode, granularities=(1, 2, 4), with_cp=with_cp)
    encoder.router.weight.data[:, :3] = 0
    tokens, block = torch.randn(8, num_extra + 35, DIM), torch.nn.Identity()
    tokens[:, num_extra:, 0], tokens[:, num_extra:, 1] = torch.arange(35) % 7, torch.arange(35) // 7
    tokens[..., 2] = torch.arange(num_extra + 35) < num_extra
    calls, block.job = [], lambda *args: None
    block.change = lambda queries, tokens, shape, lengths, num_extra, points: calls.append((queries, points)) or queries
    for block.uses_points in (True, False):
        encoder(block, tokens, (5, 7), num_extra)
    (queries, points), (_, none) = calls
    assert none is None and set(encoder.decision.choice.flatten().tolist()) == {0, 1, 2}
    cells = queries[..., 2] == 0
    assert (~cells).sum() == 8 * num_extra
    torch.testing.assert_close(points.expand(*cells.shape, 2)[cells], queries[cells][:, :2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('drop_path_rate', [0., 0.5])
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
    encoder.router.weight.data = torch.tensor([[1e4], [0.]]) * torch.eye(DIM)[0]
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
    # Tokens and queries have a call each.
    assert calls == 2 * [False] + 4 * [True]


@pytest.mark.parametrize('sr_ratio', [1, None])
def test_runs_in_inference_mode_and_trains_afterwards(sr_ratio):
    """What inference mode leaves in a cache must not break the backward pass of the same map later."""
    region_table.cache_clear()
    patch_groups.cache_clear()
    candidate_centres.cache_clear()
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('mode', MODES)
def test_synchronises_once(mode):
    encoder, block = (module.cuda() for module in make(mode, sr_ratio=2))
    tokens = torch.randn(3, 1 + 35, DIM, device='cuda')
    encoder(block, tokens, (5, 7), 1)  # fills the caches
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with pytest.warns(UserWarning, match='synchronizing') as warnings:  # noqa: PT031
            encoder(block, tokens, (5, 7), 1)
            torch.ones(1, device='cuda').item()  # dense training may have none of its own
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len([warning for warning in warnings if 'synchronizing' in str(warning.message)]) <= 2


def test_query_bounds_by_hand():
    """5 x 7: 35 cells, 3 x 4 patches of side 2, 2 x 2 of side 4."""
    assert DynamicGrainedEncoder(DIM, (1, 2, 4)).query_bounds((5, 7)) == (4, 35)
    assert DynamicGrainedEncoder(DIM, (2, 4)).query_bounds((5, 7), 2) == (6, 14)
    assert DynamicGrainedEncoder(DIM, (0, 2)).query_bounds((5, 7), 1) == (1, 13)


@pytest.mark.parametrize('options, regions', [(dict(), 4), (dict(region_size=8), 1), (dict(routing='layer'), 1)])
def test_macs_are_those_of_the_router(options, regions):
    """The library's counter sees them as the only product outside of the block."""
    encoder, block = make('eval', granularities=(1, 2, 4), **options)
    block.change = lambda queries, *_: queries
    with FlopCounterMode(display=False) as counter:
        encoder(block, torch.randn(1, 35, DIM), (5, 7))
    assert encoder.macs((5, 7)) == counter.get_total_flops() / 2 == regions * 3 * DIM


def test_check_granularities_returns_a_tuple():
    assert check_granularities([0, 1, 3], 6) == (0, 1, 3)


@pytest.mark.parametrize('granularities, region_size, message', [
    ((), None, r'granularities=\(\) leave no query: give at least one side greater than 0'),
    ((0, ), None, r'granularities=\(0,\) leave no query'),
    ((1, 1, 2), None, r'\(1, 1, 2\) must be in ascending order without repeats: write \(1, 2\)'),
    ((4, 1, 2), None, r'\(4, 1, 2\) must be in ascending order without repeats: write \(1, 2, 4\)'),
    ((-1, 2), None, r'\(-1, 2\): each is the side of a patch in cells, an integer >= 0'),
    ((1, 2.), None, r'\(1, 2.0\): each is the side of a patch in cells, an integer >= 0'),
    ((2, 3), None, r'\[2\] do not divide the region of 3 x 3 cells: choose sides that divide 3, or another'),
    ((1, 4), 6, r'\[4\] do not divide the region of 6 x 6 cells'),
    ((1, 4), 2, r'\[4\] do not divide the region of 2 x 2 cells'),
    ((1, 2), -4, 'region'),
    ((1, 2), 0, 'region'),
])
def test_unfit_granularities(granularities, region_size, message):
    with pytest.raises(ValueError, match=message):
        DynamicGrainedEncoder(DIM, granularities, region_size)


@pytest.mark.parametrize('option, message', [
    (dict(routing='image'), r"dge routing='image': choose from \('region', 'layer'\)"),
    (dict(train_mode='soft'), r"dge train_mode='soft': choose from \('sparse', 'dense'\)"),
    (dict(tau=0.), r'dge tau=0.0: the temperature must be greater than 0'),
])
def test_unfit_options(option, message):
    with pytest.raises(ValueError, match=message):
        DynamicGrainedEncoder(DIM, **option)
