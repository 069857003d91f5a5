import mmcv.transforms

from ..registry import TRANSFORMS


def image_error(path: str, error: Exception) -> ValueError:
    """What to raise in place of an error from inside a reader of images."""
    return ValueError(
        f'Cannot load the image {path}: it is missing, empty or damaged ({str(error).strip()}). Restore '
        'the file, or take it out of the annotations.'
    )


@TRANSFORMS.register_module()
class LoadImageFromFile(mmcv.transforms.LoadImageFromFile):
    """mmcv's transform, which names the file whatever goes wrong with it.

    mmdyn's data sets do so with mmcv's own. Only that one, by its bare name, is found by the frameworks' inferencers.

    Raises:
        ValueError: if the image is missing, empty or cannot be decoded.
    """

    def transform(self, results: dict) -> dict:
        """Load ``results['img_path']`` into ``results['img']``, (H, W, 3)."""
        try:
            return super().transform(results)
        except Exception as error:
            raise image_error(results['img_path'], error) from error
