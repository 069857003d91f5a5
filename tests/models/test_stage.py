from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from torch import nn

from mmdyn.models.backbones.base import make_blocks
from mmdyn.models.layers import Attention, DeformableAttention, EncoderBlock
from mmdyn.models.stage import Stage, run_blocks

DIM, SHAPE, DEPTH = 8, (5, 7), 4
ATTENTIONS = dict(
    full=lambda: Attention(DIM, 2),
    reduced=lambda: Attention(DIM, 2, sr_ratio=2),
    deformable=lambda: DeformableAttention(DIM, 2),
)


def make_stage(kind='full', dge=None, num_extra=0):
    """What the protocol asks for and nothing else; its routers choose by the image."""
    stage = SimpleNamespace(num_extra=num_extra, patch_embed=None)
    make_blocks(stage, [EncoderBlock(DIM, ATTENTIONS[kind](), 2).eval() for _ in range(DEPTH)], DIM, dge)
    for encoder in filter(None, stage.dge.eval()):
        nn.init.normal_(encoder.router.weight, std=5.0)
        nn.init.zeros_(encoder.router.bias)
    return stage


@pytest.mark.parametrize('start, stop', [(0, None), (0, 2), (1, 3), (2, None), (3, 3), (0, -1), (-2, None), (0, 99)])
@pytest.mark.parametrize('kind, num_extra', [('full', 1), ('reduced', 0), ('deformable', 0)])
@pytest.mark.parametrize('grad', [False, True])
def test_blocks_run_one_after_another(grad, kind, num_extra, start, stop):
    """Those of the slice."""
    stage, tokens = make_stage(kind, num_extra=num_extra), torch.randn(2, num_extra + 35, DIM)
    expected = tokens
    for block in list(stage.blocks)[start:stop]:
        expected = block(expected, expected, SHAPE, num_extra)
    for run in (run_blocks, run_blocks.plain):
        with torch.set_grad_enabled(grad):
            found = run(stage, tokens.clone(), SHAPE, start, stop)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('start, stop', [(0, None), (1, 3), (2, None)])
@pytest.mark.parametrize('kind, num_extra', [('full', 1), ('reduced', 0), ('deformable', 0)])
@pytest.mark.parametrize('grad', [False, True])
def test_each_block_runs_in_its_own_encoder(grad, kind, num_extra, start, stop):
    """The others decide nothing."""
    stage, tokens = make_stage(kind, dict(granularities=(1, 2)), num_extra), torch.randn(2, num_extra + 35, DIM)
    expected, choices = tokens, []
    for block, encoder in list(zip(stage.blocks, stage.dge))[start:stop]:
        expected = encoder(block, expected, SHAPE, num_extra)
        choices.append(encoder.decision.choice)
    for run in (run_blocks, run_blocks.plain):
        for encoder in stage.dge:
            encoder.decision = None
        with torch.set_grad_enabled(grad):
            found = run(stage, tokens.clone(), SHAPE, start, stop)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert [encoder.decision is not None for encoder in stage.dge] == [
            i in range(DEPTH)[start:stop] for i in range(DEPTH)
        ]
        assert all(
            torch.equal(encoder.decision.choice, choice)
            for encoder, choice in zip(list(stage.dge)[start:stop], choices)
        )


@pytest.mark.parametrize('kind, num_extra', [('full', 1), ('reduced', 0), ('deformable', 0)])
@pytest.mark.parametrize('grad', [False, True])
def test_blocks_without_an_encoder_run_by_themselves(grad, kind, num_extra):
    """Also in what stands in for the function."""
    stage = make_stage(kind, dict(granularities=(1, 2), dense_layers=[0, 2]), num_extra)
    tokens = expected = torch.randn(2, num_extra + 35, DIM)
    assert [encoder is None for encoder in stage.dge] == [True, False, True, False]
    for block, encoder in zip(stage.blocks, stage.dge):
        extra = SHAPE, num_extra
        expected = encoder(block, expected, *extra) if encoder else block(expected, expected, *extra)
    for run in (run_blocks, run_blocks.plain):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(run(stage, tokens.clone(), SHAPE), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_all_blocks():
    stage, tokens = make_stage('full', dict(granularities=(1, 2)), 1), torch.randn(2, 36, DIM, requires_grad=True)
    for module in (stage.blocks, stage.dge):
        module.train()
    run_blocks(stage, tokens, SHAPE).square().sum().backward()
    for parameter in (tokens, *stage.blocks.parameters(), *stage.dge.parameters()):
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any()


@pytest.mark.parametrize('name', ['pvt', 'deit', 'lvvit', 'cfvit', 'dpvt'])
def test_stages_of_the_backbones_keep_the_protocol(name, make_backbone):
    for stage, _ in make_backbone(name).named_stages():
        for attribute, kind in get_type_hints(Stage).items():
            assert isinstance(getattr(stage, attribute), kind)
        assert len(stage.dge) in (0, len(stage.blocks)) and stage.patch_embed.macs((2, 3)) > 0


def test_class_attention_of_each_block():
    """What the first query attends to, as each block by itself tells it."""
    stage, tokens, rows, expected = make_stage('full', None, 1), torch.randn(2, 36, DIM), [], []
    after = tokens
    for block in stage.blocks[1:]:
        after = block(after, after, SHAPE, 1, class_rows=expected)
    torch.testing.assert_close(run_blocks.plain(stage, tokens, SHAPE, 1, class_rows=rows), after)
    torch.testing.assert_close(rows, expected)
    assert [tuple(row.shape) for row in rows] == [(2, 36)] * len(stage.blocks[1:])
