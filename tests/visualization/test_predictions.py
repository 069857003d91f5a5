import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData

from mmdyn.visualization import build_visualizer, describe_label, draw_prediction

IMAGE = np.full((40, 60, 3), 100, np.uint8)


def make_visualizer(scope, visualizer, dataset):
    init_default_scope(scope)
    return build_visualizer(Config(dict(visualizer=dict(type=visualizer), test_dataloader=dict(dataset=dataset))))


@pytest.mark.parametrize('enlarge', [1, 2])
def test_instances_above_the_threshold(enlarge):
    from mmdet.structures import DetDataSample

    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 5:35, 5:25] = masks[1, 5:35, 35:55] = True
    sample = DetDataSample(
        pred_instances=InstanceData(
            bboxes=torch.tensor([[5.0, 5.0, 25.0, 35.0], [35.0, 5.0, 55.0, 35.0]]),
            labels=torch.tensor([0, 1]),
            scores=torch.tensor([0.9, 0.2]),
            masks=masks,
        )
    )
    visualizer = make_visualizer('mmdet', 'DetLocalVisualizer', dict(type='CocoDataset'))
    drawn = draw_prediction(visualizer, IMAGE, sample, score_thr=0.5, enlarge=enlarge)
    assert drawn.shape == (40 * enlarge, 60 * enlarge, 3)
    changed = (drawn != 100).any(-1)[::enlarge, ::enlarge]
    assert changed[30, 10:20].all() and not changed[30, 40:50].any()
    assert sample.pred_instances.bboxes.max() == 55


@pytest.mark.parametrize('enlarge', [1, 3])
def test_segmentation_in_the_colours_of_the_data_set(enlarge):
    from mmseg.structures import SegDataSample

    labels = torch.zeros(1, 40, 60, dtype=torch.long)
    labels[:, :, 30:] = 1
    palette = [[255, 0, 0], [0, 0, 255]]
    visualizer = make_visualizer(
        'mmseg', 'SegLocalVisualizer', dict(type='BaseSegDataset', metainfo=dict(classes=('a', 'b'), palette=palette))
    )
    drawn = draw_prediction(visualizer, IMAGE, SegDataSample(pred_sem_seg=PixelData(data=labels)), enlarge=enlarge)
    assert drawn.shape == (40 * enlarge, 60 * enlarge, 3)
    assert drawn[0, 0].argmax() == 0 and drawn[0, -1].argmax() == 2


def test_label_in_words():
    from mmpretrain.structures import DataSample

    sample = DataSample().set_pred_label(1).set_pred_score(torch.tensor([0.04, 0.96]))
    assert describe_label(sample, dict(classes=('dog', 'cat'))) == 'cat 0.96'
    assert describe_label(sample, {}) == '1 0.96'
