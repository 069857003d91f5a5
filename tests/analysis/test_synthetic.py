import pytest
import torch

from mmdyn.analysis.synthetic import PATTERNS, force_routing, synthetic_choice


def ratio(choice, granularities):
    return sum((choice == k).float().mean().item() / phi**2 for k, phi in enumerate(granularities) if phi)


def neighbours_alike(choice):
    return (choice[1:] == choice[:-1]).float().mean().item()


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize('granularities, query_ratio', [((1, 2, 4), 0.5), ((1, 2, 4), 1.), ((1, 2), 0.4), ((0, 1), 0.3)])
def test_query_ratio(granularities, query_ratio, pattern):
    choice = synthetic_choice((50, 80), granularities, query_ratio, pattern)
    assert choice.shape == (50, 80) and ratio(choice, granularities) == pytest.approx(query_ratio, abs=1e-3)


def test_coarse_granularities_share_alike():
    counts = synthetic_choice((50, 80), (1, 2, 4), 0.5, 'random').flatten().bincount()
    assert abs(counts[1] - counts[2]) <= 1


def test_patterns():
    clustered, random = (synthetic_choice((50, 80), (1, 2, 4), 0.5, pattern) for pattern in PATTERNS)
    assert neighbours_alike(clustered) > 0.9
    chance = sum((random == k).float().mean().item()**2 for k in range(3))
    assert neighbours_alike(random) == pytest.approx(chance, abs=0.03)


def test_seeds():
    first, same, other = (synthetic_choice((9, 9), (1, 2), 0.5, 'random', seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_backbone_decides_as_told(make_backbone):
    model = make_backbone('pvt', dge=dict(granularities=(1, 2, 4))).eval()
    before = model.state_dict()['stages.0.dge.0.router.weight']
    force_routing(model, (160, 224), 0.5, 'clustered')
    with torch.no_grad():
        model(torch.randn(2, 3, 160, 224))
    assert model.cost.query_ratio.tolist() == pytest.approx([0.5, 0.5], abs=0.02)
    first = model.stages[0].dge[0]
    assert torch.equal(first.decision.choice[1], synthetic_choice((10, 14), (1, 2, 4), 0.5, 'clustered', 0))
    assert torch.equal(first.router.weight, before)


@pytest.mark.parametrize('query_ratio, pattern, said', [
    (0.1, 'random', r'query_ratio=0.1: granularities \(1, 2, 4\), .* allow 0.1562 to 1.0000'),
    (0.5, 'stripes', r"pattern='stripes': choose from \('clustered', 'random'\)"),
])
def test_errors(query_ratio, pattern, said):
    with pytest.raises(ValueError, match=said):
        synthetic_choice((4, 4), (1, 2, 4), query_ratio, pattern)
