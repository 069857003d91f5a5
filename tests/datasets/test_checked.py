import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, METRICS, init_default_scope

from mmdyn.datasets.checked import CheckedDataset

COCO = dict(
    type='mmdyn.CocoDataset',
    data_root='data/coco/',
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
)
ADE = dict(
    type='mmdyn.ADE20KDataset',
    data_root='data/ade',
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
)
FOLDERS = dict(type='mmdyn.CustomDataset', data_root='data/imagenet', data_prefix='train')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, which holds the data sets with two images each."""
    monkeypatch.chdir(tmp_path)
    for name in (
        'coco/train2017',
        'coco/annotations',
        'ade/images/training',
        'ade/annotations/training',
        'imagenet/train/0',
        'imagenet/train/1',
    ):
        (tmp_path / 'data' / name).mkdir(parents=True)
    image = np.zeros((20, 30, 3), np.uint8)
    for i in range(2):
        cv2.imwrite(f'data/coco/train2017/{i}.jpg', image)
        cv2.imwrite(f'data/ade/images/training/{i}.jpg', image)
        cv2.imwrite(f'data/ade/annotations/training/{i}.png', image[..., 0])
        cv2.imwrite(f'data/imagenet/train/{i}/{i}.jpg', image)
    annotations = dict(
        images=[dict(id=i, file_name=f'{i}.jpg', height=20, width=30) for i in range(2)],
        annotations=[
            dict(
                id=1,
                image_id=0,
                category_id=18,
                bbox=[1, 2, 10, 10],
                area=100,
                iscrowd=0,
                segmentation=[[1, 2, 11, 2, 11, 12, 1, 12]],
            )
        ],
        categories=[dict(id=18, name='dog')],
    )
    (tmp_path / COCO['data_root'] / COCO['ann_file']).write_text(json.dumps(annotations))
    return tmp_path


@pytest.mark.parametrize(
    'cfg, package', [(COCO, 'mmdet'), (ADE, 'mmseg'), (FOLDERS, 'mmpretrain')], ids=['coco', 'ade', 'folders']
)
def test_they_are_the_frameworks_data_sets(cfg, package):
    init_default_scope(package)
    data, theirs = (DATASETS.build(dict(cfg, type=kind)) for kind in (cfg['type'], cfg['type'].split('.')[1]))
    assert isinstance(data, type(theirs)) and type(data) is not type(theirs)
    assert data.metainfo == theirs.metainfo and [data[i] for i in range(2)] == [theirs[i] for i in range(2)]


@pytest.mark.parametrize('cfg', [COCO, ADE], ids=['coco', 'ade'])
def test_the_usual_wrappers_hold_them(cfg):
    both = dict(type='ConcatDataset', datasets=[cfg, cfg])
    wrapped = DATASETS.build(dict(type='RepeatDataset', times=3, dataset=both))
    assert len(wrapped) == 12 and len(wrapped.metainfo['classes']) in (80, 150)


def test_coco_metric_takes_its_classes():
    init_default_scope('mmdet')
    metric = METRICS.build(dict(type='mmdet.CocoMetric', ann_file=COCO['data_root'] + COCO['ann_file'], metric='bbox'))
    metric.dataset_meta = DATASETS.build(dict(COCO, test_mode=True)).metainfo
    box = dict(bboxes=torch.tensor([[1.0, 2.0, 11.0, 12.0]]), scores=torch.ones(1), labels=torch.tensor([0]))
    # The annotations know of dogs only, which are the first of the categories that they and the 80 classes share.
    metric.process({}, [dict(img_id=0, ori_shape=(20, 30), pred_instances=box)])
    assert metric.evaluate(2)['coco/bbox_mAP'] == 1.0


@pytest.mark.parametrize(
    'cfg, missing, named',
    [
        (COCO, 'data/coco', ["ann_file='data/coco/annotations/instances_train2017.json'", "'data/coco/train2017/'"]),
        (COCO, 'data/coco/annotations', ["ann_file='data/coco/annotations/instances_train2017.json'"]),
        (COCO, 'data/coco/train2017', ["data_prefix['img']='data/coco/train2017/'"]),
        (ADE, 'data', ["data_prefix['img_path']='data/ade/images/training'", "data_prefix['seg_map_path']"]),
        (ADE, 'data/ade/annotations', ["data_prefix['seg_map_path']='data/ade/annotations/training'"]),
        (FOLDERS, 'data/imagenet/train', ["data_prefix['img_path']='data/imagenet/train'"]),
    ],
)
def test_names_what_is_missing_and_shows_the_layout(folder, cfg, missing, named):
    shutil.rmtree(folder / missing)
    with pytest.raises(ValueError, match=f'{cfg["type"]} found no') as error:
        DATASETS.build(cfg)
    message = str(error.value)
    layout = {
        'mmdyn.CocoDataset': '├── annotations/instances_train2017.json\n└── train2017/\n',
        'mmdyn.ADE20KDataset': '├── images/training/*.jpg\n└── annotations/training/*.png\n',
        'mmdyn.CustomDataset': '└── train/\n',
    }[cfg['type']]
    for part in [*named, str(folder), f'\n{cfg["data_root"]}\n{layout}', 'train_dataloader.dataset.data_root=DIR']:
        assert part in message
    assert ('val_evaluator.0.ann_file=DIR' in message) == (cfg is COCO)


def test_a_layout_of_ones_own_is_shown(folder):
    with pytest.raises(ValueError, match="found no ann_file='mine/labels.json'") as error:
        DATASETS.build(
            dict(type='mmdyn.CocoDataset', data_root='mine', ann_file='labels.json', data_prefix=dict(img='pictures'))
        )
    assert '\nmine\n├── labels.json\n└── pictures/\n' in str(error.value) and 'train2017' not in str(error.value)


def test_an_empty_folder_is_no_data_set(folder):
    for image in (folder / 'data/ade/images/training').iterdir():
        image.unlink()
    with pytest.raises(ValueError, match='found no images with .*images/training'):
        DATASETS.build(ADE)


@pytest.mark.parametrize(
    'options',
    [
        dict(ann_file='s3://bucket/instances.json', data_prefix=dict(img='s3://bucket/train2017'), backend_args=None),
        dict(
            ann_file='bucket/instances.json', data_prefix=dict(img='bucket/train'), backend_args=dict(backend='petrel')
        ),
        dict(ann_file='', data_prefix=dict(img=''), backend_args=None),
    ],
)
def test_only_local_paths_are_checked(options):

    class Remote:
        def load_data_list(self):
            return ['an image']

    class Checked(CheckedDataset, Remote):
        data_root = None

    data = Checked()
    vars(data).update(options)
    assert data.load_data_list() == ['an image']


@pytest.mark.parametrize('content', [None, b'', b'not an image'])
def test_names_the_image(folder, content):
    data = DATASETS.build(dict(COCO, pipeline=[dict(type='LoadImageFromFile')]))
    image = folder / 'data/coco/train2017/0.jpg'
    image.unlink()
    if content is not None:
        image.write_bytes(content)
    with pytest.raises(ValueError, match='Cannot load the image data/coco/train2017/0.jpg: it is missing, empty or'):
        data[0]


class Fail:
    def __init__(self, error):
        self.error = error

    def __call__(self, results):
        raise self.error


def test_names_the_image_that_a_transform_fails_on():
    pipeline = [dict(type='LoadImageFromFile'), Fail(IndexError('7 is too much'))]
    with pytest.raises(
        ValueError,
        match=r'mmdyn.CocoDataset: Fail fails on image 0 \(img_id 0\), '
        'data/coco/train2017/0.jpg: IndexError: 7 is too much',
    ):
        DATASETS.build(dict(COCO, pipeline=pipeline))[0]
    named = ValueError('data/coco/train2017/0.jpg is wrong')
    with pytest.raises(ValueError, match='^data/coco/train2017/0.jpg is wrong$'):
        DATASETS.build(dict(COCO, pipeline=[Fail(named)]))[0]


def test_a_transform_may_leave_an_image_out():
    data = DATASETS.build(dict(ADE, pipeline=[lambda image: None if image['img_path'].endswith('0.jpg') else image]))
    assert data[0]['img_path'].endswith('1.jpg')


def run(code):
    subprocess.run([sys.executable, '-c', code], check=True)


def test_importing_mmdyn_imports_no_framework():
    run("""
import sys, mmdyn
assert not {'mmdet', 'mmseg', 'mmpretrain', 'timm'} & set(sys.modules)
""")


@pytest.mark.parametrize('missing, cfg, others', [('mmdet', COCO, ADE), ('mmseg', ADE, COCO)])
def test_one_framework_is_enough(missing, cfg, others):
    run(f"""
import sys
sys.modules['{missing}'] = None
from mmengine.registry import DATASETS
assert len(DATASETS.build({others})) == 2
try:
    DATASETS.build({cfg})
except ImportError as error:
    assert '{cfg['type']} needs {missing}' in str(error) and 'pip install "mmdyn[{missing[2:]}]"' in str(error)
else:
    raise AssertionError('built without {missing}')
""")
