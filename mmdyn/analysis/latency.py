"""Times and memory of alternatives, measured side by side, and the limits of the machine that they run on."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path

import torch

from ..compat import installed_version
from ..values import MOST, check_integer

try:
    from ..kernels.library import release
except ImportError:  # without kernels none keeps memory

    def release() -> None:
        """Nothing to give back."""


os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # or else torch's profiler tells of each start and stop
ONEDNN = torch.backends.mkldnn.is_available()
Outputs = torch.Tensor | Sequence[torch.Tensor]


def interleaved_times(
    cases: dict[str, Callable[[], object]],
    rounds: int = 5,
    warmup: int = 1,
    device: str | torch.device = 'cpu',
    prepare: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Run the cases in turns, A B A B, so that whatever else the machine does meets all of them.

    Args:
        cases: a function for each name.
        rounds: measured runs of each case.
        warmup: runs of each case before.
        device: what they run on; its queue is empty when a clock is read.
        prepare: called with a case's name before each of its runs, outside of what is measured.

    Returns:
        seconds of each measured run, by name.
    """

    check_integer('rounds', rounds, 1, MOST, 'the measured runs of each case')
    check_integer('warmup', warmup, 0, MOST, 'the runs of each case before')

    def timed(name, run):
        if prepare is not None:
            prepare(name)
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        return time.perf_counter() - start

    for name, run in cases.items():
        for _ in range(warmup):
            timed(name, run)
    times = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            times[name].append(timed(name, run))
    return times


def synchronise(device: str | torch.device) -> None:
    """Wait for an accelerator; the CPU never lags behind."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """Median of the ratios of neighbouring runs, ``name`` over ``reference``."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference]))


def peak_memory(run: Callable[[], object], device: str | torch.device = 'cpu') -> int:
    """Bytes that a function has allocated in tensors at its worst moment, above what there was when it started.

    The same run allocates the same. What compiled encoder blocks keep from run to run is counted; what libraries
    allocate past torch is not.
    """
    if torch.device(device).type == 'cuda':
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    release()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def largest_difference(outputs: Outputs, expected: Outputs) -> float:
    """The largest difference of two models' outputs, relative to the largest absolute value of each expected one."""
    outputs, expected = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (outputs, expected))
    return max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for a, b in zip(outputs, expected, strict=True)
    )


def supports_bfloat16(device: str | torch.device) -> bool:
    """Whether the device computes in bfloat16 itself."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def limits(
    device: str | torch.device = 'cpu', side: int = 2048, megabytes: int = 256, rounds: int = 5
) -> dict[str, float]:
    """What the device reaches at best: 10^9 operations a second of a matrix product, and 10^9 bytes of a copy.

    Args:
        device: the device.
        side: of the matrices; their product takes 2 * side^3 operations.
        megabytes: 10^6 bytes that are copied; each is read and written.
        rounds: runs of each, whose median counts.

    Returns:
        ``float32`` and, where the device supports it, ``bfloat16`` by torch, and ``oneDNN float32``, whose
        products use instructions that torch's leave unused on some CPUs, in GFLOP/s; ``copy`` in GB/s.
    """
    check_integer('side', side, 1, MOST, 'of matrices')
    check_integer('megabytes', megabytes, 1, MOST)
    source = torch.randn(megabytes * 10**6 // 4, device=device)
    target, cases, work = torch.empty_like(source), {}, {}
    cases['copy'], work['copy'] = lambda: target.copy_(source), 2 * source.nbytes
    for dtype in (torch.float32, torch.bfloat16)[: 1 + supports_bfloat16(device)]:
        factor, name = torch.randn(side, side, device=device).to(dtype), str(dtype).removeprefix('torch.')
        cases[name], work[name] = lambda factor=factor: torch.mm(factor, factor), 2 * side**3
    with torch.inference_mode():
        factor = torch.randn(side, side, device=device)
        if ONEDNN and torch.device(device).type == 'cpu':
            cases['oneDNN float32'] = lambda: torch.ops.mkldnn._linear_pointwise(factor, factor, None, 'none', [], '')
            work['oneDNN float32'] = 2 * side**3
        times = interleaved_times(cases, rounds, device=device)
    return {name: work[name] / statistics.median(seconds) / 1e9 for name, seconds in times.items()}


def cpuinfo(field: str, file: Path = Path('/proc/cpuinfo')) -> str:
    """What Linux tells of the first processor, e.g. its ``model name``; '' where it does not."""
    lines = file.read_text().splitlines() if file.exists() else []
    values = (value.strip() for name, _, value in (line.partition(':') for line in lines) if name.strip() == field)
    return next(values, '')


def environment(device: str | torch.device = 'cpu') -> dict[str, str | int]:
    """What a time depends on: the machine, the number of threads and the versions of the libraries."""
    cpu = cpuinfo('model name') or platform.processor() or platform.machine()
    found = dict(
        date=str(datetime.now(timezone.utc).date()),
        cpu=cpu,
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        allocator=allocator(),
        torch=torch.__version__,
    )
    if torch.device(device).type == 'cuda':
        found['gpu'] = torch.cuda.get_device_name(device)
    for package in ('mmcv', 'mmdet', 'timm'):
        found[package] = installed_version(package) or 'not installed'
    return found


def allocator() -> str:
    """What is said of the memory allocator by variables: fresh memory takes time, and may be kept or be given back."""
    given = (
        f'{name}={Path(value).name}'
        for name, value in sorted(os.environ.items())
        if name == 'LD_PRELOAD' or name.startswith('MALLOC_')
    )
    return ', '.join(given) or 'default'
