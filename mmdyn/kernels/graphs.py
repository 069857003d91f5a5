"""CUDA graphs: a forward pass that is recorded once, and then costs the host no more than one call."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..models.dge import DynamicGrainedEncoder

WARM_UP = 3  # passes before the recording, in which libraries choose their algorithms and take their memory


class Graphed:
    """What :func:`graphed` returns.

    Attributes:
        model: the model whose pass is replayed.
    """

    def __init__(self, model: nn.Module, example: Tensor):
        self.model, self._input = model, example.clone()
        self._graph = self._output = None
        if not example.is_cuda:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(WARM_UP):
                model(self._input)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.no_grad():
            self._output = model(self._input)

    def __call__(self, x: Tensor) -> Any:
        """The model's output for an input like the example."""
        for name in ('shape', 'dtype', 'device'):
            given, expected = getattr(x, name), getattr(self._input, name)
            if given != expected:
                raise ValueError(
                    f'The pass was recorded for an input of {name} {_say(expected)}, but this one has {_say(given)}: '
                    'resize or pad it, or call mmdyn.graphed(model, example) for this kind, too.'
                )
        if self._graph is None:
            with torch.no_grad():
                return self.model(x)
        self._input.copy_(x)
        self._graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self._output)


def _say(value: Any) -> str:
    return str(tuple(value) if isinstance(value, torch.Size) else value)


def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """Record a model's inference on a GPU, to replay it for inputs like the example without the host's work.

    The model is dense, or has an exact budget, with which all images make as many queries. Weights may change in their
    place afterwards; a budget, a device, or an autocast that changes is not noticed: record again. Deleting what is
    returned frees its memory. On a CPU there is nothing to record, and the model runs.

    Args:
        model: in evaluation mode; called with one tensor.
        example: an input of the shape, type and device that all inputs have. Its content does not matter.

    Returns:
        A callable that takes an input and returns what the model returns; ``backbone.cost`` is that of the input.

    Raises:
        TypeError: if the example is no tensor.
        ValueError: for a model in training mode, or one whose routers decide how many queries there are; when called
            with an input of another shape, type or device.
    """
    if not isinstance(example, Tensor):
        raise TypeError(f'mmdyn.graphed: example is a {type(example).__name__}: give a tensor, e.g. a batch of images.')
    if model.training:
        raise ValueError('mmdyn.graphed records inference, but the model is in training mode: call model.eval() first.')
    for name, module in model.named_modules():
        if isinstance(module, DynamicGrainedEncoder) and module.router.share is None and module.forced is None:
            raise ValueError(
                f'mmdyn.graphed: {name} decides how many queries there are, so that shapes differ from image to image: '
                'call backbone.set_budget(0.5) for an exact budget first.'
            )
    return Graphed(model, example)
