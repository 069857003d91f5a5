from collections import OrderedDict
from typing import Any, List, Sequence

from mmengine.evaluator import BaseMetric

from ..models.cost import CostMeter
from ..registry import METRICS


@METRICS.register_module()
class DynamicFLOPs(BaseMetric):
    """What the dynamic backbone spent on the test set, beside any other metric and for any task.

    Reports, as averages over the images: ``gflops`` the backbone's multiply-adds in 1e9, ``gflops_dense`` those without
    DGE, ``query_ratio`` beta of eq. 7, and ``query_ratio/<layer>`` for each layer with DGE. All forward passes of an
    image count, as in test-time augmentation and slide inference; ``gflops`` is their sum.

    Args:
        per_layer: whether to report each layer.
        collect_device: as in mmengine's metrics.
        prefix: as in mmengine's metrics. Defaults to ``'flops'``.
    """
    default_prefix = 'flops'

    def __init__(self, per_layer: bool = True, collect_device: str = 'cpu', prefix=None):
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.per_layer = per_layer
        self._meter = CostMeter(training=False)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Share the cost of the forward passes since the last call equally among this batch's images."""
        costs = self._meter.take()
        if not costs:
            raise ValueError('DynamicFLOPs saw no forward pass of an mmdyn backbone: use one (e.g. mmdyn.PVT), or leave '
                             'out the metric.')
        samples, passes = len(data_samples), sum(len(cost.query_ratio) for cost in costs)
        result = dict(
            gflops=sum(cost.spent.sum().item() for cost in costs) / samples / 1e9,
            gflops_dense=sum(cost.dense * len(cost.query_ratio) for cost in costs) / samples / 1e9,
            query_ratio=sum(cost.query_ratio.sum().item() for cost in costs) / passes)
        if self.per_layer:
            for layers in zip(*(cost.layers for cost in costs)):
                if layers[0].dynamic:
                    result[f'query_ratio/{layers[0].name}'] = sum(layer.query_ratio.sum().item()
                                                                  for layer in layers) / passes
        # One entry for each image: mmengine cuts what was gathered from all processes to the size of the data set.
        self.results += [result] * samples

    def compute_metrics(self, results: List[dict]) -> dict:
        """Average over the images."""
        return OrderedDict((name, sum(result[name] for result in results) / len(results)) for name in results[0])
