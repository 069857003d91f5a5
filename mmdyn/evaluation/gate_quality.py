"""How well routers' scores, or any others, find the foreground of images (DGE paper, tables 5 and 6)."""

import json
import math
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..models.backbones.base import DynamicStages
from ..models.dge import DynamicGrainedEncoder
from ..models.dge.routing import grid
from ..models.dge.selectivity import index_of_finest
from ..registry import METRICS
from ..values import check_integer, check_type

IGNORED = 255


@dataclass(frozen=True)
class Counts:
    """What a score of an image's pixels got right.

    Attributes:
        right: pixels on the right side of the threshold.
        pixels: that count.
        common, either: pixels that prediction and mask have in common, and that either has, of background and
            foreground.
        precision: average precision in [0, 1].
    """

    right: int
    pixels: int
    common: tuple[int, int]
    either: tuple[int, int]
    precision: float


def compare(score: np.ndarray, mask: np.ndarray) -> Counts:
    """Compare a score with a foreground mask as weakly supervised segmentations are.

    Foreground is where the score is above its mean. For the average precision the score is stretched to [0, 1] and
    ranked together with its complement, the score of the background: that of a random score is 1/2, whatever the size
    of the foreground.

    Args:
        score: (H, W), greater on the foreground.
        mask: (H, W) of 1 on the foreground, 0 on the background, and 255 where nobody knows.
    """
    try:
        from sklearn.metrics import average_precision_score
    except ImportError as error:
        raise ImportError("average precision is scikit-learn's: pip install scikit-learn") from error
    known = mask != IGNORED
    truth, score = mask[known] == 1, score.astype(np.float64)
    found = (score > score.mean())[known]
    low, high = score.min(), score.max()
    soft = ((score - low) / (high - low) if high > low else np.zeros_like(score))[known]
    both = [(found & truth), (found | truth)]
    neither = [(~found & ~truth), (~found | ~truth)]
    common, either = (tuple(int(part[i].sum()) for part in (neither, both)) for i in range(2))
    precision = average_precision_score(np.stack([~truth, truth]).ravel(), np.stack([1 - soft, soft]).ravel())
    return Counts(int((found == truth).sum()), int(known.sum()), common, either, float(precision))


def summarise(counts: Sequence[Counts]) -> dict[str, float]:
    """Over images, in per cent: pixel ``accuracy``, ``mAP`` (mean of the images) and ``mIoU`` (of both classes)."""
    pixels = sum(count.pixels for count in counts)
    ious = [
        sum(count.common[side] for count in counts) / max(sum(count.either[side] for count in counts), 1)
        for side in range(2)
    ]
    return dict(
        accuracy=100 * sum(count.right for count in counts) / pixels,
        mAP=100 * sum(count.precision for count in counts) / len(counts),
        mIoU=100 * sum(ious) / 2,
    )


class ForegroundMasks:
    """Masks of foreground by the names of images.

    Args:
        source: a folder of PNG files of the same names as the images (ADE20K's layout), whose values are classes; or a
            JSON file in COCO's layout, whose objects are the foreground.
        background: classes that are background, in a folder.
        ignore: class of pixels that do not count, in a folder. Those of a crowd do not in COCO's layout.

    Raises:
        ValueError: if there is no such folder or file.
    """

    def __init__(self, source: str | Path, background: int | Sequence[int] = 0, ignore: int | None = None):
        check_type('masks', source, (str, Path), "a folder of masks, or a JSON file in COCO's layout")
        classes = background if isinstance(background, (list, tuple)) else [background]
        for name, values in (('background', classes), ('ignore', [] if ignore is None else [ignore])):
            for value in values:
                check_integer(name, value, 0, IGNORED, 'a class of the masks')
        self.source, self.background, self.ignore = Path(source), list(classes), ignore
        if not self.source.exists():
            raise ValueError(
                f'There are no masks {source}: give a folder of PNG files of the same names as the images, or a JSON '
                "file in COCO's layout."
            )
        self.coco = None
        if self.source.is_file():
            from pycocotools.coco import COCO

            try:
                json.loads(self.source.read_text())
                self.coco = COCO(str(self.source))
                self.ids = {image['file_name']: key for key, image in self.coco.imgs.items()}
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                raise ValueError(f"{source} is no JSON file in COCO's layout ({type(error).__name__}).") from error
            self.names = {Path(name).name: name for name in self.ids}
        else:
            self.files: dict[str, list[Path]] = {}
            for file in sorted(self.source.rglob('*.png')):
                self.files.setdefault(file.stem, []).append(file)

    def read(self, image: str | Path) -> np.ndarray:
        """(H, W) uint8 mask of an image: 1 foreground, 0 background, 255 ignored.

        Raises:
            ValueError: if there is none.
        """
        image = Path(image)
        if self.coco is not None:
            if image.name not in self.names:
                raise ValueError(f'{self.source} has no image {image.name}.')
            key = self.ids[self.names[image.name]]
            size = self.coco.imgs[key]['height'], self.coco.imgs[key]['width']
            mask = np.zeros(size, np.uint8)
            for found in self.coco.imgToAnns[key]:
                inside = self.coco.annToMask(found).astype(bool)
                mask[inside & (mask != 1)] = IGNORED if found.get('iscrowd') else 1
            return mask
        # Of several of a name, the one in a folder of the image's name.
        found = self.files.get(image.stem, [])
        found = [file for file in found if file.parent.name == image.parent.name] or found
        if len(found) != 1:
            raise ValueError(f'{self.source} has {len(found)} masks {image.stem}.png for {image}: it takes one.')
        classes = cv2.imread(str(found[0]), cv2.IMREAD_UNCHANGED)
        if classes is None:
            raise ValueError(f'Cannot read the mask {found[0]}.')
        classes = classes if classes.ndim == 2 else classes[..., 0]
        mask = (~np.isin(classes, self.background)).astype(np.uint8)
        if self.ignore is not None:
            mask[classes == self.ignore] = IGNORED
        return mask


def as_seen(mask: np.ndarray, sample: dict[str, Any]) -> np.ndarray:
    """A mask as the test pipeline has resized its image and cropped the centre.

    Args:
        mask: (H, W) of the image in its file.
        sample: with the image's ``img_path``, ``ori_shape``, ``img_shape`` and, if it was resized, ``scale_factor``.

    Raises:
        ValueError: if the sizes do not fit.
    """
    path, shape = sample.get('img_path'), tuple(sample['img_shape'][:2])
    if mask.shape != tuple(sample['ori_shape'][:2]):
        raise ValueError(f'The mask of {path} has {mask.shape} pixels, but the image {tuple(sample["ori_shape"][:2])}.')
    width_scale, height_scale = np.broadcast_to(sample.get('scale_factor') or 1.0, 2)
    height, width = round(mask.shape[0] * height_scale), round(mask.shape[1] * width_scale)
    if height < shape[0] or width < shape[1]:
        raise ValueError(
            f'{path} was made larger than {height} x {width} pixels by the test pipeline: let it resize images and '
            'crop their centre, nothing else.'
        )
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    top, left = round((height - shape[0]) / 2), round((width - shape[1]) / 2)
    return mask[top : top + shape[0], left : left + shape[1]]


class _Pass(NamedTuple):
    """One forward pass: size of its input, names of the encoders, and scores of the layers, (B, H, W) on the CPU."""

    size: tuple[int, int]
    names: dict[int, str]
    scores: dict[str, Tensor]


@METRICS.register_module()
class GateQuality(BaseMetric):
    """How well the routers' scores of the finest granularity find the foreground (DGE paper, tables 5 and 6).

    The paper's models have the granularities {1, 2}. A layer's score, the softmax of its logits, is enlarged to the
    image (bilinearly) and compared with a mask of the foreground. Reports ``<layer>/accuracy``, ``<layer>/mAP`` and
    ``<layer>/mIoU`` in per cent, see :func:`compare`, and those of ``random``, a random score of each pixel, beside any
    other metric and for any task.

    Masks are brought to what the network sees, for which the test pipeline may resize images and crop their centre.
    While this metric lives, it listens to all modules, and compiled encoder blocks are not used.

    Args:
        masks: see :class:`ForegroundMasks`.
        background, ignore: classes that are background, and whose pixels do not count, in a folder of masks.
        layers: names of layers, such as ``'stages.0.blocks.1'``. Defaults to all that have several regions.
        seed: of the random scores.
        collect_device: as in mmengine's metrics.
        prefix: as in mmengine's metrics. Defaults to ``'gates'``.
    """

    default_prefix = 'gates'

    def __init__(
        self,
        masks: str | Path,
        background: int | Sequence[int] = 0,
        ignore: int | None = None,
        layers: Sequence[str] | None = None,
        seed: int = 0,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        check_integer('seed', seed, 0, what='of the random scores')
        if layers is not None:
            check_type('layers', layers, (list, tuple), 'a sequence of names of layers, or None')
        self.masks, self.layers, self.seed = ForegroundMasks(masks, background, ignore), layers, seed
        self._passes: list[_Pass] = []
        self._seen = 0
        weakly = weakref.ref(self)

        def listen(module: nn.Module, inputs: tuple) -> None:
            stages = stages_entered_by(module)
            if (stages is not None or isinstance(module, DynamicGrainedEncoder)) and (metric := weakly()) is not None:
                metric._note(module, inputs, stages)

        weakref.finalize(self, register_module_forward_pre_hook(listen).remove)

    @torch.no_grad()
    def _note(self, module: nn.Module, inputs: tuple, stages: DynamicStages | None) -> None:
        """Begin a pass, or keep the score of a layer."""
        if module.training:
            return
        if stages is not None:
            names = {
                id(encoder): f'{prefix}blocks.{i}'
                for stage, prefix in stages.named_stages()
                for i, encoder in enumerate(stage.dge)
            }
            self._passes.append(_Pass(tuple(inputs[0].shape[-2:]), names, {}))
        elif self._passes and id(module) in self._passes[-1].names:
            size, names, scores = self._passes[-1]
            shape = inputs[2]
            if self.layers is None and math.prod(grid(module.decision_side(shape), shape)) == 1:
                return  # nothing to tell apart
            scores[names[id(module)]] = finest_score(module, *inputs[1:], size=size).cpu()

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Compare the scores of each image with its mask."""
        passes, self._passes = self._passes, []
        scores = passes[0].scores if len(passes) == 1 else {}
        if not scores or any(len(of_layer) != len(data_samples) for of_layer in scores.values()):
            raise ValueError(
                f'GateQuality saw {len(passes)} passes of a backbone of mmdyn, with DGE in {len(scores)} layers, for a '
                f'batch of {len(data_samples)} images: test a model with DGE, without slide inference or test-time '
                'augmentation.'
            )
        scores = self._chosen(scores)
        for index, sample in enumerate(data_samples):
            mask = as_seen(self.masks.read(sample['img_path']), sample)
            height, width = mask.shape
            noise = np.random.default_rng([self.seed, self._seen]).random(mask.shape)
            self._seen += 1
            counts = {'random': compare(noise, mask)}
            counts.update({name: compare(s[index, :height, :width].numpy(), mask) for name, s in scores.items()})
            self.results.append(counts)

    def _chosen(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.layers is None:
            return scores
        if unknown := [name for name in self.layers if name not in scores]:
            raise ValueError(f'GateQuality: no layers {unknown} have DGE: choose from {list(scores)}.')
        return {name: scores[name] for name in self.layers}

    def compute_metrics(self, results: list[dict[str, Counts]]) -> dict[str, float]:
        """Over all images."""
        names = dict.fromkeys(name for counts in results for name in counts)
        return OrderedDict(
            (f'{name}/{metric}', value)
            for name in names
            for metric, value in summarise([counts[name] for counts in results if name in counts]).items()
        )


def stages_entered_by(module: nn.Module) -> DynamicStages | None:
    """The stages whose images a module is given: its own, or those that DGE was added to it with; None for others."""
    candidates = (module, *module._modules.values())
    return next((other for other in candidates if isinstance(other, DynamicStages) and other.entry is module), None)


def finest_score(
    encoder: DynamicGrainedEncoder,
    tokens: Tensor,
    shape: tuple[int, int],
    num_extra: int = 0,
    *,
    size: tuple[int, int],
) -> Tensor:
    """How much a layer wants the finest granularity at each pixel: softmax of the logits, enlarged bilinearly.

    Args:
        encoder: with a router.
        tokens: (B, E + h*w, C) that it is given.
        shape: (h, w).
        num_extra: E.
        size: (H, W) of the network's input.

    Returns:
        (B, H, W), in [0, 1].
    """
    side = encoder.decision_side(shape)
    scores = encoder.router.logits(tokens, shape, side, num_extra).softmax(-1)
    score = scores[..., index_of_finest(encoder.granularities)]
    # Regions hang over the map, and over the image, at the bottom and on the right.
    whole = [round(count * side * length / cells) for count, length, cells in zip(score.shape[1:], size, shape)]
    score = F.interpolate(score[:, None].float(), size=whole, mode='bilinear', align_corners=False)[:, 0]
    return score[:, : size[0], : size[1]]
