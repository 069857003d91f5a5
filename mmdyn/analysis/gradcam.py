"""Where a classifier looks, by the gradients of its prediction: what DGE's scores are compared with (DGE, table 5)."""

import torch
from torch import Tensor, nn

from ..models.backbones.base import DynamicBackbone, find_backbones
from ..models.layers import to_maps


class _Classifier(nn.Module):
    """Logits of a model, with the cells that enter its last block as the output of a module of its own."""

    def __init__(self, model: nn.Module, backbone: DynamicBackbone):
        super().__init__()
        self.model, self.maps = model, nn.Identity()
        stage = [stage for stage, _ in backbone.named_stages()][-1]
        encoder = stage.dge[-1] if len(stage.dge) else None
        self.last = stage.blocks[-1] if encoder is None else encoder

    def forward(self, images: Tensor) -> Tensor:
        handle = self.last.register_forward_pre_hook(self._pass_through)
        try:
            return self.model(images, mode='tensor')
        finally:
            handle.remove()

    def _pass_through(self, module: nn.Module, inputs: tuple) -> tuple:
        """Both kinds of layer take (queries or block, tokens, shape, number of extra tokens)."""
        first, tokens, shape, num_extra = inputs[:4]
        cells = self.maps(to_maps(tokens[:, num_extra:], shape))
        passed = torch.cat([tokens[:, :num_extra], cells.flatten(2).transpose(1, 2)], dim=1)
        return passed if first is tokens else first, passed, *inputs[2:]


def gradcam(model: nn.Module, images: Tensor) -> Tensor:
    """Grad-CAM of a classifier's prediction, on the cells that enter its last encoder block, by captum.

    Args:
        model: mmpretrain's classifier with one backbone of mmdyn, in evaluation mode.
        images: (B, 3, H, W), as the backbone takes them.

    Returns:
        (B, H, W), at least 0, enlarged bilinearly.

    Raises:
        ValueError: if the model is no such classifier.
        ImportError: without captum.
    """
    try:
        from captum.attr import LayerAttribution, LayerGradCam
    except ImportError as error:
        raise ImportError("Grad-CAM is captum's: pip install captum, or mmdyn[analysis]") from error
    backbones = find_backbones(model)
    if len(backbones) != 1 or not hasattr(model, 'head') or not hasattr(backbones[0], 'named_stages'):
        raise ValueError(
            f'Grad-CAM explains the class that a classifier predicts: the model is a {type(model).__name__} with '
            f'{len(backbones)} backbones of mmdyn. Give the config of a classifier.'
        )
    classifier = _Classifier(model, backbones[0])
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        with torch.no_grad():
            labels = classifier(images).argmax(-1)
        maps = LayerGradCam(classifier, classifier.maps).attribute(images, labels, relu_attributions=True)
    return LayerAttribution.interpolate(maps, images.shape[-2:], 'bilinear')[:, 0].detach()
