import subprocess
import sys

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

HEIGHT, WIDTH = 6, 10
BOXES = [[0, 0, 4, 3], [1, 0, 4, 3], [5, 2, 10, 6], [0, 0, 4, 2]]  # x1, y1, x2, y2
# How a detector sees pixel (row, column) and corner (x, y) of an image that was flipped before.
PIXEL = dict(
    horizontal=lambda row, column: (row, WIDTH - 1 - column),
    vertical=lambda row, column: (HEIGHT - 1 - row, column),
    diagonal=lambda row, column: (HEIGHT - 1 - row, WIDTH - 1 - column),
)
CORNER = dict(
    horizontal=lambda x, y: (WIDTH - x, y),
    vertical=lambda x, y: (x, HEIGHT - y),
    diagonal=lambda x, y: (WIDTH - x, HEIGHT - y),
)


@pytest.fixture
def make_model(mmcv_operators):
    """The model for a config of its NMS."""
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    module = nn.Module()
    module.test_step = None

    def make(max_per_img=10, **nms):
        tta_cfg = ConfigDict(nms=dict(dict(type='nms', iou_threshold=0.5), **nms), max_per_img=max_per_img)
        return MODELS.build(dict(type='mmdyn.MaskTTAModel', module=module, tta_cfg=tta_cfg))

    return make


def mask_in(box, generator):
    """A random mask in a box, which no flip of it leaves as it is."""
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = torch.rand(y2 - y1, x2 - x1, generator=generator) < 0.5
    mask[y1, x1], mask[y1, x2 - 1], mask[y2 - 1, x1], mask[y2 - 1, x2 - 1] = True, False, False, False
    return mask


def view(boxes, scores, labels, masks=None, direction=None):
    """A detector's prediction on an image that was flipped in that direction, of objects seen without the flip."""
    from mmdet.structures import DetDataSample

    boxes = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)
    if direction:
        corners = [[CORNER[direction](x, y) for x, y in zip(box[0::2], box[1::2])] for box in boxes.tolist()]
        boxes = boxes.new_tensor([[*map(min, zip(*ends)), *map(max, zip(*ends))] for ends in corners]).reshape(-1, 4)
    instances = InstanceData(bboxes=boxes, scores=torch.tensor(scores), labels=torch.tensor(labels, dtype=torch.long))
    if masks is not None:
        seen = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
        for i, mask in enumerate(masks):
            for row in range(HEIGHT):
                for column in range(WIDTH):
                    seen[(i, *(PIXEL[direction](row, column) if direction else (row, column)))] = mask[row, column]
        instances.masks = seen
    # The boxes and masks are at the scale of the original, whatever the size of the view.
    meta = dict(
        ori_shape=(HEIGHT, WIDTH),
        img_shape=(3 * HEIGHT, 3 * WIDTH),
        scale_factor=(3.0, 3.0),
        img_id=7,
        flip=bool(direction),
        flip_direction=direction,
    )
    return DetDataSample(metainfo=meta, pred_instances=instances)


@pytest.mark.parametrize('direction', PIXEL)
def test_keeps_the_masks_of_the_boxes_that_nms_keeps(make_model, direction):
    generator = torch.Generator().manual_seed(1)
    # The second box overlaps the first with IoU 0.75; the last one does too with 0.67, but is of another class.
    plain = [mask_in(box, generator) for box in BOXES[:2]]
    flipped = [mask_in(box, generator) for box in BOXES[1:]]
    views = [
        view(BOXES[:2], [0.9, 0.3], [1, 1], plain),
        view(BOXES[1:], [0.8, 0.95, 0.2], [1, 1, 2], flipped, direction),
    ]
    for most in (10, 2):
        (merged,) = make_model(most).merge_preds([[sample.clone() for sample in views]])
        instances = merged.pred_instances
        assert merged.img_id == 7
        assert instances.bboxes.tolist() == [BOXES[2], BOXES[0], BOXES[3]][:most]
        assert torch.equal(instances.scores, torch.tensor([0.95, 0.9, 0.2])[:most])
        assert instances.labels.tolist() == [1, 1, 2][:most]
        assert torch.equal(instances.masks, torch.stack([flipped[1], plain[0], flipped[2]])[:most])


def test_soft_nms_lowers_scores_and_masks_follow_their_order(make_model):
    masks = [mask_in(box, torch.Generator().manual_seed(1)) for box in BOXES[:3]]
    views = [view(BOXES[:1], [0.9], [0], masks[:1]), view(BOXES[1:3], [0.8, 0.5], [0, 0], masks[1:], 'horizontal')]
    (merged,) = make_model(type='soft_nms', iou_threshold=0.3, min_score=0.01).merge_preds([views])
    # Of the second box, IoU 0.75 with the first leaves a quarter of the score.
    assert torch.allclose(merged.pred_instances.scores, torch.tensor([0.9, 0.5, 0.2]))
    assert torch.equal(merged.pred_instances.masks, torch.stack([masks[0], masks[2], masks[1]]))


@pytest.mark.parametrize('masks', [True, False])
def test_views_may_detect_nothing(make_model, masks):
    nothing = [], [], [], [] if masks else None
    for box in ([], [BOXES[0]]):
        found = [mask_in(box, torch.Generator().manual_seed(1)) for box in box] if masks else None
        views = [view(*nothing), view(box, [0.5] * len(box), [0] * len(box), found, 'horizontal')]
        (merged,) = make_model().merge_preds([views])
        assert merged.pred_instances.bboxes.tolist() == box
        assert ('masks' in merged.pred_instances) == masks
        if masks:
            assert torch.equal(
                merged.pred_instances.masks,
                torch.stack(found) if box else torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool),
            )


def test_without_masks_it_is_mmdets(make_model):
    from mmdet.models import DetTTAModel

    model = make_model()
    assert isinstance(model, DetTTAModel)
    theirs = DetTTAModel(module=model.module, tta_cfg=model.tta_cfg)
    samples = [
        [view(BOXES, [0.9, 0.3, 0.5, 0.7], [0, 0, 1, 1]), view(BOXES[1:], [0.8, 0.6, 0.2], [0, 1, 0], None, way)]
        for way in PIXEL
    ]
    for ours, mmdets in zip(
        model.merge_preds([[sample.clone() for sample in views] for views in samples]),
        theirs.merge_preds(samples),
        strict=True,
    ):
        assert set(ours.pred_instances.keys()) == set(mmdets.pred_instances.keys())
        for name, values in ours.pred_instances.items():
            assert torch.equal(values, mmdets.pred_instances[name]), name


def run(code):
    subprocess.run([sys.executable, '-c', code], check=True)


def test_mmdet_is_imported_only_when_it_is_built():
    run("""
import sys, mmdyn
from mmengine.registry import MODELS, init_default_scope
init_default_scope('mmdyn')
MODELS.build(dict(type='mmdyn.PVT', arch='tiny', img_size=32, out_type='cls_token'))
assert MODELS.get('mmdyn.MaskTTAModel')
assert not [name for name in sys.modules if name.split('.')[0] == 'mmdet']
""")


def test_without_mmdet_classifiers_build_and_it_says_what_to_install():
    pytest.importorskip('mmpretrain')
    run("""
import sys
sys.modules['mmdet'] = None
from mmengine.registry import MODELS, init_default_scope
init_default_scope('mmpretrain')
backbone = dict(type='mmdyn.PVT', arch='tiny', img_size=32, out_type='cls_token')
MODELS.build(dict(type='ImageClassifier', backbone=backbone))
try:
    MODELS.build(dict(type='mmdyn.MaskTTAModel', module=None))
except ImportError as error:
    assert 'mmdyn.MaskTTAModel needs mmdet' in str(error) and 'pip install "mmdyn[det]"' in str(error)
else:
    raise AssertionError('built without mmdet')
""")
