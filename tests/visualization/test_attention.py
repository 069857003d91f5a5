import numpy as np

from mmdyn.visualization import draw_attention


def test_colours_of_patches():
    image = np.full((4, 6, 3), 100, np.uint8)
    drawn = draw_attention(image, np.array([[0.2, 0.1, 0.3]]), opacity=1.0)
    assert (drawn[:, :2].std((0, 1)) == 0).all() and drawn.shape == image.shape
    middle, low, high = drawn[0, 0].astype(int), drawn[0, 2].astype(int), drawn[0, 4].astype(int)
    assert low[2] > low[0] and high[0] > high[2] and middle[1] > 200  # blue, red, green
    assert np.array_equal(draw_attention(image, np.ones((2, 2)), opacity=0.0), image)
    assert draw_attention(image, np.ones((2, 2))).std((0, 1)).max() == 0  # the same everywhere
