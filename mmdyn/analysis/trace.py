"""One traced pass of a model: kernels of a GPU, gaps between them, and where the host waits for it."""

import gzip
import json
import re
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..values import check_choice, check_integer, check_type, sides
from .latency import synchronise
from .passes import AUTOCAST, FAMILIES, build, inference, round_products
from .synthetic import force_routing

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
    work = sorted(
        (event for event in events if event.get('cat') in DEVICE_WORK and event['ts'] >= start),
        key=lambda event: event['ts'],
    )
    calls = Counter(event['name'] for event in events if event.get('cat') in CALLS and start <= event['ts'] < end)
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
        kernels=len(kernels),
        copies=len(work) - len(kernels),
        launches=sum(number for name, number in calls.items() if 'Launch' in name),
        milliseconds=(end - start) / 1e3,
        device_milliseconds=whole / 1e3,
        busy_milliseconds=(whole - sum(gaps)) / 1e3,
        gap_milliseconds=sum(gaps) / 1e3,
        gaps=len(gaps),
        largest_gap_milliseconds=max(gaps, default=0) / 1e3,
        # A copy by cudaMemcpy waits itself; an asynchronous one is followed by a call that does.
        synchronisations={
            name: number for name, number in sorted(calls.items()) if 'Synchronize' in name or name == 'cudaMemcpy'
        },
        top_kernels=[[name[:120], numbers[name], time / 1e3] for name, time in times.most_common(10)],
    )


def trace(run: Callable, device: str, file: Path) -> list[dict]:
    """Run under torch's profiler, write the trace as .json.gz and return its events."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == 'cuda' else [])]
    for _ in range(2):  # the first time the tracer itself takes time
        with profile(activities=activities, acc_events=True) as profiler:
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
    return dict(
        Counter(
            f'{place(warning.filename)}:{warning.lineno}'
            for warning in caught
            if 'synchronizing' in str(warning.message)
        )
    )


def place(file: str) -> str:
    """A file without the folders of this machine."""
    for root in (sysconfig.get_path('purelib'), Path(__file__).parents[2]):  # which may hold the environment
        file = file.removeprefix(f'{root}/')
    return file


def arch_of(name: str) -> tuple[str, bool]:
    """FAMILY-SIZE of a model, and whether '+DGE' is behind it.

    Raises:
        ValueError: if anything else is there.
    """
    check_type('name', name, str, 'FAMILY-SIZE or FAMILY-SIZE+DGE')
    found = re.fullmatch(rf'((?:{"|".join(FAMILIES)})-[^-+]+)(\+DGE)?', name)
    if not found:
        raise ValueError(
            f'{name}: give FAMILY-SIZE or FAMILY-SIZE+DGE with a FAMILY of {", ".join(FAMILIES)}, e.g. PVT-small+DGE.'
        )
    return found[1], bool(found[2])


def trace_backbone(
    name: str,
    shape: tuple[int, int],
    folder: Path,
    *,
    batch: int = 1,
    device: str = 'cpu',
    dtype: str = 'float32',
    query_ratio: float = 0.5,
    pattern: str = 'clustered',
) -> dict:
    """Trace a forward pass of a backbone on random images.

    Args:
        name: FAMILY-SIZE, with DGE if '+DGE' is behind it.
        shape: (height, width) of the images in pixels.
        folder: where the trace is written.
        batch: number of images.
        device: what computes.
        dtype: a key of :data:`~mmdyn.analysis.passes.AUTOCAST`.
        query_ratio: of the routing that DGE is given.
        pattern: of that routing, see :func:`~mmdyn.analysis.synthetic.synthetic_choice`.

    Returns:
        ``model``, ``shape``, ``dtype``, ``device``, ``query_ratio``, what :func:`count` finds, ``waits`` and the name
        of the file, ``trace``.
    """
    shape = sides('shape', shape)
    check_integer('batch', batch, 1, what='the number of images')
    check_choice('dtype', dtype, AUTOCAST)
    check_choice('device', device, ('cpu', 'cuda'))
    arch, dge = arch_of(name)
    img_size = shape if arch.startswith('DeiT') else (256, 256)
    model = build(arch, img_size, **({'granularities': (1, 2, 4)} if dge else {}))
    if dge:
        force_routing(model, shape, query_ratio, pattern)
    round_products(dtype == 'tf32')
    images = torch.randn(batch, 3, *shape, device=device)
    run = inference(model.to(device), images, AUTOCAST[dtype])
    for _ in range(3):
        run()
    file = folder / f'trace-{name.replace("+", "-")}-{"x".join(map(str, (batch, *shape)))}.json.gz'
    counts = count(trace(run, device, file))
    return dict(
        model=name,
        shape=[batch, 3, *shape],
        dtype=dtype,
        device=device,
        query_ratio=model.cost.query_ratio.mean().item(),
        **counts,
        waits=waits(run, device),
        trace=file.name,
    )
