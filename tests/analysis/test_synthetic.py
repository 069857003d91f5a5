import pytest
import torch

from mmdyn.analysis.synthetic import (
    PATTERNS,
    LayerChoice,
    force_routing,
    record_routing,
    recorded_granularities,
    replay_choice,
    replay_routing,
    synthetic_choice,
)


def ratio(choice, granularities):
    return sum((choice == k).float().mean().item() / phi**2 for k, phi in enumerate(granularities) if phi)


def neighbours_alike(choice):
    return (choice[1:] == choice[:-1]).float().mean().item()


@pytest.mark.parametrize('pattern', PATTERNS)
@pytest.mark.parametrize(
    'granularities, query_ratio', [((1, 2, 4), 0.5), ((1, 2, 4), 1.0), ((1, 2), 0.4), ((0, 1), 0.3)]
)
def test_query_ratio(granularities, query_ratio, pattern):
    choice = synthetic_choice((50, 80), granularities, query_ratio, pattern)
    assert choice.shape == (50, 80) and ratio(choice, granularities) == pytest.approx(query_ratio, abs=1e-3)


def test_coarse_granularities_share_alike():
    counts = synthetic_choice((50, 80), (1, 2, 4), 0.5, 'random').flatten().bincount()
    assert abs(counts[1] - counts[2]) <= 1


def test_patterns():
    clustered, random = (synthetic_choice((50, 80), (1, 2, 4), 0.5, pattern) for pattern in PATTERNS)
    assert neighbours_alike(clustered) > 0.9
    chance = sum((random == k).float().mean().item() ** 2 for k in range(3))
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


def test_replayed_choice_is_that_of_the_place():
    choice = torch.tensor([[0, 1, 2], [2, 0, 1]])
    assert torch.equal(replay_choice(choice, (2, 3)), choice)
    assert torch.equal(replay_choice(choice, (4, 9)), choice.repeat_interleave(2, 0).repeat_interleave(3, 1))
    # The centres of 1 x 2 regions lie at 1/4 and 3/4 of the width: in the first and the last column.
    assert replay_choice(choice, (1, 2)).tolist() == [[2, 1]]


def test_dense_layers_have_nothing_to_record_and_to_force(make_backbone):
    small = make_backbone('pvt', dge=dict(granularities=(1, 2), dense_layers=['stages.0'])).eval()
    with torch.no_grad():
        small(torch.randn(1, 3, 32, 32))
    ((layer,),) = recording = record_routing(small)
    assert torch.equal(layer.choice, small.stages[1].dge[0].decision.choice[0])
    assert recorded_granularities(recording, 2) == [(1, 2), (1, 2)]
    model = make_backbone('pvt', dge=dict(granularities=(1, 2), dense_layers=['stages.0.blocks.0'])).eval()
    replay_routing(model, (32, 32), recording)
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert torch.equal(model.stages[1].dge[0].decision.choice[0], layer.choice)
    force_routing(model, (32, 32), 0.5, 'random')
    assert torch.equal(model.stages[0].dge[1].forced, synthetic_choice((4, 4), (1, 2), 0.5, 'random', 0))


def test_backbone_replays_another_one(make_backbone):
    def ran(model, size):
        with torch.no_grad():
            model.eval()(torch.randn(2, 3, *size))
        return [[encoder.decision.choice for encoder in stage.dge] for stage, _ in model.named_stages()]

    small = make_backbone('pvt', dge=dict(granularities=((1, 2), (0, 1))))  # two layers and one
    chosen = ran(small, (32, 32))
    recording = record_routing(small, image=1)
    assert recorded_granularities(recording, 2) == [(1, 2), (0, 1)]
    assert recorded_granularities(recording, 1) == [(1, 2)]
    assert recorded_granularities(recording, 4) == [(1, 2), (1, 2), (0, 1), (0, 1)]

    model = make_backbone('pvt', dge=dict(granularities=((1, 2), (0, 1))))
    replay_routing(model, (64, 96), recording)
    for ours, theirs in zip(ran(model, (64, 96)), chosen):
        for layer, other in zip(ours, theirs, strict=True):
            assert torch.equal(layer[0], replay_choice(other[1], layer.shape[1:]))

    plain = make_backbone('deit', dge=dict(granularities=(1, 2)))  # three layers: the first two take the first of two
    replay_routing(plain, (32, 32), recording)
    (layers,) = ran(plain, (32, 32))
    for layer, other in zip(layers, (0, 0, 1)):
        assert torch.equal(layer[0], replay_choice(chosen[0][other][1], (4, 4)))


def test_other_granularities_cannot_be_replayed(make_backbone):
    recording = [[LayerChoice((1, 2), torch.zeros(2, 2, dtype=torch.long))]]
    with pytest.raises(
        ValueError,
        match=r'Layer 0 of stage 0 has granularities \(1, 2, 4\), but the recorded one '
        r'\(1, 2\): build the backbone with dge=dict\(granularities=\[\(1, 2\), \(1, 2\)\]\)',
    ):
        replay_routing(make_backbone('pvt', dge=dict(granularities=(1, 2, 4))), (64, 64), recording)


@pytest.mark.parametrize(
    'query_ratio, pattern, said',
    [
        (0.1, 'random', r'query_ratio=0.1: granularities \(1, 2, 4\), .* allow 0.1562 to 1.0000'),
        (0.5, 'stripes', r"pattern='stripes': choose from \('clustered', 'random'\)"),
    ],
)
def test_errors(query_ratio, pattern, said):
    with pytest.raises(ValueError, match=said):
        synthetic_choice((4, 4), (1, 2, 4), query_ratio, pattern)
