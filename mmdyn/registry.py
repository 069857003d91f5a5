"""Nodes of mmengine's registries; the scope prefix ``mmdyn.`` in a config leads here."""
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry


class DatasetRegistry(Registry):
    """Finds data sets that are not a part of `import mmdyn`, because they import a framework."""

    def get(self, key: str):
        """The class of a name, whose module is imported when it is first asked for."""
        from . import datasets
        getattr(datasets, key.split('.')[-1], None)
        return super().get(key)


MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmdyn', locations=['mmdyn.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmdyn', locations=['mmdyn.engine'])
METRICS = Registry('metric', parent=MMENGINE_METRICS, scope='mmdyn', locations=['mmdyn.evaluation'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='mmdyn', locations=['mmdyn.datasets'])
DATASETS = DatasetRegistry('dataset', parent=MMENGINE_DATASETS, scope='mmdyn', locations=['mmdyn.datasets'])


def expose_bare_names() -> None:
    """Let every scope find the classes without the prefix too, where nothing else has the name."""
    for registry in (MODELS, HOOKS, METRICS, TRANSFORMS):
        for name, cls in registry.module_dict.items():
            if name not in registry.parent.module_dict:
                registry.parent.register_module(name=name, module=cls)
