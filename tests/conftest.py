"""What tests of several modules share: seeds, small models, and the oracles to compare them with."""

import inspect
import math
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdyn.models.dge import DynamicGrainedEncoder

sys.path.append(str(Path(__file__).parent))
from oracles import adapters, cfvit, dge, layers, vit

# The tensors are small: threads that wait for each other would take longer than one.
torch.set_num_threads(1)

BACKBONES = {
    'pvt': dict(
        type='mmdyn.PVT',
        img_size=32,
        patch_size=4,
        arch=dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), sr_ratios=(2, 1)),
    ),
    'deit': dict(
        type='mmdyn.DeiT', img_size=32, patch_size=4, arch=dict(embed_dim=16, depth=3, num_heads=2, mlp_ratio=2)
    ),
    'lvvit': dict(
        type='mmdyn.LVViT', img_size=32, patch_size=4, arch=dict(embed_dim=16, depth=3, num_heads=2, mlp_ratio=2)
    ),
    'cfvit': dict(
        type='mmdyn.CFViT',
        coarse_size=3,
        patch_size=4,
        arch=dict(family='deit', embed_dim=16, depth=6, num_heads=2, mlp_ratio=2),
    ),
    'dpvt': dict(
        type='mmdyn.DPVT',
        img_size=32,
        patch_size=4,
        arch=dict(embed_dims=(16, 24), depths=(2, 1), num_heads=(2, 3), mlp_ratios=(2, 3), num_points=(4, 2)),
    ),
}
FIND_BASE = Config._get_cfg_path


@cache
def find_base_of_framework(name):
    return FIND_BASE(name, '')


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


@pytest.fixture(scope='session')
def count_by_fvcore():
    """What fvcore counts of a model on images, by operator: multiply-adds, and what it makes of norms and pooling."""
    fvcore = pytest.importorskip('fvcore.nn')  # a machine with a GPU may lack it

    def attention(inputs, outputs):
        (*batch, queries, dim), keys = inputs[0].type().sizes(), inputs[1].type().sizes()[-2]
        return Counter(scaled_dot_product_attention=2 * math.prod(batch) * queries * keys * dim)

    def product(inputs, outputs):
        (batch, rows, inner), columns = inputs[1].type().sizes(), inputs[2].type().sizes()[2]
        return Counter(baddbmm=batch * rows * inner * columns)

    def count(model, images):
        counter = fvcore.FlopCountAnalysis(model, images).unsupported_ops_warnings(False)
        counter.set_op_handle('aten::scaled_dot_product_attention', attention)
        counter.set_op_handle('aten::baddbmm', product)
        return counter.by_operator()

    return count


@pytest.fixture(autouse=True)
def same_start():
    """Each test begins with the same random numbers and the same registry scope, whatever ran before."""
    torch.manual_seed(0)
    init_default_scope('mmpretrain')


@pytest.fixture
def bases(monkeypatch):
    """Search a framework's metafiles for each base of a config once."""
    monkeypatch.setattr(
        Config,
        '_get_cfg_path',
        staticmethod(lambda name, config: find_base_of_framework(name) if '::' in name else FIND_BASE(name, config)),
    )


@pytest.fixture
def quick(bases, monkeypatch):
    """Spare what a test does not look at: initial weights, and the search for bases of configs."""
    for name in ('kaiming_uniform_', 'normal_', 'trunc_normal_', 'uniform_', 'xavier_uniform_'):
        monkeypatch.setattr(nn.init, name, lambda weight, *args, **kwargs: weight)


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
            nn.init.normal_(encoder.router.weight, std=10.0)
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
    """Attention of one image in loops."""
    return layers.slow_attention


@pytest.fixture
def slow_deformable_attention():
    """Deformable attention of one image in loops."""
    return layers.slow_deformable_attention


@pytest.fixture
def slow_change():
    """The residual of an encoder block for one image in loops."""
    return layers.slow_change


@pytest.fixture
def slow_areas():
    """The tokens of each query of one image in loops."""
    return dge.slow_areas


@pytest.fixture
def slow_dge():
    """A dynamic grained encoder in the loops of the paper."""
    return dge.slow_dge


@pytest.fixture
def slow_adapters():
    """Blocks of other libraries on queries in loops."""
    return adapters


@pytest.fixture
def slow_vit():
    """A plain ViT of one image in loops."""
    return vit


@pytest.fixture
def slow_cfvit():
    """CF-ViT on one image in loops."""
    return cfvit.slow_cfvit


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


@pytest.fixture
def run_distributed(tmp_path):
    """Run ``worker(rank, world)``, a function of a test module, in a group of new processes."""

    def run(worker, world):
        # Not forked: a fork inherits the locks that another thread holds, and may wait for them for ever.
        command = [sys.executable, Path(__file__).with_name('run_worker.py'), inspect.getfile(worker), worker.__name__]
        processes = [
            subprocess.Popen(
                list(map(str, [*command, rank, world, tmp_path / 'rendezvous'])), stderr=subprocess.PIPE, text=True
            )
            for rank in range(world)
        ]
        try:
            errors = [process.communicate(timeout=300)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes), '\n'.join(errors)

    return run
