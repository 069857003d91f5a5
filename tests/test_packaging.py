"""What a wheel and the source tree give to mim, and that mmdet and mmseg are optional."""
import subprocess
import sys
import zipfile
from pathlib import Path

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]


def names(folder):
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}


def test_wheel_holds_tools_and_configs_for_mim(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, ROOT],
                   check=True)
    content = set(zipfile.ZipFile(next(tmp_path.glob('mmdyn-*.whl'))).namelist())
    wanted = {f'mmdyn/.mim/{name}' for name in names('tools') | names('configs') | {'model-index.yml'}}
    assert wanted <= content
    assert {name for name in names('mmdyn') if name.endswith('.py') and '.mim' not in name} <= content


def test_source_tree_links_to_the_same_places():
    for name in ('tools/train.py', 'tools/test.py', 'configs/_base_/default_runtime.py', 'model-index.yml'):
        assert (ROOT / 'mmdyn/.mim' / name).samefile(ROOT / name)


def test_imports_and_classifies_without_mmdet_mmseg_and_operators():
    subprocess.run([sys.executable, '-c', '''
import sys
for name in ('mmdet', 'mmseg', 'mmcv._ext'):
    sys.modules[name] = None
import mmdyn, torch
from mmengine.config import Config
from mmdyn.analysis.flops import build_model
cfg = Config.fromfile(sys.argv[1])
assert build_model(cfg)(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
''', ROOT / 'configs/demo/pvt-mini-dge_digits.py'], check=True)
