import cv2
import numpy as np
import pytest

from mmdyn.datasets import LoadImageFromFile


def test_loads_as_mmcv_does(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    results = LoadImageFromFile()(dict(img_path=str(tmp_path / 'a.png')))
    assert np.array_equal(results['img'], image) and results['ori_shape'] == (5, 7)


@pytest.mark.parametrize('content', [None, b'', b'not an image', b'\xff\xd8\xff\xe0'])
def test_names_the_file(tmp_path, content):
    path = tmp_path / 'broken.jpg'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match='Cannot load the image .*broken.jpg: it is missing, empty or damaged'):
        LoadImageFromFile()(dict(img_path=str(path)))
