"""CUDA graphs: a forward pass that is recorded once, and then costs the host no more than one call."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..models.backbones.base import find_backbones
from ..models.backbones.budget import spent_layers
from ..models.dge import Bound, DynamicGrainedEncoder
from ..values import check_number

WARM_UP = 3  # passes before the recording, in which libraries choose their algorithms and take their memory


def deciding(model: nn.Module) -> Iterator[tuple[str, DynamicGrainedEncoder]]:
    """The encoders of a model that have no exact budget, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, DynamicGrainedEncoder) and (module.router.share is None or module.forced is not None):
            yield name, module


def spent_shares(model: nn.Module, example: Tensor) -> dict[DynamicGrainedEncoder, float]:
    """The greatest query ratio that an image of the example has in each encoder."""
    with torch.no_grad():
        model(example)
    return {
        encoder: layer.query_ratio.max().item()
        for backbone in find_backbones(model)
        if backbone.has_dge
        for layer, encoder in spent_layers(backbone)
    }


class Bounded:
    """Inference in which no layer waits for the number of its queries: each has places for so many.

    Whether they were enough is asked once, behind the pass. If not, the model runs again without bounds.

    Args:
        model: in evaluation mode.
        example: whose images say how many queries each layer needs, unless all have an exact budget.
        margin: share of a layer's dense queries that there are places for above that.

    Attributes:
        shares: places of each bounded encoder, as shares of its dense queries.
        exceeded: number of inputs for which they were not enough.
    """

    def __init__(self, model: nn.Module, example: Tensor, margin: float):
        self.model, self.exceeded = model, 0
        bounded = [encoder for _, encoder in deciding(model)]
        spent = spent_shares(model, example) if bounded else {}
        self.shares = {encoder: min(spent[encoder] + margin, 1.0) for encoder in bounded}

    def run(self, x: Tensor) -> tuple[Any, Tensor | None]:
        """The output, and the most queries of an image above a layer's places; above 0 the output is wrong."""
        bounds = {encoder: Bound(share) for encoder, share in self.shares.items()}
        for encoder, bound in bounds.items():
            encoder.bound = bound
        try:
            output = self.model(x)
        finally:
            for encoder in bounds:
                encoder.bound = None
        surplus = [of_pass for bound in bounds.values() for of_pass in bound.surplus]
        return output, torch.cat(surplus).amax() if surplus else None

    def is_exceeded(self, surplus: Tensor | None) -> bool:
        """Whether places were missing; this waits for the device."""
        is_exceeded = surplus is not None and surplus.item() > 0
        self.exceeded += is_exceeded
        return is_exceeded

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:
        """The model's output."""
        output, surplus = self.run(x)
        return self.model(x) if self.is_exceeded(surplus) else output


class Graphed:
    """What :func:`graphed` returns.

    Attributes:
        model: the model whose pass is replayed.
        exceeded: number of inputs that had more queries than there are places for, and ran without the graph.
    """

    def __init__(self, model: nn.Module, example: Tensor, margin: float = 0.0):
        self.model, self._input = model, example.clone()
        self._graph = self._output = None
        if not example.is_cuda:
            return
        self._autocast = torch.autocast(
            'cuda', torch.get_autocast_dtype('cuda'), enabled=torch.is_autocast_enabled('cuda')
        )
        self._bounded = Bounded(model, self._input, margin)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(WARM_UP):
                self._bounded.run(self._input)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), torch.no_grad():
            self._output, self._surplus = self._bounded.run(self._input)
        self._decisions = [(m, m.decision) for m in model.modules() if isinstance(m, DynamicGrainedEncoder)]
        self._passes = [(backbone, backbone.last_pass) for backbone in find_backbones(model)]

    @property
    def exceeded(self) -> int:
        return 0 if self._graph is None else self._bounded.exceeded

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
        if self._bounded.is_exceeded(self._surplus):
            with torch.no_grad(), self._autocast:
                return self.model(x)
        # Other passes of the model may have left theirs.
        for encoder, decision in self._decisions:
            encoder.decision = decision
        for backbone, last_pass in self._passes:
            backbone.last_pass = last_pass
        return tree_map_only(Tensor, Tensor.clone, self._output)


def _say(value: Any) -> str:
    return str(tuple(value) if isinstance(value, torch.Size) else value)


def graphed(model: nn.Module, example: Tensor, margin: float | None = None) -> Graphed:
    """Record a model's inference on a GPU, to replay it for inputs like the example without the host's work.

    Dense models, and those with an exact budget, with which all images make as many queries, need no ``margin``, and no
    call waits for the GPU. Where the routers decide, freely or by an average budget, each layer of each image gets
    places for as many queries as an image of the example needed, and for ``margin`` of its dense queries more. Each
    call then waits once, behind the pass, for whether they were enough. If not, the input runs as without a graph, so
    that the result is right in any case; ``exceeded`` counts these inputs. Places that are left over cost time: take
    an example of usual images, and the least margin with which hardly any is exceeded.

    Weights may change in their place afterwards; a budget, a device, or an autocast that changes is not noticed: record
    again. Deleting what is returned frees its memory. On a CPU there is nothing to record, and the model runs.

    Args:
        model: in evaluation mode; called with one tensor.
        example: an input of the shape, type and device that all inputs have. Without a margin its content does not
            matter.
        margin: from 0 to 1; None for a model whose numbers of queries are known.

    Returns:
        A callable that takes an input and returns what the model returns; ``backbone.cost`` is that of the input.

    Raises:
        TypeError: if the example is no tensor.
        ValueError: for a model in training mode, or, without a margin, one whose routers decide how many queries there
            are; when called with an input of another shape, type or device.
    """
    if not isinstance(example, Tensor):
        raise TypeError(f'mmdyn.graphed: example is a {type(example).__name__}: give a tensor, e.g. a batch of images.')
    if model.training:
        raise ValueError('mmdyn.graphed records inference, but the model is in training mode: call model.eval() first.')
    if margin is not None:
        check_number('margin', margin, '[0, 1]', 'the share of the dense queries that is kept free')
    for name, _ in deciding(model) if margin is None else ():
        raise ValueError(
            f'mmdyn.graphed: {name} decides how many queries there are, so that shapes differ from image to image: '
            'call backbone.set_budget(0.5) for an exact budget first, or give margin=0.1 with usual images as the '
            'example.'
        )
    return Graphed(model, example, margin or 0.0)
