"""Choices at a price and within a budget by the compiled functions, against plain PyTorch, which other tests check."""

import math
import re

import pytest
import torch
from torch import nn

from mmdyn.kernels.functions import choose_by_means
from mmdyn.kernels.stage import encode_blocks
from mmdyn.models.dge import DynamicGrainedEncoder
from mmdyn.models.dge.budget import choose_within
from mmdyn.models.dge.router import Router, choose
from mmdyn.models.dge.routing import count_patches, pool
from mmdyn.models.replaceable import Refused
from mmdyn.models.stage import run_blocks

SETS = [((1, 2, 4), 4), ((0, 1), 1), ((0, 1, 2), 4), ((1, 3), 6), ((2,), 4), ((0, 1, 2, 4, 8), 8)]
SHAPES = [(10, 13), (16, 16), (3, 50), (1, 1), (60, 70)]


@pytest.mark.parametrize('phis, region', SETS)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('num_extra', [0, 2])
@torch.no_grad()
def test_choice_of_a_router(num_extra, shape, phis, region, compiled, threads):
    router, tokens = Router(5, phis), torch.randn(3, num_extra + math.prod(shape), 5)
    nn.init.normal_(router.weight), nn.init.normal_(router.bias)
    router.price = 0.3 * torch.rand(len(phis))
    assert torch.equal(
        choose_by_means(router, tokens, shape, region, num_extra),
        choose.plain(router, tokens, shape, region, num_extra),
    )
    for share in (0.0, 0.1, 0.3, 0.5, 0.77, 1.0):
        router.share = share
        assert torch.equal(
            choose_by_means(router, tokens, shape, region, num_extra),
            choose.plain(router, tokens, shape, region, num_extra),
        )


@pytest.mark.parametrize(
    'values', [[0.0], [0.0, -0.0], [1.0, math.nan], [1.0, math.inf, -math.inf], [1e-42, -1e-42, 0.0]]
)
@torch.no_grad()
def test_logits_that_are_alike_or_no_numbers(values, compiled):
    """Steps of the same slope are taken in the order of regions; whatever comes of NaN, the choice keeps the budget."""
    phis, shape = (1, 2, 4), (16, 24)
    router = Router(1, phis)
    nn.init.zeros_(router.bias), nn.init.constant_(router.weight, 1)
    router.weight.data[1:] = 0
    tokens = torch.tensor(values)[torch.randint(len(values), (2, 6 * 4))].view(2, 4, 1, 6, 1)
    tokens = tokens.expand(-1, -1, 4, -1, 4).reshape(2, -1, 1)
    patches = count_patches(shape, phis, 4)
    for queries in range(0, 16 * 24 + 1, 7):
        router.share = queries / (16 * 24)
        choice = choose_by_means(router, tokens, shape, 4, 0)
        assert choice.min() >= 0 and choice.max() <= 2
        assert (patches.gather(-1, choice[0][..., None]).sum() <= max(queries, 24)).all()
        if all(map(math.isfinite, values)):
            assert torch.equal(choice, choose.plain(router, tokens, shape, 4, 0))


@pytest.mark.parametrize(
    'kind, num_extra, shape',
    [
        ('full', 0, (10, 13)),
        ('full', 2, (10, 13)),
        ('deformable', 0, (9, 30)),
        ('reduced', 0, (12, 16)),
        ('reduced', 0, (72, 68)),
    ],
)
@pytest.mark.parametrize('phis, region', SETS)
@torch.no_grad()
def test_stage(kind, num_extra, shape, phis, region, make_block, stage_of, avx, threads):
    """Choices by logits that differ in rounding errors alone are the same but where slopes are nearly alike."""
    encoder, block = DynamicGrainedEncoder(12, phis, region).eval(), make_block(kind)
    nn.init.normal_(encoder.router.weight, std=5.0)
    stage = stage_of(block, dge=[encoder], num_extra=num_extra)
    tokens, dense = torch.randn(3, num_extra + math.prod(shape), 12), num_extra + math.prod(shape)
    patches, logits = count_patches(shape, phis, region), encoder.router(pool(tokens, shape, region, num_extra))
    for price, share in ((0.2, None), (None, 0.2), (None, 0.5), (None, 0.9)):
        encoder.router.price = None if price is None else price * torch.rand(len(phis))
        encoder.router.share = share
        out = encode_blocks(stage, tokens.clone(), shape)
        assert not isinstance(out, Refused), out
        choice, queries, _ = encoder.decision
        spent = num_extra + patches.expand(3, -1, -1, -1).gather(-1, choice[..., None]).flatten(1).sum(1)
        assert torch.equal(queries, spent)
        if share is None:
            best = (logits - encoder.router.price).max(-1).values
            torch.testing.assert_close(
                (logits - encoder.router.price).gather(-1, choice[..., None])[..., 0], best, rtol=1e-4, atol=1e-4
            )
        else:
            expected = choose_within(logits, phis, patches, math.floor(share * dense + 1e-3) - num_extra)
            assert (choice != expected).sum() <= 2 * 3 and (choice == expected).float().mean() > 0.5
        for image in range(3):
            encoder.forced = choice[image]
            alone = tokens[image : image + 1]
            torch.testing.assert_close(
                run_blocks.plain(stage, alone, shape), out[image : image + 1], rtol=1e-4, atol=1e-4
            )
            encoder.forced = None


@pytest.mark.parametrize(
    'attribute, value, reason',
    [
        ('price', torch.zeros(2), r'router.price has the shape \(2,\), not \(3,\)'),
        ('price', torch.zeros(3, dtype=torch.double), 'router.price is float64, not float32'),
        ('price', torch.zeros(6)[::2], 'router.price is not contiguous'),
        ('share', 2.0, r'router.share=2.0 is no number from 0 to 1'),
        ('share', math.nan, 'router.share=nan is no number'),
        ('share', torch.tensor(0.5), 'is no number from 0 to 1'),
    ],
)
@torch.no_grad()
def test_prices_and_shares_that_are_not_read(attribute, value, reason, make_block, stage_of, avx):
    encoder, tokens = DynamicGrainedEncoder(12).eval(), torch.randn(1, 64, 12)
    stage = stage_of(make_block(), dge=[encoder])
    assert not isinstance(encode_blocks(stage, tokens.clone(), (8, 8)), Refused)
    setattr(encoder.router, attribute, value)
    for refused in (encode_blocks(stage, tokens, (8, 8)), choose_by_means(encoder.router, tokens, (8, 8), 4, 0)):
        assert re.search(reason, refused.reason)


@torch.no_grad()
def test_changed_price_counts_at_once(make_block, stage_of, avx):
    """Also one that was changed in place, and a bias that was."""
    encoder, tokens = DynamicGrainedEncoder(12).eval(), torch.randn(1, 64, 12)
    stage = stage_of(make_block(), dge=[encoder])
    found = []
    encoder.router.price = torch.zeros(3)
    for change in (
        lambda: None,
        lambda: encoder.router.price.add_(torch.tensor([100.0, 50.0, 0.0])),
        lambda: encoder.router.bias.add_(torch.tensor([0.0, 100.0, 0.0])),
    ):
        change()
        encode_blocks(stage, tokens.clone(), (8, 8))
        found.append(encoder.decision.choice.unique().tolist())
    assert found == [[0], [2], [1]]
