import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS

import mmdyn  # noqa: F401


@pytest.fixture
def build(tmp_path):
    """A data set of one image in each of the folders cat, dog and owl."""
    for name in ('cat', 'dog', 'owl'):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / 'a.png'), np.zeros((4, 4, 3), np.uint8))

    def run(lines=None, kind='CustomDataset', **options):
        if lines is not None:
            (tmp_path / 'list.txt').write_text(''.join(f'{line}\n' for line in lines))
            options['ann_file'] = str(tmp_path / 'list.txt')
        return DATASETS.build(dict(type=f'mmdyn.{kind}', data_prefix=str(tmp_path), **options))

    return run


def test_folders_and_lists(build):
    assert [build()[i]['gt_label'] for i in range(3)] == [0, 1, 2]
    assert build().metainfo['classes'] == ('cat', 'dog', 'owl')
    assert [build(['dog/a.png 1', 'cat/a.png 0'])[i]['gt_label'] for i in range(2)] == [1, 0]
    # Other names for the same folders, as ImageNet has.
    assert build(metainfo=dict(classes=('Katze', 'Hund', 'Eule')))[2]['gt_label'] == 2
    assert len(build(with_label=False)) == 3


@pytest.mark.parametrize(
    'classes, said',
    [
        (('dog', 'cat', 'owl'), "class 0 is 'dog' in metainfo, but the folder 'cat' of .*: labels count the folders"),
        (('cat', 'dog', 'eel'), "class 2 is 'eel' in metainfo, but the folder 'owl' of"),
        (('cat', 'dog', 'eel', 'owl'), r"has 3 folders of classes \('cat', 'dog', 'owl'\), but metainfo has 4 classes"),
        (('a', 'b'), 'has 3 folders of classes'),
    ],
)
def test_classes_that_are_not_the_folders(build, classes, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        build(metainfo=dict(classes=classes))
    assert str(tmp_path) in str(error.value)


def test_a_thousand_classes_are_not_three_folders(build):
    with pytest.raises(ValueError, match='mmdyn.ImageNet: .* has 3 folders of classes .*, but metainfo has 1000'):
        build(kind='ImageNet')


@pytest.mark.parametrize('line', ['owl/a.png', 'owl/a.png owl', 'owl/a.png -1', 'owl/a.png 1.5', ''])
def test_lines_that_are_no_image_and_label(build, line):
    with pytest.raises(ValueError, match=f"mmdyn.CustomDataset: line 2 of .*list.txt is '{line}', but each line"):
        build(['cat/a.png 0', line])


def test_a_label_that_is_no_class(build):
    with pytest.raises(ValueError, match="line 1 of .*list.txt is 'owl/a.png 2', but its label must be from 0 to 1"):
        build(['owl/a.png 2'], metainfo=dict(classes=('cat', 'dog')))


def test_no_images(build, tmp_path):
    for name in ('cat', 'dog', 'owl'):
        (tmp_path / name / 'a.png').rename(tmp_path / name / 'a.txt')
    with pytest.raises(ValueError, match=r'found no images \(.png\) in'):
        build(extensions=['.png'])
