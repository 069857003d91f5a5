import copy
import json
import math

import pytest
from mmengine.registry import DATASETS, init_default_scope

import mmdyn  # noqa: F401

CONTENT = dict(
    images=[dict(id=5, file_name='a.jpg', height=20, width=30), dict(id=6, file_name='b.jpg', height=20, width=30)],
    annotations=[
        dict(
            id=1,
            image_id=5,
            category_id=18,
            bbox=[1, 2, 10, 10],
            area=100,
            iscrowd=0,
            segmentation=[[1, 2, 11, 2, 11, 12, 1, 12]],
        ),
        dict(
            id=2,
            image_id=6,
            category_id=17,
            bbox=[1.5, 2, 10, 10],
            area=100.0,
            iscrowd=1,
            segmentation=dict(size=[20, 30], counts=[100, 500]),
        ),
    ],
    categories=[dict(id=17, name='cat'), dict(id=18, name='dog')],
)
WITH_MASK = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
DELETE = object()


@pytest.fixture
def build(tmp_path):
    init_default_scope('mmdet')

    def run(content, **options):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / 'coco.json').write_text(text)
        options = {'metainfo': dict(classes=('cat', 'dog')), 'pipeline': WITH_MASK, **options}
        return DATASETS.build(
            dict(
                type='mmdyn.CocoDataset',
                ann_file=str(tmp_path / 'coco.json'),
                data_prefix=dict(img=str(tmp_path)),
                **options,
            )
        )

    return run


def changed(key, **fields):
    """The content with other fields in the last entry of a list."""
    content = copy.deepcopy(CONTENT)
    for name, value in fields.items():
        content[key][-1].pop(name) if value is DELETE else content[key][-1].update({name: value})
    return content


def without(key):
    return {name: value for name, value in CONTENT.items() if name != key}


def test_it_reads_as_mmdet_does(build, tmp_path):
    ours = build(CONTENT)
    theirs = DATASETS.build(
        dict(
            type='CocoDataset',
            ann_file=ours.ann_file,
            data_prefix=dict(img=str(tmp_path)),
            metainfo=dict(classes=('cat', 'dog')),
        )
    )
    assert [ours.get_data_info(i) for i in range(2)] == [theirs.get_data_info(i) for i in range(2)]
    assert ours.get_data_info(0)['instances'][0]['bbox'] == [1, 2, 11, 12]


@pytest.mark.parametrize(
    'content, said',
    [
        ('{"images": [', r'Expecting value: line 1 column 13 \(char 12\)'),
        ('', 'Expecting value: line 1'),
        ([1, 2], 'it holds a list, but needs a dict of images, annotations and categories'),
        (without('images'), 'it has no images, of which it needs a list'),
        ({**CONTENT, 'images': []}, 'it has no images'),
        (without('categories'), 'it has no categories'),
        (without('annotations'), 'it has no annotations'),
        ({**CONTENT, 'images': [7]}, r'images\[0\] has no id'),
        ({**CONTENT, 'images': CONTENT['images'] * 2}, 'images with the id 5, 6 are there more than once'),
        (changed('annotations', id=1), 'annotations with the id 1 are there more than once'),
        (changed('images', file_name=DELETE), 'the image of id 6 has no file_name'),
        (changed('images', height=DELETE, width=DELETE), 'the image of id 6 has no height and no width'),
        (changed('images', height='tall'), "the image of id 6 has height='tall', but needs a number of pixels"),
    ],
)
def test_files_that_are_no_coco(build, content, said):
    with pytest.raises(ValueError, match=f'mmdyn.CocoDataset: .*coco.json is no COCO file, because {said}'):
        build(content)


@pytest.mark.parametrize(
    'fields, said',
    [
        (dict(bbox=DELETE), 'has no bbox'),
        (dict(image_id=DELETE, area=DELETE), 'has no image_id and no area'),
        (dict(bbox=[1, 2, 3]), r'has bbox=\[1, 2, 3\], but needs \[x, y, width, height\]'),
        (dict(bbox=['a', 2, 3, 4]), 'has bbox='),
        (dict(bbox=[math.nan, 2, 3, 4]), 'has bbox='),
        (dict(bbox=[9, 9, -3, 4]), 'has bbox='),
        (dict(bbox=None), 'has bbox=None'),
        (dict(area='large'), "has area='large', but needs a number of pixels"),
        (dict(area=math.inf), 'has area=inf'),
        (dict(area=-1), 'has area=-1'),
        (dict(area=True), 'has area=True'),
        (dict(image_id=99), 'has image_id=99, which none of the images has'),
        (dict(category_id=99), 'has category_id=99, which none of the categories has'),
        (dict(segmentation=DELETE), 'has no segmentation, which with_mask=True needs'),
        (dict(segmentation=[]), 'has no segmentation, which with_mask=True needs'),
        (dict(segmentation='polygon'), 'which must be a list of polygons, or a dict of size and counts'),
        (dict(segmentation=[1, 2, 3, 4, 5, 6]), 'has a segmentation, which is a list, but not of polygons'),
        (dict(segmentation=[['a'] * 6]), 'has a segmentation, which is a list, but not of polygons'),
        (dict(segmentation=[[1, 2, 3, 4]]), 'has a segmentation, which has polygons of 4 numbers'),
        (dict(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), 'has a segmentation, which has polygons of 7 numbers'),
        (dict(segmentation=dict(counts=[600])), 'has a segmentation, which must be a list of polygons'),
        (dict(segmentation=dict(size=[20], counts=[600])), r'has a segmentation, which has size=\[20\]'),
        (dict(segmentation=dict(size=[20, 30], counts=[3, 4])), 'has counts that do not sum up to 20 x 30 pixels'),
        (dict(segmentation=dict(size=[20, 30], counts=7)), 'has counts=7, but needs a list of numbers or a string'),
    ],
)
def test_annotations_that_are_wrong(build, fields, said):
    for options in ({}, dict(test_mode=True)):
        with pytest.raises(ValueError, match=f'coco.json is no COCO file, because the annotation of id 2 .*{said}'):
            build(changed('annotations', **fields), **options)


@pytest.mark.parametrize(
    'fields',
    [
        dict(area=0),
        dict(bbox=[3, 3, 0, 4]),
        dict(segmentation=[[1, 2], [1, 2, 3, 4, 5, 6]]),
        dict(bbox=DELETE, ignore=1),
        dict(segmentation=dict(size=[20, 30], counts='compressed')),
    ],
)
def test_what_mmdet_leaves_out_is_no_mistake(build, fields):
    assert len(build(changed('annotations', **fields))) == 2


def test_boxes_need_no_segmentation(build):
    assert len(build(changed('annotations', segmentation=DELETE), pipeline=[])) == 2


def test_test_sets_may_lack_annotations(build):
    assert len(build(without('annotations'), test_mode=True)) == 2


@pytest.mark.parametrize(
    'classes, said',
    [
        (
            ('a', 'b'),
            "metainfo has the classes 'a', 'b', of which .*coco.json has none: its categories are 'cat', 'dog'",
        ),
        (
            ('cat', 'dgo'),
            "coco.json has 1 annotations of the category 'dog', which metainfo does not name; it names 'dgo'",
        ),
    ],
)
def test_other_classes_than_the_files(build, classes, said):
    with pytest.raises(ValueError, match=said):
        build(CONTENT, metainfo=dict(classes=classes))


def test_a_part_of_the_classes(build, monkeypatch):
    said = []
    monkeypatch.setattr('mmdyn.datasets.detection.print_log', lambda message, *options, **more: said.append(message))
    data = build(CONTENT, metainfo=dict(classes=('dog',)))
    assert [len(data.get_data_info(i)['instances']) for i in range(2)] == [1, 0]
    assert len(said) == 1 and "coco.json are left out, because metainfo does not name their categories 'cat'" in said[0]


def test_a_filter_that_leaves_nothing(build):
    with pytest.raises(
        ValueError,
        match=r'has 2 images, of which filter_cfg=\{.*\} leaves none: of all images, 2 '
        'have a side of less than 32 pixels, and 0 have no object',
    ):
        build(CONTENT, filter_cfg=dict(filter_empty_gt=True, min_size=32))
