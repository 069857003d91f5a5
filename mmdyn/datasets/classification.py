"""Data sets of mmpretrain, which this module imports."""

import mmengine

from ..registry import DATASETS
from .checked import CheckedDataset, parent_class, some


class CheckedLabels(CheckedDataset):
    """Check the labels of images, whether they come from folders or from a list."""

    options = (*CheckedDataset.options, 'train_dataloader.dataset.data_prefix=FOLDER')
    types = CheckedDataset.types | dict(
        data_prefix=((str, dict), "a folder, or a dict such as dict(img_path='images')")
    )

    def read_data_list(self) -> list[dict]:
        """mmpretrain's list of images, whose labels are checked."""
        lines = []
        if not self.ann_file:
            self._check_folders()
        elif self.with_label:
            lines = mmengine.list_from_file(self.ann_file)
            for number, line in enumerate(lines, 1):
                label = line.strip().rsplit(' ', 1)[1:]
                if not label or not label[0].isdigit():
                    self._fail_at(number, line, 'each line must be the path of an image, a space and a label from 0 on')
        data_list = super().read_data_list()
        classes = self.CLASSES
        for number, (line, info) in enumerate(zip(lines, data_list), 1):
            if classes and info['gt_label'] >= len(classes):
                self._fail_at(
                    number,
                    line,
                    f'its label must be from 0 to {len(classes) - 1}, since metainfo has {len(classes)} classes',
                )
        return data_list

    def _fail_at(self, number: int, line: str, what: str) -> None:
        raise ValueError(f'{self.name}: line {number} of {self.ann_file} is {line!r}, but {what}.')

    def _check_folders(self) -> None:
        """Compare the folders of classes with the classes' names, if those are given."""
        folders = sorted(mmengine.list_dir_or_file(self.img_prefix, list_file=False)) if self.with_label else []
        images = (file for file in mmengine.list_dir_or_file(self.img_prefix, list_dir=False, recursive=True))
        if not any(self.is_valid_file(file) for file in images):
            self._fail(f'found no images ({", ".join(sorted(self.extensions))}) in {self.img_prefix!r}')
        names = list(self.CLASSES or folders)
        if not self.with_label:
            return
        if len(names) != len(folders):
            raise ValueError(
                f'{self.name}: {self.img_prefix} has {len(folders)} folders of classes ({some(folders)}), '
                f'but metainfo has {len(names)} classes ({some(names)}). Give metainfo=dict(classes=...) '
                'with a name for each folder in alphabetical order, or ann_file, a list of images and '
                'labels.'
            )
        # Names may be others than the folders', as ImageNet's are, but not the same in another order.
        if names != folders and set(names) & set(folders):
            at = next(i for i, pair in enumerate(zip(names, folders)) if pair[0] != pair[1])
            raise ValueError(
                f'{self.name}: class {at} is {names[at]!r} in metainfo, but the folder {folders[at]!r} of '
                f'{self.img_prefix}: labels count the folders in alphabetical order. Give '
                f'metainfo=dict(classes=...) in that order, or leave it out.'
            )


@DATASETS.register_module()
class CustomDataset(CheckedLabels, parent_class('mmpretrain', 'CustomDataset', 'cls')):
    """mmpretrain's data set of folders or of a list, which checks them."""


@DATASETS.register_module()
class ImageNet(CheckedLabels, parent_class('mmpretrain', 'ImageNet', 'cls')):
    """mmpretrain's data set for ImageNet, which checks its folders."""
