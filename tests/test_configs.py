"""Every config loads and builds, and its metafile entry is right."""
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config
from mmengine.registry import HOOKS, METRICS, init_default_scope

import mmdyn
from mmdyn.analysis.flops import build_model, dynamic_backbone

ROOT = Path(mmdyn.__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT) for folder in ('dge', 'demo') for path in (ROOT / 'configs' / folder).glob('*.py'))


def metafile_models():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    return {model['Config']: model for name in index['Import'] for model in yaml.safe_load((ROOT / name).read_text())['Models']}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_builds(path):
    cfg = Config.fromfile(ROOT / path)
    init_default_scope(cfg.default_scope)
    model = build_model(cfg)
    backbone = dynamic_backbone(model)
    assert backbone.has_dge == ('-dge' in path.stem)
    hooks = [HOOKS.build(hook) for hook in cfg.get('custom_hooks', [])]
    assert [type(hook).__name__ for hook in hooks] == ['BudgetHook'] * backbone.has_dge
    if hooks:
        least, most = backbone.ratio_bounds()
        assert least <= hooks[0].budget <= most
    assert 'DynamicFLOPs' in [type(METRICS.build(metric)).__name__ for metric in cfg.test_evaluator]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.pipeline[0].type == 'mmdyn.LoadImageFromFile'
    if path.parent.name == 'dge':
        assert metafile_models()[str(path)]['Metadata']['Parameters'] == sum(w.numel() for w in model.parameters())


def test_imagenet_schedule_is_that_of_the_paper():
    cfg = Config.fromfile(ROOT / 'configs/dge/pvt-small-dge_8xb16_in1k-256px.py')
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-3, 0.05)
    assert cfg.train_cfg.max_epochs == 300 and cfg.param_scheduler[0].end == 20
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 128
    assert cfg.custom_hooks[0] == dict(type='mmdyn.BudgetHook', budget=0.5, weight=1.)


def test_weight_decay_spares_tokens_embeddings_norms_and_biases():
    from mmengine.optim import build_optim_wrapper
    cfg = Config.fromfile(ROOT / 'configs/dge/deit-tiny-dge_8xb16_in1k-256px.py')
    model = build_model(cfg)
    decayed = {id(p) for group in build_optim_wrapper(model, cfg.optim_wrapper).param_groups
               for p in group['params'] if group['weight_decay']}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(('cls_token', 'pos_embed'))
        assert (id(parameter) in decayed) != spared, name


