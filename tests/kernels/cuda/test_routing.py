import itertools
from types import SimpleNamespace

import pytest
import torch

from mmdyn.kernels.cuda.routing import load_programs, power_of_two
from mmdyn.models.dge import DynamicGrainedEncoder
from mmdyn.models.dge.router import choose
from mmdyn.models.dge.routing import route
from mmdyn.models.replaceable import Refused


def test_powers_of_two():
    assert [power_of_two(number) for number in (0, 1, 2, 3, 8, 9)] == [1, 1, 2, 4, 8, 16]


def test_no_gpu_no_programs():
    assert load_programs(torch.empty(1)) == Refused('the tensors are on cpu, not on a GPU')
    assert 'not on a GPU' in route.why_not(torch.zeros(1, 1, 1, dtype=torch.long), (1, 1), (1,), 1).popitem()[1]


def test_triton_that_cannot_compile_the_programs(monkeypatch):
    triton = pytest.importorskip('triton')
    monkeypatch.setattr(triton, '__version__', '3.3.1')
    refused = load_programs(SimpleNamespace(is_cuda=True))
    assert refused == Refused('the programs need Triton 3.4 or newer, which torch 2.8 brings along, not 3.3.1')


@pytest.mark.cuda
@pytest.mark.parametrize('phis, region', [((1, 2, 4), 4), ((0, 1), 1), ((0, 1, 3), 6)])
@pytest.mark.parametrize('budget', [None, 0.6])
def test_encoder_on_a_gpu(budget, phis, region):
    """With the programs and without them, in training and in inference."""
    from mmdyn.models.layers import Attention, EncoderBlock

    block = EncoderBlock(32, Attention(32, 2), 2).cuda()
    encoder = DynamicGrainedEncoder(32, phis, region).cuda()
    torch.nn.init.normal_(encoder.router.weight)
    encoder.router.share = budget
    for is_training, num_extra in itertools.product((False, True), (0, 1)):
        tokens = torch.randn(3, num_extra + 15 * 10, 32, device='cuda', requires_grad=True)
        encoder.train(is_training)
        results = []
        for functions in ((route, choose), ()):
            kernels = [function.kernels[:] for function in (route, choose)]
            for function in (route, choose):
                if function not in functions:
                    function.kernels.clear()
            torch.manual_seed(0)
            with torch.set_grad_enabled(is_training):
                out = encoder(block, tokens, (15, 10), num_extra)
                gradient = torch.autograd.grad(out.square().sum(), tokens) if is_training else ()
            results.append([out, *gradient, encoder.decision.choice])
            for function, of_function in zip((route, choose), kernels):
                function.kernels[:] = of_function
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
