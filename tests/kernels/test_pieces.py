"""Blocks by pieces of rows against plain PyTorch in float64."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdyn.kernels import pieces
from mmdyn.kernels.pieces import run_in_pieces
from mmdyn.models.dge import DynamicGrainedEncoder
from mmdyn.models.replaceable import Refused
from mmdyn.models.stage import run_blocks

SHAPE = (10, 13)
KERNEL = 'mmdyn.kernels.pieces.run_in_pieces'
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='torch was built without oneDNN')


def by_double(stage, tokens):
    stage = SimpleNamespace(
        blocks=copy.deepcopy(stage.blocks).double(),
        dge=copy.deepcopy(stage.dge).double(),
        num_extra=stage.num_extra,
    )
    return run_blocks.plain(stage, tokens.double(), SHAPE).float()


@torch.no_grad()
def test_blocks_that_stay_dense_beside_others(make_block, stage_of):
    encoder = DynamicGrainedEncoder(12).eval()
    nn.init.normal_(encoder.router.weight, std=5.0)
    stage = stage_of(*(make_block('full') for _ in range(3)), dge=[None, encoder, None])
    tokens = torch.randn(1, math.prod(SHAPE), 12)
    out = run_in_pieces(stage, tokens.clone(), SHAPE)
    encoder.forced = encoder.decision.choice[0]
    torch.testing.assert_close(out, by_double(stage, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('numbers', [12 * 7, 12 * 150, 2**20])
@pytest.mark.parametrize('phis', [None, (1, 2, 4), (0, 2)])
@pytest.mark.parametrize(
    'kind, num_extra', [('full', 0), ('full', 2), ('unbiased', 1), ('reduced', 0), ('reduced', 1), ('points', 0)]
)
@torch.no_grad()
def test_blocks_in_pieces(kind, num_extra, phis, numbers, make_block, stage_of, monkeypatch):
    """Parts of an image, about an image, all of them."""
    monkeypatch.setattr(pieces, 'NUMBERS', numbers)
    blocks = [make_block(kind, residual_scale=0.7) for _ in range(2)]
    encoders = [DynamicGrainedEncoder(12, phis).eval() for _ in blocks] if phis else []
    for encoder in encoders:
        nn.init.normal_(encoder.router.weight, std=5.0)
    stage, tokens = (
        stage_of(*blocks, dge=encoders, num_extra=num_extra),
        torch.randn(3, num_extra + math.prod(SHAPE), 12),
    )
    out = run_in_pieces(stage, tokens.clone(), SHAPE)
    decisions = [encoder.decision for encoder in encoders]
    for image in range(3):
        for encoder, (choice, *_) in zip(encoders, decisions):
            encoder.forced = choice[image]
        expected = by_double(stage, tokens[image : image + 1])
        torch.testing.assert_close(out[image : image + 1], expected, rtol=1e-4, atol=1e-4)
        alone = run_in_pieces(stage, tokens[image : image + 1].clone(), SHAPE)
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)
        for encoder, (_, queries, _) in zip(encoders, decisions):
            run_blocks.plain(stage, tokens[image : image + 1], SHAPE)
            assert encoder.decision.queries.tolist() == [queries[image]]


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda block: block.train(), 'blocks.0 is in training mode'),
        (lambda block: block.attn.q.register_forward_hook(lambda *args: None), 'blocks.0.attn.q has forward hooks'),
        (
            lambda block: setattr(block.ffn, 'fc1', nn.Sequential(block.ffn.fc1)),
            'blocks.0.ffn.fc1 is a Sequential, not a Linear',
        ),
        (
            lambda block: setattr(block.ffn.fc2, 'bias', nn.Parameter(torch.zeros(3))),
            'blocks.0.ffn.fc2.bias has the shape (3,), not (12,)',
        ),
        (lambda block: block.double(), 'blocks.0.norm1.weight is float64, not float32'),
    ],
)
@torch.no_grad()
def test_what_is_left_to_torch(change, reason, make_block, stage_of):
    stage, tokens = stage_of(make_block()), torch.randn(2, math.prod(SHAPE), 12)
    assert KERNEL not in run_blocks.why_not(stage, tokens, SHAPE)
    change(stage.blocks[0])
    assert run_in_pieces(stage, tokens, SHAPE) == Refused(reason)


@torch.no_grad()
def test_contexts_that_are_left_to_torch(make_block, stage_of):
    stage, tokens = stage_of(make_block()), torch.randn(2, math.prod(SHAPE), 12)
    stage.patch_embed = nn.Identity()
    with torch.backends.mkldnn.flags(enabled=False):
        assert 'oneDNN is switched off' in run_in_pieces(stage, tokens, SHAPE).reason
    with torch.autocast('cpu', torch.bfloat16):
        assert run_in_pieces(stage, tokens, SHAPE).reason == 'autocast is on'
    with torch.enable_grad():
        assert run_in_pieces(stage, tokens, SHAPE).reason.startswith('gradients are on')
    stage.patch_embed.register_forward_hook(lambda *args: None)
    assert run_in_pieces(stage, tokens, SHAPE).reason.startswith('patch_embed has forward hooks')
