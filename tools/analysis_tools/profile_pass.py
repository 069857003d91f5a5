"""Trace one forward pass of a backbone, and count what keeps a GPU from computing.

Kernels, the time that they take and the gaps between them, and the synchronisations, in which the host waits for the
device: as the trace has them, and with the line that asked for each. DGE decides by a routing that is given, the real
routers decide as well. Writes profile.json and a trace of each model, which chrome://tracing and ui.perfetto.dev show.
"""
import argparse
import gzip
import json
import sys
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).parent))
import benchmark  # noqa: E402

from mmdyn.analysis.latency import synchronise  # noqa: E402
from mmdyn.analysis.synthetic import PATTERNS, force_routing  # noqa: E402
from mmdyn.engine.command import command, output_folder

PASS = 'mmdyn forward pass'
DEVICE_WORK = ('kernel', 'gpu_memcpy', 'gpu_memset')  # categories of the trace
CALLS = ('cuda_runtime', 'cuda_driver')


def count(events: list[dict]) -> dict:
    """What a trace says of the pass.

    Args:
        events: ``traceEvents`` of a trace with one range ``PASS``; times in microseconds.

    Returns:
        ``kernels``, ``copies`` and ``launches`` by graphs or kernels; ``milliseconds`` of the host's pass, from the
        first to the last work of the device (``device_milliseconds``), with work (``busy_milliseconds``) and without
        (``gap_milliseconds``); the number of gaps, the largest of them; ``synchronisations`` by the name of the call;
        ``top_kernels``: the ten that take longest together, as name, number, milliseconds.
    """
    marks = [event for event in events if event.get('name') == PASS and event.get('cat') == 'user_annotation']
    if len(marks) != 1:
        raise ValueError(f'The trace has {len(marks)} ranges {PASS!r}: give one of a single pass.')
    start, end = marks[0]['ts'], marks[0]['ts'] + marks[0]['dur']
    work = sorted((event for event in events if event.get('cat') in DEVICE_WORK and event['ts'] >= start),
                  key=lambda event: event['ts'])
    calls = Counter(event['name'] for event in events
                    if event.get('cat') in CALLS and start <= event['ts'] < end)
    gaps, until = [], None
    for event in work:
        if until is not None and event['ts'] > until:
            gaps.append(event['ts'] - until)
        until = max(until or 0, event['ts'] + event['dur'])
    whole = until - work[0]['ts'] if work else 0
    times = Counter()
    kernels = [event for event in work if event['cat'] == 'kernel']
    for event in kernels:
        times[event['name']] += event['dur']
    numbers = Counter(event['name'] for event in kernels)
    return dict(
        kernels=len(kernels), copies=len(work) - len(kernels),
        launches=sum(number for name, number in calls.items() if 'Launch' in name), milliseconds=(end - start) / 1e3,
        device_milliseconds=whole / 1e3, busy_milliseconds=(whole - sum(gaps)) / 1e3, gap_milliseconds=sum(gaps) / 1e3,
        gaps=len(gaps), largest_gap_milliseconds=max(gaps, default=0) / 1e3,
        # A copy by cudaMemcpy waits itself; an asynchronous one is followed by a call that does.
        synchronisations={name: number for name, number in sorted(calls.items())
                          if 'Synchronize' in name or name == 'cudaMemcpy'},
        top_kernels=[[name[:120], numbers[name], time / 1e3] for name, time in times.most_common(10)])


def trace(run: Callable, device: str, file: Path) -> list[dict]:
    """Run under torch's profiler, write the trace as .json.gz and return its events."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == 'cuda' else [])]
    for _ in range(2):  # the first time the tracer itself takes time
        with profile(activities=activities) as profiler:
            with record_function(PASS):
                run()
            synchronise(device)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f'{folder}/trace.json')
        text = Path(folder, 'trace.json').read_text()
    file.write_bytes(gzip.compress(text.encode(), compresslevel=6))
    return json.loads(text)['traceEvents']


def waits(run: Callable, device: str) -> dict:
    """Where a pass waits for the device: number of times by file and line, as torch warns of them; of a GPU only."""
    if device != 'cuda':
        return {}
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            run()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return dict(Counter(f'{place(warning.filename)}:{warning.lineno}' for warning in caught
                        if 'synchronizing' in str(warning.message)))


def place(file: str) -> str:
    """A file without the folders of this machine."""
    for root in (benchmark.ROOT, sysconfig.get_path('purelib')):
        file = file.removeprefix(f'{root}/')
    return file


def measure(name: str, args: argparse.Namespace) -> dict:
    """Counts of one model: FAMILY-SIZE, with DGE if '+DGE' is behind it."""
    shape, device = tuple(args.shape), args.device
    arch, _, dge = name.partition('+')
    if dge not in ('', 'DGE') or arch.count('-') != 1 or arch.split('-')[0] not in benchmark.FAMILIES:
        raise ValueError(f'--models {name}: give FAMILY-SIZE or FAMILY-SIZE+DGE with a FAMILY of '
                         f'{", ".join(benchmark.FAMILIES)}, e.g. PVT-small+DGE.')
    size = shape if arch.startswith('DeiT') else (256, 256)
    model = benchmark.build(arch, size, **(dict(granularities=(1, 2, 4)) if dge else {}))
    if dge:
        force_routing(model, shape, args.query_ratio, args.pattern)
    benchmark.round_products(args.dtype == 'tf32')
    images = torch.randn(args.batch, 3, *shape, device=device)
    run = benchmark.inference(model.to(device), images, benchmark.AUTOCAST[args.dtype])
    for _ in range(3):
        run()
    file = args.out / f'trace-{name.replace("+", "-")}-{"x".join(map(str, (args.batch, *shape)))}.json.gz'
    counts = count(trace(run, device, file))
    return dict(model=name, shape=[args.batch, 3, *shape], dtype=args.dtype, device=device,
                query_ratio=model.cost.query_ratio.mean().item(), **counts, waits=waits(run, device), trace=file.name)


@command
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['PVT-small', 'PVT-small+DGE'])
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), default=(800, 1280))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', choices=benchmark.AUTOCAST, default='float32')
    parser.add_argument('--query-ratio', type=float, default=0.5)
    parser.add_argument('--pattern', choices=PATTERNS, default='clustered')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/profile'))
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('no device: torch finds no CUDA device.')
    output_folder(args.out)
    found = []
    for name in args.models:
        found.append(measure(name, args))
        (args.out / 'profile.json').write_text(json.dumps(found, indent=1) + '\n')
        print(*(f'{key}: {value}' for key, value in found[-1].items() if key != 'top_kernels'), '', sep='\n')


if __name__ == '__main__':
    main()
