"""What the tests of what all backbones have in common share."""

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models import ImageClassifier


@pytest.fixture(params=['pvt', 'deit', 'lvvit', 'dpvt'])
def name(request):
    """Each small backbone, with a class token or not."""
    return request.param


@pytest.fixture
def resized():
    """The position embedding ``key`` of 32 x 32 images, interpolated for those of ``img_size``."""

    def resize(key, embedding, img_size):
        stride = 4 * 2 ** int(key.split('.')[1]) if key.startswith('stages') else 4
        side = 32 // stride
        maps = embedding[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        maps = F.interpolate(maps, (img_size[0] // stride, img_size[1] // stride), mode='bilinear', align_corners=False)
        return torch.cat([embedding[:, : -side * side], maps.flatten(2).transpose(1, 2)], 1)

    return resize


@pytest.fixture
def classifier_of():
    """A classifier with a backbone, whose own initialisation is another one."""
    return lambda backbone: ImageClassifier(
        backbone,
        head=dict(type='LinearClsHead', num_classes=3, in_channels=4),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.5),
    )
