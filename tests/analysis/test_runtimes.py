import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdyn.analysis import runtimes
from mmdyn.analysis.latency import largest_difference, supports_bfloat16


@pytest.fixture
def model():
    """A model of two outputs, and its images."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 16, 2, 2)

        def forward(self, images):
            x = self.first(images)
            return x, self.second(x).softmax(1)

    return Two().eval(), torch.randn(2, 3, 16, 24)


@pytest.mark.parametrize('missing', ['', 'openvino', 'onnxscript'])
def test_versions(missing, monkeypatch):
    for name, version in (('onnxscript', '0.1'), ('onnxruntime', '1.2'), ('openvino', '3.4-56-releases')):
        found = None if name == missing else SimpleNamespace(__version__=version)
        monkeypatch.setitem(sys.modules, name, found)
    expected = {'': ('1.2', '3.4'), 'openvino': ('1.2', ''), 'onnxscript': ('', '')}[missing]
    assert tuple(runtimes.versions().values()) == expected


def test_what_onnxruntime_is_told(model, monkeypatch):
    _, images = model
    told = SimpleNamespace(add_session_config_entry=lambda name, value: setattr(told, name, value))

    def session(graph, options, providers):
        assert (graph, options, providers) == (b'graph', told, ['CPUExecutionProvider'])
        return SimpleNamespace(
            get_inputs=lambda: [SimpleNamespace(name='images')], run=lambda names, inputs: [2 * inputs['images']]
        )

    fake = SimpleNamespace(SessionOptions=lambda: told, InferenceSession=session)
    monkeypatch.setitem(sys.modules, 'onnxruntime', fake)
    (output,) = runtimes.by_onnxruntime(b'graph', images, 3)()
    assert torch.equal(output, 2 * images) and told.intra_op_num_threads == 3
    assert getattr(told, 'session.force_spinning_stop') == '1'


@pytest.mark.parametrize('precision', ['f32', 'bf16'])
def test_what_openvino_is_told(precision, model, monkeypatch):
    _, images = model

    def compile_model(read, device, config):
        assert (read, device) == ('read graph', 'CPU')
        assert config['INFERENCE_NUM_THREADS'] == 3 and config['INFERENCE_PRECISION_HINT'] == precision
        return lambda inputs, **options: SimpleNamespace(to_tuple=lambda: (2 * inputs[0],))

    core = SimpleNamespace(read_model=lambda graph: f'read {graph.decode()}', compile_model=compile_model)
    monkeypatch.setitem(sys.modules, 'openvino', SimpleNamespace(Core=lambda: core))
    (output,) = runtimes.by_openvino(b'graph', images, 3, precision)()
    assert torch.equal(output, 2 * images)


def test_outputs_of_onnxruntime_are_the_models(model):
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    model, images = model
    run = runtimes.by_onnxruntime(runtimes.to_onnx(model, images), images, 1)
    with torch.no_grad():
        expected = model(images)
    for _ in range(2):
        assert largest_difference(run(), expected) < 1e-5


@pytest.mark.parametrize('precision', ['f32', 'bf16'])
def test_outputs_of_openvino_are_the_models(precision, model, tmp_path):
    """In a process of its own: one that has loaded OpenVINO, and pytest's handlers, is ended by the next signal."""
    pytest.importorskip('onnxscript')
    if not find_spec('openvino'):
        pytest.skip("it is not there: pip install 'mmdyn[bench]'")
    if precision == 'bf16' and not supports_bfloat16('cpu'):
        pytest.skip('the processor has no bfloat16')
    model, images = model
    (tmp_path / 'graph').write_bytes(runtimes.to_onnx(model, images))
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / 'tensors.pth')
    code = (
        'import torch\n'
        'from mmdyn.analysis.latency import largest_difference\n'
        'from mmdyn.analysis.runtimes import by_openvino\n'
        "images, expected = torch.load('tensors.pth')\n"
        f"run = by_openvino(open('graph', 'rb').read(), images, 1, {precision!r})\n"
        'print(max(largest_difference(run(), expected) for _ in range(2)))\n'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    difference = float(done.stdout.split()[-1])
    assert difference < 1e-5 if precision == 'f32' else 1e-4 < difference < 0.1
