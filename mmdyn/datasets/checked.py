"""What the data sets of all frameworks share: whatever is wrong with the data, errors name the file and the entry."""

from importlib import import_module
from pathlib import Path

from ..values import check_type
from .loading import image_error

# What the frameworks' data sets have in common.
TYPES = dict(
    ann_file=((str, Path), 'the path of a file'),
    data_prefix=(dict, "a dict of folders, such as dict(img_path='images')"),
    data_root=((str, Path, type(None)), 'the path of a folder'),
    filter_cfg=((dict, type(None)), 'a dict of options'),
    metainfo=((dict, type(None)), 'a dict such as dict(classes=(...))'),
    pipeline=((list, tuple), 'a list of transforms'),
)


def parent_class(package: str, name: str, extra: str) -> type:
    """The data set of a framework, or a class that says what to install if the framework cannot be imported."""
    try:
        return getattr(import_module(f'{package}.datasets'), name)
    except (ImportError, AssertionError) as reason:  # the frameworks assert the versions of mmcv and mmengine
        error = ImportError(
            f'mmdyn.{name} needs {package}, which cannot be imported ({reason}). Install it with: '
            f'pip install "mmdyn[{extra}]"'
        )

    def fail(*args, **kwargs):
        raise error

    return type(name, (), dict(__init__=fail))


def some(names) -> str:
    """The first of many names."""
    names = list(map(repr, names))
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


class CheckedDataset:
    """Before a data set of mmengine's: check what it reads, and name the files and entries that are wrong.

    Raises:
        TypeError: for options of another type.
        ValueError: at the start, if a file or folder is missing, if the list of images is broken, or if there are no
            images; later, if one of the transforms fails on an image.
    """

    # Options that name other data.
    options = tuple(f'{split}_dataloader.dataset.data_root=DIR' for split in ('train', 'val', 'test'))
    types = TYPES

    def __init__(self, *args, **kwargs):
        for name, (allowed, what) in self.types.items():
            if name in kwargs:
                check_type(f'{self.name}: {name}', kwargs[name], allowed, what)
        self._check_classes((kwargs.get('metainfo') or {}).get('classes') or ())
        try:
            super().__init__(*args, **kwargs)
        except AssertionError as error:  # by which the frameworks refuse options
            raise ValueError(f'{self.name}: {error}') from error

    def _check_classes(self, classes) -> None:
        """Refuse what the frameworks would take for the letters of a name."""
        is_file = isinstance(classes, str) and Path(classes).expanduser().is_file()
        if not is_file and not (isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)):
            raise ValueError(
                f"{self.name}: metainfo has classes={classes!r}: give a sequence of names, e.g. ('cat', 'dog'), or the "
                'path of a file with a name in each line.'
            )

    def load_data_list(self) -> list[dict]:
        """The framework's list of images."""
        paths = self._paths()
        # A storage backend has paths of its own.
        local = {} if getattr(self, 'backend_args', None) else {k: v for k, v in paths.items() if '://' not in v}
        missing = [f'{key}={path!r}' for key, path in local.items() if not Path(path).exists()]
        if missing:
            self._fail(f'found no {" and no ".join(missing)}')
        data_list = self.read_data_list()
        if not data_list:
            self._fail(f'found no images with {", ".join(f"{key}={path!r}" for key, path in paths.items())}')
        return data_list

    def read_data_list(self) -> list[dict]:
        """The framework's list of images, from files that are there."""
        return super().load_data_list()

    def filter_data(self) -> list[dict]:
        """The framework's choice of images, of which some have to be left."""
        chosen = super().filter_data()
        if not chosen:
            self._fail(
                f'has {len(self.data_list)} images, of which filter_cfg={self.filter_cfg} leaves none: of all '
                f'images, {self.why_filtered()}'
            )
        return chosen

    def why_filtered(self) -> str:
        """What the images lack that were filtered."""
        return 'none fits'

    def prepare_data(self, idx: int) -> dict | None:
        """Send an image through the pipeline."""
        info = self.get_data_info(idx)
        files = {key: info.get(key) for key in ('img_path', 'seg_map_path')}
        entry = f'image {idx}' + (f' (img_id {info["img_id"]})' if 'img_id' in info else '')
        for transform in self.pipeline.transforms:
            kind = type(transform).__name__
            try:
                info = transform(info)
            except Exception as error:
                if kind == 'LoadImageFromFile':
                    raise image_error(files['img_path'], error) from error
                if kind == 'LoadAnnotations' and files['seg_map_path']:
                    raise self.mask_error(files, f'is missing, empty or damaged ({str(error).strip()})') from error
                if isinstance(error, ValueError) and str(files['img_path']) in str(error):
                    raise
                raise ValueError(
                    f'{self.name}: {kind} fails on {entry}, {files["img_path"]}: {type(error).__name__}: {error}'
                ) from error
            if info is None:
                return None
            if kind == 'LoadAnnotations':
                self.check_annotations(info, files)
        return info

    def check_annotations(self, results: dict, files: dict) -> None:
        """Look at what was loaded for an image."""

    def mask_error(self, files: dict, what: str) -> ValueError:
        """An error about the mask of an image."""
        return ValueError(f'{self.name}: the mask {files["seg_map_path"]} of the image {files["img_path"]} {what}.')

    @property
    def name(self) -> str:
        return f'mmdyn.{type(self).__name__}'

    def _paths(self) -> dict:
        """What the data set reads, by the name of the option."""
        prefix = self.data_prefix
        paths = {'ann_file': self.ann_file, **{f'data_prefix[{key!r}]': path for key, path in prefix.items()}}
        return {key: path for key, path in paths.items() if path}

    def _fail(self, what: str) -> None:
        root = str(self.data_root or '')
        below = [path.removeprefix(root).strip('/') if root else path for path in self._paths().values()]
        tree = ''.join(
            f'{"└" if i == len(below) - 1 else "├"}── {path}{self.contents(path)}\n' for i, path in enumerate(below)
        )
        raise ValueError(
            f'{self.name} {what}, seen from {Path.cwd()}. By the config, the layout is:\n\n{root or "."}\n'
            f'{tree}\nPut or link your data there, or name its folder: --cfg-options '
            f'{" ".join(self.options)}'
        )

    def contents(self, path: str) -> str:
        """What a folder has to hold."""
        return '' if Path(path).suffix else '/'
