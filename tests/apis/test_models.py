"""The model index in Python: names, configs and models, and that the frameworks take them from any folder."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmdet.apis import DetInferencer, inference_detector
from mmengine.config import Config
from mmengine.runner import save_checkpoint
from mmpretrain import FeatureExtractor, ImageClassificationInferencer
from mmseg.apis import MMSegInferencer, inference_model

import mmdyn

ROOT = Path(mmdyn.__file__).parents[1]
DEMO = ROOT / 'configs/demo'
CLASSIFIER = 'pvt-tiny-dge_8xb16_in1k-256px'
DETECTOR = 'mask-rcnn_pvt-t-dge_fpn_1x_coco'
SEGMENTOR = 'fpn_pvt-t-dge_8xb4-80k_ade20k-512x512'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing may depend on where Python was started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (64, 96, 3), np.uint8) for _ in range(2)]


def test_names_are_those_of_the_metafiles():
    metafiles = [yaml.safe_load(path.read_text()) for path in (ROOT / 'configs').glob('*/metafile.yml')]
    names = [model['Name'] for metafile in metafiles for model in metafile['Models']]
    assert mmdyn.list_models() == sorted(names) and len(names) > 80


def test_pattern():
    found = mmdyn.list_models('*retinanet*')
    assert found == ['retinanet_pvt-s-dge_fpn_1x_coco', 'retinanet_pvt-s_fpn_1x_coco']
    assert mmdyn.list_models('resnet*') == []


def test_config_by_name_path_and_config():
    by_name = mmdyn.get_config(CLASSIFIER)
    path = ROOT / f'configs/dge/{CLASSIFIER}.py'
    for cfg in (mmdyn.get_config(path), mmdyn.get_config(str(path)), Config.fromfile(path)):
        assert cfg.to_dict() == by_name.to_dict()
    copy = mmdyn.get_config(by_name, budget=0.3)
    assert copy.model.backbone.dge.test_budget == 0.3 and 'test_budget' not in by_name.model.backbone.dge


def test_budget_of_a_whole_model():
    """Of mmdyn.WithDGE around a model that has no backbone."""
    whole = Config(
        dict(model=dict(type='mmdyn.WithDGE', backbone=dict(type='TimmClassifier'), dge=dict(router='random')))
    )
    assert mmdyn.get_config(whole, budget=0.3).model.dge == dict(router='random', test_budget=0.3)


@pytest.mark.parametrize(
    'options, message',
    [
        (
            dict(name='pvt-small-dge_in1k'),
            "no model 'pvt-small-dge_in1k': did you mean 'pvt-small-dge_8xb16_in1k-256px'",
        ),
        (dict(name='resnet'), r"There is no model 'resnet': Choose one of mmdyn.list_models\(\), or give the path"),
        (dict(name='nowhere.py'), 'There is no config nowhere.py'),
        (dict(name='pvt-tiny_8xb16_in1k-256px', budget=0.4), r'budget=0.4: the mmdyn.PVT of this config has no DGE'),
        (dict(name=CLASSIFIER, budget=0.01), r'budget=0.01 cannot be reached'),
        (dict(name=CLASSIFIER, checkpoint='nowhere.pth'), 'There is no checkpoint nowhere.pth'),
        (dict(name=Config(dict(model={}, default_scope='mmocr'))), "default_scope='mmocr' of this config: models are"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mmdyn.get_model(**options)


def test_classifier_in_plain_pytorch():
    model = mmdyn.get_model(CLASSIFIER, budget=0.4, device='cpu')
    images = torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        logits, (features,) = model(images), model.backbone(images)
        expected = features @ model.head.fc.weight.T + model.head.fc.bias
    assert not model.training and logits.shape == (2, 1000) and features.shape == (2, 512)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert (model.backbone.cost.query_ratio <= 0.4).all()
    model.backbone.set_budget(None)
    with torch.no_grad():
        model(images)
    assert (model.backbone.cost.query_ratio > 0.4).all()


def test_two_stages_in_plain_pytorch():
    coarse, fine = mmdyn.get_model(DEMO / 'cf-vit-mini_digits.py', device='cpu')(torch.randn(2, 3, 64, 64))
    assert coarse.shape == fine.shape == (2, 10)


@pytest.mark.parametrize('kind', ['.pth', '.safetensors'])
def test_checkpoints(kind, tmp_path):
    trained = mmdyn.get_model(DEMO / 'pvt-mini-dge_digits.py', device='cpu')
    path = tmp_path / f'trained{kind}'
    if kind == '.pth':
        save_checkpoint(dict(state_dict=trained.state_dict(), meta={}), str(path))
    else:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in trained.state_dict().items()}, path)
    model = mmdyn.get_model(DEMO / 'pvt-mini-dge_digits.py', checkpoint=path, device='cpu')
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), trained(images))


def test_mmpretrain_knows_the_names(images):
    classify = ImageClassificationInferencer(CLASSIFIER, pretrained=False, device='cpu')
    assert type(classify.model.backbone) is mmdyn.models.PVT and len(classify(images, batch_size=2)) == 2


def test_classifiers_in_mmpretrain(images):
    model = mmdyn.get_model(DEMO / 'pvt-mini-dge_digits.py', device='cpu')
    results = ImageClassificationInferencer(model)(images, batch_size=2)
    assert [len(result['pred_scores']) for result in results] == [10, 10]
    assert [out.shape[-1] for out in FeatureExtractor(model)(images[0])[0]] == [192]


def test_detectors_in_mmdet(images):
    cfg = mmdyn.get_config(DETECTOR, budget=0.2)
    cfg.model.test_cfg.rpn.max_per_img = 20
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
    cfg.test_pipeline[1].scale = cfg.test_dataloader.dataset.pipeline[1].scale = (96, 64)
    detect = DetInferencer(cfg, device='cpu', show_progress=False)
    results = detect(images, batch_size=2)['predictions']
    assert len(results) == 2 and set(results[0]) == {'bboxes', 'labels', 'masks', 'scores'}
    assert (detect.model.backbone.cost.query_ratio <= 0.2).all()
    model = mmdyn.get_model(cfg, device='cpu')
    one, other = inference_detector(model, images)
    assert len(one.pred_instances) > 0 and one.img_shape == other.img_shape == (64, 96)


def test_segmentors_in_mmseg(images):
    cfg = mmdyn.get_config(SEGMENTOR)
    cfg.test_pipeline[1].scale = cfg.test_dataloader.dataset.pipeline[1].scale = (96, 64)
    segment = MMSegInferencer(cfg, device='cpu', dataset_name='ade20k')
    assert np.shape(segment(images, batch_size=2)['predictions']) == (2, 64, 96)
    results = inference_model(mmdyn.get_model(cfg, device='cpu'), images)
    assert [result.pred_sem_seg.data.shape for result in results] == [(1, 64, 96)] * 2


def test_inferencers_take_paths_of_configs_and_folders(images, tmp_path):
    for number, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f'{number}.png'), image)
    folder = str(tmp_path)
    classify = ImageClassificationInferencer(str(DEMO / 'pvt-mini-dge_digits.py'), pretrained=False, device='cpu')
    detect = DetInferencer(str(DEMO / 'mask-rcnn_pvt-mini-dge_digits.py'), device='cpu', show_progress=False)
    segment = MMSegInferencer(str(DEMO / 'fpn_pvt-mini-dge_digits.py'), device='cpu', dataset_name='ade20k')
    assert len(classify(folder)) == 2
    assert len(detect(folder, no_save_vis=True)['predictions']) == 2
    assert np.shape(segment(folder)['predictions']) == (2, 64, 96)


# In children, which inherit the packages below.
OTHER_STARTS = """
import os, sys
import mmcv.transforms, mmengine.runner
assert not {'mmdyn', 'mmpretrain'} & set(sys.modules)
if not os.fork():
    import mmdyn
    assert 'mmpretrain' not in sys.modules
    mmdyn.apis.tell_mmpretrain()  # once more
    import mmpretrain
    print('mmdyn first:', len(mmpretrain.list_models(sys.argv[1])), flush=True)
    os._exit(0)
os.wait()
sys.modules['mmpretrain'] = None
import mmdyn
try:
    mmdyn.get_model(mmengine.Config(dict(model={})))  # which inherits nothing of mmpretrain's
except ImportError as error:
    print('without mmpretrain:', error)
"""


def test_other_starts():
    """mmpretrain may come after mmdyn, or not at all."""
    ran = subprocess.run([sys.executable, '-c', OTHER_STARTS, CLASSIFIER], capture_output=True, text=True)
    first, other = ran.stdout.splitlines()
    assert first == 'mmdyn first: 1' and other.startswith('without mmpretrain: mmpretrain builds the model'), ran.stderr
