"""Nodes of mmengine's registries; the scope prefix ``mmdyn.`` in a config leads here."""
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmdyn', locations=['mmdyn.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmdyn', locations=['mmdyn.engine'])
METRICS = Registry('metric', parent=MMENGINE_METRICS, scope='mmdyn', locations=['mmdyn.evaluation'])
