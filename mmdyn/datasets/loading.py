import mmcv.transforms

from ..registry import TRANSFORMS
from ..values import check_choice

BACKENDS = ('cv2', 'turbojpeg', 'pillow', 'tifffile', None)  # mmcv's
COLOURS = ('color', 'grayscale', 'unchanged', 'color_ignore_orientation')


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

    Args:
        to_float32, color_type, imdecode_backend, args, kwargs: as for mmcv's.

    Raises:
        ValueError: for another colour type or backend than mmcv's; later, if the image is missing, empty
            or cannot be decoded.
    """

    def __init__(
        self, to_float32: bool = False, color_type: str = 'color', imdecode_backend: str | None = 'cv2', *args, **kwargs
    ):
        check_choice('LoadImageFromFile: to_float32', to_float32, (True, False))
        check_choice('LoadImageFromFile: color_type', color_type, COLOURS)
        check_choice('LoadImageFromFile: imdecode_backend', imdecode_backend, BACKENDS)
        super().__init__(to_float32, color_type, imdecode_backend, *args, **kwargs)

    def transform(self, results: dict) -> dict:
        """Load ``results['img_path']`` into ``results['img']``, (H, W, 3)."""
        try:
            return super().transform(results)
        except Exception as error:
            raise image_error(results['img_path'], error) from error
