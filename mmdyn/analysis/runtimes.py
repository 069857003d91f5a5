"""Runtimes that a dense model may run in on a CPU instead of PyTorch, for benchmark.py: both read its graph in ONNX."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..compat import installed_version

MODULES = dict(onnxruntime='onnxruntime', OpenVINO='openvino')
Run = Callable[[], list[Tensor]]


def versions() -> dict[str, str]:
    """Versions of the runtimes by their names; '' if it or onnxscript, by which torch exports, is not installed."""
    exports = installed_version('onnxscript')
    return {name: installed_version(module).partition('-')[0] if exports else '' for name, module in MODULES.items()}


def to_onnx(model: nn.Module, images: Tensor) -> bytes:
    """The graph of a model's pass on images of just this shape, (B, 3, H, W)."""
    return torch.onnx.export(model, (images,), dynamo=True, verbose=False).model_proto.SerializeToString()


def by_onnxruntime(graph: bytes, images: Tensor, threads: int) -> Run:
    """A function that runs a graph on images in float32 and returns the outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry('session.force_spinning_stop', '1')  # or its threads wait for work beside others'
    session = onnxruntime.InferenceSession(graph, options, providers=['CPUExecutionProvider'])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: [torch.from_numpy(output) for output in session.run(None, inputs)]


def by_openvino(graph: bytes, images: Tensor, threads: int, precision: str = 'f32') -> Run:
    """As :func:`by_onnxruntime`; the outputs are overwritten by the next run.

    Args:
        graph: of :func:`to_onnx`.
        images: what it runs on.
        threads: their number.
        precision: that OpenVINO computes in; ``'f32'`` or ``'bf16'``.
    """
    import openvino

    core = openvino.Core()
    config = dict(PERFORMANCE_HINT='LATENCY', INFERENCE_NUM_THREADS=threads, INFERENCE_PRECISION_HINT=precision)
    compiled = core.compile_model(core.read_model(graph), 'CPU', config)
    inputs = [images.numpy()]
    return lambda: [torch.from_numpy(x) for x in compiled(inputs, share_inputs=True, share_outputs=True).to_tuple()]
