import os
import subprocess
import sys

import pytest


@pytest.fixture
def mmcv(tmp_path, monkeypatch):
    """The folder of an mmcv without operators."""
    folder = tmp_path / 'mmcv'
    for source in ('pytorch/ms_deform_attn.cpp', 'pytorch/cuda/ms_deform_attn_cuda.cu'):
        (folder / 'ops/csrc' / source).parent.mkdir(parents=True, exist_ok=True)
        (folder / 'ops/csrc' / source).touch()
    monkeypatch.setenv('CPLUS_INCLUDE_PATH', '/given')
    monkeypatch.setenv('CUDA_HOME', '/cuda')
    return folder


@pytest.fixture
def compiler(monkeypatch):
    """Calls of torch's compilation, which does nothing."""
    from torch.utils import cpp_extension

    calls = []
    monkeypatch.setattr(cpp_extension, 'load', lambda *args, **options: calls.append((args, options)))
    return calls


def call(mmcv, expression):
    """What becomes of an expression of the module that was written, ``ext``, with one that stands for the compiled."""
    package = mmcv / '_deformable_attention'
    (package / 'deformable_attention.py').write_text('ms_deform_attn_forward = ms_deform_attn_backward = abs')
    (mmcv / '__init__.py').touch()
    code = f'import mmcv._ext as ext; print({expression})'
    done = subprocess.run([sys.executable, '-c', code], cwd=mmcv.parent, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().split('\n')[-1]


def test_only_the_operators_sources_are_compiled(tool, mmcv, compiler):
    tool('compile_deformable').compile_operator(mmcv)
    ((args, options),) = compiler
    assert [os.path.basename(file) for file in args[1]] == [
        'deformable_attention.cpp',
        'ms_deform_attn.cpp',
        'ms_deform_attn_cuda.cu',
    ]
    assert all(os.path.isfile(file) for file in args[1])
    assert options['extra_include_paths'] == [str(mmcv / 'ops/csrc/common'), str(mmcv / 'ops/csrc/common/cuda')]
    assert call(mmcv, 'ext.ms_deform_attn_forward(-2), ext.ms_deform_attn_backward(-3)') == '2 3'
    assert call(mmcv, 'hasattr(ext, "nms"), hasattr(ext, "__path__")') == 'True False'
    assert call(mmcv, 'ext.nms(1, iou=2)') == (
        "RuntimeError: mmcv's operator nms is not compiled here: install mmcv with its operators."
    )


def test_without_a_compiler_mmcv_can_be_imported(tool, mmcv, monkeypatch):
    def load(*args, **options):
        raise RuntimeError('Error building extension')

    monkeypatch.setattr('torch.utils.cpp_extension.load', load)
    with pytest.raises(RuntimeError, match='Error building extension'):
        tool('compile_deformable').compile_operator(mmcv)
    assert 'operator ms_deform_attn_forward is not compiled here' in call(mmcv, 'ext.ms_deform_attn_forward()')


def test_the_toolkit_of_an_nvcc_that_is_a_script(tool, tmp_path, monkeypatch):
    nvcc = tmp_path / 'nvcc'
    nvcc.write_text('#!/bin/sh\necho "#\\$ TOP=/opt/cuda/bin/.." >&2\n')
    nvcc.chmod(0o755)
    (tmp_path / 'site/nvidia/cu13/include').mkdir(parents=True)
    (tmp_path / 'site/nvidia/__init__.py').touch()  # so that none that is installed comes before it
    monkeypatch.syspath_prepend(tmp_path / 'site')
    monkeypatch.delitem(sys.modules, 'nvidia', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CUDA_HOME', raising=False)
    monkeypatch.setenv('CPLUS_INCLUDE_PATH', '/given')
    tool('compile_deformable').find_toolkit()
    assert os.environ['CUDA_HOME'] == '/opt/cuda'
    given, *found = os.environ['CPLUS_INCLUDE_PATH'].split(os.pathsep)
    assert given == '/given' and str(tmp_path / 'site/nvidia/cu13/include') in found
    monkeypatch.setenv('CUDA_HOME', '/mine')
    tool('compile_deformable').find_toolkit()
    assert os.environ['CUDA_HOME'] == '/mine'


def test_errors(tool, mmcv, compiler):
    compile_operator = tool('compile_deformable').compile_operator
    (mmcv / '_ext.cpython-312-x86_64-linux-gnu.so').touch()
    with pytest.raises(ValueError, match=r'was installed with its operators \(_ext.cpython.*: use those'):
        compile_operator(mmcv)
    with pytest.raises(ValueError, match='ms_deform_attn.cpp is missing: install mmcv 2.0 or 2.1'):
        compile_operator(mmcv / 'elsewhere')
