import importlib.util
from pathlib import Path

import pytest

import mmdyn

TOOLS = Path(mmdyn.__file__).parents[1] / 'tools/gpu'


@pytest.fixture
def tool():
    """A tool of tools/gpu by name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
