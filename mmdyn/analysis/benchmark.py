"""The cases of tools/analysis_tools/benchmark.py, which says what each of them is, and how they are measured."""

import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from ..engine.command import first_line
from ..models.adapters import apply_dge
from ..models.adapters import cost as spent
from ..models.backbones.budget import encoders_of
from ..models.layers import DeformableAttention, deformable_sampling
from .conversion import translate
from .flops import build_model, dynamic_backbone, image_files, run_on_images
from .latency import interleaved_times, largest_difference, peak_memory, ratio, supports_bfloat16
from .others import OTHERS, build_other
from .passes import AUTOCAST, build, family_and_size, inference, precision, round_products, training_step
from .runtimes import by_onnxruntime, by_openvino, to_onnx, versions
from .synthetic import PATTERNS, Recording, force_routing, record_routing, recorded_granularities, replay_routing

ATTENTION = ' attention'  # behind the name of an arch: its attention layers alone
PYRAMIDS = ('PVT-small', 'PVT-medium', 'DPVT-small', 'DPVT-medium')
SUITES = dict(
    cls=dict(
        archs=('PVT-small', 'DeiT-small'), shapes=((224, 224), (256, 256)), batches=(1,), on_cuda=(1, 8, 64), runs=5
    ),
    det=dict(archs=(*PYRAMIDS, f'DPVT-small{ATTENTION}'), shapes=((800, 1280),), batches=(1,), on_cuda=(1, 2)),
    seg=dict(archs=PYRAMIDS, shapes=((512, 2048),), batches=(1,), on_cuda=(1, 2)),
    cfvit=dict(archs=('DeiT-small',), shapes=((224, 224),), batches=(64,)),
    train=dict(archs=('PVT-small',), shapes=((256, 256),), batches=(32,)),
    any=dict(
        archs=(
            'timm ViT-small',
            'timm DINOv3-small',
            'mmpretrain DeiT-small',
            'timm PVTv2-b1',
            'mmdet PVTv2-b1',
            'mmseg MiT-b1',
            'timm Swin-tiny',
            'mmdet Swin-tiny',
        ),
        shapes=((224, 224),),
        batches=(1, 16),
        # Beside those, one image of dense prediction.
        large={
            'timm PVTv2-b1': (800, 1280),
            'mmdet PVTv2-b1': (800, 1280),
            'mmseg MiT-b1': (512, 2048),
            'mmdet Swin-tiny': (800, 1280),
        },
    ),
    peers=dict(
        archs=('PVT-small', 'DPVT-small', 'DeiT-small'),
        shapes=((224, 224),),
        batches=(1,),
        large={'PVT-small': (800, 1280), 'DPVT-small': (800, 1280)},
        runs=5,
    ),
)
PAUSE = 0.05  # seconds before each run of peers: threads that wait for work in vain would hold up other libraries' ones


class Options(NamedTuple):
    """How cases run.

    Attributes:
        device: what they run on.
        dtype: a key of :data:`~mmdyn.analysis.passes.AUTOCAST`.
        rounds: measured runs of each case; those of small images of cls and peers run five times as often.
        query_ratio: of the routing that is made up.
        patterns: of the routing: those of :data:`~mmdyn.analysis.synthetic.PATTERNS`, and ``'trained'``.
        recording: what is replayed as ``'trained'``.
    """

    device: str = 'cpu'
    dtype: str = 'float32'
    rounds: int = 7
    query_ratio: float = 0.5
    patterns: Sequence[str] = PATTERNS
    recording: Recording | None = None


class Case(NamedTuple):
    """What is timed.

    Attributes:
        run: one pass; of a case that is ``exact``, it returns the outputs.
        macs: multiply-adds of an image in the last pass.
        query_ratio: share of the queries in the last pass, where the model has any to choose.
        exact: whether the outputs are to be those of the first case.
        reference: the case that it is compared with, the first one if it names none.
        in_torch: whether it is torch that allocates its memory, which can be told then.
    """

    run: Callable[[], object]
    macs: Callable[[], float]
    query_ratio: Callable[[], float] | None = None
    exact: bool = False
    reference: str = ''
    in_torch: bool = True


def is_large(suite: str, arch: str, shape: Sequence[int]) -> bool:
    """Whether images are those of dense prediction that a suite has for an architecture beside its others."""
    return tuple(shape) == SUITES[suite].get('large', {}).get(arch)


def sample_by_mmcv_fallback(
    value: Tensor, points: Tensor, weights: Tensor, shape: tuple[int, int], lengths: list[int] | None = None
) -> Tensor:
    """``deformable_sampling`` by mmcv's function for the CPU, which takes as many queries of each image."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    sides, batch = torch.tensor([shape], device=value.device), len(value)
    where, weights = (x.unflatten(0, (batch, -1))[:, :, :, None] for x in ((points + 0.5) / sides.flip(1), weights))
    return multi_scale_deformable_attn_pytorch(value, sides, where, weights).flatten(0, 1)


class FallbackAttention(DeformableAttention):
    """Deformable attention that samples by mmcv's function."""

    def forward(self, *args, **options):
        kernels = deformable_sampling.kernels
        kernels.insert(0, sample_by_mmcv_fallback)
        try:
            return super().forward(*args, **options)
        finally:
            kernels.remove(sample_by_mmcv_fallback)


def peer_of(name: str, img_size: tuple[int, int], dense: nn.Module) -> tuple[nn.Module, str]:
    """The same model by another package and that package's name; the two have the same weights afterwards."""
    family, arch = family_and_size(name)
    torch.manual_seed(0)
    if family == 'DPVT':
        theirs = copy.deepcopy(dense)
        for module in theirs.modules():
            if isinstance(module, DeformableAttention):
                module.__class__ = FallbackAttention  # the weights stay
        return theirs, 'mmcv fallback'
    if family == 'PVT':
        from mmdet.models.backbones import PyramidVisionTransformer

        package, kind = 'mmdet', 'mmdet-pvt'
        theirs = PyramidVisionTransformer(
            pretrain_img_size=img_size, num_layers=[len(stage.blocks) for stage in dense.stages]
        )
        theirs.init_weights()
    else:
        import timm

        package, kind = 'timm', 'deit'
        theirs = timm.create_model(f'deit_{arch}_patch16_224', img_size=img_size, num_classes=0)
    state, *_ = translate(kind, theirs.state_dict())
    dense.load_state_dict({name.removeprefix('backbone.'): value for name, value in state.items()})
    return theirs.eval(), package


def backbone_case(
    model: nn.Module,
    images: Tensor,
    autocast: torch.dtype | None,
    exact: bool = False,
    step: Callable = inference,
) -> Case:
    """A pass of one of our backbones."""
    return Case(
        step(model.to(images.device), images, autocast),
        lambda: model.cost.spent.mean().item(),
        lambda: model.cost.query_ratio.mean().item(),
        exact,
    )


def dynamic_like(dense: nn.Module, arch: str, img_size: tuple[int, int], shape: tuple[int, int], options: Options):
    """A function that builds the model with DGE: by a pattern of the routing, its query ratio, and options of DGE."""

    def dynamic(pattern: str, query_ratio: float = options.query_ratio, **dge) -> nn.Module:
        if pattern == 'trained':
            dge['granularities'] = recorded_granularities(options.recording, len(list(dense.named_stages())))
        model = build(arch, img_size, **{'granularities': (1, 2, 4), **dge})
        # The weights of all cases are alike; those of the routers decide nothing here.
        model.load_state_dict({**model.state_dict(), **dense.state_dict()})
        if pattern == 'trained':
            replay_routing(model, shape, options.recording)
        else:
            force_routing(model, shape, query_ratio, pattern)
        return model

    return dynamic


def backbone_cases(suite: str, arch: str, images: Tensor, options: Options) -> dict[str, Case]:
    """The dense model, DGE, and where it is not trained the same by peers and in bfloat16."""
    shape, autocast = tuple(images.shape[-2:]), AUTOCAST[options.dtype]
    # Of dense prediction the images have many sizes; position embeddings are of those that the backbone was trained on.
    img_size = (256, 256) if suite in ('det', 'seg') or is_large(suite, arch, shape) else shape
    dense = build(arch, img_size)
    dynamic = dynamic_like(dense, arch, img_size, shape, options)
    if suite == 'train':
        models = {f'DGE {mode}': dynamic(options.patterns[0], train_mode=mode) for mode in ('sparse', 'pair', 'dense')}
        return {
            name: backbone_case(model, images, autocast, step=training_step)
            for name, model in {'dense': dense, **models}.items()
        }
    theirs, package = peer_of(arch, img_size, dense)
    models = {pattern: dynamic(pattern) for pattern in options.patterns[: 1 if suite == 'peers' else None]}
    cases = {'dense': backbone_case(dense, images, autocast)}
    cases |= {f'DGE {pattern}': backbone_case(model, images, autocast) for pattern, model in models.items()}
    if suite != 'peers':
        cases['DGE finest'] = backbone_case(dynamic('clustered', query_ratio=1.0), images, autocast, exact=True)
    cases[package] = cases['dense']._replace(run=inference(theirs.to(images.device), images, autocast), exact=True)
    if suite == 'peers':
        cases |= runtime_cases(arch, dense, images, cases['dense'])
    if options.dtype == 'float32' and supports_bfloat16(images.device):
        cases['dense bfloat16'] = backbone_case(dense, images, torch.bfloat16, exact=True)
        cases['DGE bfloat16'] = backbone_case(models[options.patterns[0]], images, torch.bfloat16)
    if images.is_cuda and suite != 'peers':
        cases |= graphed_cases(dense, models[options.patterns[0]], dynamic('clustered'), images, options)
    return cases


def runtime_cases(arch: str, dense: nn.Module, images: Tensor, like: Case) -> dict[str, Case]:
    """The dense model, whose own case is given, by the runtimes that are installed; one that fails is told of."""
    makers = dict(onnxruntime=by_onnxruntime, OpenVINO=by_openvino)
    makers = {name: makers[name] for name, version in versions().items() if version}
    if 'OpenVINO' in makers and supports_bfloat16(images.device):
        makers['OpenVINO bfloat16'] = functools.partial(by_openvino, precision='bf16')
    cases, graph = {}, b''
    for name, make in makers.items():
        try:
            graph = graph or to_onnx(dense, images)
            run = make(graph, images, torch.get_num_threads())
            run()
        except Exception as error:  # whatever it is, the other cases are worth their time
            print(f'benchmark.py: {name} is left out of {arch}: {first_line(error)}', file=sys.stderr)
        else:
            cases[name] = like._replace(run=run, exact=True, in_torch=False)
    return cases


def graphed_cases(
    dense: nn.Module, bounded: nn.Module, exact: nn.Module, images: Tensor, options: Options
) -> dict[str, Case]:
    """Models that are recorded once and replayed, and with an exact budget also as it is.

    Args:
        dense: the dense model.
        bounded: a dynamic one, which gets places for a tenth of the dense queries more than it needs.
        exact: a dynamic one, which gets an exact budget.
        images: a batch.
        options: how.
    """
    from ..kernels.graphs import graphed

    autocast, cases = AUTOCAST[options.dtype], {}
    for encoder in encoders_of(exact):
        encoder.forced = None
    exact.set_budget(options.query_ratio)
    cases['DGE exact'] = backbone_case(exact, images, autocast)
    with precision(images, autocast):
        for name, model, margin in (('dense', dense, None), ('DGE exact', exact, None), ('DGE bounded', bounded, 0.1)):
            run = functools.partial(graphed(model.to(images.device), images, margin), images)
            case = backbone_case(model, images, autocast)
            cases[f'{name} graphed'] = case._replace(run=run, reference='' if model is dense else 'dense graphed')
    return cases


def attention_cases(arch: str, images: Tensor, options: Options) -> dict[str, Case]:
    """All attention layers of a dense DPVT on random tokens, beside their sampling by mmcv's fallback."""
    autocast = AUTOCAST[options.dtype]
    dense = build(arch, (256, 256))
    theirs, package = peer_of(arch, (256, 256), dense)
    inference(dense.to(images.device), images, autocast)()
    inputs = [
        torch.randn(len(images), h * w, dim, device=images.device)
        for (h, w), dim in zip(dense.last_shapes, dense.out_channels)
    ]

    def attend(model):
        return lambda _: [
            block.attn(x, x, shape)
            for stage, x, shape in zip(model.stages, inputs, dense.last_shapes)
            for block in stage.blocks
        ]

    macs = sum(
        h * w * query + static
        for stage, (h, w) in zip(dense.stages, dense.last_shapes)
        for query, static in (block.attn.macs((h, w), 0) for block in stage.blocks)
    )
    return {
        name: Case(inference(attend(model.to(images.device)), images, autocast), lambda: macs, exact=True)
        for name, model in (('ours', dense), (package, theirs))
    }


def coarse_to_fine_cases(arch: str, images: Tensor, options: Options) -> dict[str, Case]:
    """timm's DeiT, and CF-ViT's classification at thresholds that none, half or all of the images reach."""
    import timm

    autocast, shape = AUTOCAST[options.dtype], tuple(images.shape[-2:])
    ours = build(arch, shape).to(images.device)
    inference(ours, images[:1], autocast)()
    theirs = timm.create_model(f'{arch.lower().replace("-", "_")}_patch16_224', img_size=shape).eval().to(images.device)
    cases = {'timm': Case(inference(theirs, images, autocast), lambda: ours.cost.dense)}  # the same model
    for exits in (0.0, 0.5, 1.0):
        cases[f'CF-ViT, {exits:.0%} stop'] = coarse_to_fine_case(arch, ours.out_channels[-1], exits, images, autocast)
    return cases


def coarse_to_fine_case(arch: str, channels: int, exits: float, images: Tensor, autocast: torch.dtype | None) -> Case:
    """CF-ViT's classification at a threshold that a share of the images reaches."""
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    backbone = dict(type='mmdyn.CFViT', arch=arch.lower(), coarse_size=images.shape[-1] // 32)
    head = dict(type='LinearClsHead', num_classes=1000, in_channels=channels)
    model = MODELS.build(dict(type='mmdyn.CoarseToFineClassifier', backbone=backbone, head=head))
    predict, spent = inference(model.eval().to(images.device).predict, images, autocast), []

    def run():
        spent[:] = [sample.macs for sample in predict()]

    confidences = sorted((sample.coarse_score.max().item() for sample in predict()), reverse=True)
    stop = round(exits * len(images))
    model.test_cfg['threshold'] = confidences[stop - 1] if stop else 1.0
    return Case(run, lambda: statistics.mean(spent))


def other_cases(arch: str, images: Tensor, options: Options) -> dict[str, Case]:
    """A model of another library as it is, and with DGE."""
    (family, size), shape = family_and_size(arch, OTHERS), tuple(images.shape[-2:])
    autocast, granularities = AUTOCAST[options.dtype], OTHERS[family][1]

    def dynamic(pattern: str, query_ratio: float = options.query_ratio) -> nn.Module:
        model = apply_dge(build_other(family, size, shape), granularities, img_size=shape).to(images.device)
        force_routing(dynamic_backbone(model), shape, query_ratio, pattern)
        return model

    models = {f'DGE {pattern}': dynamic(pattern) for pattern in options.patterns if pattern != 'trained'}
    models['DGE finest'] = dynamic('clustered', 1.0)
    dense = build_other(family, size, shape).to(images.device)
    cases = {
        'dense': Case(
            inference(dense, images, autocast), lambda: spent(models['DGE finest']).dense, lambda: 1.0, exact=True
        )
    }
    for name, model in models.items():
        cases[name] = Case(
            inference(model, images, autocast),
            lambda model=model: spent(model).spent.mean().item(),
            lambda model=model: spent(model).query_ratio.mean().item(),
            exact=name == 'DGE finest',
        )
    return cases


def cases_of(suite: str, arch: str, images: Tensor, options: Options) -> dict[str, Case]:
    """The cases of one architecture by their names; the first is what the others are compared with."""
    if suite == 'any':
        return other_cases(arch, images, options)
    if suite == 'cfvit':
        return coarse_to_fine_cases(arch, images, options)
    if arch.endswith(ATTENTION):
        return attention_cases(arch.removesuffix(ATTENTION), images, options)
    return backbone_cases(suite, arch, images, options)


def measure(suite: str, arch: str, shape: Sequence[int], batch: int, options: Options) -> dict:
    """Time the cases of one architecture on random images.

    Args:
        suite: a key of :data:`SUITES`.
        arch: FAMILY-SIZE, of DPVT also with :data:`ATTENTION` behind it; in ``any``, a family of
            :data:`~mmdyn.analysis.others.OTHERS`.
        shape: (height, width) of the images in pixels.
        batch: their number.
        options: how.

    Returns:
        ``suite``, ``arch``, ``shape``, ``batch``, and ``rows``: of each case ``seconds``, ``spread``, ``time_ratio``,
        ``macs_ratio``, ``efficiency``, and where it has them ``peak_memory`` in bytes, ``memory_ratio``,
        ``query_ratio`` and ``max_difference``.
    """
    torch.manual_seed(0)
    round_products(options.dtype == 'tf32')
    cases = cases_of(suite, arch, torch.randn(batch, 3, *shape, device=options.device), options)
    times = interleaved_times(
        {name: case.run for name, case in cases.items()},
        options.rounds * (1 if is_large(suite, arch, shape) else SUITES[suite].get('runs', 1)),  # short runs vary more
        warmup=3 if options.device == 'cuda' else 1,
        device=options.device,
        prepare=(lambda _: time.sleep(PAUSE)) if suite == 'peers' else None,
    )
    first, rows = next(iter(cases)), {}
    expected = cases[first].run() if any(case.exact for case in cases.values()) else None
    for name, case in cases.items():
        reference = case.reference or first
        row = rows[name] = dict(
            seconds=statistics.median(times[name]),
            spread=max(times[name]) - min(times[name]),
            time_ratio=ratio(times, name, reference),
        )
        if case.in_torch:
            row['peak_memory'] = peak_memory(case.run, options.device)
            row['memory_ratio'] = row['peak_memory'] / rows[reference]['peak_memory']
        row['macs_ratio'] = case.macs() / cases[reference].macs()
        row['efficiency'] = row['macs_ratio'] / row['time_ratio']
        if case.query_ratio:
            row['query_ratio'] = case.query_ratio()
        if case.exact:
            row['max_difference'] = largest_difference(case.run(), expected)
    return dict(suite=suite, arch=arch, shape=list(shape), batch=batch, rows=rows)


def groups_of(
    suite: str,
    device: str,
    archs: Sequence[str] | None = None,
    shape: Sequence[int] | None = None,
    batch: int | None = None,
) -> Iterator[tuple[str, Sequence[int], int]]:
    """What a suite measures on a device, if not told otherwise: architectures, shapes and numbers of images."""
    suite = SUITES[suite]
    batches = suite.get('on_cuda', suite['batches']) if device == 'cuda' else suite['batches']
    for arch in archs or suite['archs']:
        for sides in [shape] if shape else suite['shapes']:
            for number in [batch] if batch else batches:
                yield arch, sides, number
        if arch in suite.get('large', {}) and not (shape or batch):
            yield arch, suite['large'][arch], 1


def record(config: str, checkpoint: str, images: str, num: int = 16) -> Recording:
    """What the routers of a trained model choose on the one of ``num`` images that has the median query ratio.

    Raises:
        ValueError: if there is no such checkpoint or no image, or if the model has no DGE.
    """
    if not Path(checkpoint).is_file():
        raise ValueError(f'There is no checkpoint {checkpoint}: run `make demo`, or give --trained-checkpoint.')
    cfg, files = Config.fromfile(config), image_files(images)
    model = build_model(cfg)
    load_checkpoint(model, checkpoint, map_location='cpu')
    backbone = dynamic_backbone(model)
    if backbone is None or not backbone.has_dge:
        raise ValueError(f'The model of {config} has no DGE: give the --trained-config of one that has.')
    runs = [
        (run.cost.query_ratio.item(), record_routing(backbone))
        for run in run_on_images(model, cfg, files[:: max(1, len(files) // num)][:num])
    ]
    return sorted(runs, key=lambda run: run[0])[len(runs) // 2][1]
