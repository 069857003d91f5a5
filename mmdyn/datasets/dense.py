"""The data sets of detection and segmentation, which say what is missing and what their folders must look like.

This module imports mmdet and mmseg; ``mmdyn.registry`` imports it when a config first names one of its classes.
"""
from importlib import import_module
from pathlib import Path
from typing import List

from ..registry import DATASETS


def parent_class(package: str, name: str, extra: str) -> type:
    """The data set of a framework, or a class that says what to install if the framework cannot be imported."""
    try:
        return getattr(import_module(f'{package}.datasets'), name)
    except (ImportError, AssertionError) as reason:  # the frameworks assert the versions of mmcv and mmengine
        error = ImportError(f'mmdyn.{name} needs {package}, which cannot be imported ({reason}). Install it with: '
                            f'pip install "mmdyn[{extra}]"')

    def fail(*args, **kwargs):
        raise error

    return type(name, (), dict(__init__=fail))


class CheckedFolders:
    """Before a data set loads its list: look for the annotation file and the folders on the local disk.

    Raises:
        ValueError: if one is missing, or if there are no images; it shows the layout and how to name another folder.
    """
    layout = ''
    options = tuple(f'{split}_dataloader.dataset.data_root=DIR' for split in ('train', 'val', 'test'))

    def load_data_list(self) -> List[dict]:
        """The framework's list of images."""
        paths = {'ann_file': self.ann_file, **{f'data_prefix[{key!r}]': path for key, path in self.data_prefix.items()}}
        # A storage backend has paths of its own.
        local = {} if self.backend_args else {k: path for k, path in paths.items() if path and '://' not in path}
        missing = [f'{key}={path!r}' for key, path in local.items() if not Path(path).exists()]
        if missing:
            self._fail(f'found no {" and no ".join(missing)}')
        data_list = super().load_data_list()
        if not data_list:
            self._fail(f'found no images with {", ".join(f"{key}={path!r}" for key, path in paths.items() if path)}')
        return data_list

    def _fail(self, what: str) -> None:
        raise ValueError(
            f'mmdyn.{type(self).__name__} {what}, seen from {Path.cwd()}. The layout must be:\n\n'
            f'{self.data_root or "."}\n{self.layout}\n'
            f'Put or link your data there, or name its folder: --cfg-options {" ".join(self.options)}')


@DATASETS.register_module()
class CocoDataset(CheckedFolders, parent_class('mmdet', 'CocoDataset', 'det')):
    """mmdet's data set for COCO, which checks its folders."""
    layout = ('├── annotations\n'
              '│   ├── instances_train2017.json\n'
              '│   └── instances_val2017.json\n'
              '├── train2017/*.jpg\n'
              '└── val2017/*.jpg\n')
    options = (*CheckedFolders.options, *(f'{split}_evaluator.0.ann_file=DIR/annotations/instances_val2017.json'
                                          for split in ('val', 'test')))


@DATASETS.register_module()
class ADE20KDataset(CheckedFolders, parent_class('mmseg', 'ADE20KDataset', 'seg')):
    """mmseg's data set for ADE20K, which checks its folders."""
    layout = ('├── annotations\n'
              '│   ├── training/*.png\n'
              '│   └── validation/*.png\n'
              '└── images\n'
              '    ├── training/*.jpg\n'
              '    └── validation/*.jpg\n')
