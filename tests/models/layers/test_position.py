import pytest
import torch
import torch.nn.functional as F

from mmdyn.models.layers import Positions, fit_position_embedding, position_embedding, resize_position_embedding


def test_position_embedding_is_a_truncated_normal():
    embedding = position_embedding(2, (40, 60), 16)
    assert embedding.shape == (1, 2402, 16) and embedding.requires_grad
    # The standard deviation of a sample of n has itself one of about std / sqrt(2 n).
    assert abs(embedding.std() - 0.02) < 4 * 0.02 / (2 * embedding.numel()) ** 0.5


def test_resize_keeps_extra_rows_and_the_same_shape():
    embedding = torch.randn(1, 2 + 12, 3)
    assert resize_position_embedding(embedding, (3, 4), (3, 4), 2) is embedding
    resized = resize_position_embedding(embedding, (3, 4), (5, 7), 2)
    assert resized.shape == (1, 2 + 35, 3) and torch.equal(resized[:, :2], embedding[:, :2])


def test_positions_are_resized_to_a_shape():
    embedding = torch.randn(1, 12, 3)
    for mode in ('bilinear', 'bicubic'):
        resized = Positions(embedding, (3, 4), mode).resized((5, 7))
        assert torch.equal(resized, resize_position_embedding(embedding, (3, 4), (5, 7), 0, mode))


def test_resize_by_hand():
    """Pixel centres of twice as many lie at 1/4 and 3/4 between those before; the border repeats."""
    row = torch.tensor([0.0, 1.0]).reshape(1, 2, 1)
    assert resize_position_embedding(row, (1, 2), (1, 4)).flatten().tolist() == [0, 0.25, 0.75, 1]
    assert resize_position_embedding(row, (2, 1), (4, 1)).flatten().tolist() == [0, 0.25, 0.75, 1]
    assert resize_position_embedding(row, (1, 2), (1, 4), mode='nearest').flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize('dtype, tolerance', [(torch.double, 1e-12), (torch.float, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize('mode', ['nearest', 'nearest-exact', 'bilinear', 'bicubic', 'area'])
@pytest.mark.parametrize('source, target', [((4, 6), (9, 5)), ((7, 7), (3, 16)), ((1, 2), (4, 4)), ((5, 5), (5, 2))])
def test_resize_is_the_librarys_interpolation(source, target, mode, dtype, tolerance):
    """Of a contiguous map, in values and gradients."""
    embedding = torch.randn(1, source[0] * source[1], 3, dtype=dtype, requires_grad=True)
    maps = embedding.to(torch.promote_types(dtype, torch.float)).mT.unflatten(2, source).contiguous()
    maps = F.interpolate(maps, target, mode=mode)
    results = []
    for out in (resize_position_embedding(embedding, source, target, mode=mode), maps.flatten(2).mT.to(dtype)):
        results.append([out, *torch.autograd.grad(out.square().sum(), embedding)])
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('saved_extra', [0, 1, 2])
@pytest.mark.parametrize('num_extra', [0, 1, 2])
@pytest.mark.parametrize('shape', [(4, 4), (3, 7), (2, 2)])
def test_fit_resizes_the_map_and_keeps_the_rows_that_both_have(saved_extra, num_extra, shape):
    """Rows of extra tokens that the checkpoint has not are those of the model."""
    saved = torch.randn(1, saved_extra + 16, 3)
    current = torch.randn(1, num_extra + shape[0] * shape[1], 3)
    fitted = fit_position_embedding(saved, current, shape, num_extra)
    both = min(saved_extra, num_extra)
    assert torch.equal(fitted[:, :both], saved[:, :both])
    assert torch.equal(fitted[:, both:num_extra], current[:, both:num_extra])
    maps = saved[:, saved_extra:].reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, shape, mode='bilinear', align_corners=False)
    torch.testing.assert_close(fitted[:, num_extra:], expected.permute(0, 2, 3, 1).flatten(1, 2), rtol=1e-6, atol=1e-6)


def test_fit_takes_the_shape_of_the_model_for_as_many_rows():
    """3 x 4 cells are no square, but the model's own shape, with or without its class token."""
    saved, current = torch.randn(1, 12, 3), torch.randn(1, 13, 3)
    assert torch.equal(fit_position_embedding(saved, current, (3, 4), 1), torch.cat([current[:, :1], saved], 1))
    assert fit_position_embedding(current, current, (3, 4), 1) is current


@pytest.mark.parametrize('saved_extra', [0, 1, 2])
def test_fit_takes_the_map_that_it_is_told(saved_extra):
    """16 cells may be 2 x 8, and not the model's 4 x 4."""
    saved, current = torch.randn(1, saved_extra + 16, 3), torch.randn(1, 1 + 16, 3)
    fitted = fit_position_embedding(saved, current, (4, 4), 1, source=(2, 8))
    maps = saved[:, saved_extra:].reshape(1, 2, 8, 3).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, (4, 4), mode='bilinear').permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(fitted[:, 1:], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(fitted[:, :1], (saved if saved_extra else current)[:, :1])
    assert fit_position_embedding(current, current, (4, 4), 1, source=(4, 4)) is current


def test_fit_needs_a_square_map():
    with pytest.raises(
        ValueError,
        match='A position embedding of 13 rows is no square map with 0, 1 or 2 extra '
        r'tokens: give img_size so that the model has as many rows \(it has 17\)',
    ):
        fit_position_embedding(torch.randn(1, 13, 3), torch.randn(1, 17, 3), (4, 4), 1)
