"""The backbones inside detectors and segmentors: mixed sizes, images without objects, windows."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import nn

import mmdyn

CONFIGS = Path(mmdyn.__file__).parents[1] / 'configs/demo'
SIZES = [(96, 64), (60, 128)]  # the batch is padded to 96 x 128


@pytest.fixture
def make_model(encoders):
    """A demo model with PVT+DGE or DPVT+DGE, whose routers choose by the image."""

    def make(config, package, backbone, **test_cfg):
        pytest.importorskip(package)
        cfg = Config.fromfile(CONFIGS / config)
        init_default_scope(cfg.default_scope)
        if backbone == 'DPVT':
            arch = cfg.model.backbone.arch
            del arch.sr_ratios
            arch.num_points = (4,) * len(arch.embed_dims)
            cfg.model.backbone.type = 'mmdyn.DPVT'
        cfg.model.test_cfg.update(test_cfg)
        model = MODELS.build(cfg.model)
        for encoder in encoders(model):
            nn.init.normal_(encoder.router.weight, std=10.0)
        return model

    return make


@pytest.fixture
def make_detector(make_model, mmcv_operators):
    return lambda backbone: make_model('mask-rcnn_pvt-mini-dge_digits.py', 'mmdet', backbone)


@pytest.fixture
def make_segmentor(make_model):
    return lambda backbone, **test_cfg: make_model('fpn_pvt-mini-dge_digits.py', 'mmseg', backbone, **test_cfg)


def random_image(size):
    return torch.randint(256, (3, *size), dtype=torch.uint8)


def detection_batch(num_objects):
    """Images of SIZES with so many boxes each."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    samples = []
    for size, number in zip(SIZES, num_objects, strict=True):
        masks = torch.zeros(number, *size, dtype=torch.uint8)
        masks[:, 10:40, 8:28] = 1
        instances = InstanceData(
            bboxes=torch.tensor([[8.0, 10.0, 28.0, 40.0]] * number).reshape(-1, 4),
            labels=torch.zeros(number, dtype=torch.long),
            masks=BitmapMasks(masks.numpy(), *size),
        )
        samples.append(
            DetDataSample(
                gt_instances=instances,
                ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)),
                metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)),
            )
        )
    return dict(inputs=[random_image(size) for size in SIZES], data_samples=samples)


def assert_trains(model, batch):
    """Finite losses, and gradients of all parameters that the losses see."""
    losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    loss, values = model.parse_losses(losses)
    assert all(torch.isfinite(value) for value in values.values())
    loss.backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert any(parameter.grad.any() for name, parameter in model.backbone.named_parameters() if 'router' in name)
    return values


BACKBONES = pytest.mark.parametrize('backbone', ['PVT', 'DPVT'])


@BACKBONES
@pytest.mark.parametrize('num_objects', [(1, 2), (0, 2), (0, 0)])
def test_detector_trains_with_and_without_objects(make_detector, backbone, num_objects):
    values = assert_trains(make_detector(backbone), detection_batch(num_objects))
    assert (values['loss_mask'] > 0) == any(num_objects)


@BACKBONES
def test_padded_images_are_independent(make_detector, backbone):
    model, batch = make_detector(backbone).eval(), detection_batch((0, 0))
    data = model.data_preprocessor(batch)
    assert data['inputs'].shape == (2, 3, 96, 128)
    with torch.no_grad():
        together = model.extract_feat(data['inputs'])
        ratios = model.backbone.cost.query_ratio
        for i, (image, (height, width)) in enumerate(zip(batch['inputs'], SIZES)):
            padded = torch.zeros(1, 3, 96, 128)
            padded[0, :, :height, :width] = (image.flip(0) - 127.5) / 64  # from BGR to RGB
            for ours, expected in zip(together, model.extract_feat(padded), strict=True):
                torch.testing.assert_close(ours[i], expected[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ratios[i : i + 1], model.backbone.cost.query_ratio)
        predictions = model(**data, mode='predict')
    for prediction, (height, width) in zip(predictions, SIZES, strict=True):
        boxes, masks = prediction.pred_instances.bboxes, prediction.pred_instances.masks
        assert len(boxes) and masks.shape == (len(boxes), height, width)
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()


@BACKBONES
def test_segmentor_trains_also_where_all_is_ignored(make_segmentor, backbone):
    from mmseg.structures import SegDataSample

    labels = [torch.randint(11, (1, 128, 128)), torch.full((1, 128, 128), 255)]
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=dict(img_shape=(128, 128))) for label in labels]
    batch = dict(inputs=[random_image((128, 128)) for _ in labels], data_samples=samples)
    assert_trains(make_segmentor(backbone), batch)


@BACKBONES
def test_segmentor_slides(make_segmentor, backbone):
    """The mean of the logits of the windows that see a pixel; the last ones end with the image."""
    model = make_segmentor(backbone, mode='slide', crop_size=(64, 64), stride=(48, 48)).eval()
    image = torch.randn(1, 3, 96, 128)
    meta = dict(img_shape=(96, 128), ori_shape=(96, 128), pad_shape=(96, 128), padding_size=[0] * 4)
    total, count = torch.zeros(11, 96, 128), torch.zeros(96, 128)
    with torch.no_grad():
        logits = model.inference(image, [meta])[0]
        for top in (0, 32):
            for left in (0, 48, 64):
                window = image[..., top : top + 64, left : left + 64]
                total[:, top : top + 64, left : left + 64] += model.encode_decode(window, [meta])[0]
                count[top : top + 64, left : left + 64] += 1
    torch.testing.assert_close(logits, total / count, rtol=1e-4, atol=1e-4)
