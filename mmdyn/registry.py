"""Nodes of mmengine's registries; the scope prefix ``mmdyn.`` in a config leads here."""

from importlib import import_module

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry


class LazyRegistry(Registry):
    """A registry that also finds classes whose modules import a framework, which is slow and need not be there.

    Attributes:
        modules: by the names of such classes, the modules that register them when they are imported.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.modules: dict[str, str] = {}

    def get(self, key: str) -> type | None:
        """The class of a name, whose module is imported when it is first asked for."""
        self.import_from_location()
        name = key.split('.')[-1]
        if name in self.modules:
            import_module(self.modules[name])
        return super().get(key)


MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmdyn', locations=['mmdyn.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmdyn', locations=['mmdyn.engine'])
METRICS = Registry('metric', parent=MMENGINE_METRICS, scope='mmdyn', locations=['mmdyn.evaluation'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='mmdyn', locations=['mmdyn.datasets'])
DATASETS = LazyRegistry('dataset', parent=MMENGINE_DATASETS, scope='mmdyn', locations=['mmdyn.datasets'])


def expose_bare_names() -> None:
    """Let every scope find the classes without the prefix too, where nothing else has the name."""
    for registry in (MODELS, HOOKS, METRICS, TRANSFORMS):
        for name, cls in registry.module_dict.items():
            if name not in registry.parent.module_dict:
                registry.parent.register_module(name=name, module=cls)
