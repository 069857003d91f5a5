import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

from mmdyn.analysis.gradcam import gradcam

pytest.importorskip('captum')
MEANS = dict(type='ClsDataPreprocessor', mean=[127.5] * 3, std=[64.0] * 3)


@pytest.fixture
def classifier(backbone_config, randomise):
    def make(name, out_type, **options):
        backbone = backbone_config(name, out_type=out_type, **options)
        channels = 16 if name == 'deit' else 24
        head = dict(type='LinearClsHead', num_classes=3, in_channels=channels)
        model = dict(type='ImageClassifier', data_preprocessor=MEANS, backbone=backbone, head=head)
        return randomise(MODELS.build(model)).eval()

    return make


@pytest.mark.parametrize('name, out_type', [('deit', 'cls_token'), ('pvt', 'avg_featmap')])
@pytest.mark.parametrize('dge', [None, dict(granularities=(1, 2))])
def test_is_the_formula(name, out_type, dge, classifier, make_backbone):
    """ReLU of the cells, each channel weighted by the mean gradient of the predicted logit, for each image alone."""
    model, images = classifier(name, out_type, dge=dge), torch.randn(2, 3, 32, 32)
    found = gradcam(model, images)
    assert found.shape == (2, 32, 32) and found.max() > 0
    stage = [stage for stage, _ in model.backbone.named_stages()][-1]
    last = stage.dge[-1] if dge else stage.blocks[-1]
    for image, cam in zip(images, found):
        kept = []

        def keep(module, inputs, kept=kept):
            tokens = inputs[1].detach().requires_grad_()
            kept.append((tokens, inputs[2], inputs[3]))
            return tokens if inputs[0] is inputs[1] else inputs[0], tokens, *inputs[2:]

        handle = last.register_forward_pre_hook(keep)
        logits = model(image[None], mode='tensor')
        handle.remove()
        ((tokens, shape, num_extra),) = kept
        (gradient,) = torch.autograd.grad(logits.max(), tokens)
        cells, gradient = (x[0, num_extra:].detach() for x in (tokens, gradient))
        wanted = (cells * gradient.mean(0)).sum(1).relu().view(1, 1, *shape)
        wanted = F.interpolate(wanted, size=(32, 32), mode='bilinear')[0, 0]
        assert torch.allclose(cam, wanted, atol=1e-6 + 1e-4 * wanted.max().item())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_models(backbone_config):
    model = torch.nn.Sequential(MODELS.build(backbone_config('pvt')))
    with pytest.raises(ValueError, match='a Sequential with 1 backbones of mmdyn. Give the config of a classifier'):
        gradcam(model, torch.zeros(1, 3, 32, 32))
