import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from ..registry import METRICS
from ..values import check_choice, check_type, is_integer

COLLECT_DEVICES = ('cpu', 'gpu', 'npu')  # mmengine's


@METRICS.register_module()
class CoarseToFineMetric(BaseMetric):
    """Accuracy of each stage of CF-ViT, and what the early exit saves, from one test.

    Reports, over the images: ``top<k>`` of the stage at which each image stops, ``coarse_top<k>`` of the coarse stage,
    and ``fine_top<k>`` of the fine stage, in per cent; ``exit_share``, the share in [0, 1] that stops after the coarse
    stage; and ``gflops``, the backbone's multiply-adds in 1e9. ``fine_top<k>`` is not a number unless the fine stage
    ran on all images, as with ``test_cfg=dict(every_stage=True)`` or ``threshold=1``.

    Args:
        topk: k, or several.
        collect_device: as in mmengine's metrics.
        prefix: as in mmengine's metrics. Defaults to ``'cf'``.
    """

    default_prefix = 'cf'

    def __init__(self, topk: int | Sequence[int] = (1, 5), collect_device: str = 'cpu', prefix=None):
        check_choice('CoarseToFineMetric: collect_device', collect_device, COLLECT_DEVICES)
        check_type('CoarseToFineMetric: prefix', prefix, (str, type(None)), "the beginning of the metrics' names")
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.topk = tuple(topk) if isinstance(topk, (tuple, list)) else (topk,)
        if not self.topk or not all(is_integer(k, 1) for k in self.topk):
            raise ValueError(f'CoarseToFineMetric: topk={topk!r}: give a positive k, or several, e.g. (1, 5).')

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Note of each image by which stages its label is among the best k."""
        for sample in data_samples:
            if 'coarse_score' not in sample:
                raise ValueError(
                    'CoarseToFineMetric: the predictions have no coarse_score, which a CF-ViT gives: use '
                    'the model type mmdyn.CoarseToFineClassifier, or leave out the metric.'
                )
            if 'gt_label' not in sample:
                raise ValueError(
                    'CoarseToFineMetric: the images have no gt_label: give a test set with labels, or '
                    'leave out the metric.'
                )
            hits = {
                name: self._hits(sample[f'{score}_score'], sample['gt_label'])
                for name, score in (('', 'pred'), ('coarse_', 'coarse'), ('fine_', 'fine'))
                if f'{score}_score' in sample
            }
            # One entry for each image: mmengine cuts what was gathered from all processes to the size of the data set.
            self.results.append(dict(hits=hits, exits=sample['exit_stage'] == 0, macs=sample['macs']))

    def _hits(self, score: Tensor, label: Tensor) -> list[bool]:
        """For each k, whether the label is among the k classes of the highest score."""
        if max(self.topk) > len(score):
            raise ValueError(
                f'CoarseToFineMetric: topk={self.topk}, but the model tells {len(score)} classes apart: '
                f'give a topk of at most {len(score)}.'
            )
        found = (score.topk(max(self.topk)).indices == label.to(score.device)).tolist()
        return [any(found[:k]) for k in self.topk]

    def compute_metrics(self, results: list[dict]) -> dict:
        """Average over the images."""
        metrics = OrderedDict()
        for name in ('', 'coarse_', 'fine_'):
            unknown = [math.nan] * len(self.topk)
            hits = torch.tensor([result['hits'].get(name, unknown) for result in results], dtype=torch.double)
            metrics.update({f'{name}top{k}': 100 * share for k, share in zip(self.topk, hits.mean(0).tolist())})
        metrics['exit_share'] = sum(result['exits'] for result in results) / len(results)
        metrics['gflops'] = sum(result['macs'] for result in results) / len(results) / 1e9
        return metrics
