"""Bring public data sets into the layouts that configs/results reads; docs/data.md tells where to get them."""

import json
import pickle
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

# The classes of Tiny-ImageNet-50, of the 200 of Tiny-ImageNet.
# fmt: off
TINY_CLASSES = [
    'n01443537', 'n01641577', 'n01774750', 'n01944390', 'n02056570', 'n02058221', 'n02099712', 'n02106662',
    'n02124075', 'n02132136', 'n02233338', 'n02279972', 'n02281406', 'n02321529', 'n02364673', 'n02437312',
    'n02486410', 'n02509815', 'n02769748', 'n02802426', 'n02963159', 'n03085013', 'n03201208', 'n03544143',
    'n03733131', 'n03804744', 'n03838899', 'n03854065', 'n03891332', 'n03970156', 'n03983396', 'n04008634',
    'n04067472', 'n04099969', 'n04146614', 'n04254777', 'n04265275', 'n04275548', 'n04507155', 'n04540053',
    'n07614500', 'n07695742', 'n07749582', 'n07753592', 'n07873807', 'n07875152', 'n07920052', 'n09246464',
    'n09256479', 'n09428293',
]
# fmt: on
# The 11 classes of CamVid that are usual, in the order of their labels, and which of its 32 each of them stands for.
CAMVID_CLASSES = {
    'sky': ['Sky'],
    'building': ['Archway', 'Bridge', 'Building', 'Tunnel', 'Wall'],
    'pole': ['Column_Pole', 'TrafficCone'],
    'road': ['LaneMkgsDriv', 'LaneMkgsNonDriv', 'Road'],
    'pavement': ['ParkingBlock', 'RoadShoulder', 'Sidewalk'],
    'tree': ['Tree', 'VegetationMisc'],
    'sign': ['Misc_Text', 'SignSymbol', 'TrafficLight'],
    'fence': ['Fence'],
    'car': ['Car', 'OtherMoving', 'SUVPickupTruck', 'Train', 'Truck_Bus'],
    'pedestrian': ['Animal', 'CartLuggagePram', 'Child', 'Pedestrian'],
    'bicyclist': ['Bicyclist', 'MotorcycleScooter'],
}
IGNORED = 255
BCCD_CLASSES = ('RBC', 'WBC', 'Platelets')


def need(*paths: Path, of: str) -> None:
    """Check that a public data set is where it is said to be.

    Raises:
        ValueError: it names what is missing.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f'There is no {path}: give the folder of {of}, as docs/data.md shows it.')


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3), blue first.

    Raises:
        ValueError: if it is no image.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f'{path} is no image.')
    return image


def write_image(path: Path, image: np.ndarray) -> None:
    """In the format that the name ends with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def convert_tiny_imagenet(source: Path, out: Path, classes: Iterable[str] = TINY_CLASSES) -> dict[str, int]:
    """Tiny-ImageNet (``train/<class>/images/*.JPEG``, ``val/images`` and ``val/val_annotations.txt``).

    Each tenth training image, those whose number ends with 9, is for validation; the public validation images, whose
    classes are in a table, are the test.

    Returns:
        images of ``train``, ``val`` and ``test``, each with a folder for each class.
    """
    need(source / 'train', source / 'val/val_annotations.txt', of='Tiny-ImageNet')
    classes, counts = set(classes), dict(train=0, val=0, test=0)

    def copy(image: Path, part: str, name: str) -> None:
        folder = out / part / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, folder / image.name)
        counts[part] += 1

    for name in sorted(classes):
        need(source / 'train' / name, of='Tiny-ImageNet')
        for image in sorted((source / 'train' / name / 'images').glob('*.JPEG')):
            copy(image, 'val' if image.stem.endswith('9') else 'train', name)
    for line in (source / 'val/val_annotations.txt').read_text().splitlines():
        image, name = line.split('\t')[:2]
        if name in classes:
            copy(source / 'val/images' / image, 'test', name)
    return counts


class ArraysOnly(pickle.Unpickler):
    """Reads pickled arrays, numbers and strings, and runs nothing else that a file may hold."""

    allowed = {('numpy', '_reconstruct'), ('numpy', 'ndarray'), ('numpy', 'dtype'), ('_codecs', 'encode')}

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle names."""
        if (module.split('.')[0], name) in self.allowed:
            return super().find_class(module.replace('numpy.core', 'numpy._core'), name)
        raise ValueError(f'a pickle of CIFAR-10 holds arrays, but this one {module}.{name}.')


def read_pickle(path: Path) -> dict[bytes, Any]:
    """A batch of CIFAR-10, which Python 2 has written."""
    with open(path, 'rb') as file:
        return ArraysOnly(file, encoding='bytes').load()


def convert_cifar10(source: Path, out: Path) -> dict[str, int]:
    """CIFAR-10 for Python (``data_batch_1`` to ``5``, ``test_batch``, ``batches.meta``).

    Returns:
        images of ``train`` and of ``val``, which the test batch is, each with a folder for each class.
    """
    batches = {'train': [f'data_batch_{number}' for number in range(1, 6)], 'val': ['test_batch']}
    need(*(source / name for names in batches.values() for name in [*names, 'batches.meta']), of='CIFAR-10')
    classes = [name.decode() for name in read_pickle(source / 'batches.meta')[b'label_names']]
    counts = dict.fromkeys(batches, 0)
    for part, names in batches.items():
        for batch in map(read_pickle, (source / name for name in names)):
            for pixels, label in zip(batch[b'data'], batch[b'labels']):
                image = pixels.reshape(3, 32, 32).transpose(1, 2, 0)[..., ::-1]  # blue first
                write_image(out / part / classes[label] / f'{counts[part]:05}.png', image)
                counts[part] += 1
    return counts


def camvid_labels(colours: str) -> dict[tuple[int, int, int], int]:
    """The label of each colour.

    Args:
        colours: the text of ``label_colors.txt``, a line of red, green, blue and name for each of the 32 classes.

    Raises:
        ValueError: for a class of ours that has no colour.
    """
    found = {line.split()[3]: tuple(map(int, line.split()[:3])) for line in colours.splitlines() if line.strip()}
    absent = [name for names in CAMVID_CLASSES.values() for name in names if name not in found]
    if absent:
        raise ValueError(f'label_colors.txt has no colour of {", ".join(absent)}.')
    labels = dict.fromkeys(found.values(), IGNORED)
    for label, names in enumerate(CAMVID_CLASSES.values()):
        labels.update({found[name]: label for name in names})
    return labels


def to_labels(colours: np.ndarray, labels: dict[tuple[int, int, int], int]) -> np.ndarray:
    """Translate a picture (H, W, 3), red first, to labels (H, W).

    Raises:
        ValueError: for a colour that is no class.
    """
    numbers = colours.astype(np.int64) @ [1 << 16, 1 << 8, 1]
    present, places = np.unique(numbers, return_inverse=True)
    known = {(red << 16) + (green << 8) + blue: label for (red, green, blue), label in labels.items()}
    wrong = [number for number in present.tolist() if number not in known]
    if wrong:
        red, green, blue = wrong[0] >> 16, wrong[0] >> 8 & 255, wrong[0] & 255
        raise ValueError(f'the colour {red} {green} {blue} is none of label_colors.txt')
    return np.array([known[number] for number in present.tolist()], np.uint8)[places].reshape(numbers.shape)


def convert_camvid(source: Path, out: Path, size: tuple[int, int] = (480, 360)) -> dict[str, int]:
    """CamVid (``images/*.png``, ``labels/*_L.png``, ``label_colors.txt``, and lists ``train.txt`` and ``val.txt``).

    Args:
        source: folder of all that.
        out: folder of ``images`` and ``annotations``.
        size: width and height that images and labels are scaled to.

    Returns:
        images of each list that there is.
    """
    need(*(source / name for name in ('images', 'labels', 'label_colors.txt', 'train.txt', 'val.txt')), of='CamVid')
    labels, counts = camvid_labels((source / 'label_colors.txt').read_text()), {}
    for part in ('train', 'val', 'test'):
        if not (source / f'{part}.txt').exists():
            continue
        # A line may have the path of the labels, too.
        names = [
            Path(line.split()[0]).stem for line in (source / f'{part}.txt').read_text().splitlines() if line.strip()
        ]
        for name in names:
            image, colours = (read_image(source / file) for file in (f'images/{name}.png', f'labels/{name}_L.png'))
            try:
                map_of_labels = to_labels(colours[..., ::-1], labels)
            except ValueError as error:
                raise ValueError(f'{source}/labels/{name}_L.png: {error}.') from error
            write_image(out / f'images/{part}/{name}.jpg', cv2.resize(image, size, interpolation=cv2.INTER_AREA))
            small = cv2.resize(map_of_labels, size, interpolation=cv2.INTER_NEAREST)
            write_image(out / f'annotations/{part}/{name}.png', small)
        counts[part] = len(names)
    return counts


def voc_boxes(text: str, classes: Sequence[str] = BCCD_CLASSES) -> tuple[tuple[int, int], list[dict]]:
    """What Pascal VOC's XML says of an image.

    Args:
        text: of the file.
        classes: names, whose places, counted from 1, are the categories.

    Returns:
        width and height, and COCO's ``category_id``, ``bbox`` (x, y, width, height), ``area`` and ``iscrowd`` of each
        object. Boxes without an area are left out.
    """
    root, objects = ElementTree.fromstring(text), []
    for entry in root.iter('object'):
        left, top, right, bottom = (int(entry.findtext(f'bndbox/{side}')) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
        box = [left, top, right - left, bottom - top]
        if min(box[2:]) > 0:
            label = list(classes).index(entry.findtext('name')) + 1
            objects.append(dict(category_id=label, bbox=box, area=box[2] * box[3], iscrowd=0))
    return (int(root.findtext('size/width')), int(root.findtext('size/height'))), objects


def convert_bccd(source: Path, out: Path) -> dict[str, int]:
    """BCCD (``JPEGImages/*.jpg``, ``Annotations/*.xml``, ``ImageSets/Main/{train,val}.txt``) to COCO's layout.

    Returns:
        images of each list that there is.
    """
    lists = source / 'ImageSets/Main'
    need(source / 'JPEGImages', source / 'Annotations', lists / 'train.txt', lists / 'val.txt', of='BCCD')
    categories, counts = [dict(id=label, name=name) for label, name in enumerate(BCCD_CLASSES, 1)], {}
    for part in ('train', 'val', 'test'):
        if not (lists / f'{part}.txt').exists():
            continue
        images, annotations = [], []
        (out / part).mkdir(parents=True, exist_ok=True)
        for number, name in enumerate((lists / f'{part}.txt').read_text().split(), 1):
            (width, height), objects = voc_boxes((source / f'Annotations/{name}.xml').read_text())
            images.append(dict(id=number, file_name=f'{name}.jpg', width=width, height=height))
            annotations += [dict(id=len(annotations) + i, image_id=number, **each) for i, each in enumerate(objects, 1)]
            shutil.copyfile(source / f'JPEGImages/{name}.jpg', out / part / f'{name}.jpg')
        (out / 'annotations').mkdir(exist_ok=True)
        content = dict(images=images, annotations=annotations, categories=categories)
        (out / f'annotations/instances_{part}.json').write_text(json.dumps(content))
        counts[part] = len(images)
    return counts


CONVERTERS = {
    'tiny-imagenet-50': convert_tiny_imagenet,
    'cifar10': convert_cifar10,
    'camvid': convert_camvid,
    'bccd': convert_bccd,
}
