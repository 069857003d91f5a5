"""What all command lines of tools/ share: a user's mistake is a line on stderr, and results are alone on stdout."""

import contextlib
import functools
import inspect
import linecache
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

PACKAGE = f'{Path(__file__).parents[1]}/'
# What is wrong with a config shows in them.
OF_CONFIGS = ('mmengine.config', 'mmengine.registry', 'mmengine.runner')


def message_for_user(error: BaseException, tool: dict[str, Any]) -> str | None:
    """What to tell the user of an error, or None if it is no mistake of theirs and its traceback is needed.

    Theirs is what our code and mmengine's runner raise on purpose, whatever its registries and configs raise, and what
    the system says of a file.

    Args:
        error: that ended the tool.
        tool: globals of the tool's module.
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if 'Original Traceback (most recent call last)' in text:  # of a process that loads data
        last = re.findall(r'File "([^"]+)", line \d+, in .+\n +raise ', text)[-1:]
        name = type(error).__name__
        return text.rpartition(f'\n{name}: ')[2].strip() if last and last[0].startswith(PACKAGE) else None
    if isinstance(error, OSError) and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    module = frame.f_globals.get('__name__', '')
    on_purpose = linecache.getline(frame.f_code.co_filename, line).strip().startswith('raise ')
    ours = frame.f_globals is tool or frame.f_code.co_filename.startswith(PACKAGE)
    of_configs = module.startswith(OF_CONFIGS[:2]) or (on_purpose and module.startswith(OF_CONFIGS))
    return text if (ours and on_purpose) or of_configs else None


def command(main: Callable[..., Any]) -> Callable[..., Any]:
    """Let a tool's ``main`` end with exit code 2 and a message for a mistake of the user, and quietly at Ctrl-C."""

    tool = inspect.unwrap(main).__globals__

    @functools.wraps(main)
    def run(*args: Any) -> Any:
        try:
            return main(*args)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            message = message_for_user(error, tool)
            if message is None:
                raise
            message = f'{Path(tool["__file__"]).name}: {message}'
            print(message, file=sys.stderr)
            end = SystemExit(message)
            end.code = 2
            raise end from error

    return run


def only_results(main: Callable[..., str]) -> Callable[..., None]:
    """Print what ``main`` returns on stdout, and whatever is logged or printed meanwhile on stderr."""

    @functools.wraps(main)
    def run(*args: Any) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            results = main(*args)
        print(results)

    return run


def first_line(error: BaseException) -> str:
    """An error of another package in short: the first sentence of what may be long advice."""
    text = str(error).strip().partition('\n')[0].partition('. ')[0]
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


def read_config(path: str | Path, options: dict[str, Any] | None = None) -> Config:
    """Read a config and change some of its options.

    Raises:
        ValueError: if the file is missing or no config, or if an option does not fit.
    """
    if not Path(path).is_file():
        raise ValueError(f'There is no config {path}: give the path of a .py file, e.g. one below configs/.')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program
        raise ValueError(f'Cannot read the config {path}: {first_line(error)}.') from error
    try:
        cfg.merge_from_dict(options or {})
    except Exception as error:
        raise ValueError(f'--cfg-options do not fit {path}: {first_line(error)}.') from error
    if 'model' not in cfg:
        raise ValueError(f'{path} has no model: give a whole config, e.g. one below configs/dge.')
    return cfg


def config_with_dge(model: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's config that has the option ``dge``: its backbone, or itself in ``mmdyn.WithDGE``."""
    is_whole = str(model.get('type')).split('.')[-1] == 'WithDGE'
    return model if is_whole else model.get('backbone', {})


def check_has(cfg: Config, why: str, *names: str) -> None:
    """Raise ValueError unless a config has all of some parts; ``why`` says what for."""
    for name in names:
        if cfg.get(name) is None:
            raise ValueError(f'the config has no {name}, {why}.')


def check_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        ValueError: if it is missing or no checkpoint.
    """
    if '://' not in str(path) and not Path(path).is_file():
        raise ValueError(f'There is no checkpoint {path}.')
    try:
        return CheckpointLoader.load_checkpoint(str(path), 'cpu', logger='silent')
    except Exception as error:  # a broken file can make the loader stumble over anything
        raise ValueError(f'Cannot read the checkpoint {path}: {first_line(error)}.') from error


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load a checkpoint into a model, as mmengine does, and return it.

    Raises:
        ValueError: if it is missing or no checkpoint.
    """
    check_checkpoint(path)
    return load_checkpoint(model, str(path), map_location='cpu')


def output_folder(path: str | Path) -> Path:
    """Make a folder, before the work for it begins.

    Raises:
        ValueError: if nothing can be written there.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / '.mmdyn'
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f'Cannot write to the folder {path}: {error.strerror}.') from error
    return Path(path)


def names_apart(paths: Sequence[str | Path]) -> list[str]:
    """Short names of files: how they are called if that tells them apart, else the folder that does.

    ``a/weights.pth`` and ``b/weights.pth`` are ``a`` and ``b``. Where no one folder does, names are whole paths.
    """
    stems, folders = [Path(path).stem for path in paths], [Path(path).absolute().parts[-2::-1] for path in paths]
    levels = [stems, *map(list, zip(*folders))]
    different = len({Path(path).absolute() for path in paths})
    if different == 1:
        return stems
    return next((names for names in levels if len(set(names)) == different), [str(path) for path in paths])
