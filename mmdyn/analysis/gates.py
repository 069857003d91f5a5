"""Which granularity each region of an image got, layer by layer."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mmengine.config import Config
from torch import nn

from ..models.backbones.base import DynamicStages
from ..models.dge import DynamicGrainedEncoder
from .flops import ImageRun, run_on_images


class LayerGates(NamedTuple):
    """A layer's decision on an image.

    Attributes:
        name: of the encoder block.
        encoder: its wrapper, whose decision lasts until the next pass.
        shape: (h, w) of its map in cells.
    """

    name: str
    encoder: DynamicGrainedEncoder
    shape: tuple[int, int]

    @property
    def grid(self) -> np.ndarray:
        """(rows, columns) granularity of each region of the first image."""
        return np.asarray(self.encoder.granularities)[self.encoder.decision.choice[0].cpu().numpy()]


class GatedRun(NamedTuple):
    """One image's pass through a model with DGE.

    Attributes:
        run: the pass.
        size: (H, W) of the network's input; models pad at the bottom and on the right.
        layers: those that have more than one region.
    """

    run: ImageRun
    size: tuple[int, int]
    layers: list[LayerGates]

    @property
    def image(self) -> np.ndarray:
        """(h, w, 3) uint8, RGB, the image as the network sees it, without padding."""
        return image_of(self.run)


def image_of(run: ImageRun) -> np.ndarray:
    """The image of a pass, (h, w, 3) uint8, RGB, without padding."""
    return np.ascontiguousarray(run.view.numpy()[::-1].transpose(1, 2, 0))


def classes_of_mask(image: Path, images: str | Path, masks: str | Path, pipeline: Callable) -> np.ndarray:
    """What the mask of an image says of each pixel, (h, w), cropped and resized as the image was.

    Args:
        image: a file in the folder ``images``.
        images: folder.
        masks: folder of files with the same names, or these as PNG files.
        pipeline: the image's own, without annotations.

    Raises:
        ValueError: if there is none.
    """
    file = Path(masks) / image.relative_to(images)
    found = next((path for path in (file, file.with_suffix('.png')) if path.exists()), None)
    if found is None:
        raise ValueError(f'no mask {file} for {image}.')
    return pipeline(dict(img_path=str(found), img_id=0))['inputs'].numpy()[0]


def layers_with_regions(backbone: DynamicStages) -> list[LayerGates]:
    """The layers that had something to choose in the backbone's last forward pass."""
    return [
        LayerGates(f'{prefix}blocks.{i}', encoder, shape)
        for (stage, prefix), shape in zip(backbone.named_stages(), backbone.last_shapes)
        for i, encoder in enumerate(stage.dge)
        if encoder is not None and encoder.decision.choice[0].numel() > 1
    ]


def run_with_gates(model: nn.Module, backbone: DynamicStages, cfg: Config, files: Iterable[Path]) -> Iterator[GatedRun]:
    """Run a model on each image, and tell what its layers decided.

    Raises:
        ValueError: if the model looks at parts of an image.
    """
    sizes: list[tuple[int, int]] = []
    handle = backbone.entry.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    try:
        for run in run_on_images(model, cfg, files):
            if any(side < least for side, least in zip(sizes[-1], run.view.shape[-2:])):
                raise ValueError(
                    f'the model looks at parts of {run.path}, not at all of it at once. For slide '
                    'inference give --cfg-options model.test_cfg.mode=whole.'
                )
            yield GatedRun(run, sizes[-1], layers_with_regions(backbone))
    finally:
        handle.remove()
