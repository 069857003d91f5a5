"""What docs/any-vit.md shows."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

import mmdyn
from mmdyn.models.adapters import ADAPTERS
from mmdyn.models.adapters.adapter import name_of

GUIDE = Path(mmdyn.__file__).parents[1] / 'docs/any-vit.md'
BLOCKS = re.findall(r'```python\n(.*?)```', GUIDE.read_text(), re.DOTALL)


def test_calls():
    """In the order of the page, but for the config and the adapter, and on a smaller model."""
    names = {}
    for code in BLOCKS:
        if 'WithDGE' not in code and 'register_adapter' not in code:
            exec(code.replace('vit_small', 'vit_tiny'), names)
    assert names['model'].patch_embed.proj.weight.grad is not None
    assert mmdyn.remove_dge(names['model']).blocks[0].mlp.fc1.weight.grad.abs().max() > 0


def test_configs():
    from mmengine.registry import MODELS

    built = []
    for code in BLOCKS:
        if 'WithDGE' in code:
            names = {}
            exec(code.replace('vit_small', 'vit_tiny'), names)
            model = names['model']
            built.append(type(MODELS.build(model if 'type' in model else model['backbone'])).__name__)
    assert built == ['PyramidVisionTransformerV2', 'TimmClassifier']


@pytest.fixture
def with_adapter(monkeypatch):
    """The page's adapter is known for the time of a test."""
    (code,) = [code for code in BLOCKS if 'register_adapter' in code]
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(('import', 'from'))]
    assert 20 <= len(lines) <= 40
    monkeypatch.setitem(ADAPTERS, name_of(VisionTransformer), None)
    exec(code, {'__name__': 'guide'})


def test_adapter(with_adapter, randomise):
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3).eval()
    randomise(model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        mmdyn.apply_dge(model, img_size=32)
        torch.testing.assert_close(model(images), expected)
        for stage in model.mmdyn_apply_dge.stages:
            for encoder in stage.dge:
                randomise(encoder.router, std=10.0)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model(images)
    cost = mmdyn.cost(model)
    assert counter.get_total_flops() // 2 == cost.spent.sum().item() + 2 * 16 * 3
    assert (cost.query_ratio < 1).all()


def test_routers_are_those_of_the_results():
    rows = json.loads((GUIDE.parent / 'results.json').read_text())['rows']
    tested = {row['label']: row['budgets'] for row in rows if row['budgets']}
    lines = [line[2:-2].split(' | ') for line in GUIDE.read_text().splitlines() if line.startswith('| ')]
    (budgets,) = [cells for label, *cells in lines if label == 'router']
    table = {label: cells for label, *cells in lines if label in tested}
    assert len(table) == 4
    for label, cells in table.items():
        tests = [tested[label][budget] for budget in budgets]
        assert cells == [f'{test["value"]:.1f} ({test["query_ratio"]:.3f})' for test in tests]


def test_families_of_the_page_are_those_that_are_known():
    page = GUIDE.read_text()
    for name in ADAPTERS:
        assert f'`{name.rpartition(".")[2]}`' in page
