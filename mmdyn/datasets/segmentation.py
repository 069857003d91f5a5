"""Data sets of mmseg, which this module imports."""

import difflib

import numpy as np

from ..registry import DATASETS
from .checked import CheckedDataset, parent_class


class CheckedMasks(CheckedDataset):
    """Check each mask when it is loaded."""

    def check_annotations(self, results: dict, files: dict) -> None:
        """Compare a mask with its image and with the classes.

        Raises:
            ValueError: for a mask of more than one channel, of another size, or with a label that is no class.
        """
        labels, shape = results['gt_seg_map'], tuple(results['ori_shape'][:2])
        if labels.ndim != 2:
            raise self.mask_error(
                files,
                f'has the shape {labels.shape}, but must be {shape}, with the number of a '
                'class in each pixel; a picture in colours has to be translated to them',
            )
        if labels.shape != shape:
            raise self.mask_error(
                files, f'has {labels.shape[0]} x {labels.shape[1]} pixels, but the image {shape[0]} x {shape[1]}'
            )
        classes = self.metainfo.get('classes')
        wrong = (labels >= len(classes)) & (labels != self.ignore_index) if classes else np.zeros(0, bool)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            moved = ' (after reduce_zero_label, which takes 1 off)' if self.reduce_zero_label else ''
            raise self.mask_error(
                files,
                f'has the label {labels[row, column]}{moved} in {wrong.sum()} pixels, first '
                f'in row {row}, column {column}, but metainfo has {len(classes)} classes: allowed '
                f'are 0 to {len(classes) - 1}, and {self.ignore_index} for what is ignored',
            )

    def contents(self, path: str) -> str:
        """What a folder has to hold."""
        is_mask = path and (self.data_prefix.get('seg_map_path') or '').rstrip('/').endswith(path)
        return super().contents(path) and f'/*{self.seg_map_suffix if is_mask else self.img_suffix}'

    @classmethod
    def get_label_map(cls, new_classes=None) -> dict | None:
        """mmseg's map from the labels in masks to those of chosen classes.

        Raises:
            ValueError: if a class is chosen that the data set does not have.
        """
        known = cls.METAINFO.get('classes')
        for name in new_classes or () if known else ():
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f'mmdyn.{cls.__name__}: metainfo names the class {name!r}, which is none of the '
                    f'{len(known)} of the data set{f"; did you mean {close[0]!r}?" if close else "."} For '
                    'classes of your own use mmdyn.BaseSegDataset.'
                )
        return super().get_label_map(new_classes)


@DATASETS.register_module()
class ADE20KDataset(CheckedMasks, parent_class('mmseg', 'ADE20KDataset', 'seg')):
    """mmseg's data set for ADE20K, which checks its folders and masks."""


@DATASETS.register_module()
class BaseSegDataset(CheckedMasks, parent_class('mmseg', 'BaseSegDataset', 'seg')):
    """mmseg's data set for masks of any classes, which checks its folders and masks."""
