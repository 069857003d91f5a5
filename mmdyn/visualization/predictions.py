"""Pictures of what a model predicts, drawn by the visualizer of its own framework."""

from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, VISUALIZERS
from mmengine.structures import BaseDataElement, PixelData
from mmengine.visualization import Visualizer

from ..values import check_integer, check_number
from .regions import labelled


def build_visualizer(cfg: Config, dataset_meta: dict | None = None) -> Visualizer:
    """The config's visualizer, without the backends that would save its pictures.

    Args:
        cfg: config with a ``visualizer`` and a ``test_dataloader``.
        dataset_meta: names and colours of the classes, as a checkpoint holds them in ``meta``. Defaults to what the
            config and the class of its test set say.
    """
    visualizer = VISUALIZERS.build({'name': 'predictions', **cfg.visualizer, 'vis_backends': None})
    dataset = cfg.test_dataloader.dataset
    with DATASETS.switch_scope_and_registry(None) as registry:
        known = registry.get(dataset.type).METAINFO
    visualizer.dataset_meta = dataset_meta or {**known, **dataset.get('metainfo', {})}
    return visualizer


def draw_prediction(
    visualizer: Visualizer, image: np.ndarray, sample: BaseDataElement, score_thr: float = 0.3, enlarge: int = 1
) -> np.ndarray:
    """Draw the instances or the segmentation of a sample over its image.

    Args:
        visualizer: mmdet's or mmseg's.
        image: (H, W, 3) uint8, RGB, as it was before the test pipeline.
        sample: what the model returned for it.
        score_thr: instances with a lower score are left out.
        enlarge: how many times as large to draw a small image, which lines and words would hide otherwise.

    Returns:
        (enlarge * H, enlarge * W, 3) uint8, RGB.
    """
    check_number('score_thr', score_thr, '[0, 1]', 'the least score of what is drawn')
    check_integer('enlarge', enlarge, 1, 100, 'how many times as large to draw')
    if enlarge > 1:
        image, sample = image.repeat(enlarge, 0).repeat(enlarge, 1), _enlarged(sample, enlarge)
    options = dict(pred_score_thr=score_thr) if 'pred_instances' in sample else {}
    visualizer.add_datasample('prediction', image, sample, draw_gt=False, **options)
    return visualizer.get_image()


def prediction_panel(
    visualizer: Visualizer,
    path: str | Path,
    sample: BaseDataElement,
    side: int,
    score_thr: float = 0.3,
    title: str = 'prediction',
) -> np.ndarray:
    """A picture of what was predicted, ``side`` pixels high below its title; a class is told in words.

    Args:
        visualizer: of the model's framework.
        path: of the image.
        sample: what the model returned for it.
        side: height of the picture.
        score_thr: instances with a lower score are left out.
        title: over instances and segmentations.
    """
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    if 'pred_label' in sample:
        return labelled(image, describe_label(sample, visualizer.dataset_meta), side)
    return labelled(draw_prediction(visualizer, image, sample, score_thr, max(1, side // image.shape[0])), title, side)


def _enlarged(sample: BaseDataElement, times: int) -> BaseDataElement:
    """A copy of a sample whose boxes and maps are ``times`` as large."""
    sample = sample.clone()

    def repeat(maps):
        return maps.repeat_interleave(times, -2).repeat_interleave(times, -1)

    if 'pred_instances' in sample:
        instances = sample.pred_instances = sample.pred_instances.clone()
        instances.bboxes = instances.bboxes * times
        if 'masks' in instances:
            instances.masks = repeat(instances.masks)
    if 'pred_sem_seg' in sample:
        sample.pred_sem_seg = PixelData(data=repeat(sample.pred_sem_seg.data))
    return sample


def describe_label(sample: BaseDataElement, dataset_meta: dict) -> str:
    """The predicted class of a classified sample with its score, e.g. ``'cat 0.98'``."""
    label = sample.pred_label.item()
    name = dataset_meta['classes'][label] if dataset_meta.get('classes') else label
    return f'{name} {sample.pred_score[label].item():.2f}'
