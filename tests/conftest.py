"""What tests of several modules share: seeds, small models, and a slow encoder block to compare with."""
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdyn.models.dge import DynamicGrainedEncoder

# The tensors are small: threads that wait for each other would take longer than one.
torch.set_num_threads(1)

BACKBONES = {
    'pvt': dict(type='mmdyn.PVT', img_size=32, patch_size=4, arch=dict(
        embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), sr_ratios=(2, 1))),
    'deit': dict(type='mmdyn.DeiT', img_size=32, patch_size=4, arch=dict(
        embed_dim=16, depth=3, num_heads=2, mlp_ratio=2)),
    'dpvt': dict(type='mmdyn.DPVT', img_size=32, patch_size=4, arch=dict(
        embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), num_points=(4, 2))),
}


@pytest.fixture(autouse=True)
def same_start():
    """Each test begins with the same random numbers and the same registry scope, whatever ran before."""
    torch.manual_seed(0)
    init_default_scope('mmpretrain')


@pytest.fixture(params=['pvt', 'deit'])
def name(request):
    """Each small backbone that may have a class token."""
    return request.param


@pytest.fixture
def backbone_config():
    """The config of a small backbone by name."""
    return lambda name, **options: {**BACKBONES[name], **options}


@pytest.fixture
def encoders():
    """The dynamic grained encoders of a model."""
    return lambda model: [module for module in model.modules() if isinstance(module, DynamicGrainedEncoder)]


@pytest.fixture
def make_backbone(backbone_config, encoders):
    """A small backbone by name, whose routers choose by the image, not the finest granularity as in the beginning."""

    def make(name, **options):
        model = MODELS.build(backbone_config(name, **options))
        for encoder in encoders(model):
            nn.init.normal_(encoder.router.weight, std=10.)
            nn.init.zeros_(encoder.router.bias)
        return model

    return make


@pytest.fixture
def randomise():
    """Leave no parameter of a module at a value that hides a mistake, such as 0 or 1."""

    def change(module, std=0.1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += std * torch.randn_like(parameter)
        return module

    return change


@pytest.fixture
def slow_attention():
    """Attention of the queries (n, C) of one image over its tokens (E + H*W, C), one head and one key at a time."""

    def attend(attn, queries, tokens, shape, num_extra):
        if attn.sr_ratio > 1:
            side, cells = attn.sr_ratio, tokens[num_extra:].unflatten(0, shape)
            patches = [cells[row:row + side, column:column + side]
                       for row in range(0, shape[0] - side + 1, side) for column in range(0, shape[1] - side + 1, side)]
            keys = [torch.einsum('ocij,ijc->o', attn.sr.weight, patch) + attn.sr.bias for patch in patches]
            tokens = torch.cat([tokens[:num_extra], attn.norm(torch.stack(keys))])
        key, value = attn.kv(tokens).chunk(2, -1)
        heads = []
        for q, k, v in zip(*(x.chunk(attn.num_heads, -1) for x in (attn.q(queries), key, value))):
            heads.append((q @ k.T / q.shape[-1]**0.5).softmax(-1) @ v)
        return attn.proj(torch.cat(heads, -1))

    return attend


@pytest.fixture
def slow_deformable_attention():
    """Deformable attention of the queries (n, C) at the points (n, 2) of one image, one head and one point at a time.

    Each point takes all cells, of which the tent max(0, 1 - |x - column|) max(0, 1 - |y - row|) leaves its neighbours.
    """

    def attend(attn, queries, tokens, shape, points):
        offsets, logits = attn.offsets(queries), attn.attn_weight(queries)
        if offsets.requires_grad:
            offsets.register_hook(lambda gradient: gradient / 10)
        row, column = (torch.arange(side).to(tokens) for side in shape)
        heads = []
        for head, value in enumerate(attn.v(tokens).chunk(attn.num_heads, -1)):
            first = head * attn.num_points
            weights, head_sum = logits[:, first:first + attn.num_points].softmax(-1), 0
            for i, weight in enumerate(weights.unbind(-1)):
                x, y = (points[:, axis] + offsets[:, 2 * (first + i) + axis] for axis in (0, 1))
                tent_x, tent_y = ((1 - (at[:, None] - cell).abs()).clamp(min=0) for at, cell in ((x, column), (y, row)))
                head_sum = head_sum + weight[:, None] * torch.einsum('nr,nc,rcd->nd', tent_y, tent_x,
                                                                     value.unflatten(0, shape))
            heads.append(head_sum)
        return attn.proj(torch.cat(heads, -1))

    return attend


@pytest.fixture
def slow_change(slow_attention, slow_deformable_attention):
    """enc(q) - q of the queries (n, C) of one image: pre-norm attention to the tokens (E + H*W, C), then the FFN."""

    def change(block, queries, tokens, shape, num_extra, points=None):
        q, t = block.norm1(queries), block.norm1(tokens)
        attended = queries + (slow_attention(block.attn, q, t, shape, num_extra) if points is None else
                              slow_deformable_attention(block.attn, q, t, shape, points))
        hidden = block.ffn.fc1(block.norm2(attended))
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        return attended + block.ffn.fc2(hidden) - queries

    return change


@pytest.fixture
def run_distributed(tmp_path):
    """Run ``worker(rank, world)``, a function of a test module, in a group of new processes."""

    def run(worker, world):
        # Not forked: a fork inherits the locks that another thread holds, and may wait for them for ever.
        command = [sys.executable, Path(__file__).with_name('run_worker.py'), inspect.getfile(worker), worker.__name__]
        processes = [subprocess.Popen(list(map(str, [*command, rank, world, tmp_path / 'rendezvous'])),
                                      stderr=subprocess.PIPE, text=True) for rank in range(world)]
        try:
            errors = [process.communicate(timeout=300)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes), '\n'.join(errors)

    return run
