"""Time dense and dynamic models side by side.

Suites: det (backbones on one image of 800 x 1280), seg (on one of 512 x 2048), train (a training iteration of the
dense model, of DGE that trains sparsely and of DGE that trains densely), cfvit (classification of 64 images by CF-ViT
when none, half or all of them stop at the coarse stage, beside timm's DeiT). DGE decides by a synthetic routing at the
given query ratio: clustered, the finest regions lie together as on the objects of a natural image, or random, the worst case.

Cases run in turns; times are medians, ratios medians of neighbouring runs. Efficiency is the share of the promised
saving that arrives: the ratio of multiply-adds over the ratio of times.
"""
import argparse
import json
import platform
import statistics
from typing import Callable, Dict, NamedTuple, Optional

import mmdyn  # noqa: F401
import torch
from mmdyn.analysis.latency import interleaved_times, ratio
from mmdyn.analysis.synthetic import PATTERNS, force_routing
from mmdyn.models import DPVT, PVT, DeiT
from mmengine.registry import MODELS, init_default_scope

FAMILIES = dict(PVT=PVT, DPVT=DPVT, DeiT=DeiT)
SUITES = dict(
    det=dict(archs=('PVT-small', 'PVT-medium', 'DPVT-small', 'DPVT-medium'), shape=(800, 1280), batch=1),
    seg=dict(archs=('PVT-small', 'PVT-medium', 'DPVT-small', 'DPVT-medium'), shape=(512, 2048), batch=1),
    train=dict(archs=('PVT-small', ), shape=(256, 256), batch=8),
    cfvit=dict(archs=('deit-small', ), shape=(224, 224), batch=64))


def build(name: str, **dge) -> torch.nn.Module:
    """A backbone such as PVT-small, with DGE if options of it are given."""
    family, arch = name.split('-')
    torch.manual_seed(0)
    return FAMILIES[family](arch, dge=dge or None)


def mmdet_pvt(depths) -> torch.nn.Module:
    """mmdet's PVT."""
    from mmdet.models.backbones import PyramidVisionTransformer
    return PyramidVisionTransformer(pretrain_img_size=256, num_layers=depths, patch_sizes=[4, 2, 2, 2],
                                    strides=[4, 2, 2, 2], paddings=[0] * 4, norm_cfg=dict(type='LN', eps=1e-6))


def training_step(model: torch.nn.Module, images: torch.Tensor):
    """A function that runs one forward and backward pass."""
    model.train()

    def step():
        model.zero_grad()
        sum(out.float().pow(2).mean() for out in model(images)).backward()

    return step


def inference(model: torch.nn.Module, images: torch.Tensor):
    """A function that runs one forward pass."""
    model.eval()

    def run():
        with torch.inference_mode():
            model(images)

    return run


class Case(NamedTuple):
    """What is timed.

    Attributes:
        run: one pass.
        macs: multiply-adds of an image in the last pass; None if they are not known.
        query_ratio: share of the queries in the last pass.
    """
    run: Callable[[], object]
    macs: Optional[Callable[[], float]] = None
    query_ratio: Callable[[], float] = lambda: 1.


def backbone_case(model: torch.nn.Module, images: torch.Tensor, trains: bool = False) -> Case:
    """A pass, or a training iteration, of one of our backbones."""
    return Case((training_step if trains else inference)(model, images), lambda: model.cost.spent.mean().item(),
                lambda: model.cost.query_ratio.mean().item())


def coarse_to_fine_case(arch: str, exits: float, images: torch.Tensor) -> Case:
    """CF-ViT's classification at a threshold that a share of the images reaches."""
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(dict(type='mmdyn.CoarseToFineClassifier', backbone=dict(type='mmdyn.CFViT', arch=arch),
                              head=dict(type='LinearClsHead', num_classes=1000, in_channels=384))).eval()
    spent = []

    def run():
        with torch.inference_mode():
            spent[:] = [sample.macs for sample in model.predict(images)]

    with torch.inference_mode():
        confidences = sorted((sample.coarse_score.max().item() for sample in model.predict(images)), reverse=True)
    stop = round(exits * len(images))
    model.test_cfg['threshold'] = confidences[stop - 1] if stop else 1.
    return Case(run, lambda: statistics.mean(spent))


def make_cases(suite: str, arch: str, images: torch.Tensor, query_ratio: float, patterns) -> Dict[str, Case]:
    """What to time, by name; the first is what the others are compared with."""
    shape = tuple(images.shape[-2:])
    if suite == 'cfvit':
        import timm
        ours, theirs = build(arch.replace('deit', 'DeiT')), timm.create_model(f'{arch.replace("-", "_")}_patch16_224')
        inference(ours, images[:1])()
        cases = {'timm': Case(inference(theirs, images), lambda: ours.cost.dense)}  # the same model
        for exits in (0., 0.5, 1.):
            cases[f'CF-ViT, {exits:.0%} stop'] = coarse_to_fine_case(arch, exits, images)
        return cases
    dense = build(arch)
    cases = {'dense': backbone_case(dense, images, suite == 'train')}
    if suite == 'train':
        options = {f'DGE {mode}': (patterns[0], dict(train_mode=mode)) for mode in ('sparse', 'dense')}
    else:
        options = {f'DGE {pattern}': (pattern, dict(granularities=(1, 2, 4))) for pattern in patterns}
    for name, (pattern, dge) in options.items():
        model = build(arch, **dge)
        force_routing(model, shape, query_ratio, pattern)
        cases[name] = backbone_case(model, images, suite == 'train')
    if arch.startswith('PVT-') and suite != 'train':
        cases['mmdet'] = Case(inference(mmdet_pvt([len(stage.blocks) for stage in dense.stages]), images))
    return cases


def measure(suite: str, arch: str, shape, batch: int, args: argparse.Namespace) -> dict:
    """Rows of one architecture."""
    cases = make_cases(suite, arch, torch.randn(batch, 3, *shape), args.query_ratio, args.patterns)
    times = interleaved_times({name: case.run for name, case in cases.items()}, args.rounds)
    reference, rows = next(iter(cases)), {}
    for name, case in cases.items():
        row = rows[name] = dict(seconds=statistics.median(times[name]), spread=max(times[name]) - min(times[name]),
                                time_ratio=ratio(times, name, reference))
        if case.macs:
            row.update(query_ratio=case.query_ratio(), macs_ratio=case.macs() / cases[reference].macs())
            row['efficiency'] = row['macs_ratio'] / row['time_ratio']
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', choices=SUITES, default='det')
    parser.add_argument('--archs', nargs='+', help='e.g. PVT-small; default: those of the suite')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='default: that of the suite')
    parser.add_argument('--batch', type=int, help='default: that of the suite')
    parser.add_argument('--query-ratio', type=float, default=0.5)
    parser.add_argument('--patterns', nargs='+', choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    suite = SUITES[args.suite]
    shape, batch = tuple(args.shape or suite['shape']), args.batch or suite['batch']
    result = {arch: measure(args.suite, arch, shape, batch, args) for arch in args.archs or suite['archs']}
    if args.json:
        print(json.dumps(dict(suite=args.suite, shape=shape, batch=batch, threads=args.threads, torch=torch.__version__,
                              rows=result)))
        return
    print(f'{args.suite}: {batch} x {shape[0]} x {shape[1]}, {args.threads} threads, torch {torch.__version__}, '
          f'{platform.machine()} {torch.backends.cpu.get_cpu_capability()}')
    print(f'{"":30}{"seconds":>9}{"spread":>8}{"time":>8}{"MACs":>8}{"efficiency":>12}{"query ratio":>13}')
    for arch, rows in result.items():
        for name, row in rows.items():
            line = f'{f"{arch} {name}":30}{row["seconds"]:9.3f}{row["spread"]:8.3f}{row["time_ratio"]:8.2f}'
            if 'macs_ratio' in row:
                line += f'{row["macs_ratio"]:8.2f}{row["efficiency"]:12.2f}{row["query_ratio"]:13.3f}'
            print(line)


if __name__ == '__main__':
    main()
