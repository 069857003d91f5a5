from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

import mmdyn
from mmdyn.analysis.benchmark import (
    PAUSE,
    SUITES,
    Case,
    Options,
    build,
    graphed_cases,
    groups_of,
    measure,
    peer_of,
    record,
    runtime_cases,
    sample_by_mmcv_fallback,
)
from mmdyn.analysis.flops import build_model
from mmdyn.analysis.latency import largest_difference, supports_bfloat16
from mmdyn.analysis.passes import inference
from mmdyn.analysis.runtimes import versions
from mmdyn.analysis.synthetic import LayerChoice
from mmdyn.models.layers import deformable_sampling
from mmdyn.models.stage import run_blocks

CONFIGS = Path(mmdyn.__file__).parents[1] / 'configs/demo'
ONCE = Options(rounds=1)
BFLOAT16 = ['dense bfloat16', 'DGE bfloat16'] if supports_bfloat16('cpu') else []
# What the demo's routers choose when all choose the coarsest: of 4, 4, 2 and 2 cells.
COARSEST = [[LayerChoice(sides, torch.full((1, 1), len(sides) - 1))] for sides in ((1, 2, 4),) * 2 + ((1, 2),) * 2]


def coarsest_ratio(attention):
    """Query ratio at the demo's coarsest granularities, 4, 4, 2 and 2, on maps of 64 x 80 to 8 x 10 cells.

    A query counts as what it costs; ``attention`` tells that of (channels, keys) for the first half of a block.
    """
    used = total = 0
    for dim, ratio, cells, keys, side in (
        (64, 8, 5120, 80, 4),
        (128, 8, 1280, 80, 4),
        (320, 4, 320, 80, 2),
        (512, 4, 80, 80, 2),
    ):
        cost = attention(dim, keys) + 2 * ratio * dim**2
        used, total = used + cells / side**2 * cost, total + cells * cost
    return used / total


@pytest.mark.parametrize(
    'arch, peer, attention',
    [
        ('PVT-tiny', 'mmdet', lambda dim, keys: 2 * dim**2 + 2 * keys * dim),
        # Offsets and weights of 4 points for each head, of 64 channels, the output, and 4 cells for each point.
        ('DPVT-tiny', 'mmcv fallback', lambda dim, keys: dim * dim // 64 * 12 + dim**2 + 16 * dim),
    ],
)
def test_detection(arch, peer, attention):
    options = ONCE._replace(patterns=('clustered', 'random', 'trained'), recording=COARSEST)
    group = measure('det', arch, (256, 320), 1, options)
    rows = group.pop('rows')
    assert group == dict(suite='det', arch=arch, shape=[256, 320], batch=1)
    assert list(rows) == ['dense', 'DGE clustered', 'DGE random', 'DGE trained', 'DGE finest', peer, *BFLOAT16]
    dense = rows['dense']
    assert dense['macs_ratio'] == dense['time_ratio'] == dense['memory_ratio'] == dense['query_ratio'] == 1
    for name in ('DGE clustered', 'DGE random', *BFLOAT16[1:]):
        assert rows[name]['query_ratio'] == pytest.approx(0.5, abs=0.03)
        assert 0.5 < rows[name]['macs_ratio'] < 0.7
    assert rows['DGE trained']['query_ratio'] == pytest.approx(coarsest_ratio(attention), rel=1e-3)
    assert rows['DGE finest']['query_ratio'] == pytest.approx(1)
    assert rows[peer]['macs_ratio'] == 1
    for name in ('DGE finest', peer):
        assert rows[name]['max_difference'] < 1e-4
    for name in BFLOAT16[:1]:
        assert 1e-4 < rows[name]['max_difference'] < 0.1
    for row in rows.values():
        assert row['efficiency'] == pytest.approx(row['macs_ratio'] / row['time_ratio'])
        # At least the first map (64, 64, 80), in the smaller of the two precisions.
        assert row['peak_memory'] > 64 * 64 * 80 * 2
        assert row['memory_ratio'] == pytest.approx(row['peak_memory'] / dense['peak_memory'])


@pytest.mark.parametrize('name', ['PVT-tiny', 'DPVT-tiny', 'DeiT-tiny'])
def test_peers_compute_the_same(name):
    images, dense = torch.randn(2, 3, 64, 96), build(name, (64, 96))
    theirs, _ = peer_of(name, (64, 96), dense)
    with torch.inference_mode():
        ours, theirs = (model(images) for model in (dense, theirs))
    difference = largest_difference(ours, theirs)
    assert difference < 1e-4 and (difference > 0 or not run_blocks.kernels)  # plain PyTorch may do what a peer does


def test_the_fallback_samples_only_in_the_peer():
    dense = build('DPVT-tiny', (64, 64))
    peer, _ = peer_of('DPVT-tiny', (64, 64), dense)
    kernels, seen = list(deformable_sampling.kernels), []
    handle = (
        peer.stages[0]
        .blocks[0]
        .attn.proj.register_forward_hook(lambda *args: seen.append(deformable_sampling.kernels[0]))
    )
    peer(torch.randn(1, 3, 64, 64))
    assert seen == [sample_by_mmcv_fallback] and deformable_sampling.kernels == kernels
    handle.remove()
    with pytest.raises(ValueError, match='extra tokens'):
        peer.stages[0].blocks[0].attn(torch.zeros(1, 5, 64), torch.zeros(1, 5, 64), (2, 2), num_extra=1)
    assert deformable_sampling.kernels == kernels


def test_attention_alone():
    rows = measure('det', 'DPVT-tiny attention', (64, 96), 1, ONCE)['rows']
    assert list(rows) == ['ours', 'mmcv fallback'] and rows['mmcv fallback']['macs_ratio'] == 1
    assert rows['ours']['max_difference'] == 0 and 0 < rows['mmcv fallback']['max_difference'] < 1e-4


def test_training():
    rows = measure('train', 'PVT-tiny', (256, 320), 1, ONCE)['rows']
    assert list(rows) == ['dense', 'DGE sparse', 'DGE pair', 'DGE dense']
    for name in ('DGE sparse', 'DGE pair', 'DGE dense'):
        assert 0.5 < rows[name]['macs_ratio'] < 0.7
    # Gradients of 12.7 million weights and more.
    assert all(row['peak_memory'] > 4 * 12.7e6 for row in rows.values())


@torch.no_grad()
def test_recorded_models():
    """On a CPU, where there is nothing to record; the routers decide, within a budget."""
    pytest.importorskip('mmdyn.kernels')
    dense = build('DeiT-tiny', (32, 32))
    bounded, exact = (build('DeiT-tiny', (32, 32), granularities=(1, 2)) for _ in range(2))
    for encoder in (*bounded.dge, exact.dge[0]):
        encoder.forced = torch.zeros(1, 1, dtype=torch.long)
    images = torch.randn(1, 3, 32, 32)
    cases = graphed_cases(dense, bounded, exact, images, ONCE)
    assert [*cases] == ['DGE exact', 'dense graphed', 'DGE exact graphed', 'DGE bounded graphed']
    for name, model in zip(list(cases)[1:], (dense, exact, bounded)):
        assert torch.equal(cases[name].run()[0], model(images)[0])
        assert cases[name].reference == ('' if model is dense else 'dense graphed')
    assert cases['DGE exact graphed'].query_ratio() == pytest.approx(0.4)  # of 5 queries with the class token
    assert cases['DGE bounded graphed'].query_ratio() == pytest.approx(1)  # as it is forced to


def test_a_case_may_be_compared_with_another_than_the_first(monkeypatch):
    cases = {
        'dense': Case(lambda: torch.ones(1), lambda: 8.0),
        'graphed': Case(lambda: torch.ones(1), lambda: 4.0),
        'DGE graphed': Case(lambda: torch.ones(1), lambda: 1.0, reference='graphed'),
    }
    monkeypatch.setattr('mmdyn.analysis.benchmark.cases_of', lambda *_: cases)
    rows = measure('cls', 'PVT-tiny', (8, 8), 1, ONCE)['rows']
    assert [row['macs_ratio'] for row in rows.values()] == [1, 0.5, 0.25]


@pytest.mark.parametrize('arch, side', [('timm ViT-tiny', 128), ('mmseg MiT-b0', 64)])
def test_models_of_other_libraries(arch, side):
    rows = measure('any', arch, (side, side), 1, ONCE._replace(patterns=('clustered',)))['rows']
    assert list(rows) == ['dense', 'DGE clustered', 'DGE finest']
    assert rows['DGE clustered']['query_ratio'] == pytest.approx(0.5, abs=0.15)  # of few regions
    assert 0.4 < rows['DGE clustered']['macs_ratio'] < 0.8
    assert rows['DGE finest']['max_difference'] < 1e-4
    assert 1 < rows['DGE finest']['macs_ratio'] < 1.01


def test_coarse_to_fine():
    rows = measure('cfvit', 'DeiT-small', (224, 224), 4, ONCE)['rows']
    assert list(rows) == ['timm', 'CF-ViT, 0% stop', 'CF-ViT, 50% stop', 'CF-ViT, 100% stop']
    # 4.60 G for the plain model, 1.10 G for the coarse and 2.91 G for the fine stage, all without the head.
    for name, stop in (('CF-ViT, 0% stop', 0), ('CF-ViT, 50% stop', 0.5), ('CF-ViT, 100% stop', 1)):
        assert rows[name]['macs_ratio'] == pytest.approx((1.10 + (1 - stop) * 2.91) / 4.60, abs=0.005)


@pytest.fixture
def runtimes(monkeypatch):
    """Runtimes that are there but for OpenVINO's bfloat16, and run the dense model; what they were given."""
    given = []

    def by_runtime(model, images, threads, precision='f32'):
        given.append((threads, precision))
        if precision == 'bf16':
            raise RuntimeError('no such type\nand more')
        return lambda: inference(model, images, None)()

    monkeypatch.setattr('mmdyn.analysis.benchmark.versions', lambda: dict(onnxruntime='1.2', OpenVINO='3.4'))
    monkeypatch.setattr('mmdyn.analysis.benchmark.to_onnx', lambda model, images: model)
    monkeypatch.setattr('mmdyn.analysis.benchmark.supports_bfloat16', lambda device: True)
    for name in ('by_onnxruntime', 'by_openvino'):
        monkeypatch.setattr(f'mmdyn.analysis.benchmark.{name}', by_runtime)
    return given


def test_runtimes(runtimes, capsys):
    rows = measure('peers', 'DeiT-tiny', (64, 96), 1, ONCE)['rows']
    assert list(rows) == [
        'dense',
        'DGE clustered',
        'timm',
        'onnxruntime',
        'OpenVINO',
        'dense bfloat16',
        'DGE bfloat16',
    ]
    assert runtimes == [(torch.get_num_threads(), precision) for precision in ('f32', 'f32', 'bf16')]
    assert capsys.readouterr().err == (
        'benchmark.py: OpenVINO bfloat16 is left out of DeiT-tiny: RuntimeError: no such type\n'
    )
    for name in ('onnxruntime', 'OpenVINO'):
        assert rows[name]['macs_ratio'] == 1 and rows[name]['max_difference'] == 0
        assert not {'peak_memory', 'memory_ratio'} & set(rows[name])


@torch.no_grad()
def test_installed_runtimes(make_backbone, randomise, monkeypatch):
    names = [name for name, version in versions().items() if version and name != 'OpenVINO']  # see test_runtimes.py
    if not names:
        pytest.skip("none is there: pip install 'mmdyn[bench]'")
    monkeypatch.setattr('mmdyn.analysis.benchmark.versions', lambda: dict.fromkeys(names, '1'))
    arch = dict(embed_dims=(16,), depths=(1,), num_heads=(2,), mlp_ratios=(2,), num_points=(3,))
    dense, images = randomise(make_backbone('dpvt', arch=arch)).eval(), torch.randn(1, 3, 64, 96)
    cases = runtime_cases('DPVT', dense, images, Case(lambda: None, lambda: 1.0))
    assert set(names) <= set(cases)
    assert all(largest_difference(cases[name].run(), dense(images)) < 1e-4 for name in names)


def test_images_of_dense_prediction_resize_position_embeddings(runtimes, monkeypatch):
    monkeypatch.setitem(SUITES['peers'], 'large', {'PVT-tiny': (64, 128)})
    seen = []
    monkeypatch.setattr('mmdyn.analysis.benchmark.build', lambda arch, size, **dge: seen.append(size) or 1 / 0)
    for shape in ((64, 64), (64, 128)):
        with pytest.raises(ZeroDivisionError):
            measure('peers', 'PVT-tiny', shape, 1, ONCE)
    assert seen == [(64, 64), (256, 256)]


def test_short_runs_are_run_more_often(monkeypatch):
    rounds, paused = [], []

    def interleaved_times(cases, number, prepare=None, **options):
        rounds.append(number)
        if prepare is not None:
            prepare('dense')
        return {name: [1.0] for name in cases}

    monkeypatch.setattr('mmdyn.analysis.benchmark.interleaved_times', interleaved_times)
    case = Case(lambda: None, lambda: 1.0, in_torch=False)
    monkeypatch.setattr('mmdyn.analysis.benchmark.cases_of', lambda *_: dict(dense=case))
    monkeypatch.setattr('mmdyn.analysis.benchmark.time.sleep', paused.append)
    monkeypatch.setitem(SUITES['peers'], 'large', {'PVT-tiny': (64, 256)})
    for suite, width in (('cls', 128), ('train', 128), ('peers', 128), ('peers', 256)):
        measure(suite, 'PVT-tiny', (64, width), 1, ONCE._replace(rounds=3))
    assert rounds == [15, 3, 15, 3] and paused == [PAUSE, PAUSE]


def test_a_suite_has_more_images_on_cuda():
    assert list(groups_of('det', 'cuda', ['PVT-tiny'])) == [('PVT-tiny', (800, 1280), batch) for batch in (1, 2)]
    assert list(groups_of('cls', 'cpu', ['A', 'B'], (32, 64), 5)) == [('A', (32, 64), 5), ('B', (32, 64), 5)]
    assert list(groups_of('cfvit', 'cuda')) == [('DeiT-small', (224, 224), 64)]


@pytest.fixture
def trained(tmp_path):
    """A function that writes the demo's weights, changed by a function, and an image; returns where they are."""

    def write(name, change=lambda model: None):
        model = build_model(Config.fromfile(CONFIGS / name))
        change(model)
        torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
        cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((64, 64, 3), np.uint8))
        return CONFIGS / name, str(tmp_path / 'model.pth'), tmp_path

    return write


def test_records_what_routers_choose(trained):
    def choose_the_coarsest(model):
        for stage in model.backbone.stages:
            for encoder in stage.dge:
                torch.nn.init.constant_(encoder.router.bias[-1:], 1000.0)

    found = record(*trained('pvt-mini-dge_digits.py', choose_the_coarsest))
    assert [stage[0].granularities for stage in found] == [stage[0].granularities for stage in COARSEST]
    assert all((layer.choice == len(layer.granularities) - 1).all() for stage in found for layer in stage)


def test_errors_of_recording(trained):
    with pytest.raises(ValueError, match='has no DGE: give the --trained-config of one that has'):
        record(*trained('pvt-mini_digits.py'))
    with pytest.raises(ValueError, match=r'There is no checkpoint missing.pth: run `make demo`'):
        record(CONFIGS / 'pvt-mini-dge_digits.py', 'missing.pth', '')
