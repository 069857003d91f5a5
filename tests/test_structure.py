"""What each room of the package may know of the others, and that each module can be imported alone."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from importlib.util import resolve_name
from pathlib import Path

import pytest

import mmdyn

PACKAGE = Path(mmdyn.__file__).parent
TOOLS = PACKAGE.parent / 'tools'
# Which rooms each room may import beside itself.
SEAMS = ['kernels', 'engine', 'evaluation', 'visualization', 'datasets']
BELOW = ['compat', 'registry', 'values', 'version']
ROOMS = {
    'version': [],
    'registry': [],
    'values': [],
    'compat': [],
    'models': BELOW,
    **{room: [*BELOW, 'models'] for room in SEAMS},
    'apis': [*BELOW, 'models', 'engine'],
    'analysis': [*BELOW, 'models', *SEAMS],
    'utils': [*BELOW, 'models', 'kernels'],
    '__main__': ['utils'],
}
# Words of how to run, in the names of what models/ is made of; they say what is computed. The seam speaks of kernels.
FOREIGN = {'kernels', 'job', 'jobs', 'address', 'addresses', 'inplace', 'into', 'piece', 'pieces', 'data_ptr', 'ctypes'}


def modules():
    """Each module of the package: its name, and its file."""
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
        if '.mim' not in parts:
            yield '.'.join(parts[:-1] if parts[-1] == '__init__' else parts), path


def imports(path, name=''):
    """The modules that a file imports anywhere, also in functions, and where only types are checked.

    Args:
        path: the file.
        name: its module's, for relative imports.
    """
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name('.' * node.level + (node.module or ''), package)
            # What follows may be a module, too.
            yield from (f'{module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split('.')[-1] == 'import_module':
            target = node.args[0]
            if isinstance(target, ast.Constant) and target.value.startswith(('.', 'mmdyn')):
                yield resolve_name(target.value, package)


def room_of(name):
    """The part of the package that a module is in; None for the package itself and for others' modules."""
    package, _, rest = name.partition('.')
    return rest.partition('.')[0] if package == 'mmdyn' and rest else None


def names_of(path):
    """The names in a file, each part of them between underscores: of variables, arguments, attributes, functions."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            yield from ((part, token) for part in {token.string, *re.split('_+', token.string)})


def foreign_names(path):
    """Those of :data:`FOREIGN`, with their lines."""
    return [
        f'{path.name}:{token.start[0]}: {token.line.strip()}'
        for name, token in names_of(path)
        if name in FOREIGN and 'nn.ReLU(inplace=True)' not in token.line
    ]


def test_each_module_is_in_a_room():
    rooms = {room_of(name) for name, _ in modules()} - {None}
    assert 'models' in rooms and rooms <= set(ROOMS)


@pytest.mark.parametrize('room', ROOMS)
def test_imports_run_one_way(room):
    wrong = [
        f'{name} imports {imported}'
        for name, path in modules()
        if room_of(name) == room
        for imported in imports(path, name)
        if room_of(imported) not in (None, room, *ROOMS[room])
    ]
    assert wrong == []


def test_models_speak_of_what_is_computed():
    """Not of how; only the seam, through which kernels come, names them."""
    wrong = [
        line
        for name, path in modules()
        if room_of(name) == 'models' and name != 'mmdyn.models.replaceable'
        for line in foreign_names(path)
    ]
    assert wrong == []


def test_models_import_no_kernels_in_their_comments_either():
    """Nor do docstrings refer to them."""
    wrong = [name for name, path in modules() if room_of(name) == 'models' and 'mmdyn.kernels' in path.read_text()]
    assert wrong == []


def test_no_tool_imports_a_tool():
    tools = {path.stem for path in TOOLS.rglob('*.py')}
    # tools/test.py has the name of a module of Python's.
    wrong = [
        f'{path.name} imports {imported}'
        for path in TOOLS.rglob('*.py')
        for imported in imports(path)
        if imported.split('.')[0] in {*tools, 'tools'} - {'test'}
    ]
    wrong += [f'{path.name} changes sys.path' for path in TOOLS.rglob('*.py') if 'sys.path' in path.read_text()]
    assert len(tools) > 5 and wrong == []


def test_tools_import_modules_that_there_are():
    known = {name for name, _ in modules()}
    wrong = [
        f'{path.name} imports {imported}'
        for path in TOOLS.rglob('*.py')
        for imported in imports(path)
        if imported.startswith('mmdyn.') and imported not in known and imported.rpartition('.')[0] not in known
    ]
    assert wrong == []


@pytest.mark.parametrize(
    'line, expected',
    [
        ('from .b import c', ['p.q.b.c']),
        ('from ..b import c, d', ['p.b.c', 'p.b.d']),
        ('from . import c', ['p.q.c']),
        ('import a.b, c', ['a.b', 'c']),
        ('def f():\n    from x import y', ['x.y']),
        ("import_module('mmdyn.kernels')", ['mmdyn.kernels']),
        ("importlib.import_module('..b', __name__)", ['p.b']),
    ],
)
def test_imports_are_found(line, expected, tmp_path):
    (tmp_path / 'module.py').write_text(line)
    assert list(imports(tmp_path / 'module.py', 'p.q.module')) == expected


@pytest.mark.parametrize(
    'line, is_foreign',
    [
        ('def f(x, inplace=False): pass', True),
        ('y = add_into(x)', True),
        ('x.data_ptr()', True),
        ('PIECES = 3', False),
        ('by_pieces(x)', True),
        ('# a job, of which pieces go into kernels', False),
        ("'''in pieces'''", False),
        ('nn.ReLU(inplace=True)', False),
        ('nn.GELU(inplace=True)', True),
        ('kernel = 3', False),
        ('jobless = 3', False),
    ],
)
def test_foreign_names_are_found(line, is_foreign, tmp_path):
    (tmp_path / 'module.py').write_text(line)
    assert bool(foreign_names(tmp_path / 'module.py')) == is_foreign


# Each module in a child of its own, which inherits the packages below mmdyn, but nothing of mmdyn. Packages around a
# module are left empty: they would import its neighbours in an order of their own, in which a ring may not show.
IMPORT_ALONE = """
import importlib, os, sys, traceback, types
for name in ('mmcv.transforms', 'mmengine.runner', 'mmpretrain.models', 'mmdet.models', 'matplotlib.figure', 'cv2'):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
folder = sys.argv[1]
assert not any(name.split('.')[0] == 'mmdyn' for name in sys.modules)
for name in sys.argv[2:]:
    child = os.fork()
    if not child:
        parts = name.split('.')
        for end in range(1, len(parts)):
            package = types.ModuleType('.'.join(parts[:end]))
            package.__path__ = [os.path.join(folder, *parts[:end])]
            sys.modules[package.__name__] = package
        try:
            importlib.import_module(name)
        except BaseException:
            print(f'{name} alone:\\n{traceback.format_exc()}', file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


def test_each_module_can_be_imported_alone():
    names = [name for name, _ in modules()]
    assert len(names) > 40
    ran = subprocess.run(
        [sys.executable, '-c', IMPORT_ALONE, PACKAGE.parent, *names], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
