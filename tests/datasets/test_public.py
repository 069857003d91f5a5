"""Each converter on a small fake of the public layout."""

import json
import pickle

import cv2
import numpy as np
import pytest

from mmdyn.datasets.public import (
    BCCD_CLASSES,
    CAMVID_CLASSES,
    TINY_CLASSES,
    camvid_labels,
    convert_bccd,
    convert_camvid,
    convert_cifar10,
    convert_tiny_imagenet,
    to_labels,
    voc_boxes,
)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def write(path, content=b''):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_tiny_imagenet_holds_out_a_tenth_and_finds_the_classes_of_the_test(tmp_path):
    source, out = tmp_path / 'public', tmp_path / 'out'
    for name in ('n1', 'n2', 'n3'):
        for number in (0, 8, 9, 19):
            write(source / f'train/{name}/images/{name}_{number}.JPEG', f'{name} {number}')
    for number in range(3):
        write(source / f'val/images/val_{number}.JPEG', f'val {number}')
    write(
        source / 'val/val_annotations.txt',
        'val_0.JPEG\tn2\t0\t0\t1\t1\nval_1.JPEG\tn3\t0\t0\t1\t1\nval_2.JPEG\tn1\t0\t0\t1\t1\n',
    )
    assert convert_tiny_imagenet(source, out, ['n1', 'n2']) == dict(train=4, val=4, test=2)
    assert names(out) == [
        'test/n1/val_2.JPEG',
        'test/n2/val_0.JPEG',
        *(f'train/{name}/{name}_{number}.JPEG' for name in ('n1', 'n2') for number in (0, 8)),
        *(f'val/{name}/{name}_{number}.JPEG' for name in ('n1', 'n2') for number in (19, 9)),
    ]
    assert (out / 'val/n2/n2_19.JPEG').read_text() == 'n2 19'


def test_tiny_imagenet_has_50_classes():
    assert len(set(TINY_CLASSES)) == 50 and sorted(TINY_CLASSES) == TINY_CLASSES


def cifar_batch(images, labels):
    """As the public files: a row of 3072 bytes for each image, all of red first, keys in bytes."""
    data = np.stack([image.transpose(2, 0, 1).reshape(-1) for image in images])
    return pickle.dumps({b'data': data, b'labels': labels}, protocol=2)


def test_cifar10_keeps_each_pixel(tmp_path):
    rng, source, out = np.random.default_rng(0), tmp_path / 'public', tmp_path / 'out'
    images = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)  # red first
    for number, batch in enumerate(('data_batch_1', 'data_batch_2', 'data_batch_3', 'data_batch_4', 'data_batch_5')):
        write(source / batch, cifar_batch(images[number : number + 1], [number % 2]))
    write(source / 'test_batch', cifar_batch(images[5:], [1]))
    write(source / 'batches.meta', pickle.dumps({b'label_names': [b'cat', b'dog']}, protocol=2))
    assert convert_cifar10(source, out) == dict(train=5, val=1)
    assert names(out) == [
        'train/cat/00000.png',
        'train/cat/00002.png',
        'train/cat/00004.png',
        'train/dog/00001.png',
        'train/dog/00003.png',
        'val/dog/00000.png',
    ]
    for number, path in ((3, 'train/dog/00003.png'), (5, 'val/dog/00000.png')):
        assert np.array_equal(cv2.imread(str(out / path))[..., ::-1], images[number])


def test_a_pickle_of_something_else_is_not_run(tmp_path):
    class Command:
        def __reduce__(self):
            return print, ('run',)

    for batch in (*(f'data_batch_{number}' for number in range(1, 6)), 'test_batch'):
        write(tmp_path / batch)
    write(tmp_path / 'batches.meta', pickle.dumps(Command()))
    with pytest.raises(ValueError, match=r'holds arrays, but this one builtins\.print'):
        convert_cifar10(tmp_path, tmp_path / 'out')


@pytest.fixture
def colours():
    """A colour for each of CamVid's 32 classes, one of them void, and of what names it."""
    classes = [name for group in CAMVID_CLASSES.values() for name in group] + ['Void']
    assert len(set(classes)) == 32
    return {name: (number, 255 - number, 7 * number % 256) for number, name in enumerate(classes)}


def colour_file(colours):
    return ''.join(f'{red} {green} {blue}\t\t{name}\r\n' for name, (red, green, blue) in colours.items())


def test_camvid_becomes_11_classes_and_255(tmp_path, colours):
    source, out = tmp_path / 'public', tmp_path / 'out'
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4, :4], picture[:4, 4:] = colours['Sky'], colours['Truck_Bus']
    picture[4:, :4], picture[4:, 4:] = colours['Void'], colours['MotorcycleScooter']
    for name in ('a_1', 'b_2'):
        write(source / f'images/{name}.png', cv2.imencode('.png', picture)[1].tobytes())
        write(source / f'labels/{name}_L.png', cv2.imencode('.png', picture[..., ::-1])[1].tobytes())
    write(source / 'label_colors.txt', colour_file(colours))
    write(source / 'train.txt', '/SegNet/CamVid/train/a_1.png /SegNet/CamVid/trainannot/a_1.png\n')
    write(source / 'val.txt', 'b_2\n')
    assert convert_camvid(source, out, size=(4, 4)) == dict(train=1, val=1)
    expected = ['annotations/train/a_1.png', 'annotations/val/b_2.png', 'images/train/a_1.jpg', 'images/val/b_2.jpg']
    assert names(out) == expected
    labels = cv2.imread(str(out / expected[0]), cv2.IMREAD_UNCHANGED)
    assert labels.tolist() == [[0, 0, 8, 8]] * 2 + [[255, 255, 10, 10]] * 2
    assert cv2.imread(str(out / expected[2])).shape == (4, 4, 3)


def test_camvid_names_what_is_wrong(tmp_path, colours):
    del colours['Tree'], colours['Child']
    with pytest.raises(ValueError, match='has no colour of Tree, Child'):
        camvid_labels(colour_file(colours))
    with pytest.raises(ValueError, match='the colour 1 2 3 is none of label_colors.txt'):
        to_labels(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8), {(9, 9, 9): 4})


def voc(objects, size=(640, 480)):
    boxes = ''.join(
        f'<object><name>{name}</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax>'
        f'<ymax>{bottom}</ymax></bndbox></object>'
        for name, left, top, right, bottom in objects
    )
    return f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{boxes}</annotation>'


def test_voc_boxes_become_those_of_coco():
    size, objects = voc_boxes(voc([('WBC', 68, 315, 286, 480), ('RBC', 5, 5, 5, 9), ('Platelets', 1, 2, 4, 6)]))
    assert size == (640, 480)
    assert objects == [
        dict(category_id=2, bbox=[68, 315, 218, 165], area=218 * 165, iscrowd=0),
        dict(category_id=3, bbox=[1, 2, 3, 4], area=12, iscrowd=0),
    ]


def test_bccd_becomes_coco(tmp_path):
    source, out = tmp_path / 'public', tmp_path / 'out'
    for name, objects in (('x', [('RBC', 0, 0, 2, 2)] * 2), ('y', [('WBC', 1, 1, 3, 4)]), ('z', [])):
        write(source / f'JPEGImages/{name}.jpg', name)
        write(source / f'Annotations/{name}.xml', voc(objects))
    write(source / 'ImageSets/Main/train.txt', 'x\ny\n')
    write(source / 'ImageSets/Main/val.txt', 'z\n')
    assert convert_bccd(source, out) == dict(train=2, val=1)
    content = json.loads((out / 'annotations/instances_train.json').read_text())
    assert [image['file_name'] for image in content['images']] == ['x.jpg', 'y.jpg']
    assert [(entry['id'], entry['image_id'], entry['category_id']) for entry in content['annotations']] == [
        (1, 1, 1),
        (2, 1, 1),
        (3, 2, 2),
    ]
    assert [category['name'] for category in content['categories']] == list(BCCD_CLASSES)
    assert (out / 'val/z.jpg').read_text() == 'z'


@pytest.mark.parametrize('convert', [convert_tiny_imagenet, convert_cifar10, convert_camvid, convert_bccd])
def test_what_is_missing_is_named(convert, tmp_path):
    with pytest.raises(ValueError, match=r'There is no .+: give the folder of .+, as docs/data.md shows it'):
        convert(tmp_path, tmp_path / 'out')
