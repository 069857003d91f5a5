import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope

import mmdyn  # noqa: F401

LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]


@pytest.fixture
def build(tmp_path):
    """A data set of one image of 6 x 8 pixels whose mask is given, as an array or as bytes."""
    init_default_scope('mmseg')
    for folder in ('images', 'masks'):
        (tmp_path / folder).mkdir()
    cv2.imwrite(str(tmp_path / 'images/a.jpg'), np.zeros((6, 8, 3), np.uint8))

    def run(mask, kind='BaseSegDataset', pipeline=LOAD, **options):
        file = tmp_path / 'masks/a.png'
        file.write_bytes(mask if isinstance(mask, bytes) else cv2.imencode('.png', mask)[1].tobytes())
        options = {'metainfo': dict(classes=('a', 'b', 'c')), **options}
        return DATASETS.build(
            dict(
                type=f'mmdyn.{kind}',
                data_root=str(tmp_path),
                pipeline=pipeline,
                data_prefix=dict(img_path='images', seg_map_path='masks'),
                **options,
            )
        )

    return run


def mask(**places):
    labels = np.zeros((6, 8), np.uint8)
    for label, (row, column) in places.items():
        labels[row, column] = int(label[1:])
    return labels


def test_masks_that_fit(build):
    labels = mask(_2=(0, 0), _255=(5, 7))
    assert np.array_equal(build(labels)[0]['gt_seg_map'], labels)
    # With reduce_zero_label 0 is ignored, and the others count from 1.
    reduced = build(mask(_3=(0, 0)), reduce_zero_label=True)[0]['gt_seg_map']
    assert reduced[0, 0] == 2 and (reduced.flatten()[1:] == 255).all()


def test_masks_are_compared_with_the_original_image(build):
    resized = [LOAD[0], dict(type='Resize', scale=(4, 3)), LOAD[1]]
    assert build(mask(), pipeline=resized)[0]['gt_seg_map'].shape == (6, 8)


@pytest.mark.parametrize(
    'labels, options, said',
    [
        (
            mask(_3=(4, 5)),
            {},
            'has the label 3 in 1 pixels, first in row 4, column 5, but metainfo has 3 classes: allowed '
            'are 0 to 2, and 255 for what is ignored',
        ),
        (
            mask(_4=(4, 5)),
            dict(reduce_zero_label=True),
            r'has the label 3 \(after reduce_zero_label, which takes 1 off\)',
        ),
        (
            np.zeros((6, 8, 3), np.uint8),
            {},
            r'has the shape \(6, 8, 3\), but must be \(6, 8\), with the number of a class',
        ),
        (np.zeros((6, 7), np.uint8), {}, 'has 6 x 7 pixels, but the image 6 x 8'),
        (
            cv2.imencode('.png', np.random.default_rng(0).integers(0, 3, (6, 8), np.uint8))[1].tobytes()[:60],
            {},
            'is missing, empty or damaged',
        ),
        (b'no mask', {}, 'is missing, empty or damaged'),
    ],
)
def test_masks_that_do_not(build, labels, options, said, tmp_path):
    files = rf'the mask {tmp_path}/masks/a.png of the image {tmp_path}/images/a.jpg '
    with pytest.raises(ValueError, match=f'mmdyn.BaseSegDataset: {files}{said}'):
        build(labels, **options)[0]


def test_a_mask_that_is_not_there(build, tmp_path):
    data = build(mask())
    (tmp_path / 'masks/a.png').unlink()
    with pytest.raises(ValueError, match='the mask .*masks/a.png of the image .*a.jpg is missing'):
        data[0]


def test_classes_that_ade20k_does_not_have(build):
    with pytest.raises(
        ValueError,
        match="mmdyn.ADE20KDataset: metainfo names the class 'waal', which is none of the "
        "150 of the data set; did you mean 'wall'?",
    ):
        build(mask(), kind='ADE20KDataset', metainfo=dict(classes=('sky', 'waal')))
    subset = build(mask(_1=(0, 0), _3=(0, 1)), kind='ADE20KDataset', metainfo=dict(classes=('sky', 'wall')))[0]
    # Of the labels after reduce_zero_label 0 is the wall and 2 the sky.
    assert subset['gt_seg_map'][0, :2].tolist() == [1, 0]


def test_images_of_another_suffix(build, tmp_path):
    with pytest.raises(ValueError, match='found no images with .*images') as error:
        build(mask(), img_suffix='.tif')
    assert f'\n{tmp_path}\n├── images/*.tif\n└── masks/*.png\n' in str(error.value)
