import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import mmdyn
from mmdyn.engine.command import (
    check_checkpoint,
    check_has,
    command,
    load_weights,
    names_apart,
    only_results,
    output_folder,
    read_config,
)

ROOT = Path(mmdyn.__file__).parents[1]
NAME = Path(__file__).name
CONFIG = ROOT / 'configs/demo/pvt-mini-dge_digits.py'


def ends(main, capsys):
    """Exit code and what a tool said."""
    with pytest.raises(SystemExit) as end:
        command(main)()
    return end.value.code, capsys.readouterr().err


def test_mistakes_are_one_line(capsys):
    def own():
        raise ValueError('no such thing')

    assert ends(own, capsys) == (2, 'test_command.py: no such thing\n')
    assert ends(lambda: Path('/nowhere/a').read_text(), capsys) == (
        2,
        f'{NAME}: /nowhere/a: No such file or directory\n',
    )
    code, said = ends(lambda: MODELS.build(dict(type='mmdyn.Nothing')), capsys)
    assert code == 2 and said.startswith('test_command.py: mmdyn.Nothing is not in the')
    code, said = ends(lambda: MODELS.build(dict(type='mmdyn.PVT', colour='red')), capsys)
    assert code == 2 and "unexpected keyword argument 'colour'" in said and said.count('\n') == 1


@pytest.mark.parametrize('mistake', [lambda: int('x'), lambda: {}['a'], lambda: torch.zeros(2)[5], lambda: None.a])
def test_mistakes_of_ours_keep_their_traceback(mistake):
    with pytest.raises((ValueError, LookupError, AttributeError)):
        command(mistake)()


def test_mistakes_in_processes_that_load_data(capsys, tmp_path):
    from mmengine.registry import TRANSFORMS

    load = TRANSFORMS.get('mmdyn.LoadImageFromFile')()

    class Files(torch.utils.data.Dataset):
        def __init__(self, load):
            self.load = load

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return self.load(dict(img_path='nowhere.png'))

    def first(load):
        return next(iter(torch.utils.data.DataLoader(Files(load), num_workers=1)))

    code, said = ends(lambda: first(load), capsys)
    assert code == 2 and said.startswith('test_command.py: Cannot load the image nowhere.png: ')
    assert said.count('\n') == 1
    with pytest.raises(KeyError):
        command(lambda: first(lambda results: results['nothing']))()


def test_results_are_alone_on_stdout(capsys):
    @only_results
    def main(word):
        print('a log')
        return word

    main('a result')
    out, err = capsys.readouterr()
    assert out == 'a result\n' and err == 'a log\n'


def test_interruption_is_quiet(tmp_path):
    script = tmp_path / 'tool.py'
    script.write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from mmdyn.engine.command import command

@command
def main():
    print('begun', flush=True)
    time.sleep(60)

main()
""")
    tool = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # also below a job that ignores it
    assert tool.stdout.readline() == 'begun\n'
    time.sleep(0.1)
    tool.send_signal(signal.SIGINT)
    _, said = tool.communicate(timeout=60)
    assert tool.returncode == 130 and 'Traceback' not in said and 'KeyboardInterrupt' not in said


def test_a_config_with_options():
    cfg = read_config(CONFIG, {'model.backbone.img_size': 32})
    assert cfg.model.backbone.img_size == 32 and read_config(CONFIG).model.backbone.img_size == 64


@pytest.mark.parametrize(
    'content, said',
    [
        (None, 'There is no config .*c.py: give the path of a .py file'),
        ('model = dict(', 'Cannot read the config .*c.py: SyntaxError'),
        ('model = unknown', "Cannot read the config .*c.py: NameError: name 'unknown' is not defined"),
        ("_base_ = 'nowhere.py'", 'Cannot read the config .*c.py: FileNotFoundError'),
        ('lr = 1', 'c.py has no model: give a whole config'),
    ],
)
def test_configs_that_are_none(tmp_path, content, said):
    if content is not None:
        (tmp_path / 'c.py').write_text(content)
    with pytest.raises(ValueError, match=said):
        read_config(tmp_path / 'c.py')


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match='--cfg-options do not fit .*digits.py: '):
        read_config(CONFIG, {'val_evaluator.7.topk': 1})


@pytest.mark.parametrize(
    'content, said',
    [
        (None, 'There is no checkpoint .*c.pth'),
        (b'', 'Cannot read the checkpoint .*c.pth: EOFError'),
        (b'no checkpoint', 'Cannot read the checkpoint .*c.pth: UnpicklingError'),
    ],
)
def test_checkpoints_that_are_none(tmp_path, content, said):
    if content is not None:
        (tmp_path / 'c.pth').write_bytes(content)
    for load in (check_checkpoint, lambda path: load_weights(torch.nn.Linear(2, 2), path)):
        with pytest.raises(ValueError, match=said) as error:
            load(tmp_path / 'c.pth')
        assert '\n' not in str(error.value)


def test_parts_that_a_config_lacks():
    cfg = Config(dict(test_dataloader={}, test_evaluator=None))
    check_has(cfg, 'whose images are needed', 'test_dataloader')
    with pytest.raises(ValueError, match='the config has no test_evaluator, which tells what to test on'):
        check_has(cfg, 'which tells what to test on', 'test_dataloader', 'test_evaluator')


def test_weights(tmp_path):
    saved, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    torch.save(dict(state_dict=saved.state_dict(), meta=dict(epoch=3)), tmp_path / 'c.pth')
    assert load_weights(model, tmp_path / 'c.pth')['meta'] == dict(epoch=3)
    assert torch.equal(model.weight, saved.weight)


def test_folders(tmp_path):
    assert output_folder(tmp_path / 'a/b').is_dir() and not list((tmp_path / 'a/b').iterdir())
    (tmp_path / 'file').touch()
    for wrong in ('file', 'file/folder'):
        with pytest.raises(ValueError, match=f'Cannot write to the folder {tmp_path}/{wrong}: '):
            output_folder(tmp_path / wrong)


# Each tool, and a call that it has to refuse.
REFUSED = {
    'analysis_tools/analyze_redundancy.py': [CONFIG, 'nowhere.pth'],
    'analysis_tools/benchmark.py': ['--suite', 'cls', '--out', '{file}/x'],
    'analysis_tools/benchmark_report.py': ['nowhere.json'],
    'analysis_tools/class_attention.py': [CONFIG, 'nowhere.pth'],
    'analysis_tools/gate_quality.py': [CONFIG, 'nowhere.pth'],
    'analysis_tools/get_flops.py': ['nowhere.py'],
    'analysis_tools/plot_curves.py': ['nowhere.json'],
    'analysis_tools/profile_pass.py': ['--models', 'PVT-small', '--out', '{file}/x'],
    'analysis_tools/paper_tables.py': ['--paper', 'dge', '--table', '2', '--query-ratio', '3'],
    'analysis_tools/report.py': [CONFIG, 'nowhere.pth'],
    'analysis_tools/results.py': ['--only', 'nothing', '--list'],
    'analysis_tools/sweep_budget.py': [CONFIG, 'nowhere.pth'],
    'analysis_tools/sweep_threshold.py': [CONFIG, 'nowhere.pth'],
    'dataset_tools/convert_dataset.py': ['camvid', 'nowhere', '{file}/x'],
    'dataset_tools/make_demo_dataset.py': ['--out', '{file}/x'],
    'demo.py': [CONFIG, '--work-dir', '{file}/x'],
    'model_converters/convert.py': ['pvt', 'nowhere.pth', 'x.pth'],
    'model_converters/publish_model.py': ['nowhere.pth', 'x.pth'],
    'test.py': [CONFIG, 'nowhere.pth', '--work-dir', '{file}/../o'],
    'train.py': [CONFIG, '--work-dir', '{file}/x'],
    'visualizations/draw_gates.py': [CONFIG, 'nowhere.pth', '--images', 'x', '--out', 'x'],
    'visualizations/draw_predictions.py': [CONFIG, 'nowhere.pth', '--images', 'x', '--out', 'x'],
    'visualizations/draw_regions.py': ['nowhere.py', 'nowhere.pth', '--images', 'x', '--out', 'x'],
}


def test_each_tool_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    # What tools/gpu holds runs on a machine with a GPU, by a script of its own; docs_tools are parts of `make docs`.
    tools = {str(path.relative_to(ROOT / 'tools')) for path in (ROOT / 'tools').rglob('*.py')}
    assert {tool for tool in tools if not tool.startswith(('gpu/', 'docs_tools/'))} == set(REFUSED)
    for tool, args in REFUSED.items():
        path = ROOT / 'tools' / tool
        monkeypatch.setattr(sys, 'argv', [str(path), *(str(arg).format(file=tmp_path / 'file') for arg in args)])
        monkeypatch.syspath_prepend(path.parent)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name='__main__')
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith(f'{path.name}: ')]
        assert (end.value.code, len(lines), out) == (2, 1, ''), (tool, err)
        assert 'Traceback' not in err


@pytest.mark.parametrize(
    'paths, names',
    [
        (['a/x.pth', 'a/y.pth'], ['x', 'y']),
        (['r/a/seed0/w.pth', 'r/b/seed0/w.pth'], ['a', 'b']),
        (['a/w.pth', 'b/w.pth', 'a/w.pth'], ['a', 'b', 'a']),
        (['r/a/0/w.pth', 'r/a/1/w.pth', 'r/b/0/w.pth'], ['r/a/0/w.pth', 'r/a/1/w.pth', 'r/b/0/w.pth']),
        (['a/w.pth', 'a/w.pth'], ['w', 'w']),
    ],
)
def test_names_that_tell_files_apart(paths, names):
    assert names_apart(paths) == names_apart([Path(path) for path in paths]) == names
