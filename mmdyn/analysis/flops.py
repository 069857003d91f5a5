"""Parameters and multiply-adds of whole models, given as configs."""

import copy
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..engine.command import config_with_dge, load_weights
from ..models.backbones.base import DynamicStages, check_sides, find_backbones
from ..models.checks import check_channels
from ..models.cost import BackboneCost, CostMeter
from ..values import check_integer, check_number, sides

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')


def build_model(cfg: Config, dense: bool = False) -> nn.Module:
    """The config's model in evaluation mode, without DGE if ``dense``; pretrained weights are not loaded."""
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    model = copy.deepcopy(cfg.model)
    if 'data_preprocessor' in cfg:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)  # as mmengine's Runner does
    for backbone in (model.backbone, model.backbone.get('backbone', {})):  # what mmdyn.WithDGE wraps
        backbone.pop('init_cfg', None)
    if dense:
        config_with_dge(model).pop('dge', None)
    model = MODELS.build(model).eval()
    check_channels(model)
    return model


def dynamic_backbone(model: nn.Module) -> DynamicStages | None:
    """The part of the model that tells what it spends, if there is one."""
    return next(iter(find_backbones(model)), None)


def _embedding_bag_flops(weight_shape, indices_shape, *args, **kwargs) -> int:
    return 2 * math.prod(indices_shape) * weight_shape[1]


_BAGS = (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only)


def count_macs(model: nn.Module, shape: tuple[int, int], proposals: int = 1000, detections: int = 0) -> int:
    """Multiply-adds of the matrix products, convolutions and sampled points that run on one image.

    Args:
        model: a classifier, segmentor or detector.
        shape: (H, W) of the image in pixels.
        proposals: boxes that the second stage of a two-stage detector looks at.
        detections: boxes that its mask head looks at. By default none: what is left of a random model's boxes, and what
            the DGE paper's totals agree with.
    """
    for name, value in (('proposals', proposals), ('detections', detections)):
        check_integer(name, value, 1 if name == 'proposals' else 0, what='a number of boxes')
    inputs = torch.zeros(1, 3, *sides('shape', shape))
    # The math path of attention is made of matrix products, which the counter knows on every device.
    counted = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_BAGS, _embedding_bag_flops))
    with counted as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if not hasattr(model, 'roi_head'):
            model(inputs, mode='tensor')
            return counter.get_total_flops() // 2
        from mmengine.structures import InstanceData

        features = model.extract_feat(inputs)
        model.rpn_head(features)
        boxes = torch.tensor([[0.0, 0.0, shape[1], shape[0]]]).expand(proposals, -1)
        model.roi_head(features, [InstanceData(bboxes=boxes)])
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    masks = sum(flops for name, flops in counts.items() if name.endswith('.mask_head'))
    most = min(proposals, 100)  # mmdet's RoI heads look for masks in this many of the proposals
    return (counts['Global'] - masks + masks // most * detections) // 2


def image_files(folder: str) -> list[Path]:
    """The images below a folder.

    Raises:
        ValueError: if there are none.
    """
    if not Path(folder).is_dir():
        raise ValueError(f'There is no folder of images {folder}.')
    files = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f'No images in {folder}: give a folder that holds {", ".join(IMAGES)} files.')
    return files


class ImageRun(NamedTuple):
    """One image's pass through a model.

    Attributes:
        path: the image.
        view: (3, h, w) uint8 image as the test pipeline gives it to the model, before the model pads it.
        cost: what the backbone spent.
        sample: what the model predicts.
    """

    path: Path
    view: torch.Tensor
    cost: BackboneCost
    sample: BaseDataElement


def pipeline_without_annotations(cfg: Config) -> Compose:
    """The config's test pipeline for images that have no annotations."""
    pipeline = [
        dict(transform)
        for transform in cfg.test_dataloader.dataset.pipeline
        if 'LoadAnnotations' not in transform['type']
    ]
    for transform in pipeline:
        if transform['type'] == 'LoadImageFromFile':
            transform['type'] = 'mmdyn.LoadImageFromFile'  # which names the file
    return Compose(pipeline)


def run_on_images(model: nn.Module, cfg: Config, files: Iterable[Path]) -> Iterator[ImageRun]:
    """Run the model on each image; one that it looks at in several passes, as in slide inference, is told as often."""
    pipeline, meter = pipeline_without_annotations(cfg), CostMeter(training=False)
    for path in files:
        packed = pipeline(dict(img_path=str(path), img_id=0))
        with torch.inference_mode():
            (sample,) = model.test_step(pseudo_collate([packed]))
        for cost in meter.take():
            yield ImageRun(path, packed['inputs'], cost, sample)


def report(
    cfg: Config,
    shape: tuple[int, int],
    query_ratio: float | None = None,
    images: str | None = None,
    checkpoint: str | None = None,
    detections: int = 0,
) -> dict:
    """Count a config's model.

    Args:
        cfg: config with a ``model``.
        shape: (H, W) of the image in pixels.
        query_ratio: beta at which to tell the spent multiply-adds, in (0, 1].
        images: folder of images whose routing tells them instead; they keep their own size.
        checkpoint: weights for that.
        detections: boxes that a detector's mask head looks at, see :func:`count_macs`.

    Returns:
        ``params`` and ``params_dense``, with and without DGE; ``flops_dense`` and ``flops``, multiply-adds of one
        image, dense and as spent, by the whole model; ``query_ratio``; and ``layers``, one dict for each encoder block
        of name, flops_dense, flops_queries (those of them that queries cost), flops and query_ratio.
    """
    if query_ratio is not None:
        check_number('query_ratio', query_ratio, '(0, 1]')
    shape = sides('shape', shape)
    check_integer('detections', detections, 0, what='a number of boxes')
    model, dense = build_model(cfg), build_model(cfg, dense=True)
    for own in find_backbones(model):
        check_sides(own, shape, [])
    params, params_dense = (sum(weight.numel() for weight in of.parameters()) for of in (model, dense))
    result = dict(params=params, params_dense=params_dense, flops_dense=count_macs(dense, shape, detections=detections))
    backbone = dynamic_backbone(dense)
    if backbone is None:
        return dict(result, flops=result['flops_dense'], query_ratio=1.0, layers=[])

    if images is None:
        dynamic = dynamic_backbone(model)
        with torch.no_grad():
            dynamic(torch.zeros(1, 3, *shape))
        ratio = 1.0 if query_ratio is None or not dynamic.has_dge else query_ratio
        cost = dynamic.cost
        rest = result['flops_dense'] - cost.dense
        layers = [
            dict(
                name=layer.name,
                flops_dense=layer.dense,
                flops_queries=layer.dense - layer.static,
                flops=layer.spent_at(ratio),
                query_ratio=ratio if layer.dynamic else 1.0,
            )
            for layer in cost.layers
        ]
        return dict(result, flops=rest + cost.spent_at(ratio), query_ratio=ratio, layers=layers)

    if checkpoint:
        load_weights(model, checkpoint)
    costs = [run.cost for run in run_on_images(model, cfg, image_files(images))]
    rest = result['flops_dense'] - backbone.cost.dense

    def mean(values):
        return sum(float(value) for value in values) / len(costs)

    layers = [
        dict(
            name=of[0].name,
            flops_dense=mean(layer.dense for layer in of),
            flops_queries=mean(layer.dense - layer.static for layer in of),
            flops=mean(layer.spent for layer in of),
            query_ratio=mean(layer.query_ratio for layer in of),
        )
        for of in zip(*(cost.layers for cost in costs))
    ]
    return dict(
        result,
        flops_dense=rest + mean(cost.dense for cost in costs),
        flops=rest + mean(cost.spent for cost in costs),
        query_ratio=mean(cost.query_ratio for cost in costs),
        layers=layers,
    )
