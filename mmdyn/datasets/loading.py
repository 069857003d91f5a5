import mmcv.transforms

from ..registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadImageFromFile(mmcv.transforms.LoadImageFromFile):
    """mmcv's transform, which names the file whatever goes wrong with it.

    Raises:
        ValueError: if the image is missing, empty or cannot be decoded.
    """

    def transform(self, results: dict) -> dict:
        """Load ``results['img_path']`` into ``results['img']``, (H, W, 3)."""
        try:
            return super().transform(results)
        except Exception as error:
            raise ValueError(f'Cannot load the image {results["img_path"]}: it is missing, empty or damaged '
                             f'({str(error).strip()}). Restore the file, or take it out of the annotations.') from error
