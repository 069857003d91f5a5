import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MessageHub, print_log
from torch import Tensor

from ..models.cost import BackboneCost, CostMeter
from ..models.dge import share_within_images
from ..registry import METRICS
from ..values import check_choice, check_type
from .coarse_to_fine import COLLECT_DEVICES

# A layer is said to spend the same on all images if the query ratios of this share of at least so many images lie
# within the tolerance around their median.
ALIKE, LEAST_IMAGES, TOLERANCE = 0.99, 8, 0.01


def owners_of_passes(sizes: list[int], samples: Sequence[dict]) -> list[Tensor | None]:
    """Which image of a batch each entry of some forward passes belongs to.

    Args:
        sizes: images of each pass.
        samples: what the model returned for each image of the batch.

    Returns:
        For each pass (size,) indices into ``samples``, or None where nothing tells.
    """
    num = len(samples)
    goes_on = [i for i, sample in enumerate(samples) if isinstance(sample, dict) and sample.get('exit_stage')]
    owners = []
    for size in sizes:
        if size % num == 0:  # views of an image that share a pass lie together
            owners.append(torch.arange(num).repeat_interleave(size // num))
        elif size == len(goes_on):  # the fine stage of CF-ViT
            owners.append(torch.tensor(goes_on))
        else:
            owners.append(None)
    rest = [size for size, owner in zip(sizes, owners) if owner is None]
    if rest and sum(rest) % num == 0:  # one image after another, in passes of their own
        parts = iter(torch.arange(num).repeat_interleave(sum(rest) // num).split(rest))
        owners = [next(parts) if owner is None else owner for owner in owners]
    return owners


@METRICS.register_module()
class DynamicFLOPs(BaseMetric):
    """What the dynamic backbone spent on the test set, beside any other metric and for any task.

    Reports, as averages over the images: ``gflops`` the backbone's multiply-adds in 1e9, ``gflops_dense`` those without
    DGE, ``query_ratio`` beta of eq. 7, and ``query_ratio/<layer>`` for each layer with DGE. All forward passes of an
    image count, as in test-time augmentation and slide inference; ``gflops`` is their sum, and a ratio their mean. Each
    image has a cost of its own, so that the averages depend neither on the batch size nor on the number of processes.
    ``within_images/<layer>`` tells how much of the variance of the layer's choice lies within images, see
    :func:`~mmdyn.models.dge.share_within_images`: near 0 it treats all regions of an image alike.

    After a test, a warning in the log names the layers that spent the same on nearly all images.

    Args:
        per_layer: whether to report each layer.
        collect_device: as in mmengine's metrics.
        prefix: as in mmengine's metrics. Defaults to ``'flops'``.
    """

    default_prefix = 'flops'

    def __init__(self, per_layer: bool = True, collect_device: str = 'cpu', prefix: str | None = None) -> None:
        check_choice('DynamicFLOPs: per_layer', per_layer, (True, False))
        check_choice('DynamicFLOPs: collect_device', collect_device, COLLECT_DEVICES)
        check_type('DynamicFLOPs: prefix', prefix, (str, type(None)), "the beginning of the metrics' names")
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.per_layer = per_layer
        self._meter = CostMeter(training=False)
        self._shares_equally = False

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Note of each image what the forward passes since the last call spent on it."""
        costs = self._meter.take()
        if not costs:
            raise ValueError(
                'DynamicFLOPs saw no forward pass of an mmdyn backbone: use one (e.g. mmdyn.PVT), or '
                'leave out the metric.'
            )
        num, sums, counts = len(data_samples), {}, {}
        owners = owners_of_passes([len(cost.query_ratio) for cost in costs], data_samples) if num else []
        for cost, owner in zip(costs, owners):
            for name, values in self._columns(cost).items():
                if owner is None:
                    self._say_that_passes_are_shared()
                    share = values.new_full((num,), len(values) / num)
                    total = share * values.mean()
                else:
                    share = torch.bincount(owner, minlength=num).double()
                    total = torch.zeros(num).double().index_add_(0, owner, values)
                sums[name], counts[name] = sums.get(name, 0) + total, counts.get(name, 0) + share
        for name in sums:
            if name.startswith(('query_ratio', 'finest')):
                sums[name] = sums[name] / counts[name]
        # One entry for each image: mmengine cuts what was gathered from all processes to the size of the data set.
        if sums:
            self.results += [dict(zip(sums, values)) for values in torch.stack([*sums.values()], dim=1).tolist()]

    @staticmethod
    def _columns(cost: BackboneCost) -> dict[str, Tensor]:
        """What is reported of a pass, each with (B,) values of its images."""
        layers = [layer for layer in cost.layers if layer.dynamic]
        of_layers = [f'{kind}/{layer.name}' for kind in ('query_ratio', 'finest') for layer in layers]
        names = ['gflops', 'gflops_dense', 'query_ratio', *of_layers]
        ratio = cost.query_ratio.double()
        columns = [
            cost.spent / 1e9,
            torch.full_like(ratio, cost.dense / 1e9),
            ratio,
            *(layer.query_ratio.double() for layer in layers),
            *(layer.finest.to(ratio) for layer in layers),
        ]
        return dict(zip(names, torch.stack(columns).detach().cpu()))

    def _say_that_passes_are_shared(self) -> None:
        if not self._shares_equally:
            self._shares_equally = True
            print_log(
                'DynamicFLOPs: some forward passes have fewer images than the batch, and nothing tells which. '
                "They are shared equally among the batch's images.",
                'current',
                logging.WARNING,
            )

    def compute_metrics(self, results: list[dict]) -> dict:
        """Average over the images."""
        if not results:
            return OrderedDict()
        columns = {name: [result[name] for result in results] for name in results[0]}
        # A validation is part of a training, whose hooks look at the routers and know for how long.
        if MessageHub.get_current_instance().get_info('loop_stage') != 'val':
            self._warn_of_collapse(
                {name.partition('/')[2]: values for name, values in columns.items() if name.startswith('query_ratio/')}
            )
        means = OrderedDict()
        for name, values in columns.items():
            kind, _, layer = name.partition('/')
            mean = sum(values) / len(values)
            if kind == 'finest' and self.per_layer:
                square = sum(value**2 for value in values) / len(values)
                means[f'within_images/{layer}'] = share_within_images(mean, square)
            elif kind != 'finest' and (self.per_layer or not layer):
                means[name] = mean
        return means

    @staticmethod
    def _warn_of_collapse(ratios: dict[str, list[float]]) -> None:
        """Name the layers whose query ratio is the same for nearly all images."""
        alike = {}
        for layer, values in ratios.items():
            middle = np.median(values)
            if len(values) >= LEAST_IMAGES and np.mean(np.abs(values - middle) <= TOLERANCE) >= ALIKE:
                alike[layer] = middle
        if not alike:
            return
        layers = ', '.join(f'{layer} ({ratio:.3f})' for layer, ratio in alike.items())
        print_log(
            f'{"All" if len(alike) == len(ratios) else "Some"} layers with DGE spend the same share of queries, in '
            f'brackets, on at least {ALIKE:.0%} of the {len(values)} images: {layers}. Their regions choose one '
            'granularity, whatever the image. draw_gates.py shows it; the log of the training says since when, and '
            'what to try.',
            'current',
            logging.WARNING,
        )
