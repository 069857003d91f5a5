"""README and docs: links lead somewhere, commands and options exist, configs load, numbers are their sources'."""

import argparse
import ast
import contextlib
import io
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS, init_default_scope
from pages import FENCE, PAGES, ROOT, all_commands, blocks, commands, text_of

import mmdyn
from mmdyn.analysis.flops import build_model
from mmdyn.analysis.report import summary

hooks = runpy.run_path(str(ROOT / 'tools/docs_tools/site_hooks.py'))
# Of programs that are not ours, what the pages may call; each is run by a user's hands alone.
FOREIGN = ('git', 'cd', '.venv/bin/pre-commit', '.venv/bin/ruff', 'find', 'xargs')
# Tools whose command lines are run by another test than tests/tools/test_<name>.py.
TESTED_BY = {
    'tools/train.py': 'tests/test_mim.py',
    'tools/test.py': 'tests/test_mim.py',
    'tools/dist_train.sh': 'tests/tools/test_dist.py',
    'tools/dist_test.sh': 'tests/tools/test_dist.py',
    'tools/docs_tools/drawings.py': 'tests/test_docs.py',
}
# Targets of the Makefile that no check of a change runs, and why; `make -n` tells what they would.
NOT_CHECKED = {
    'demo': 'minutes of training',
    'demo-det': 'minutes of training',
    'demo-seg': 'minutes of training',
    'demo-cls-cf': 'minutes of training',
    'bench': 'half an hour on a machine that does nothing else',
    'results': 'hours of training',
    'results-time': 'a machine that does nothing else',
    'docs': 'packages of its own',
    'sanitize': 'an hour',
    'test-forks': 'packages of its own',
    'test-oldest': 'packages of its own',
    'gpu-kit': 'wheels for another machine',
    'clean': 'it removes what runs the tests',
}


def anchor(heading):
    """As GitHub and mkdocs make it."""
    words = re.sub(r'[`*]|\[([^\]]*)\]\([^)]*\)', r'\1', heading).lower()
    return re.sub(r'[\s-]+', '-', re.sub(r'[^\w\s-]', '', words).strip())


@cache
def anchors(page):
    return {anchor(heading) for heading in re.findall(r'^#+ (.+)$', FENCE.sub('', text_of(page)), re.MULTILINE)}


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = FENCE.sub('', text_of(page))
    wrong = [link for link in hooks['links'](text) if hooks['target_of'](str(page), link) is None]
    for link, fragment in re.findall(r'\]\(([^)\s#:]*)#([^)\s]+)\)', text):
        target = hooks['target_of'](str(page), link) if link else str(page)
        if target and target.endswith('.md') and fragment not in anchors(target):
            wrong.append(f'{link}#{fragment}')
    assert wrong == []


class Parsed(Exception):
    """In place of parsing: the parser."""


@cache
def parser_of(tool):
    """The parser that a tool of ours makes."""

    def give(parser, *args, **kwargs):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(argparse.ArgumentParser, 'parse_args', give)
        patch.setattr(argparse.ArgumentParser, 'parse_known_args', give)
        patch.setattr(sys, 'argv', [tool])
        try:
            runpy.run_path(str(ROOT / tool), run_name='__main__')
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f'{tool} parses nothing')


def what_is_wrong_with_options(words, parser, others=()):
    """Options that the parser does not know, and values that are none of its choices."""
    known = parser._option_string_actions
    for word, value in itertools.pairwise([*words, '']):
        if not word.startswith('--'):
            continue
        if word not in known and word not in others:
            yield f'there is no option {word}'
        choices = known[word].choices if word in known else None
        if choices and re.fullmatch(r'[\w|]+', value):
            yield from (f'{word} is not {one}' for one in value.split('|') if one not in map(str, choices))


def mim_options(name):
    command = import_module(f'mim.commands.{name}').cli
    return {option for parameter in command.params for option in parameter.opts}


@cache
def config_names():
    return {path.name for path in (ROOT / 'configs').rglob('*.py')}


def is_config(word):
    """A path of ours, a name of ours, or a placeholder."""
    return (ROOT / word).is_file() or word in config_names() or not re.fullmatch(r'(configs/)?[\w./-]+\.py', word)


def what_is_wrong(command):
    """Reasons for which a documented command could not run."""
    words = [re.sub(r'^\[|\]?(\.\.\.)?$', '', word) for word in shlex.split(command)]  # of a synopsis
    while words and re.fullmatch(r'[A-Z_]+=\S*', words[0]):
        words.pop(0)
    if not words or words[0] in FOREIGN:
        return
    if words[0].startswith('--'):  # the end of a command
        yield from what_is_wrong_with_options(words, parser_of('tools/train.py'))
        return
    program, *rest = words
    missing = [word for word in rest if word.startswith('configs/') and '<' not in word and not is_config(word)]
    yield from (f'there is no {word}' for word in missing)
    if program == 'make':
        targets = re.findall(r'^([\w -]+):', text_of('Makefile'), re.MULTILINE)
        known = {name for line in targets for name in line.split()}
        yield from (f'no target {word}' for word in rest if '=' not in word and word not in known)
    elif program in ('bash', 'python', '.venv/bin/python') and rest[0].startswith('tools/'):
        tool, *options = rest
        if not (ROOT / tool).is_file():
            yield f'there is no {tool}'
            return
        if tool.endswith('.sh'):
            return
        yield from what_is_wrong_with_options(options, parser_of(tool))
    elif program in ('python', '.venv/bin/python') and rest[0] == '-m':
        module = rest[1].replace('.', '/')
        files = [ROOT / f'{module}{end}' for end in ('.py', '/__main__.py')]
        if module.startswith('mmdyn') and not any(map(Path.is_file, files)):
            yield f'there is no module {rest[1]}'
    elif program in ('python', '.venv/bin/python') and rest[0] == '-c':
        compile(rest[1], command, 'exec')
    elif program == 'mim' and rest[0] in ('train', 'test'):
        name, package, *options = rest
        config = options.pop(0) if options else 'CONFIG'
        if package not in ('mmdyn', 'mmpretrain', 'mmdet', 'mmseg', 'mmsegmentation'):
            yield f'mim knows no {package} of ours'
        if not is_config(config):
            yield f'there is no {config}'
        yield from what_is_wrong_with_options(options, parser_of(f'tools/{name}.py'), mim_options(name))
    elif program == 'pip' and rest[0] == 'install':
        extras = text_of('pyproject.toml').partition('[project.optional-dependencies]')[2].partition('\n\n')[0]
        known = set(re.findall(r'^(\w+) = ', extras, re.MULTILINE))
        asked = {name for names in re.findall(r'(?:^|\s)\.\[([\w,]+)', ' '.join(rest)) for name in names.split(',')}
        yield from (f'there is no extra {extra}' for extra in sorted(asked - known))
    else:
        yield f'who runs {program}?'


def test_commands_exist_with_their_options():
    found = list(all_commands())
    if not (ROOT / 'mmdyn/kernels').is_dir():  # which may be deleted, with the command that tells of them
        found = [(page, command) for page, command in found if 'mmdyn.kernels' not in command]
    wrong = [f'{page}: {command}: {why}' for page, command in found for why in what_is_wrong(command)]
    assert len(found) > 80 and wrong == []


@pytest.mark.parametrize(
    'command, why',
    [
        ('python tools/nothing.py', 'there is no tools/nothing.py'),
        ('python tools/analysis_tools/get_flops.py CONFIG [--shapes H W]', 'there is no option --shapes'),
        ('python tools/analysis_tools/benchmark.py --suite cls|depth', '--suite is not depth'),
        ('python tools/test.py configs/dge/nothing.py CHECKPOINT', 'there is no configs/dge/nothing.py'),
        ('mim train mmdet CONFIG --gpu 8', 'there is no option --gpu'),
        ('mim train mmcls CONFIG', 'mim knows no mmcls of ours'),
        ('mim test mmdyn nothing_at_all.py', 'there is no nothing_at_all.py'),
        ('make nothing', 'no target nothing'),
        ('python -m mmdyn.nothing', 'there is no module mmdyn.nothing'),
        ('pip install ".[nothing]"', 'there is no extra nothing'),
        ('curl x', 'who runs curl?'),
        ('OMP_NUM_THREADS=1 make test', None),
        ('python tools/test.py CONFIG CHECKPOINT [--tta] [--cfg-options KEY=VALUE]', None),
    ],
)
def test_what_is_wrong_with_a_command(command, why):
    assert list(what_is_wrong(command)) == [why] * (why is not None)


def test_the_checks_of_each_change_are_those_of_the_pages():
    """.ci/run calls `make test`, which calls the others."""
    rules = dict(re.findall(r'^(test|lint|run-tests): (\w+)$', text_of('Makefile'), re.MULTILINE))
    assert rules == {'test': 'lint', 'lint': 'setup', 'run-tests': 'setup'}
    assert re.search(r'^(\w+=\w+ )?make test$', text_of('.ci/run'), re.MULTILINE)


@pytest.mark.parametrize(
    'target', sorted({word for _, command in all_commands() for word in command.split()[1:] if command[:5] == 'make '})
)
def test_targets_call_what_there_is(target):
    """What `make` would run has the tools, configs and options that there are, if it is not run by the checks."""
    if '=' in target or not re.fullmatch(r'[a-z-]+', target):
        pytest.skip('a variable')
    assert target in NOT_CHECKED or target in ('test', 'lint', 'setup')
    # What the `make` that runs the tests was told is not for this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith('MAKE')}
    printed = subprocess.run(
        ['make', '-n', target], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    called = [command for command in commands(printed) if re.match(r'\S+/python tools/', command)]
    assert [(command, why) for command in called for why in what_is_wrong(command)] == []
    assert bool(called) == (target.startswith(('demo', 'bench', 'results')))


def test_each_documented_tool_is_run_by_a_test():
    words = {word for _, command in all_commands() for word in command.split()}
    tools = {word for word in words if re.match(r'tools/\S+\.(py|sh)$', word)}
    tests = {
        tool: [ROOT / TESTED_BY.get(tool, ''), *(ROOT / 'tests/tools').rglob(f'test_{Path(tool).stem}.py')]
        for tool in tools
    }
    assert len(tools) > 12 and [tool for tool, paths in tests.items() if not any(map(Path.is_file, paths))] == []


def test_each_tool_is_documented():
    text = text_of('docs/commands.md') + text_of('docs/gpu.md')
    tools = [path for path in (ROOT / 'tools').rglob('*.py') if '__main__' in path.read_text()]
    inner = {'machine.py', 'benchmark_cases.py', 'compile_deformable.py', 'train_amp.py'}  # run by gpu_check.sh
    assert [path.name for path in tools if path.name not in inner and str(path.relative_to(ROOT)) not in text] == []


def registered(name):
    init_default_scope('mmpretrain')
    return any(registry.get(f'mmdyn.{name}') for registry in (MODELS, HOOKS, METRICS, TRANSFORMS, DATASETS))


def test_names_of_configs_are_registered():
    names = {name for page in PAGES for name in re.findall(r'\bmmdyn\.([A-Z]\w+)', text_of(page))}
    assert len(names) > 20 and [name for name in names if not registered(name)] == []


def test_all_names_of_configs_are_documented():
    text, reference = text_of('docs/names.md'), ''.join(text_of(page) for page in PAGES if page.parent.name == 'api')
    nodes = [getattr(mmdyn.registry, kind).module_dict for kind in ('MODELS', 'HOOKS', 'METRICS', 'TRANSFORMS')]
    names = {name for node in nodes for name in node} | set(mmdyn.registry.DATASETS.modules)
    assert [name for name in names if f'`mmdyn.{name}`' not in text] == []
    assert [name for name in names if not re.search(rf'::: mmdyn\.\S+\.{name}$', reference, re.MULTILINE)] == []


@pytest.mark.parametrize('page, code', [pytest.param(*block, id=str(block[0])) for block in blocks('python')])
def test_python_is_python(page, code):
    tree = ast.parse(code)
    for node in ast.walk(tree):  # what is named of the package is there
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'mmdyn':
            assert hasattr(mmdyn, node.attr)


def configs_of(page):
    return [code for _, code in blocks('python', [Path(page)]) if code.startswith('_base_')]


def test_recipe_makes_a_dense_model_dynamic(tmp_path):
    (recipe,) = configs_of('docs/make-dynamic.md')
    assert recipe in text_of('README.md')
    (tmp_path / 'your_dense_config.py').write_text(f"_base_ = '{ROOT}/configs/demo/pvt-mini_digits.py'")
    (tmp_path / 'recipe.py').write_text(recipe)
    cfg = Config.fromfile(tmp_path / 'recipe.py')
    assert build_model(cfg).backbone.has_dge and cfg.optim_wrapper.optimizer.lr == 1e-5
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys['.router'] == dict(lr_mult=50.0)
    hooks = [HOOKS.build(hook) for hook in cfg.custom_hooks]
    assert [type(hook).__name__ for hook in hooks] == ['BudgetHook', 'GateNoiseHook', 'DenseTeacherHook']


def test_first_config_is_a_detector(tmp_path):
    first = next(code for code in configs_of('README.md') if 'mmdet::' in code)
    assert first in text_of('docs/get-started.md')
    (tmp_path / 'first.py').write_text(first)
    cfg = Config.fromfile(tmp_path / 'first.py')
    assert cfg.model.type == 'MaskRCNN' and cfg.model.backbone.type == 'mmdyn.PVT'
    assert build_model(cfg).neck.in_channels == [64, 128, 320, 512]


@pytest.mark.parametrize(
    'index, kind, classes', [(0, 'CustomDataset', 2), (1, 'CocoDataset', 3), (2, 'BaseSegDataset', 3)]
)
def test_configs_of_own_data(index, kind, classes, tmp_path):
    code = configs_of('docs/your-data.md')[index]
    (tmp_path / 'config.py').write_text(code.replace("'../dge/", f"'{ROOT}/configs/dge/"))
    cfg = Config.fromfile(tmp_path / 'config.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.type == f'mmdyn.{kind}' and loader.dataset.pipeline[0].type == 'LoadImageFromFile'
        places = [loader.dataset.data_root, loader.dataset.data_prefix, loader.dataset.get('ann_file', '')]
        assert not re.search('imagenet|coco|ADE|instances', str(places))
    assert 'data/coco' not in str(cfg.val_evaluator) + str(cfg.test_evaluator)
    model = build_model(cfg)
    if kind == 'CustomDataset':
        assert model.data_preprocessor.num_classes == classes and model.data_preprocessor.mean.max() > 100
    if kind == 'BaseSegDataset':
        pipelines = cfg.train_dataloader.dataset.pipeline + cfg.test_dataloader.dataset.pipeline
        assert [step.reduce_zero_label for step in pipelines if step.type == 'LoadAnnotations'] == [False, False]
    numbers = {
        name: module.num_classes
        for name, module in model.named_modules()
        if name.endswith('head') and name != 'rpn_head' and hasattr(module, 'num_classes')
    }
    assert numbers and set(numbers.values()) == {classes}


def test_results_are_those_of_the_runs():
    """Of the three rows of each model: that which the others start from, trained on, and made dynamic."""
    rows = {row['name']: row for row in json.loads(text_of('docs/results.json'))['rows']}
    lines = re.findall(r'^\| `([\w-]+/[\w-]+)` \| .+? \| (.+) \|$', text_of('README.md'), re.MULTILINE)
    assert len(lines) == 3
    for name, cells in lines:
        of = [rows[f'{name}/{kind}'] for kind in ('base', 'dense', 'dge')]
        values = [f'{row["value"]:.1f}' for row in of]
        expected = [*values, f'{of[-1]["query_ratio"]:.3f}', f'{100 * of[-1]["of_dense"]:.0f} %']
        assert cells.split(' | ') == expected and all(row['seeds'] == [0] for row in of)


def test_times_are_those_of_the_benchmark():
    table = summary(json.loads(text_of('docs/benchmark.json')))
    assert f'\n{table}\n' in text_of('README.md'), 'benchmark_report.py docs/benchmark.json --summary prints it'


def test_pages_of_the_site_are_in_its_navigation():
    def targets(nav):
        for entry in nav:
            ((_, target),) = entry.items()
            yield from targets(target) if isinstance(target, list) else [target]

    nav = yaml.safe_load(text_of('mkdocs.yml'))['nav']
    named = {hooks['repository_path'](target) for target in targets(nav)}
    assert {str(page) for page in PAGES} <= named
    planned = {'results.md'}
    assert {name for name in named if not (ROOT / name).is_file()} <= planned
    kept = set(targets(hooks['existing'](nav)))
    assert all((ROOT / hooks['repository_path'](target)).is_file() for target in kept)


@pytest.mark.parametrize(
    'text, page, expected',
    [
        ('[x](docs/faq.md#a)', 'README.md', '[x](faq.md#a)'),
        ('[x](../configs/dge/README.md)', 'docs/dge.md', '[x](configs/dge/README.md)'),
        ('[x](../dge/README.md)', 'configs/dpvt/README.md', '[x](../dge/README.md)'),
        ('[x](../../README.md)', 'configs/dge/README.md', '[x](../../index.md)'),
        ('![x](images/dge.svg)', 'docs/dge.md', '![x](images/dge.svg)'),
        ('[x](configs/demo)', 'README.md', '[x](configs/demo/README.md)'),
        ('[x](https://a.b/c.md), [y](#z)', 'README.md', '[x](https://a.b/c.md), [y](#z)'),
        ('[x](nothing.md)', 'README.md', '[x](nothing.md)'),
        ('<img src="docs/images/dge.svg">', 'README.md', '<img src="images/dge.svg">'),
    ],
)
def test_links_of_the_site(text, page, expected):
    assert hooks['relink'](text, page) == expected


def test_drawings(tmp_path, monkeypatch, capsys):
    import cv2
    import numpy as np

    tool = runpy.run_path(str(ROOT / 'tools/docs_tools/drawings.py'))
    (tmp_path / 'gates').mkdir()
    for number, name in enumerate(tool['DIGITS']):
        row = np.full((182, 1148, 3), 255, np.uint8)
        row[22:, :160], row[22:, 328:488] = 10 * number, 100 + 10 * number
        cv2.imwrite(str(tmp_path / f'gates/{name}.png'), row)
    tool['main'](['--out', str(tmp_path / 'out'), '--gates', str(tmp_path / 'gates')])
    drawn = {path.name for path in (tmp_path / 'out').iterdir()}
    others = set(re.findall(r'images/([\w.-]+)', (ROOT / 'docs/figures.md').read_text()))  # which tells what draws them
    assert drawn == {path.name for path in (ROOT / 'docs/images').iterdir()} - others
    gates = cv2.imread(str(tmp_path / 'out/gates.jpg'))
    assert gates.shape == (324, 6 * 164 - 4, 3)
    assert [round(int(gates[80, 164 * i + 80, 0]), -1) for i in range(6)] == [0, 10, 20, 30, 40, 50]
    assert [round(int(gates[240, 164 * i + 80, 0]), -1) for i in range(6)] == [100, 110, 120, 130, 140, 150]
    queries = tool['patches'](np.array([[4, 2], [4, 1]]))
    assert sum(phi**2 for _, _, phi in queries) == 64
    # Without the demo's pictures, those of before stay.
    tool['main'](['--out', str(tmp_path / 'again'), '--gates', str(tmp_path / 'nothing')])
    assert not (tmp_path / 'again/gates.jpg').exists()
    assert (tmp_path / 'again/dge.svg').read_bytes() == (tmp_path / 'out/dge.svg').read_bytes()


def test_pictures_are_small():
    for path in (ROOT / 'docs').rglob('*'):
        if path.suffix in ('.png', '.jpg', '.svg'):
            assert path.stat().st_size < 200_000, path


def test_readme_is_read_in_three_minutes():
    words = re.sub(r'\|[-|]+\||```\w*|\([^)]*\)', ' ', text_of('README.md')).split()
    assert len(words) < 3 * 260
