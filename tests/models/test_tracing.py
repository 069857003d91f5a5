"""Tracers, exporters and counters of operations on the backbones, which have never run before."""

import io
from collections import Counter

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.registry import MODELS

from mmdyn.models.tracing import TELLS_EXPORTS, image_of_each, to_integers

NAMES = ['pvt', 'dpvt', 'deit', 'lvvit', 'cfvit']
DGES = [
    ('pvt', dict(granularities=(1, 2, 4))),
    ('pvt', dict(granularities=(0, 1), routing='layer')),
    ('dpvt', dict(granularities=(0, 1, 2))),
    ('deit', dict(granularities=(1, 2, 4), test_budget=0.5)),
    ('lvvit', dict(granularities=(1, 2))),
]
# Small ones, for what takes long.
SHALLOW = {
    'deit': dict(arch=dict(embed_dim=16, depth=1, num_heads=2, mlp_ratio=2)),
    'dpvt': dict(arch=dict(embed_dims=(16,), depths=(1,), num_heads=(2,), mlp_ratios=(2,), num_points=(3,))),
    'pvt': dict(arch=dict(embed_dims=(16,), depths=(1,), num_heads=(2,), mlp_ratios=(2,), sr_ratios=(2,))),
    'cfvit': dict(arch=dict(family='deit', embed_dim=16, depth=2, num_heads=2, mlp_ratio=2), ema_start=1),
}
COUNTED = ('conv', 'linear', 'matmul', 'einsum')


def images_for(name, batch=2, seed=0):
    """Of a size that position embeddings are resized to, where there is another."""
    side = 24 if name == 'cfvit' else 44
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def export(model, images, strict=False, **options):
    """As torch.export does by itself since torch 2.7."""
    return torch.export.export(model, (images,), strict=strict, **options)


@torch.no_grad()
def assert_equal_outputs(recorded, model, name, batches=(2,)):
    """On the images that were recorded, and on others."""
    for batch in batches:
        for seed in range(3):
            images = images_for(name, batch, seed)
            torch.testing.assert_close(list(recorded(images)), list(model(images)), rtol=1e-4, atol=1e-5)


@pytest.fixture
def make_classifier(backbone_config):
    """CF-ViT's, which returns the logits of both stages."""
    pytest.importorskip('mmpretrain')
    head = dict(type='mmpretrain.LinearClsHead', num_classes=5, in_channels=16)
    return lambda: MODELS.build(
        dict(type='mmdyn.CoarseToFineClassifier', backbone=backbone_config('cfvit'), head=head)
    ).eval()


@pytest.mark.parametrize('name', NAMES)
def test_dense_models_trace_for_any_number_of_images(name, make_backbone):
    model = make_backbone(name).eval()
    assert_equal_outputs(torch.jit.trace(model, images_for(name)), model, name, batches=(1, 2, 3))


@pytest.mark.parametrize('name, dge', DGES)
def test_dynamic_models_trace_for_any_number_of_queries(name, dge, make_backbone, encoders):
    model = make_backbone(name, dge=dge).eval()
    traced, queries = torch.jit.trace(model, images_for(name)), []
    assert_equal_outputs(traced, model, name)
    for seed in range(3):
        model(images_for(name, seed=seed))
        queries.append([encoder.decision.queries.tolist() for encoder in encoders(model)])
    assert 'test_budget' in dge or 'routing' in dge or queries[0] != queries[1] != queries[2]
    with pytest.raises(RuntimeError):
        traced(images_for(name, 3))


def test_classifier_of_two_stages_traces(make_classifier):
    model = make_classifier()
    assert_equal_outputs(torch.jit.trace(model, images_for('cfvit')), model, 'cfvit', batches=(1, 2))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dge', [None, dict(granularities=(0, 1, 2))])
@pytest.mark.parametrize('counter', ['mmengine', 'fvcore'])
def test_counters_count_what_ran(counter, dge, name, make_backbone):
    """On these images; the cost tells it afterwards, and integers where there are sizes."""
    if name == 'cfvit' and dge:
        pytest.skip('CF-ViT has no DGE')
    analysis = FlopAnalyzer if counter == 'mmengine' else pytest.importorskip('fvcore.nn').FlopCountAnalysis
    model = make_backbone(name, **(dict(dge=dge) if dge else {})).eval()
    counts = analysis(model, images_for(name)).unsupported_ops_warnings(False).by_operator()
    cost = model.cost
    expected = 2 * sum(model.stage_macs()) if name == 'cfvit' else cost.spent.sum()
    assert sum(counts[kind] for kind in COUNTED if kind in counts) == expected
    with torch.no_grad():
        model(images_for(name))
    assert torch.equal(cost.spent, model.cost.spent) and type(cost.dense) is int
    assert all(type(side) is int for shape in model.last_shapes for side in shape)


@pytest.mark.parametrize('strict', [False, True])
def test_dense_models_export_for_any_number_of_images(strict, make_backbone):
    if strict and not TELLS_EXPORTS:
        pytest.skip('torch before 2.7: "Mutating module attribute last_pass during export"')
    model, batch = make_backbone('deit', **SHALLOW['deit']).eval(), torch.export.Dim('batch', max=64)
    exported = export(model, images_for('deit'), strict, dynamic_shapes=({0: batch},)).module()
    assert_equal_outputs(exported, model, 'deit', batches=(2, 3))


@pytest.mark.parametrize(
    'name, dge',
    [
        ('deit', dict(granularities=(1, 2))),
        ('deit', dict(granularities=(1, 2), test_budget=0.5)),
        ('dpvt', dict(granularities=(0, 1))),
    ],
)
def test_dynamic_models_export_for_any_number_of_queries(name, dge, make_backbone):
    model = make_backbone(name, dge=dge, **SHALLOW[name]).eval()
    if not TELLS_EXPORTS and 'test_budget' not in dge:
        with pytest.raises(RuntimeError, match=r'exports no numbers of queries .*: install torch 2.7 or .*set_budget'):
            export(model, images_for(name))
        return
    assert_equal_outputs(export(model, images_for(name)).module(), model, name)


@pytest.mark.filterwarnings('ignore:.*get_attr')  # of torch before 2.7 about its own graph
def test_both_stages_export(make_backbone):
    model = make_backbone('cfvit', **SHALLOW['cfvit']).eval()
    assert_equal_outputs(export(model, images_for('cfvit')).module(), model, 'cfvit')


def test_an_export_is_no_pass(make_backbone, encoders):
    """It has tensors without values, and leaves what an earlier pass left."""
    model = make_backbone('deit', dge=dict(test_budget=0.5), **SHALLOW['deit']).eval()
    with torch.no_grad():
        model(images_for('deit'))
    spent, decision = model.cost.spent, encoders(model)[0].decision
    export(model, images_for('deit', 1))
    assert torch.equal(model.cost.spent, spent) and encoders(model)[0].decision is decision


@pytest.mark.skipif(not TELLS_EXPORTS, reason='torch before 2.7 exports no model with DGE')
def test_an_export_of_a_dynamic_model_has_a_number_of_images(make_backbone):
    model, batch = make_backbone('deit', dge=dict(), **SHALLOW['deit']).eval(), torch.export.Dim('batch', max=64)
    with pytest.raises(RuntimeError, match='A model with DGE is exported for a fixed number of images'):
        export(model, images_for('deit'), dynamic_shapes=({0: batch},))


@pytest.mark.parametrize('name, dge, what', [('pvt', dict(), 'the numbers of queries'), ('dpvt', None, 'deformable')])
def test_what_the_older_exporter_to_onnx_would_get_wrong(name, dge, what, make_backbone):
    model = make_backbone(name, dge=dge).eval()
    with pytest.raises(RuntimeError, match=f'cannot express {what}.*: write dynamo=True, or count.*get_flops.py'):
        torch.onnx.export(model, (images_for(name),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize(
    'name, dge', [('pvt', None), ('deit', None), ('cfvit', None), ('deit', dict()), ('dpvt', dict())]
)
@pytest.mark.parametrize('dynamo', [False, True])
def test_exports_to_onnx(dynamo, name, dge, make_backbone):
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    if dge is not None and not dynamo:
        pytest.skip('refused')
    model = make_backbone(name, **SHALLOW[name], **({} if dge is None else dict(dge=dge))).eval()
    if dynamo:
        shapes = None if dge is not None else ({0: torch.export.Dim('batch', max=64)},)
        program = torch.onnx.export(model, (images_for(name),), dynamo=True, dynamic_shapes=shapes, verbose=False)
        graph = program.model_proto.SerializeToString()
    else:
        file = io.BytesIO()
        torch.onnx.export(
            model,
            (images_for(name),),
            file,
            dynamo=False,
            input_names=['images'],
            dynamic_axes={'images': {0: 'batch'}},
        )
        graph = file.getvalue()
    session = runtime.InferenceSession(graph, providers=['CPUExecutionProvider'])
    (images,) = session.get_inputs()

    def recorded(x):
        return [torch.from_numpy(output) for output in session.run(None, {images.name: x.numpy()})]

    assert_equal_outputs(recorded, model, name, batches=(2,) if dge is not None else (2, 3))


def test_integers_stay_tensors_in_a_trace():
    assert to_integers(torch.tensor([3, 0])) == [3, 0]
    traced = torch.jit.trace(lambda counts: counts.new_zeros(to_integers(counts)), torch.tensor([3, 1]))
    assert traced(torch.tensor([2, 5])).shape == (2, 5)


@pytest.mark.parametrize('lengths', [[2, 0, 3], [4], [], [0, 0]])
def test_image_of_each_query(lengths):
    expected = list(Counter(dict(enumerate(lengths))).elements())
    assert image_of_each(lengths, sum(lengths), torch.device('cpu')).tolist() == expected


def test_images_of_queries_in_a_trace():
    def images(counts):
        return image_of_each(to_integers(counts), counts.sum(), counts.device)

    traced = torch.jit.trace(images, torch.tensor([2, 0, 3]), check_trace=False)
    assert traced(torch.tensor([1, 4, 0])).tolist() == [0, 1, 1, 1, 1]
