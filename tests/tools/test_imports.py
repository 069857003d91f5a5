"""A tool is a command line: what two of them need is in the package."""

import ast
from pathlib import Path

import pytest

import mmdyn

TOOLS = Path(mmdyn.__file__).parents[1] / 'tools'
FILES = sorted(TOOLS.rglob('*.py'))


def modules_of(tree):
    """Names of what is imported, with the attributes of ``from`` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{"." * node.level}{node.module or ""}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_no_tool_imports_a_tool(path):
    text = path.read_text()
    own = {file.stem for file in FILES} | {'tools'}
    assert not [name for name in modules_of(ast.parse(text)) if name.split('.')[0] in own or name.startswith('.')]
    assert 'sys.path' not in text
