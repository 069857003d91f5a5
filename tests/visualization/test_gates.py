import numpy as np
import pytest
import torch

from mmdyn.models.dge import DynamicGrainedEncoder
from mmdyn.models.dge.encoder import Decision
from mmdyn.visualization import Selectivity, draw_gates, draw_outline, granularity_of_pixels
from mmdyn.visualization.gates import COLOURS


def test_granularity_of_pixels_with_a_region_over_the_edge():
    encoder = DynamicGrainedEncoder(4, (1, 2, 4))
    encoder.decision = Decision(torch.tensor([[[0, 1]], [[2, 0]]]), torch.zeros(2))
    # A map of 4 x 6 cells on 8 x 12 pixels: the second region has two columns of cells, 8 to 11 in pixels.
    pixels = granularity_of_pixels(encoder, (4, 6), (8, 12), image=1)
    assert pixels.shape == (8, 12)
    assert (pixels[:, :8] == 4).all() and (pixels[:, 8:] == 1).all()


def test_colours_stand_for_granularities_in_order():
    image = np.full((2, 4, 3), 100, np.uint8)
    drawn = draw_gates(image, np.array([[0, 1, 2, 4]] * 2), (0, 1, 2, 4), opacity=1.0)
    assert [tuple(pixel) for pixel in drawn[0]] == [(0, 0, 0), *COLOURS[:3]]
    assert (draw_gates(image, np.ones((2, 4)), (1, 2), opacity=0.0) == image).all()


def test_outline_is_white_and_on_the_object_only():
    image, mask = np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7] = 255
    drawn = draw_outline(image, mask)
    assert (drawn[2, 2:7] == 255).all() and (drawn[4, 4] == 0).all() and (drawn[mask == 0] == 0).all()
    assert (image == 0).all()


def test_selectivity_by_hand():
    """3 of 4 pixels of the objects are finest, 1 of 12 of the background; half of the first image, none of the next."""
    meter, top = Selectivity(), np.zeros((2, 4), bool)
    top[0] = True
    fine = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    meter.add('a', fine, top)
    meter.add('a', np.zeros((2, 4), bool), np.zeros((2, 4), bool))
    (layer,) = meter.result().items()
    # Shares of 1/2 and 0: 1/8 within images, of 1/4 * 3/4 in all.
    expected = dict(object=3 / 4, background=1 / 12, selectivity=2 / 3, within_images=2 / 3)
    assert layer == ('a', pytest.approx(expected))


@pytest.mark.parametrize('value, counts', [(False, '0 pixels of objects and 8'), (True, '8 pixels of objects and 0')])
def test_masks_without_objects_or_background(value, counts):
    meter = Selectivity()
    meter.add('a', np.ones((2, 4), bool), np.full((2, 4), value))
    with pytest.raises(ValueError, match=counts + ' of background: give masks that have both'):
        meter.result()
