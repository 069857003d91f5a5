import importlib.util
import sys
from pathlib import Path

import pytest

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]


@pytest.fixture
def tool(monkeypatch):
    """A tool of tools/gpu by name; these import one another."""
    monkeypatch.syspath_prepend(ROOT / 'tools/gpu')

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / f'tools/gpu/{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop('results', None)
