"""The operators of accelerators; without a GPU, slow stand-ins that check what they are given."""

import math
import re
import sys

import pytest
import torch
from mmcv.ops import multi_scale_deform_attn as mmcv_ops

from mmdyn.kernels import accelerators
from mmdyn.kernels.accelerators import mmcv_sampling, varlen_attention
from mmdyn.models.layers import deformable_sampling, packed_attention
from mmdyn.models.replaceable import Refused


@pytest.fixture
def varlen_attn(monkeypatch):
    """A stand-in for torch's operator."""

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        assert key.shape == value.shape and key.shape[1:] == query.shape[1:]
        for ends, rows, most in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
            assert ends.dtype == torch.int32 and ends.device == query.device and ends.is_contiguous()
            assert ends[0] == 0 and ends[-1] == len(rows) and ends.diff().min() >= 0
            assert type(most) is int and ends.diff().max() == most
        assert cu_seq_q.shape == cu_seq_k.shape
        out = torch.empty_like(query)
        pairs = (zip(ends.tolist(), ends.tolist()[1:]) for ends in (cu_seq_q, cu_seq_k))
        for (first, last), (begin, end) in zip(*pairs):
            scores = torch.einsum('qhd,khd->hqk', query[first:last], key[begin:end]) / query.shape[2] ** 0.5
            out[first:last] = torch.einsum('hqk,khd->qhd', scores.softmax(-1), value[begin:end])
        return out

    monkeypatch.setattr(accelerators, 'varlen_attn', attend)


@pytest.mark.parametrize('lengths', [[4, 1, 2], [0, 5, 0], [3, 3, 3], [0, 1, 7]])
def test_varlen_attention(lengths, varlen_attn):
    query, (key, value) = torch.randn(sum(lengths), 2, 4), torch.randn(2, 3, 2, 6, 4)
    expected = packed_attention.plain(query, key, value, lengths)
    torch.testing.assert_close(varlen_attention(query, key, value, lengths), expected, rtol=1e-5, atol=1e-6)


def why_not(function, *args):
    reasons = {name: reason for name, reason in function.why_not(*args).items() if 'accelerators' in name}
    return next(iter(reasons.values()))


def test_attention_on_cpus_is_plain():
    query, (key, value) = torch.randn(5, 2, 4), torch.randn(2, 2, 2, 6, 4)
    assert why_not(packed_attention, query, key, value, [2, 3]) == (
        'the queries are torch.float32 on cpu, not of half precision on a GPU'
    )


@pytest.mark.cuda
def test_attention_on_a_gpu_that_is_plain(monkeypatch):
    query, (key, value) = torch.randn(5, 2, 8).half().cuda(), torch.randn(2, 2, 2, 6, 8).half().cuda()
    assert 'torch.float32 on cuda' in why_not(packed_attention, query.float(), key.float(), value.float(), [2, 3])
    assert why_not(packed_attention, query[:4], key, value, [2, 2]) == 'all images have as many queries'
    monkeypatch.setattr(accelerators, 'varlen_attn', None)
    assert (
        why_not(packed_attention, query, key, value, [2, 3]) == 'torch has no attention of variable length before 2.10'
    )


@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('lengths', [[40, 1, 23], [0, 50, 0], [30, 30, 30], [0, 0, 0]])
def test_packed_attention_on_a_gpu(lengths, dtype):
    """Values and gradients differ from those of the same numbers in float64 by the rounding of half precision."""
    tensors = [x.to('cuda', dtype) for x in (torch.randn(sum(lengths), 2, 32), *torch.randn(2, 3, 2, 60, 32))]
    results = []
    for function, to in ((packed_attention, dtype), (packed_attention.plain, torch.double)):
        leaves = [x.to(to).requires_grad_() for x in tensors]
        out = function(*leaves, lengths) if sum(lengths) else leaves[0]
        results.append(
            [x.double() for x in (out, *torch.autograd.grad(out.sum() + sum(0 * x.sum() for x in leaves), leaves))]
        )
    for found, expected in zip(*results):
        assert (found - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


# Map, queries of each image, heads, points.
LAYOUTS = [
    ((5, 7), [3, 3], 2, 4),
    ((5, 7), [4, 0, 2], 3, 2),
    ((1, 3), [1, 2], 1, 4),
    ((4, 1), [0, 5, 0], 2, 1),
    ((1, 1), [2], 2, 3),
    ((2, 9), [7], 1, 1),
]


def inputs(shape, lengths, heads, num_points, dim=3, dtype=torch.double):
    """Values, points inside of the map and up to two cells outside, and weights; all of them take gradients."""
    value = torch.randn(len(lengths), math.prod(shape), heads, dim, dtype=dtype)
    sides = torch.tensor([shape[1], shape[0]])
    points = torch.rand(sum(lengths), heads, num_points, 2, dtype=dtype) * (sides + 3) - 2
    weights = torch.randn(sum(lengths), heads, num_points, dtype=dtype)
    return [x.requires_grad_() for x in (value, points, weights)]


@pytest.fixture
def operator(monkeypatch):
    """mmcv's operator, replaced by its own function for the CPU behind the operator's contract; lists the calls."""
    calls = []

    def apply(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, im2col_step):
        images, cells, heads, _ = value.shape
        queries, num_points = sampling_locations.shape[1], sampling_locations.shape[4]
        assert sampling_locations.shape == (images, queries, heads, 1, num_points, 2)
        assert attention_weights.shape == (images, queries, heads, 1, num_points)
        assert spatial_shapes.shape == (1, 2) and spatial_shapes.prod() == cells
        assert level_start_index.tolist() == [0]
        assert spatial_shapes.dtype == level_start_index.dtype == torch.int64
        assert value.dtype == sampling_locations.dtype == attention_weights.dtype
        assert value.dtype in (torch.float32, torch.float64)
        assert all(
            x.is_contiguous() for x in (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        )
        assert isinstance(im2col_step, int) and images % min(images, im2col_step) == 0
        assert queries, 'a launch without threads'
        calls.append(queries)
        return mmcv_ops.multi_scale_deformable_attn_pytorch(
            value, spatial_shapes, sampling_locations, attention_weights
        )

    monkeypatch.setattr(mmcv_ops.MultiScaleDeformableAttnFunction, 'apply', apply)
    return calls


@pytest.mark.parametrize('shape, lengths, heads, num_points', LAYOUTS)
def test_sampling_by_mmcv_has_the_values_and_gradients_of_the_plain_one(shape, lengths, heads, num_points, operator):
    arguments = inputs(shape, lengths, heads, num_points)
    results = []
    for sample in (mmcv_sampling, deformable_sampling.plain):
        sampled = sample(*arguments, shape, lengths)
        results.append([sampled, *torch.autograd.grad((sampled * sampled.detach().sin()).sum(), arguments)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert operator == [max(lengths)]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_sampled_at_places_in_float32(dtype, operator):
    """Of cells that are powers of two only the result is rounded."""
    value = torch.zeros(1, 4 * 600, 1, 1, dtype=dtype)
    value[0, 2 * 600 + 597], value[0, 2 * 600 + 598] = 1, 4
    points, weights = torch.tensor([[[[597.25, 2.0]]]]), torch.ones(1, 1, 1, dtype=dtype)
    sampled = mmcv_sampling(value, points, weights, (4, 600), [1])
    assert sampled.dtype == dtype
    torch.testing.assert_close(sampled.item(), 1.75, rtol=torch.finfo(dtype).eps, atol=0)


INSTALL = 'compile them with the CUDA toolkit of your torch.* MMCV_WITH_OPS=1 FORCE_CUDA=1 pip install .*mmcv==2.1.0'


def test_mmcv_without_an_operator_for_the_device():
    """As one that was compiled without CUDA: it has none for the CPU."""
    refused = mmcv_sampling(*inputs((5, 7), [3, 3], 2, 4), (5, 7), [3, 3])
    assert isinstance(refused, Refused) and refused.reason.endswith('mmcv==2.1.0 for cpu')


@pytest.mark.parametrize('missing', ['mmcv.ops', 'mmcv.ops.multi_scale_deform_attn'])
def test_mmcv_without_operators(missing, monkeypatch):
    """As mmcv-lite, or as one that was compiled for another torch."""
    if missing == 'mmcv.ops':
        monkeypatch.delitem(sys.modules, 'mmcv.ops.multi_scale_deform_attn')
    monkeypatch.setitem(sys.modules, missing, None)
    refused = mmcv_sampling(*inputs((5, 7), [3, 3], 2, 4), (5, 7), [3, 3])
    assert isinstance(refused, Refused)
    assert re.search(INSTALL, refused.reason)


def test_other_errors_of_the_operator_stay_as_they_are(monkeypatch):

    def apply(*_):
        raise RuntimeError('CUDA out of memory')

    monkeypatch.setattr(mmcv_ops.MultiScaleDeformableAttnFunction, 'apply', apply)
    with pytest.raises(RuntimeError, match='CUDA out of memory'):
        mmcv_sampling(*inputs((5, 7), [3, 3], 2, 4), (5, 7), [3, 3])


def test_sampling_on_cpus_is_not_mmcvs():
    arguments = inputs((5, 7), [3, 3], 2, 4)
    assert why_not(deformable_sampling, *arguments, (5, 7), [3, 3]).startswith('the values are on the CPU')


@pytest.mark.cuda
def test_no_queries_on_a_gpu():
    arguments = [x.detach().float().cuda() for x in inputs((5, 7), [0, 0], 2, 4)]
    assert why_not(deformable_sampling, *arguments, (5, 7), [0, 0]) == 'there are no queries'
    assert deformable_sampling(*arguments, (5, 7), [0, 0]).shape == (0, 6)


@pytest.mark.cuda
@pytest.mark.parametrize('shape, lengths, heads, num_points', LAYOUTS)
def test_mmcvs_operator_on_a_gpu(shape, lengths, heads, num_points):
    arguments = [x.detach().float().cuda().requires_grad_() for x in inputs(shape, lengths, heads, num_points, dim=4)]
    if deformable_sampling.why_not(*arguments, shape, lengths).get('mmdyn.kernels.accelerators.sample_by_mmcv'):
        pytest.skip('mmcv was compiled without CUDA')
    results = []
    for sample in (deformable_sampling, deformable_sampling.plain):
        sampled = sample(*arguments, shape, lengths)
        results.append([sampled, *torch.autograd.grad(sampled.square().sum(), arguments)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
