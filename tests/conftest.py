"""What tests of several modules share: seeds, small models, and a slow encoder block to compare with."""
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
    'lvvit': dict(type='mmdyn.LVViT', img_size=32, patch_size=4, arch=dict(
        embed_dim=16, depth=3, num_heads=2, mlp_ratio=2)),
    'cfvit': dict(type='mmdyn.CFViT', coarse_size=3, patch_size=4, arch=dict(
        family='deit', embed_dim=16, depth=6, num_heads=2, mlp_ratio=2)),
    'dpvt': dict(type='mmdyn.DPVT', img_size=32, patch_size=4, arch=dict(
        embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), num_points=(4, 2))),
}


def pytest_runtest_setup(item):
    if item.get_closest_marker('cuda') and not torch.cuda.is_available():
        pytest.skip('no device: torch finds no CUDA device')


@pytest.fixture(scope='session')
def mmcv_operators():
    """For detectors: mmcv may be one that has no operators, or deformable attention alone (tools/gpu)."""
    try:
        from mmcv.ops import nms
        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f'needs mmcv with all operators: {error}')


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
def make_cfvit(make_backbone, randomise):
    """A small CF-ViT in float64 and evaluation mode, no weight or statistic of which is at 0 or 1."""

    def make(family='deit', **options):
        arch = {**BACKBONES['cfvit']['arch'], 'family': family}
        model = randomise(make_backbone('cfvit', **{'arch': arch, **options}), std=0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return model.double().eval()

    return make


# Factor of the branches, and epsilon of the norms.
SLOW_VITS = dict(deit=(1, 1e-6), lvvit=(0.5, 1e-5))


def slow_norm(norm, x, family):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + SLOW_VITS[family][1]).sqrt() * norm.weight + norm.bias


def slow_ffn(ffn, x):
    hidden = ffn.fc1(x)
    return ffn.fc2(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)


@pytest.fixture
def slow_vit():
    """A plain ViT of one image, as functions with loops that take a model's weights."""

    def patches(embed, image, side):
        """(3, H, W) -> (h*w, C), of a linear projection or, where there are convolutions, of LV-ViT's stem."""
        if hasattr(embed, 'convs'):
            side //= 2
            for conv, norm, stride in zip(embed.convs[0::3], embed.convs[1::3], (2, 1, 1), strict=True):
                x = torch.conv2d(image[None], conv.weight, None, stride, conv.weight.shape[2] // 2)[0]
                x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
                image = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
        return torch.stack([
            torch.einsum('ocij,cij->o', embed.proj.weight, image[:, row:row + side, column:column + side])
            for row in range(0, image.shape[1], side) for column in range(0, image.shape[2], side)]) + embed.proj.bias

    def blocks(layers, tokens, family):
        """(n, C) tokens -> the last block's output, and each block's (n,) class attention, mean of the heads."""
        rows, scale = [], SLOW_VITS[family][0]
        for block in layers:
            attn, normed = block.attn, slow_norm(block.norm1, tokens, family)
            query, (key, value) = attn.q(normed), attn.kv(normed).chunk(2, -1)
            matrices, heads = [], []
            for q, k, v in zip(*(x.chunk(attn.num_heads, -1) for x in (query, key, value))):
                matrices.append((q @ k.T / q.shape[1]**0.5).softmax(-1))
                heads.append(matrices[-1] @ v)
            rows.append(torch.stack(matrices).mean(0)[0])
            tokens = tokens + scale * attn.proj(torch.cat(heads, -1))
            tokens = tokens + scale * slow_ffn(block.ffn, slow_norm(block.norm2, tokens, family))
        return tokens, rows

    return SimpleNamespace(patches=patches, blocks=blocks, norm=slow_norm, ffn=slow_ffn)


@pytest.fixture
def slow_cfvit(slow_vit):
    """CF-ViT on one image, with the weights of a model."""

    def half(image):
        """Bilinear, corners on corners: (3, H, H) -> (3, H / 2, H / 2)."""
        side = image.shape[1]
        at = torch.arange(side // 2).to(image)[:, None] * (side - 1) / (side // 2 - 1)
        tent = (1 - (at - torch.arange(side).to(image)).abs()).clamp(min=0)
        return torch.einsum('ir,jc,xrc->xij', tent, tent, image)

    def run(model, image, count, *, side=4, columns=3, score='global', reuse='mlp', start=4, decay=0.99, chosen=None):
        """Both stages' normed tokens (n, C), the global class attention (N,) and the ``count`` split patches.

        ``chosen`` gives the patches for a score that cannot be foreseen.
        """
        family = 'lvvit' if hasattr(model.patch_embed, 'convs') else 'deit'
        coarse = slow_vit.patches(model.patch_embed, half(image), side) + model.coarse_pos_embed[0, 1:]
        class_token = model.cls_token[0] + model.coarse_pos_embed[0, :1]
        tokens, rows = slow_vit.blocks(model.blocks, torch.cat([class_token, coarse]), family)
        coarse_out, attention = slow_vit.norm(model.norm, tokens, family), torch.zeros(columns**2)
        for number, row in enumerate(rows, start=1):
            if number >= start:
                attention = decay * attention + (1 - decay) * row[1:]
        by = dict(negative=-attention, last=rows[-1][1:]).get(score, attention)
        if chosen is None:
            chosen = sorted(sorted(range(columns**2), key=by.tolist().__getitem__, reverse=True)[:count])

        def reused(token):
            # What the paper calls the stage's output is what the classifier takes: the tokens after the last norm.
            normed = slow_vit.norm(model.reuse.norm, token, family)
            return model.reuse.mlp(normed) if reuse == 'linear' else slow_vit.ffn(model.reuse.mlp, normed)

        fine = slow_vit.patches(model.patch_embed, image, side)
        class_token = model.cls_token[0, 0] + model.pos_embed[0, 0]
        sequence = [class_token + reused(coarse_out[0]) if reuse == 'class_token' else class_token]
        for patch in chosen:
            row, column = divmod(patch, columns)
            for place in ((2 * row + i) * 2 * columns + 2 * column + j for i in (0, 1) for j in (0, 1)):
                token = fine[place] + model.pos_embed[0, 1 + place]
                sequence.append(token + reused(coarse_out[1 + patch]) if reuse else token)
        for patch in range(columns**2):
            if patch not in chosen:
                token = coarse[patch]
                sequence.append(token + reused(coarse_out[1 + patch]) if reuse == 'uninformative' else token)
        fine_out = slow_vit.norm(model.norm, slow_vit.blocks(model.blocks, torch.stack(sequence), family)[0], family)
        return SimpleNamespace(coarse=coarse_out, fine=fine_out, attention=attention, chosen=chosen)

    return run


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
