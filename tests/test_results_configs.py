"""The rows of docs/results.md: each can be built and trained, and dense rows train as long as those beside them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, init_default_scope

import mmdyn
from mmdyn.analysis.flops import build_model, dynamic_backbone
from mmdyn.analysis.results import Results, choose, read_rows
from mmdyn.engine.command import config_with_dge
from mmdyn.models import CFViT

FOLDER = Path(mmdyn.__file__).parents[1] / 'configs/results'


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """All rows, whose bases are sought only once in the frameworks' metafiles."""
    find, found = Config._get_cfg_path, {}

    def find_once(name, config):
        if '::' not in name:
            return find(name, config)
        if name not in found:
            found[name] = find(name, config)
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, '_get_cfg_path', staticmethod(find_once))
        return Results(read_rows(FOLDER / 'rows.py'), FOLDER, tmp_path_factory.mktemp('runs'))


NAMES = list(read_rows(FOLDER / 'rows.py'))


def length(results, name):
    """Epochs or iterations of a row and of all that it starts from."""
    row = results.rows[name]
    cfg = results.configs[name].train_cfg if row.train else {}
    own = cfg.get('max_epochs') or cfg.get('max_iters') or 0
    return own + (length(results, row.start) if row.start else 0)


@pytest.mark.parametrize('name', NAMES)
def test_row(results, name):
    cfg, row = results.configs[name], results.rows[name]
    init_default_scope(cfg.default_scope)
    with torch.device('cpu' if name.startswith('camvid/mit') else 'meta'):  # mmseg's MiT asks for values
        model = build_model(cfg)
    backbone = dynamic_backbone(model)
    hooks = [HOOKS.build(hook) for hook in cfg.get('custom_hooks') or []]
    assert cfg.test_evaluator[-1].type == 'mmdyn.DynamicFLOPs'
    for budget in row.budgets:
        backbone.set_budget(budget)  # which refuses those out of reach
    if backbone.has_dge:  # its budget is the hook's in training, or told
        assert bool(hooks) != bool(row.budgets or 'test_budget' in config_with_dge(cfg.model).dge)
        for hook in hooks:
            hook.before_train(SimpleNamespace(model=model, max_iters=500))  # which refuses budgets out of reach
    if isinstance(backbone, CFViT) and row.train:
        assert 0 <= hooks[0].begin < cfg.train_cfg.max_epochs
    assert 'convert_dataset.py' in cfg.data_source
    if row.beside and row.train:
        assert length(results, name) == length(results, row.beside)


def test_the_list_has_an_order():
    runs = choose(read_rows(FOLDER / 'rows.py'), None)
    assert str(runs[0]) == 'tiny-imagenet-50/pvt/base seed 0' and len(runs) == len(set(map(str, runs)))
