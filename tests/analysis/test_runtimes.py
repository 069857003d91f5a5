import sys
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


@pytest.mark.parametrize('name', ['onnxruntime', 'OpenVINO', 'OpenVINO bfloat16'])
def test_outputs_are_the_models(name, model):
    pytest.importorskip('onnxscript')
    pytest.importorskip(runtimes.MODULES[name.partition(' ')[0]])
    (model, images), options = model, {}
    make = runtimes.by_onnxruntime if name == 'onnxruntime' else runtimes.by_openvino
    if 'bfloat16' in name:
        if not supports_bfloat16('cpu'):
            pytest.skip('the processor has no bfloat16')
        options = dict(precision='bf16')
    run = make(runtimes.to_onnx(model, images), images, 1, **options)
    with torch.no_grad():
        expected = model(images)
    for _ in range(2):
        difference = largest_difference(run(), expected)
        assert difference < 1e-5 if not options else 1e-4 < difference < 0.1
