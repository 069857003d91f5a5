"""Test-time augmentation of detectors with masks.

This module imports mmdet; ``mmdyn.models`` imports it when ``mmdyn.MaskTTAModel`` is first built.
"""

import torch
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from ...values import check_type, is_integer

try:
    from mmcv.ops import batched_nms
    from mmdet.models import DetTTAModel
    from mmdet.structures import DetDataSample
except (ImportError, AssertionError) as reason:  # mmdet asserts the versions of mmcv and mmengine
    raise ImportError(
        f'mmdyn.MaskTTAModel needs mmdet, which cannot be imported ({reason}). Install it with: '
        'pip install "mmdyn[det]"'
    ) from reason

TTA_CFG = "a dict such as dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)"
FLIPPED_AXES = dict(horizontal=[-1], vertical=[-2], diagonal=[-2, -1])


class MaskTTAModel(DetTTAModel):
    """mmdet's DetTTAModel, with the masks of the boxes that it keeps. Detectors without masks may use it too.

    Args:
        tta_cfg: ``nms``, the options of mmcv's batched_nms, and ``max_per_img``, as for DetTTAModel.
        module: the detector or its config.
    """

    def __init__(self, tta_cfg: dict, **kwargs):
        check_type('MaskTTAModel: tta_cfg', tta_cfg, dict, TTA_CFG)
        if not isinstance(tta_cfg.get('nms'), dict) or not is_integer(tta_cfg.get('max_per_img'), 1):
            raise ValueError(f'MaskTTAModel: tta_cfg={tta_cfg}: give {TTA_CFG}.')
        super().__init__(tta_cfg=ConfigDict(tta_cfg), **kwargs)

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        views, metas = zip(*((sample.pred_instances, sample.metainfo) for sample in data_samples))
        bboxes, scores = self.merge_aug_bboxes([view.bboxes for view in views], [view.scores for view in views], metas)
        merged = InstanceData(bboxes=bboxes, scores=scores, labels=torch.cat([view.labels for view in views]))
        if 'masks' in views[0]:
            # Like the boxes, they are at the scale of the original image, but still flipped.
            merged.masks = torch.cat(
                [
                    view.masks.flip(FLIPPED_AXES[meta['flip_direction']]) if meta['flip'] else view.masks
                    for view, meta in zip(views, metas)
                ]
            )
        if len(merged):
            detections, kept = batched_nms(merged.bboxes, merged.scores, merged.labels, self.tta_cfg.nms)
            most = self.tta_cfg.max_per_img
            merged = merged[kept[:most]]
            merged.scores = detections[:most, -1]  # a soft NMS changes them
        data_samples[0].pred_instances = merged
        return data_samples[0]
