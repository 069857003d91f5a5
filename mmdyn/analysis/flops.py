"""Parameters and multiply-adds of whole models, given as configs."""
import copy
from pathlib import Path
from typing import Iterable, List, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.backbones.base import DynamicBackbone, find_backbones
from .complexity import BackboneCost, CostMeter

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')


def build_model(cfg: Config, dense: bool = False) -> nn.Module:
    """The config's model in evaluation mode, without DGE if ``dense``; pretrained weights are not loaded."""
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    model = copy.deepcopy(cfg.model)
    model.backbone.pop('init_cfg', None)
    if dense:
        model.backbone.pop('dge', None)
    return MODELS.build(model).eval()


def dynamic_backbone(model: nn.Module) -> Optional[DynamicBackbone]:
    """The model's backbone if it is one of mmdyn's."""
    return next(iter(find_backbones(model)), None)


def count_macs(model: nn.Module, shape: Tuple[int, int]) -> int:
    """Multiply-adds of the matrix products and convolutions that run on one image of ``shape`` (H, W) pixels."""
    inputs, kwargs = torch.zeros(1, 3, *shape), {}
    if hasattr(model, 'roi_head') or hasattr(model, 'bbox_head'):
        from mmdet.structures import DetDataSample
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1., 1.))
        kwargs = dict(data_samples=[DetDataSample(metainfo=meta)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # The math path of attention is made of matrix products, which the counter knows on every device.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            model(inputs, mode='tensor', **kwargs)
    return counter.get_total_flops() // 2


def image_files(folder: str) -> List[Path]:
    """The images below a folder.

    Raises:
        ValueError: if there are none.
    """
    files = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f'No images in {folder}: give a folder that holds {", ".join(IMAGES)} files.')
    return files


def run_on_images(model: nn.Module, cfg: Config, files: Iterable[Path]) -> Iterable[Tuple[Path, BackboneCost]]:
    """Run the model on each image, loaded by the config's test pipeline without its annotations."""
    pipeline = Compose([t for t in cfg.test_dataloader.dataset.pipeline if 'LoadAnnotations' not in t['type']])
    meter = CostMeter(training=False)
    for path in files:
        with torch.inference_mode():
            model.test_step(pseudo_collate([pipeline(dict(img_path=str(path), img_id=0))]))
        for cost in meter.take():
            yield path, cost


def report(cfg: Config, shape: Tuple[int, int], query_ratio: Optional[float] = None, images: Optional[str] = None,
           checkpoint: Optional[str] = None) -> dict:
    """Count a config's model.

    Args:
        cfg: config with a ``model``.
        shape: (H, W) of the image in pixels.
        query_ratio: beta at which to tell the spent multiply-adds, in (0, 1].
        images: folder of images whose routing tells them instead; they keep their own size.
        checkpoint: weights for that.

    Returns:
        ``params``, ``flops_dense`` and ``flops`` (multiply-adds of one image, dense and as spent, by the whole model),
        ``query_ratio`` and ``layers``, one dict of name, flops_dense, flops and query_ratio for each encoder block.
    """
    if query_ratio is not None and not 0 < query_ratio <= 1:
        raise ValueError(f'query_ratio={query_ratio} must be greater than 0 and at most 1.')
    model, dense = build_model(cfg), build_model(cfg, dense=True)
    result = dict(params=sum(weight.numel() for weight in model.parameters()), flops_dense=count_macs(dense, shape))
    backbone = dynamic_backbone(dense)
    if backbone is None:
        return dict(result, flops=result['flops_dense'], query_ratio=1., layers=[])

    if images is None:
        dynamic = dynamic_backbone(model)
        with torch.no_grad():
            dynamic(torch.zeros(1, 3, *shape))
        ratio = 1. if query_ratio is None or not dynamic.has_dge else query_ratio
        cost = dynamic.cost
        rest = result['flops_dense'] - cost.dense
        layers = [
            dict(name=layer.name, flops_dense=layer.dense, flops=layer.spent_at(ratio),
                 query_ratio=ratio if layer.dynamic else 1.) for layer in cost.layers
        ]
        return dict(result, flops=rest + cost.spent_at(ratio), query_ratio=ratio, layers=layers)

    if checkpoint:
        from mmengine.runner import load_checkpoint
        load_checkpoint(model, checkpoint, map_location='cpu')
    costs = [cost for _, cost in run_on_images(model, cfg, image_files(images))]
    rest = result['flops_dense'] - backbone.cost.dense

    def mean(values):
        return sum(float(value) for value in values) / len(costs)

    layers = [
        dict(name=of[0].name, flops_dense=mean(layer.dense for layer in of), flops=mean(layer.spent for layer in of),
             query_ratio=mean(layer.query_ratio for layer in of)) for of in zip(*(cost.layers for cost in costs))
    ]
    return dict(result, flops_dense=rest + mean(cost.dense for cost in costs),
                flops=rest + mean(cost.spent for cost in costs), query_ratio=mean(cost.query_ratio for cost in costs),
                layers=layers)
