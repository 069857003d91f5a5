"""Time dense and dynamic models side by side, and tell their memory.

Suites: cls (backbones of classifiers on one image of 224 x 224 and of 256 x 256), det (on one of 800 x 1280), seg (on
one of 512 x 2048), cfvit (classification of 64 images by CF-ViT when none, half or all of them stop at the coarse
stage, beside timm's DeiT), train (a training iteration on 32 images of the dense model, of DGE that trains sparsely and
of DGE that trains densely), any (models of timm, mmdet, mmseg and mmpretrain on 1 and 16 images of 224 x 224, pyramids
on a large one, too), peers (backbones on one image of 224 x 224, pyramids on one of 800 x 1280, too, by what one runs
dense models with on a CPU: PyTorch, onnxruntime and OpenVINO). On CUDA cls, det and seg run with more images, too, and
peers not at all.

DGE decides by a routing that is given. Two have the query ratio that is asked for: clustered, the finest regions lie
together as on the objects of a natural image, and random, the worst case. Trained is what the demo's routers choose on
the one of 16 images that has the median query ratio, stretched to the map; DGE then has the demo's granularities.
Finest has all regions at granularity 1, so that there is nothing to save. Peers have the same weights: mmdet's PVT,
timm's DeiT, and DPVT that samples with mmcv's fallback for the CPU, whose attention layers are also timed alone.
On CUDA, exact has an exact budget in place of the routing, and graphed are models that are recorded once and replayed,
compared with the dense one of them; bounded has places for a tenth of the dense queries more than the routing needs.
onnxruntime and OpenVINO run the dense model, exported to ONNX, with as many threads, OpenVINO in bfloat16, too, where
the processor has it; pip install 'mmdyn[bench]' brings them.

Cases run in turns after a warm-up, those of small images in cls and peers five times as often as --rounds says. Times
are medians, their spread is the slowest run less the fastest, ratios are medians of neighbouring runs. Efficiency is
the share of the promised saving that arrives: the ratio of multiply-adds over the ratio of times. Memory is what a
further run allocates at its worst moment, weights and images not counted.
Writes benchmark.json (benchmark-cuda.json), benchmark.md and benchmark.png. Suites that a benchmark.json there has and
that are not measured now stay in it, with the command and the machine of their own run.
"""

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path

import torch

from mmdyn.analysis.benchmark import ATTENTION, SUITES, Options, groups_of, measure, record
from mmdyn.analysis.latency import environment, limits
from mmdyn.analysis.others import OTHERS
from mmdyn.analysis.passes import AUTOCAST, FAMILIES, family_and_size
from mmdyn.analysis.report import read, table, with_earlier, write_report
from mmdyn.analysis.runtimes import versions
from mmdyn.analysis.synthetic import PATTERNS, Recording
from mmdyn.engine.command import command, output_folder

ROOT = Path(__file__).parents[2]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', choices=[*SUITES, 'all'], default='det')
    parser.add_argument('--archs', nargs='+', help='e.g. PVT-small; default: those of the suite')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help='default: those of the suite')
    parser.add_argument('--batch', type=int, help='default: those of the suite')
    parser.add_argument('--query-ratio', type=float, help='default: 0.5')
    parser.add_argument('--patterns', nargs='+', choices=[*PATTERNS, 'trained'], help='default: all')
    parser.add_argument(
        '--trained-config',
        default=str(ROOT / 'configs/demo/pvt-mini-dge_digits.py'),
        help="config of the model whose choices 'trained' replays",
    )
    parser.add_argument('--trained-checkpoint', help='its weights; default: those of `make demo`')
    parser.add_argument('--trained-images', default=str(ROOT / 'data/demo/imagenet/val'), help='folder of its images')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument(
        '--dtype',
        choices=AUTOCAST,
        default='float32',
        help='bfloat16 and float16 run all cases under autocast, tf32 rounds the factors of products '
        'on CUDA; float32 has cases of bfloat16 beside the others',
    )
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of the results')
    args = parser.parse_args(argv)

    given = [
        f'--{name.replace("_", "-")}'
        for name in ('archs', 'shape', 'batch', 'query_ratio', 'patterns')
        if getattr(args, name) is not None
    ]
    if args.suite == 'all' and given:
        parser.error(
            f'{", ".join(given)} with --suite all, whose suites have their own: choose one of '
            f'{", ".join(SUITES)}, or leave it out.'
        )
    allowed = dict(cfvit=['DeiT'], any=list(OTHERS)).get(args.suite, list(FAMILIES))
    for arch in args.archs or []:
        try:
            family, _ = family_and_size(arch, allowed)
        except ValueError as error:
            parser.error(f'--archs {error}')
        if arch.endswith(ATTENTION) and family != 'DPVT':
            parser.error(f"--archs '{arch}': attention alone is compared of DPVT, e.g. 'DPVT-small{ATTENTION}'.")
    for name in ('threads', 'rounds', 'batch'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name} {value}: give at least 1.')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error(
            '--device cuda, but torch finds no CUDA device: use --device cpu, or install a torch that is '
            'built for the driver of this machine.'
        )
    if args.dtype == 'tf32' and args.device != 'cuda':
        parser.error('--dtype tf32 is a precision of CUDA devices: add --device cuda, or choose float32.')
    if args.suite == 'peers' and (args.device, args.dtype) != ('cpu', 'float32'):
        parser.error('--suite peers compares in float32 on a CPU: leave --device and --dtype out.')
    args.command = shlex.join(['python', 'tools/analysis_tools/benchmark.py', *(argv or sys.argv[1:])])
    args.query_ratio = 0.5 if args.query_ratio is None else args.query_ratio
    args.patterns = args.patterns or [*PATTERNS, *['trained'][: args.suite not in ('cfvit', 'train', 'any', 'peers')]]
    return args


def recording(args: argparse.Namespace) -> Recording | None:
    """What is replayed as trained; None if that is not asked for, or if there is no trained model, which it says."""
    if 'trained' not in args.patterns:
        return None
    last = ROOT / 'work_dirs/demo' / Path(args.trained_config).stem / 'last_checkpoint'
    if args.trained_checkpoint or last.exists():
        return record(args.trained_config, args.trained_checkpoint or last.read_text(), args.trained_images)
    print(
        f'benchmark.py: no {last.relative_to(ROOT)}, so the pattern trained is left out: run `make demo` first.',
        file=sys.stderr,
    )
    return None


def run(args: argparse.Namespace) -> dict:
    """Measure what the arguments ask for, and print a table of each architecture."""
    torch.set_num_threads(args.threads)
    trained = recording(args)
    patterns = [pattern for pattern in args.patterns if pattern != 'trained' or trained]
    if not patterns:
        raise ValueError(f'No pattern is left: give --patterns, one or more of {", ".join(PATTERNS)}.')
    suites = list(SUITES) if args.suite == 'all' else [args.suite]
    if (args.device, args.dtype) != ('cpu', 'float32'):
        suites = [suite for suite in suites if suite != 'peers']
    runtimes = versions() if 'peers' in suites else {}
    for name, version in runtimes.items():
        if not version:
            print(f"benchmark.py: {name} is left out: pip install 'mmdyn[bench]'", file=sys.stderr)
    options = Options(args.device, args.dtype, args.rounds, args.query_ratio, patterns, trained)
    result = dict(
        command=args.command,
        device=args.device,
        dtype=args.dtype,
        rounds=args.rounds,
        query_ratio=args.query_ratio,
        environment=environment(args.device) | {name: version or 'not installed' for name, version in runtimes.items()},
        limits=limits(args.device),
        groups=[],
    )
    print(*(f'{name}: {value}' for name, value in result['environment'].items()), sep='\n')
    for name, value in result['limits'].items():
        print(f'{name}: {value:.0f} {"GB/s" if name == "copy" else "GFLOP/s"}')
    for suite in suites:
        for arch, shape, batch in groups_of(suite, args.device, args.archs, args.shape, args.batch):
            try:
                group = measure(suite, arch, shape, batch, options)
            except ImportError as error:
                print(f'benchmark.py: {arch} is left out of {suite}: {error}', file=sys.stderr)
                continue
            result['groups'].append(group)
            print(f'\n{suite}\n{table([group])}', flush=True)
    return result


@command
def main() -> None:
    args = parse()
    # Libraries print what they load.
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        output_folder(args.out)
        files = [args.out / 'benchmark.json', args.out / 'benchmark-cuda.json']
        own = files[args.device == 'cuda']
        before = read([own])[str(own)] if own.exists() else dict(groups=[])
        result = run(args)
        own.write_text(json.dumps(with_earlier(result, before), indent=1) + '\n')
        write_report(read(file for file in files if file.exists()), args.out)
    if args.json:
        print(json.dumps(result))


if __name__ == '__main__':
    main()
