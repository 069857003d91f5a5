"""Data sets of mmdet, which this module imports."""

import json
import logging
import math
from collections import Counter
from pathlib import Path

from mmengine.logging import print_log

from ..registry import DATASETS
from .checked import CheckedDataset, parent_class, some

NUMBERS = {int, float}  # the types that JSON has


def are_numbers(values) -> bool:
    """Whether a list, which may be long, holds finite numbers only."""
    return isinstance(values, list) and set(map(type, values)) <= NUMBERS and math.isfinite(sum(values))


def what_is_wrong_with_image(image: dict) -> str:
    """What is wrong with an entry of COCO's ``images``, or ''."""
    missing = [key for key in ('file_name', 'height', 'width') if key not in image]
    if missing:
        return f'has no {" and no ".join(missing)}'
    wrong = [side for side in ('height', 'width') if not are_numbers([image[side]]) or image[side] <= 0]
    return f'has {wrong[0]}={image[wrong[0]]!r}, but needs a number of pixels' if wrong else ''


def what_is_wrong_with_segmentation(segmentation) -> str:
    """What is wrong with a segmentation of COCO's, or ''."""
    if isinstance(segmentation, list):
        if not all(map(are_numbers, segmentation)):
            return 'is a list, but not of polygons: lists of numbers x1, y1, x2, y2, ...'
        if not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation):
            return (
                f'has polygons of {some(map(len, segmentation))} numbers, but needs one with an even number of '
                'them, and at least 6'
            )
        return ''
    if not isinstance(segmentation, dict) or not {'size', 'counts'} <= set(segmentation):
        return 'must be a list of polygons, or a dict of size and counts'
    size, counts = segmentation['size'], segmentation['counts']
    if not are_numbers(size) or len(size) != 2:
        return f'has size={size!r}, but needs [height, width]'
    if isinstance(counts, list) and (not are_numbers(counts) or sum(counts) != size[0] * size[1]):
        return f'has counts that do not sum up to {size[0]} x {size[1]} pixels'
    if not isinstance(counts, (list, str)):
        return f'has counts={counts!r}, but needs a list of numbers or a string'
    return ''


def what_is_wrong_with_annotation(annotation: dict, needs_mask: bool) -> str:
    """What is wrong with an entry of COCO's ``annotations``, or ''."""
    missing = [key for key in ('image_id', 'category_id', 'bbox', 'area') if key not in annotation]
    if missing:
        return f'has no {" and no ".join(missing)}'
    box, area, segmentation = annotation['bbox'], annotation['area'], annotation.get('segmentation')
    if not are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        return f'has bbox={box!r}, but needs [x, y, width, height] in pixels'
    if not are_numbers([area]) or area < 0:
        return f'has area={area!r}, but needs a number of pixels'
    if segmentation:
        wrong = what_is_wrong_with_segmentation(segmentation)
        return f'has a segmentation, which {wrong}' if wrong else ''
    return 'has no segmentation, which with_mask=True needs' if needs_mask else ''


def twice(entries: list[dict]) -> list:
    """The ids that several entries have."""
    return [name for name, count in Counter(entry['id'] for entry in entries).items() if count > 1]


def check_coco(content, needs_annotations: bool, needs_mask: bool) -> None:
    """Look through what a JSON file of COCO's holds.

    Args:
        content: of the file.
        needs_annotations: whether images alone are not enough.
        needs_mask: whether each annotation needs a segmentation.

    Raises:
        ValueError: it names the first entry that is wrong.
    """
    if not isinstance(content, dict):
        raise ValueError(f'it holds a {type(content).__name__}, but needs a dict of images, annotations and categories')
    for key in ('images', 'categories', *(['annotations'] if needs_annotations else [])):
        if not content.get(key) or not isinstance(content[key], list):
            raise ValueError(f'it has no {key}, of which it needs a list')
    parts = {key: content.get(key, []) for key in ('images', 'categories', 'annotations')}
    for key, entries in parts.items():
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict) or 'id' not in entry:
                raise ValueError(f'{key}[{place}] has no id')
        if twice(entries):
            raise ValueError(f'{key} with the id {some(twice(entries))} are there more than once')
    for image in parts['images']:
        wrong = what_is_wrong_with_image(image)
        if wrong:
            raise ValueError(f'the image of id {image["id"]!r} {wrong}')
    known = {key: {entry['id'] for entry in parts[key]} for key in ('images', 'categories')}
    for annotation in parts['annotations']:
        if annotation.get('ignore'):
            continue
        wrong = what_is_wrong_with_annotation(annotation, needs_mask)
        for key, name in (('image_id', 'images'), ('category_id', 'categories')):
            if not wrong and annotation[key] not in known[name]:
                wrong = f'has {key}={annotation[key]!r}, which none of the {name} has'
        if wrong:
            raise ValueError(f'the annotation of id {annotation["id"]!r} {wrong}')


@DATASETS.register_module()
class CocoDataset(CheckedDataset, parent_class('mmdet', 'CocoDataset', 'det')):
    """mmdet's data set for COCO, which checks its folders and the entries of its JSON file."""

    options = (
        *CheckedDataset.options,
        *(f'{split}_evaluator.0.ann_file=DIR/annotations/instances_val2017.json' for split in ('val', 'test')),
    )

    def COCOAPI(self, path: str):
        """Read and check a file; mmdet calls it in place of the constructor of that name."""
        try:
            content = json.loads(Path(path).read_bytes())
            needs_mask = any(getattr(transform, 'with_mask', False) for transform in self.pipeline.transforms)
            check_coco(content, not self.test_mode, needs_mask)
        except ValueError as error:  # of JSON and of Unicode, too
            raise ValueError(
                f'{self.name}: {self.ann_file} is no COCO file, because {error}. Mend it there, or take it out.'
            ) from error
        if 'annotations' not in content:
            print_log(
                f'{self.name}: {self.ann_file} has no annotations, so that no metric can use it.',
                'current',
                logging.WARNING,
            )
        self._check_names(content)
        coco = super().COCOAPI()
        coco.dataset = content
        coco.createIndex()
        coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs
        return coco

    def _check_names(self, content: dict) -> None:
        """Compare the classes with the categories of the file."""
        classes = self.metainfo['classes']
        categories = {entry['id']: entry.get('name') for entry in content['categories']}
        names = list(categories.values())
        absent = [name for name in classes if name not in names]
        fix = 'Give metainfo=dict(classes=...) with the names of the file.'
        if len(absent) == len(classes):
            raise ValueError(
                f'{self.name}: metainfo has the classes {some(classes)}, of which {self.ann_file} has '
                f'none: its categories are {some(names)}. {fix}'
            )
        counts = Counter(
            categories[entry['category_id']] for entry in content.get('annotations', ()) if not entry.get('ignore')
        )
        dropped = {name: count for name, count in counts.items() if name not in classes}
        if dropped and absent:
            name = next(iter(dropped))
            raise ValueError(
                f'{self.name}: {self.ann_file} has {dropped[name]} annotations of the category {name!r}, '
                f'which metainfo does not name; it names {some(absent)} instead, which the file does not '
                f'have. {fix}'
            )
        if dropped:
            print_log(
                f'{self.name}: {sum(dropped.values())} annotations of {self.ann_file} are left out, because '
                f'metainfo does not name their categories {some(dropped)}.',
                'current',
                logging.WARNING,
            )

    def why_filtered(self) -> str:
        """What the images lack that were filtered."""
        least = (self.filter_cfg or {}).get('min_size', 0)
        small = sum(min(info['width'], info['height']) < least for info in self.data_list)
        empty = sum(not info['instances'] for info in self.data_list)
        return f'{small} have a side of less than {least} pixels, and {empty} have no object of the classes in metainfo'
