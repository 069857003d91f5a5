import pytest
import torch

from mmdyn.analysis.threshold import cheapest, curve, most_accurate, operating_points

COARSE_MACS, FINE_MACS = 100, 300


def scores(count, classes=4):
    coarse, fine = (torch.randn(count, classes).mul(2).softmax(-1) for _ in range(2))
    return coarse, fine, torch.randint(0, classes, (count,))


def slow(coarse, fine, labels, threshold):
    """(share that stops, per cent right, multiply-adds), one image at a time."""
    stopped, right, macs = 0, 0, 0
    for early, late, label in zip(coarse, fine, labels):
        stops = bool(early.max() >= threshold) and threshold < 1
        stopped += stops
        right += int((early if stops else late).argmax()) == int(label)
        macs += COARSE_MACS if stops else COARSE_MACS + FINE_MACS
    return stopped / len(labels), 100 * right / len(labels), macs / len(labels)


def assert_same(of, coarse, fine, labels):
    for i, threshold in enumerate(of.threshold.tolist()):
        wanted = slow(coarse, fine, labels, threshold)
        assert (of.exit_share[i].item(), of.top1[i].item(), of.macs[i].item()) == pytest.approx(wanted), threshold


def test_curve_is_that_of_a_loop_over_images():
    images = scores(80)
    of = curve(*images, COARSE_MACS, FINE_MACS, torch.linspace(0, 1, 31))
    assert len(of.exit_share.unique()) > 10 and len(of.top1.unique()) > 5
    assert_same(of, *images)


def test_confidences_that_equal_a_threshold():
    # 0.7 is less in single precision, in which the classifier compares; threshold 1 does not stop the certain image.
    confident = torch.tensor([0.7, 0.5, 1.0, 0.7])
    coarse = torch.stack([confident, 1 - confident], 1)
    fine, labels = 1 - coarse, torch.zeros(4, dtype=torch.long)
    of = curve(coarse, fine, labels, COARSE_MACS, FINE_MACS, [0.0, 0.5, 0.7, 0.70001, 1.0])
    assert of.exit_share.tolist() == [1, 1, 0.75, 0.25, 0]
    assert of.macs.tolist() == [100, 100, 175, 325, 400]
    assert_same(of, coarse, fine, labels)


def test_operating_points_are_all_that_there_are():
    coarse, fine, labels = scores(50)
    coarse[1] = coarse[0]
    points = operating_points(coarse)
    of = curve(coarse, fine, labels, COARSE_MACS, FINE_MACS, points)
    assert sorted(of.exit_share.mul(50).round().int().tolist()) == sorted(
        {sum(1 for score in coarse if score.max() >= t) for t in (*coarse.amax(-1).tolist(), 2)}
    )
    assert_same(of, coarse, fine, labels)
    assert torch.equal(points, torch.tensor([float(f'{t:.6f}') for t in points.tolist()], dtype=torch.double))


def example():
    """Exits 3/3, 2/3, 1/3, 0/3; the fine stage mistakes the image of the middle confidence for another."""
    coarse = torch.tensor([[0.4, 0.6], [0.8, 0.2], [0.1, 0.9]])
    fine = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9]])
    return curve(coarse, fine, torch.tensor([0, 0, 1]), COARSE_MACS, FINE_MACS, [0.0, 0.7, 0.85, 1.0])


def test_choices():
    of = example()
    assert of.macs.tolist() == [100, 200, 300, 400]
    assert of.top1.tolist() == pytest.approx([200 / 3, 100, 200 / 3, 200 / 3])
    assert most_accurate(of, 199) == 0 and most_accurate(of, 200) == 1 and most_accurate(of, 1000) == 1
    assert cheapest(of, 10) == 0 and cheapest(of, 66.7) == 1 and cheapest(of, 100) == 1
    assert of.point(1) == dict(
        threshold=0.7, exit_share=pytest.approx(2 / 3), top1=100, macs=200, coarse_right=2, fine_right=1
    )
    # Coarse alone mistakes the first; fine alone the second.
    assert (of.coarse_right.tolist(), of.fine_right.tolist()) == ([2, 2, 1, 0], [0, 1, 1, 2])


def test_unreachable():
    with pytest.raises(ValueError, match='down to 9.9e-08 G: they range from 1e-07 G.*to 4e-07 G'):
        most_accurate(example(), 99)
    with pytest.raises(ValueError, match='reaches 101 % top-1: the accuracy ranges from 66.666 to 100.0 %'):
        cheapest(example(), 101)
