"""Time dense and dynamic models side by side, and tell their memory.

Suites: cls (backbones of classifiers on one image of 224 x 224 and of 256 x 256), det (on one of 800 x 1280), seg (on
one of 512 x 2048), cfvit (classification of 64 images by CF-ViT when none, half or all of them stop at the coarse
stage, beside timm's DeiT), train (a training iteration on 32 images of the dense model, of DGE that trains sparsely and
of DGE that trains densely). On CUDA cls, det and seg run with more images, too.

DGE decides by a routing that is given. Two have the query ratio that is asked for: clustered, the finest regions lie
together as on the objects of a natural image, and random, the worst case. Trained is what the demo's routers choose on
the one of 16 images that has the median query ratio, stretched to the map; DGE then has the demo's granularities.
Finest has all regions at granularity 1, so that there is nothing to save. Peers have the same weights: mmdet's PVT,
timm's DeiT, and DPVT that samples with mmcv's fallback for the CPU, whose attention layers are also timed alone.

Cases run in turns after a warm-up, those of cls five times as often as --rounds says. Times are medians, their spread
is the slowest run less the fastest, ratios are medians of neighbouring runs. Efficiency is the share of the promised
saving that arrives: the ratio of multiply-adds over the ratio of times. Memory is what a further run allocates at its
worst moment, weights and images not counted.
Writes benchmark.json (benchmark-cuda.json), benchmark.md and benchmark.png.
"""
import argparse
import contextlib
import copy
import json
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Callable, Dict, NamedTuple, Optional

import mmdyn  # noqa: F401
import torch
from mmdyn.analysis.flops import build_model, dynamic_backbone, image_files, run_on_images
from mmdyn.analysis.latency import (environment, interleaved_times, largest_difference, limits, peak_memory, ratio,
                                    supports_bfloat16)
from mmdyn.analysis.synthetic import (PATTERNS, Recording, force_routing, record_routing, recorded_granularities,
                                      replay_routing)
from mmdyn.models import DPVT, PVT, DeiT
from mmdyn.analysis.conversion import translate
from mmdyn.models.layers import DeformableAttention, deformable_sampling
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from benchmark_report import read, table, write_report  # noqa: E402

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # or else torch's profiler tells of each start and stop
ROOT = Path(__file__).parents[2]
FAMILIES = dict(PVT=PVT, DPVT=DPVT, DeiT=DeiT)
ATTENTION = ' attention'  # behind the name of an arch: its attention layers alone
PYRAMIDS = ('PVT-small', 'PVT-medium', 'DPVT-small', 'DPVT-medium')
SUITES = dict(
    cls=dict(archs=('PVT-small', 'DeiT-small'), shapes=((224, 224), (256, 256)), batches=(1, ), on_cuda=(1, 8, 64),
             runs=5),
    det=dict(archs=(*PYRAMIDS, f'DPVT-small{ATTENTION}'), shapes=((800, 1280), ), batches=(1, ), on_cuda=(1, 2)),
    seg=dict(archs=PYRAMIDS, shapes=((512, 2048), ), batches=(1, ), on_cuda=(1, 2)),
    cfvit=dict(archs=('DeiT-small', ), shapes=((224, 224), ), batches=(64, )),
    train=dict(archs=('PVT-small', ), shapes=((256, 256), ), batches=(32, )))


class Case(NamedTuple):
    """What is timed.

    Attributes:
        run: one pass; of a case that is ``exact``, it returns the outputs.
        macs: multiply-adds of an image in the last pass.
        query_ratio: share of the queries in the last pass, where the model has any to choose.
        exact: whether the outputs are to be those of the first case.
    """
    run: Callable[[], object]
    macs: Callable[[], float]
    query_ratio: Optional[Callable[[], float]] = None
    exact: bool = False


def sample_by_mmcv_fallback(value, points, weights, shape, lengths):
    """``deformable_sampling`` by mmcv's function for the CPU, which takes as many queries of each image."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
    sides, batch = torch.tensor([shape], device=value.device), len(lengths)
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


def build(name: str, img_size, **dge) -> torch.nn.Module:
    """A backbone such as PVT-small in evaluation mode, with DGE if options of it are given."""
    family, arch = name.split('-')
    torch.manual_seed(0)
    options = {} if family == 'DeiT' else dict(embed_norm_eps=1e-6)  # as mmdet's PVT has it
    model = FAMILIES[family](arch, img_size=img_size, dge=dge or None, **options).eval()
    for module in model.modules():
        if isinstance(module, DeformableAttention):  # a fresh one samples at centres of cells, a trained one anywhere
            torch.nn.init.normal_(module.offsets.weight, std=0.05)
            torch.nn.init.normal_(module.attn_weight.weight, std=0.05)
    return model


def peer_of(name: str, img_size, dense: torch.nn.Module) -> tuple:
    """The same model by another package and that package's name; ``dense`` gets its weights."""
    family, arch = name.split('-')
    torch.manual_seed(0)
    if family == 'DPVT':
        theirs = copy.deepcopy(dense)
        for module in theirs.modules():
            if isinstance(module, DeformableAttention):
                module.__class__ = FallbackAttention  # the weights stay
        return theirs, 'mmcv fallback'
    if family == 'PVT':
        from mmdet.models.backbones import PyramidVisionTransformer
        theirs, package, kind = PyramidVisionTransformer(
            pretrain_img_size=img_size, num_layers=[len(stage.blocks) for stage in dense.stages]), 'mmdet', 'mmdet-pvt'
        theirs.init_weights()
    else:
        import timm
        theirs, package, kind = timm.create_model(
            f'deit_{arch}_patch16_224', img_size=img_size, num_classes=0), 'timm', 'deit'
    state, *_ = translate(kind, theirs.state_dict())
    dense.load_state_dict({name.removeprefix('backbone.'): value for name, value in state.items()})
    return theirs.eval(), package


def inference(call: Callable, images: torch.Tensor, autocast: bool) -> Callable[[], object]:
    """A function that runs one forward pass, in bfloat16 if ``autocast``."""

    def run():
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            return call(images)

    return run


def training_step(model: torch.nn.Module, images: torch.Tensor, autocast: bool) -> Callable[[], None]:
    """A function that runs one forward and backward pass, and leaves no gradients."""
    model.train()

    def step():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = sum(out.float().pow(2).mean() for out in model(images))
        loss.backward()
        model.zero_grad()

    return step


def backbone_case(model: torch.nn.Module, images: torch.Tensor, autocast: bool, exact: bool = False,
                  step: Callable = inference) -> Case:
    """A pass of one of our backbones."""
    return Case(step(model.to(images.device), images, autocast), lambda: model.cost.spent.mean().item(),
                lambda: model.cost.query_ratio.mean().item(), exact)


def backbone_cases(suite: str, arch: str, images: torch.Tensor, args: argparse.Namespace) -> Dict[str, Case]:
    """The dense model, DGE, and where it is not trained the same by a peer and in bfloat16."""
    shape, bfloat16 = tuple(images.shape[-2:]), args.dtype == 'bfloat16'
    # Of dense prediction the images have many sizes; position embeddings are of those that the backbone was trained on.
    img_size = (256, 256) if suite in ('det', 'seg') else shape
    dense, models = build(arch, img_size), {}

    def dynamic(pattern, query_ratio=args.query_ratio, **options):
        if pattern == 'trained':
            options['granularities'] = recorded_granularities(args.recording, len(list(dense.named_stages())))
        model = build(arch, img_size, **{'granularities': (1, 2, 4), **options})
        # The weights of all cases are alike; those of the routers decide nothing here.
        model.load_state_dict({**model.state_dict(), **dense.state_dict()})
        if pattern == 'trained':
            replay_routing(model, shape, args.recording)
        else:
            force_routing(model, shape, query_ratio, pattern)
        return model

    if suite == 'train':
        models = {'dense': dense, **{f'DGE {mode}': dynamic(args.patterns[0], train_mode=mode)
                                     for mode in ('sparse', 'dense')}}
        return {name: backbone_case(model, images, bfloat16, step=training_step) for name, model in models.items()}
    theirs, package = peer_of(arch, img_size, dense)
    cases = {'dense': backbone_case(dense, images, bfloat16)}
    for pattern in args.patterns:
        models[pattern] = dynamic(pattern)
        cases[f'DGE {pattern}'] = backbone_case(models[pattern], images, bfloat16)
    cases['DGE finest'] = backbone_case(dynamic('clustered', query_ratio=1.), images, bfloat16, exact=True)
    cases[package] = cases['dense']._replace(run=inference(theirs.to(images.device), images, bfloat16), exact=True)
    if not bfloat16 and supports_bfloat16(images.device):
        cases['dense bfloat16'] = backbone_case(dense, images, True, exact=True)
        cases['DGE bfloat16'] = backbone_case(models[args.patterns[0]], images, True)
    return cases


def attention_cases(arch: str, images: torch.Tensor, args: argparse.Namespace) -> Dict[str, Case]:
    """All attention layers of a dense DPVT on random tokens, beside their sampling by mmcv's fallback."""
    autocast = args.dtype == 'bfloat16'
    dense = build(arch, (256, 256))
    theirs, package = peer_of(arch, (256, 256), dense)
    inference(dense.to(images.device), images, autocast)()
    inputs = [torch.randn(len(images), h * w, dim, device=images.device)
              for (h, w), dim in zip(dense.last_shapes, dense.out_channels)]

    def attend(model):
        return lambda _: [block.attn(x, x, shape) for stage, x, shape in zip(model.stages, inputs, dense.last_shapes)
                          for block in stage.blocks]

    macs = sum(h * w * query + static for stage, (h, w) in zip(dense.stages, dense.last_shapes)
               for query, static in (block.attn.macs((h, w), 0) for block in stage.blocks))
    return {name: Case(inference(attend(model.to(images.device)), images, autocast), lambda: macs, exact=True)
            for name, model in (('ours', dense), (package, theirs))}


def coarse_to_fine_cases(arch: str, images: torch.Tensor, args: argparse.Namespace) -> Dict[str, Case]:
    """timm's DeiT, and CF-ViT's classification at thresholds that none, half or all of the images reach."""
    import timm
    autocast, shape = args.dtype == 'bfloat16', tuple(images.shape[-2:])
    ours = build(arch, shape).to(images.device)
    inference(ours, images[:1], autocast)()
    theirs = timm.create_model(f'{arch.lower().replace("-", "_")}_patch16_224', img_size=shape).eval().to(images.device)
    cases = {'timm': Case(inference(theirs, images, autocast), lambda: ours.cost.dense)}  # the same model
    for exits in (0., 0.5, 1.):
        cases[f'CF-ViT, {exits:.0%} stop'] = coarse_to_fine_case(arch, ours.out_channels[-1], exits, images, autocast)
    return cases


def coarse_to_fine_case(arch: str, channels: int, exits: float, images: torch.Tensor, autocast: bool) -> Case:
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
    model.test_cfg['threshold'] = confidences[stop - 1] if stop else 1.
    return Case(run, lambda: statistics.mean(spent))


def measure(suite: str, arch: str, shape, batch: int, args: argparse.Namespace) -> dict:
    """Rows of one architecture, shape and batch."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, *shape, device=args.device)
    if suite == 'cfvit':
        cases = coarse_to_fine_cases(arch, images, args)
    elif arch.endswith(ATTENTION):
        cases = attention_cases(arch.removesuffix(ATTENTION), images, args)
    else:
        cases = backbone_cases(suite, arch, images, args)
    rounds = args.rounds * SUITES[suite].get('runs', 1)  # short runs vary more
    times = interleaved_times({name: case.run for name, case in cases.items()}, rounds, device=args.device)
    reference, rows = next(iter(cases)), {}
    expected = cases[reference].run() if any(case.exact for case in cases.values()) else None
    for name, case in cases.items():
        row = rows[name] = dict(seconds=statistics.median(times[name]), spread=max(times[name]) - min(times[name]),
                                time_ratio=ratio(times, name, reference),
                                peak_memory=peak_memory(case.run, args.device),
                                macs_ratio=case.macs() / cases[reference].macs())
        row['efficiency'] = row['macs_ratio'] / row['time_ratio']
        row['memory_ratio'] = row['peak_memory'] / rows[reference]['peak_memory']
        if case.query_ratio:
            row['query_ratio'] = case.query_ratio()
        if case.exact:
            row['max_difference'] = largest_difference(case.run(), expected)
    return dict(suite=suite, arch=arch, shape=list(shape), batch=batch, rows=rows)


def record(config: str, checkpoint: str, images: str, num: int = 16) -> Recording:
    """What the routers of a trained model choose on the one of ``num`` images that has the median query ratio."""
    if not Path(checkpoint).is_file():
        raise ValueError(f'There is no checkpoint {checkpoint}: run `make demo`, or give --trained-checkpoint.')
    cfg, files = Config.fromfile(config), image_files(images)
    model = build_model(cfg)
    load_checkpoint(model, checkpoint, map_location='cpu')
    backbone = dynamic_backbone(model)
    if backbone is None or not backbone.has_dge:
        raise ValueError(f'The model of {config} has no DGE: give the --trained-config of one that has.')
    runs = [(run.cost.query_ratio.item(), record_routing(backbone))
            for run in run_on_images(model, cfg, files[::max(1, len(files) // num)][:num])]
    return sorted(runs, key=lambda run: run[0])[len(runs) // 2][1]


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', choices=[*SUITES, 'all'], default='det')
    parser.add_argument('--archs', nargs='+', help='e.g. PVT-small; default: those of the suite')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='default: those of the suite')
    parser.add_argument('--batch', type=int, help='default: those of the suite')
    parser.add_argument('--query-ratio', type=float, help='default: 0.5')
    parser.add_argument('--patterns', nargs='+', choices=[*PATTERNS, 'trained'], help='default: all')
    parser.add_argument('--trained-config', default=str(ROOT / 'configs/demo/pvt-mini-dge_digits.py'),
                        help="config of the model whose choices 'trained' replays")
    parser.add_argument('--trained-checkpoint', help="its weights; default: those of `make demo`")
    parser.add_argument('--trained-images', default=str(ROOT / 'data/demo/imagenet/val'), help='folder of its images')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32',
                        help='bfloat16 runs all cases under autocast; float32 has cases of bfloat16 beside the others')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of the results')
    args = parser.parse_args(argv)

    given = [f'--{name.replace("_", "-")}' for name in ('archs', 'shape', 'batch', 'query_ratio', 'patterns')
             if getattr(args, name) is not None]
    if args.suite == 'all' and given:
        parser.error(f'{", ".join(given)} with --suite all, whose suites have their own: choose one of '
                     f'{", ".join(SUITES)}, or leave it out.')
    allowed = ['DeiT'] if args.suite == 'cfvit' else list(FAMILIES)
    for arch in args.archs or []:
        if arch.count('-') != 1 or arch.split('-')[0] not in allowed:
            parser.error(f'--archs {arch}: give FAMILY-SIZE with a FAMILY of {", ".join(allowed)}, e.g. '
                         f'{allowed[0]}-small.')
        if arch.endswith(ATTENTION) and not arch.startswith('DPVT-'):
            parser.error(f"--archs '{arch}': attention alone is compared of DPVT, e.g. 'DPVT-small{ATTENTION}'.")
    for name in ('threads', 'rounds', 'batch'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name} {value}: give at least 1.')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda, but torch finds no CUDA device: use --device cpu, or install a torch that is '
                     'built for the driver of this machine.')
    args.command = shlex.join(['python', 'tools/analysis_tools/benchmark.py', *(argv or sys.argv[1:])])
    args.query_ratio = 0.5 if args.query_ratio is None else args.query_ratio
    args.patterns = args.patterns or [*PATTERNS, *['trained'][:args.suite not in ('cfvit', 'train')]]
    return args


def run(args: argparse.Namespace) -> dict:
    """Measure what the arguments ask for, and print a table of each architecture."""
    torch.set_num_threads(args.threads)
    if 'trained' in args.patterns:
        last = ROOT / 'work_dirs/demo' / Path(args.trained_config).stem / 'last_checkpoint'
        if args.trained_checkpoint or last.exists():
            args.recording = record(args.trained_config, args.trained_checkpoint or last.read_text(),
                                    args.trained_images)
        else:
            args.patterns.remove('trained')
            print(f'benchmark.py: no {last.relative_to(ROOT)}, so the pattern trained is left out: run `make demo` '
                  'first.', file=sys.stderr)
    if not args.patterns:
        raise ValueError(f'No pattern is left: give --patterns, one or more of {", ".join(PATTERNS)}.')
    result = dict(command=args.command, device=args.device, dtype=args.dtype, rounds=args.rounds,
                  query_ratio=args.query_ratio, environment=environment(args.device), limits=limits(args.device),
                  groups=[])
    print(*(f'{name}: {value}' for name, value in result['environment'].items()), sep='\n')
    print(*(f'{name}: {value:.0f} {"GB/s" if name == "copy" else "GFLOP/s"}'
            for name, value in result['limits'].items()), sep='\n')
    for suite in SUITES if args.suite == 'all' else [args.suite]:
        options = SUITES[suite]
        batches = options.get('on_cuda', options['batches']) if args.device == 'cuda' else options['batches']
        for arch in args.archs or options['archs']:
            for shape in [args.shape] if args.shape else options['shapes']:
                for batch in [args.batch] if args.batch else batches:
                    try:
                        result['groups'].append(measure(suite, arch, shape, batch, args))
                    except ImportError as error:
                        print(f'benchmark.py: {arch} is left out of {suite}: {error}', file=sys.stderr)
                        continue
                    print(f'\n{suite}\n{table(result["groups"][-1:])}', flush=True)
    return result


def main() -> None:
    args = parse()
    # Libraries print what they load.
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        try:
            result = run(args)
        except ValueError as error:
            raise SystemExit(f'benchmark.py: {error}') from None
        args.out.mkdir(parents=True, exist_ok=True)
        files = [args.out / 'benchmark.json', args.out / 'benchmark-cuda.json']
        files[args.device == 'cuda'].write_text(json.dumps(result, indent=1) + '\n')
        write_report(read(file for file in files if file.exists()), args.out)
    if args.json:
        print(json.dumps(result))


if __name__ == '__main__':
    main()
