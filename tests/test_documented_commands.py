"""Each command line of the pages runs, in a folder with small models and a handful of images.

Words in capitals stand for the reader's files, optional parts are given all at once, and of alternatives the first one.
What starts several processes runs here as one; tests/tools/test_dist.py starts two.
"""

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from pages import ROOT, all_commands, blocks, command_lines
from torch import nn

from mmdyn.analysis import benchmark, flops, latency, runtimes
from mmdyn.analysis.flops import build_model

# Commands that are not run, by how they begin, and why.
NOT_HERE = {
    'make ': 'tests/test_docs.py tells of each target who runs it',
    'pip install ': 'needs a package index; tests/test_packaging.py builds the wheel',
    'MMCV_WITH_OPS=1 pip install ': 'compiles for ten minutes; `make setup` does it',
    'git clone ': 'the address is the one that the reader came by',
    'cd mmdyn': 'follows on git clone',
    '.venv/bin/': 'test_lines_for_contributors runs whole lines',
    'find ': 'test_lines_for_contributors runs whole lines',
    'xargs ': 'test_lines_for_contributors runs whole lines',
}
# Options of training that mmengine refuses without a device; tools/gpu/train_amp.py trains so.
FOR_DEVICES = ('--amp',)
# Without these packages a command says what is missing; tests of its own tell of that.
NEEDS = {
    '--gradcam': 'captum',
    '.safetensors': 'safetensors',
    'python -m mmdyn.kernels': 'mmdyn.kernels',
    'mmdet': 'mmdet',
    'coco': 'mmdet',
    'mmseg': 'mmseg',
}

# The models: a config of the demo, and what is otherwise.
FEW = """
load_from = None
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
"""
DYNAMIC = """
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.5)]
auto_scale_lr = dict(base_batch_size=32)
train_cfg = dict(max_epochs=1)
tta_model = dict(type='AverageClsScoreTTA')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[[dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)], [dict(type='PackInputs')]],
    ),
]
"""
SEGMENTOR = """
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
"""
COARSE = """
model = dict(backbone=dict(coarse_size=6, img_size=96))
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=96), dict(type='PackInputs')]
val_dataloader = dict(dataset=dict(data_root='data/zeros', data_prefix='', pipeline=pipeline))
test_dataloader = val_dataloader
"""
LARGE = """
pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=128), dict(type='PackInputs')]
val_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = val_dataloader
"""
MODELS = {
    'dynamic': ('pvt-mini-dge_digits', FEW + DYNAMIC),
    'dense': ('pvt-mini_digits', FEW + LARGE),
    'plain': ('vit-mini_digits', FEW),
    'coarse': ('cf-vit-mini_digits', FEW + COARSE),
    'detector': ('mask-rcnn_pvt-mini-dge_digits', FEW),
    'segmentor': ('fpn_pvt-mini-dge_digits', FEW + SEGMENTOR),
}
# Which of them a command is about that has one of these words; else the first.
ABOUT = {
    'dge.router=': 'dense',
    'sweep_threshold': 'coarse',
    'class_attention': 'coarse',
    'draw_regions': 'coarse',
    'test_cfg.threshold': 'coarse',
    'analyze_redundancy': 'plain',
    'convert': 'plain',
    'coco/': 'detector',
    '--show-dir': 'segmentor',
}
NAMES = [
    (r'\[NAME=\]FILE\.\.\.', 'mine=test.json'),
    (r'[][]', ''),
    (r'(CHECKPOINT)\.\.\.', r'\1'),
    (r'\{tiny-imagenet-50,.*?\}', 'bccd'),
    (r'\{([\w-]+),.*?\}', r'\1'),
    (r'(\b\w+)(\|\w+)+', r'\1'),
    (r'<config>', 'CONFIG'),
    (r'<checkpoint>', 'CHECKPOINT'),
    (r'<folder>', 'DIR'),
    (r'configs/cfvit/CONFIG', 'configs/cfvit/cf-deit-small-7x7_8xb128_in1k-224px.py'),
    (r'configs/dge/CONFIG', 'configs/dge/pvt-small-dge_8xb16_in1k-256px.py'),
    (r'configs/dpvt/CONFIG', 'configs/dpvt/dpvt-small-dge_8xb16_in1k-256px.py'),
    (r'--masks DIR', '--masks data/demo/imagenet/masks/val'),
    (r'--images DIR', '--images data/demo/imagenet/val'),
    (r'\bFILE\.pkl', 'OUT/found.pkl'),
    (r'\bFILE(\.json)?\b', 'test.json'),
    (r'\bKEY=VALUE', 'randomness.seed=1'),
    (r'\bH W\b', '64 96'),
    (r'(profile_pass\.py .*)--shape 800 1280', r'\1--shape 64 96'),
    (r'\bSOURCE\b', 'sources/bccd'),
    (r'convert.py ([\w-]+) SRC', r'convert.py \1 sources/\1.pth'),
    (r'test.py CONFIG DST', 'test.py CONFIG CHECKPOINT'),
    (r'\bSRC\b', 'CHECKPOINT'),
    (r'\bDST\b(?!\.)', 'OUT/made.pth'),
    (r'\bDST\.', 'OUT/made.'),
    (r'\bDIR\b', 'OUT'),
]


def with_names(command):
    """The words of a command with names of files, and with all that is optional."""
    for name, value in NAMES:
        command = re.sub(name, value, command)
    return shlex.split(command)


def to_run():
    """All commands but those whose words others have, too: the same with more options."""
    words = {' '.join(command.split()): frozenset(with_names(command)) for _, command in all_commands()}
    own = {frozenset(with_names(command)): command for command in reversed(words)}  # the first of those that are equal
    others = {of: command for of, command in own.items() if not command.startswith(tuple(NOT_HERE))}
    return [command for of, command in others.items() if not any(of < more for more in others)][::-1]


# What makes a command small.
SMALLER = {
    'benchmark.py': ['--rounds', '1', '--threads', '1'],  # two would wait for each other beside another process
    'make_demo_dataset.py': ['--cls-train', '10', '--cls-val', '10', '--dense-train', '2', '--dense-val', '1'],
    'results.py': ['--list'],  # which does all but the trainings
}


def small(config):
    """A config for small models, few images and one epoch: itself if it is one of ours, else its twin."""
    twin = Path('small') / Path(config).name
    if not twin.exists():
        shrunk(Config.fromfile(config), Path(config).stem).dump(twin)
    return str(twin)


def shrunk(cfg, name):
    """A config with its own losses, pipelines and hooks, but of a small model and the demo's data."""
    scope = cfg.get('default_scope', 'mmpretrain')
    mini = Config.fromfile('configs/_base_/models/pvt_mini.py')
    if name.startswith('cf-'):
        cfg.model.backbone.arch = Config.fromfile('configs/demo/cf-vit-mini_digits.py').model.backbone.arch
        cfg.model.backbone.update(coarse_size=2, img_size=64)
        cfg.model.head.in_channels, cfg.custom_hooks[0].begin = 64, 0
    elif '-mini' not in name:
        cfg.model.backbone.arch = mini.dpvt_mini if cfg.model.backbone.type.endswith('DPVT') else mini.pvt_mini
        part, channels = ('head', 192) if scope == 'mmpretrain' else ('neck', [32, 64, 128, 192])
        cfg.model[part].in_channels = channels
    if scope == 'mmdet':
        few = dict(train_cfg=dict(rpn_proposal=dict(max_per_img=8), rcnn=dict(sampler=dict(num=4))))
        cfg.model.roi_head.bbox_head.fc_out_channels = 64
        cfg.merge_from_dict(dict(model=dict(few, test_cfg=dict(rpn=dict(max_per_img=8), rcnn=dict(max_per_img=2)))))
    if 'size' in cfg.model.get('data_preprocessor', {}):
        cfg.model.data_preprocessor.size = (64, 64)
    digits = dict(
        mmpretrain=dict(metainfo=dict(classes=list('0123456789'))),
        mmdet=dict(metainfo=dict(classes=list('0123456789'))),
        mmseg=dict(img_suffix='.png'),
    )[scope]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.update(digits)
        make_images_small(loader.dataset.pipeline)
    make_images_small(cfg.get('tta_pipeline', []))
    length = 'max_epochs' if 'max_epochs' in cfg.train_cfg else 'max_iters'
    cfg.train_cfg.update({length: 1, 'val_interval': 1})
    cfg.param_scheduler = cfg.param_scheduler[:1]  # which warms up; others begin later
    if cfg.get('load_from'):
        cfg.load_from = weights(cfg, name)
    return cfg


def make_images_small(part):
    """In a pipeline, let all sides of images be 64 pixels."""
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ():
        make_images_small(value)
    for name in ('scale', 'scales', 'crop_size') if isinstance(part, dict) else ():
        if name in part:
            part[name] = 64 if isinstance(part[name], int) else [(64, 64)] if name == 'scales' else (64, 64)


def weights(config, name=None):
    """A checkpoint of a config's model, whose routers choose by the image, and which takes most digits for zeros."""
    cfg = Config.fromfile(config) if isinstance(config, str) else config
    path = Path('weights') / f'{name or Path(config).stem}.pth'
    if not path.exists():
        model = build_model(cfg)
        for part, module in model.named_modules():
            if part.endswith('router'):
                nn.init.normal_(module.weight, std=1.0)
            elif part == 'head.fc':
                nn.init.constant_(module.bias[:1], 5.0)
        meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=list('0123456789')))
        torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


# Where configs and commands look for data, and what of the demo's is there.
DATA = {
    'imagenet': 'imagenet',
    'tiny-imagenet-50': 'imagenet',
    'bccd': 'imagenet',
    'camvid/images': 'imagenet',
    'camvid/annotations': 'imagenet/masks',
    'coco': 'coco',
    'ade/ADEChallengeData2016': 'ade',
}
VOC = """<annotation><size><width>9</width><height>9</height></size><object><name>WBC</name><bndbox>
<xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>"""


def write_sources():
    """What is converted: a data set, and checkpoints with the names of other programs."""
    files = {
        'JPEGImages/x.jpg': '',
        'Annotations/x.xml': VOC,
        'ImageSets/Main/train.txt': 'x',
        'ImageSets/Main/val.txt': '',
    }
    for name, text in files.items():
        path = Path('sources/bccd') / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    theirs = {
        'vtpack': [('ffn', 'mlp'), ('backbone.', ''), ('head.fc', 'head')],
        'cfvit': [
            ('ffn', 'mlp'),
            ('reuse.norm', 'reuse_block.0'),
            ('reuse.mlp', 'reuse_block.1'),
            ('backbone.pos_embed', 'pos_embed_list.1'),
            ('coarse_pos_embed', 'pos_embed_list.0'),
            ('backbone.', ''),
            ('head.fc', 'head'),
        ],
    }
    for kind, model in (('vtpack', 'plain'), ('cfvit', 'coarse')):
        state = torch.load(weights(f'small/{model}.py'))['state_dict']
        renamed = {
            functools.reduce(lambda n, pair: n.replace(*pair), theirs[kind], name): state[name] for name in state
        }
        torch.save(renamed, f'sources/{kind}.pth')
    with contextlib.suppress(ImportError):
        from mmdet.models.backbones import PyramidVisionTransformer

        model = PyramidVisionTransformer(
            pretrain_img_size=64, embed_dims=16, num_layers=[1] * 4, num_heads=[1, 2, 5, 8]
        )
        torch.save(dict(state_dict=model.state_dict()), 'sources/mmdet-pvt.pth')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A reader's folder, which has our tools and configs, data where the configs look for them, and small models."""
    folder = tmp_path_factory.mktemp('reader')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ('tools', 'configs', 'mmdyn'):
            Path(name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / 'docs/results', 'docs/results')
        shutil.copy(ROOT / 'docs/benchmark.json', 'docs')
        for name in ('small', 'weights', 'sources', 'work_dirs/...', 'work_dirs/NAME', 'data/zeros'):
            Path(name).mkdir(parents=True)
        runpy.run_path('tools/dataset_tools/make_demo_dataset.py')['main'](SMALLER['make_demo_dataset.py'])
        for name, data in DATA.items():
            (Path('data') / name).parent.mkdir(exist_ok=True)
            (Path('data') / name).symlink_to(folder / 'data/demo' / data)
        shutil.copytree('data/demo/imagenet/train/0', 'data/zeros/0')
        shutil.copytree('data/demo/imagenet/val/0', 'data/zeros/0', dirs_exist_ok=True)
        for name, (base, text) in MODELS.items():
            Path(f'small/{name}.py').write_text(f"_base_ = '{ROOT}/configs/demo/{base}.py'\n{text}")
        write_sources()
        Path('test.json').write_text(json.dumps({'flops/gflops': 2.0, 'mIoU': 30.0}))
    return folder


# What was trained and tested: by a program and its options, one config of each framework (tests/test_configs.py: all).
STARTED = set()


def python(*words):
    """Run a command line of Python in this process; of the processes that a launcher starts, one."""
    if words[:2] in (('-m', 'torch.distributed.launch'), ('-m', 'torch.distributed.run')):
        assert '--nproc_per_node=8' in words
        script, option = next(i for i, word in enumerate(words) if word.endswith('.py')), words.index('--launcher')
        words = words[script:option] + words[option + 2 :]
    if Path(words[0]).name in ('train.py', 'test.py'):
        script, config, *options = words
        if 'none' in options:  # the launcher of one process
            del options[options.index('none') - 1 : options.index('none') + 1]
        if script.endswith('train.py') and not torch.cuda.is_available():
            options = [option for option in options if option not in FOR_DEVICES]
        words = (script, small(config), *options)
        same = (Path(script).resolve(), Config.fromfile(words[1]).default_scope, *options)
        if same in STARTED:
            return
        STARTED.add(same)
    if words[0] == '-c':
        exec(words[1], {})
    else:
        module = words[0] == '-m'
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter('default')  # in tests they are errors
            patch.setattr(sys, 'argv', list(words[module:]))
            (runpy.run_module if module else runpy.run_path)(words[module], run_name='__main__')


def mim(name, package, *words):
    """Run a command of mim in this process, and what it starts."""
    try:
        importlib.metadata.distribution(dict(mmseg='mmsegmentation').get(package, package))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f'{package} has another name here')
    importlib.import_module(f'mim.commands.{name}').cli.main([package, *words], standalone_mode=False)


def bash(script, *words):
    """Run a script of ours with programs in place of Python's that tell what they are to do, and then do it here."""
    Path('bin').mkdir(exist_ok=True)
    told, program = Path('told').absolute(), Path('bin/python').absolute()
    keep = f'case "$*" in *gpu/results.py*) exec {sys.executable} "$@";; esac'
    program.write_text(f'#!/bin/bash\n{keep}\nprintf \'%s\\0\' "$@" > {told}\n')
    program.chmod(0o755)
    Path('bin/a.whl').touch()
    told_of = dict(PATH=f'{program.parent}:{os.environ["PATH"]}', PYTHON=str(program), KIT=str(program.parent))
    subprocess.run(['bash', script, *words], check=True, env={**os.environ, **told_of})
    if 'dist_' in script:
        python(*told.read_text().split('\0')[:-1])


def here(original):
    """In place of a function of subprocess: what mim is to do, or lets others do, happens in this process."""

    def call(words, *args, **options):
        program, *rest = [words] if isinstance(words, str) else map(str, words)
        if Path(program).name == 'mim':
            return mim(*rest)
        if any(word.endswith(('tools/train.py', 'tools/test.py')) for word in rest):
            return b'' if rest[-1] == '-h' else python(*rest) or 0
        return original(words, *args, **options)

    return call


read_once = functools.cache(Config.fromfile)  # a list of results has few configs, and many rows


@pytest.fixture
def counter(quick, monkeypatch):
    """What counts multiply-adds, whose weights do not matter, does it on images that are small where they may be."""
    sides = flops.sides
    monkeypatch.setattr(flops, 'sides', lambda name, shape: sides(name, shape if max(shape) < 512 else (64, 96)))
    monkeypatch.setattr(flops.count_macs, '__defaults__', (1, 0))  # proposals and detections


@pytest.fixture
def reader(folder, bases, monkeypatch):
    """In the folder. Of the benchmark there is what is quick; tests/tools/test_benchmark.py knows all of it."""
    monkeypatch.chdir(folder)
    for name in ('run', 'check_call', 'check_output'):
        monkeypatch.setattr(subprocess, name, here(getattr(subprocess, name)))
    few = dict(cls=[('DeiT-tiny', (64, 64), 1)], peers=[('DeiT-tiny', (64, 64), 1)])
    monkeypatch.setattr(benchmark, 'groups_of', lambda suite, *args: few.get(suite, []))
    monkeypatch.setattr(latency, 'limits', lambda device: dict(float32=1.0, copy=1.0))
    for module in (benchmark, runtimes):
        monkeypatch.setattr(module, 'versions', lambda: dict(onnxruntime='', OpenVINO=''))
    monkeypatch.setattr(Config, 'fromfile', lambda path, *args: copy.deepcopy(read_once(str(Path(path).resolve()))))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def filled(command, out):
    """The words of a command with files in place of the names that stand for them."""
    if command.startswith('--cfg-options'):
        command = f'python tools/train.py configs/dge/mask-rcnn_pvt-s-dge_fpn_1x_coco.py {command}'
    config = next((f'small/{model}.py' for word, model in ABOUT.items() if word in command), 'small/dynamic.py')
    words = [re.sub(r'\bOUT\b', str(out), re.sub(r'\bCONFIG\b', config, word)) for word in with_names(command)]
    config = next((word for word in words[2:] if word.endswith('.py')), config)
    return [weights(small(config)) if word == 'CHECKPOINT' else word for word in words]


def make_what_is_there_before(command, out):
    """The files that a command reads and that others have written before it."""
    for place in re.findall(r'work_dirs/[^/]+/epoch_300\.pth', command):
        config = 'small/dynamic.py' if 'NAME' in place else small('configs/dge/pvt-small-dge_8xb16_in1k-256px.py')
        Path(place).parent.mkdir(exist_ok=True)
        shutil.copy(weights(config), place)
    if 'NAME/budget/prices.json' in command:
        options = ['--budgets', '0.4', '--modes', 'average', '--out', 'work_dirs/NAME/budget']
        python('tools/analysis_tools/sweep_budget.py', 'small/dynamic.py', weights('small/dynamic.py'), *options)
    if 'gpu/report.py OUT' in command:
        found = dict(machine=dict(gpu='one'), step=dict(install=dict(seconds=3, code=0)))
        (out / 'results.json').write_text(json.dumps(found))


@pytest.mark.parametrize('command', to_run())
def test_command(command, reader, tmp_path, capsys, request):
    for word, package in NEEDS.items():
        if word in command:
            pytest.importorskip(package)
    make_what_is_there_before(command, tmp_path)
    words = filled(command, tmp_path)
    tool = Path(words[1]).name
    if not (tool == 'results.py' and {'--list', '--report'} & set(words)):
        words += SMALLER.get(tool, [])
    if tool in ('get_flops.py', 'paper_tables.py') and '--images' not in words:
        request.getfixturevalue('counter')
    capsys.readouterr()
    dict(python=python, mim=mim, bash=bash)[words[0]](*words[1:])
    printed = capsys.readouterr().out
    if '--json' in words:
        json.loads(printed)
    if str(tmp_path) in ' '.join(words):
        assert any(tmp_path.iterdir())


def test_lines_for_contributors(tmp_path):
    """They mend what they find, and install the hook."""
    lines = [line for _, code in blocks('bash', ['CONTRIBUTING.md']) for line in command_lines(code)]
    lines = [line for line in lines if not line.startswith('make ')]
    programs = [Path(sys.prefix, 'bin', name) for name in ('ruff', 'clang-format', 'pre-commit')]
    if not all(map(Path.is_file, programs)):
        pytest.skip('the programs that check the style are not installed')
    for name in ('pyproject.toml', '.clang-format', '.pre-commit-config.yaml'):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / '.venv').symlink_to(sys.prefix)
    (tmp_path / 'mmdyn').mkdir()
    (tmp_path / 'mmdyn/a.py').write_text('import os\n\nx = {"a":1}\n')
    (tmp_path / 'mmdyn/a.c').write_text('int  f( void ){return 1;}\n')
    subprocess.run(['git', 'init', '-q'], cwd=tmp_path, check=True)
    for line in lines:
        subprocess.run(['bash', '-euo', 'pipefail', '-c', line], cwd=tmp_path, check=True)
    assert len(lines) == 3 and (tmp_path / 'mmdyn/a.py').read_text() == "x = {'a': 1}\n"
    assert (tmp_path / 'mmdyn/a.c').read_text().startswith('int f(void)')
    assert (tmp_path / '.git/hooks/pre-commit').is_file()
