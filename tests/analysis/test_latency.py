import os
import platform
import time
from functools import partial

import pytest
import torch

from mmdyn.analysis import latency
from mmdyn.analysis.latency import (
    cpuinfo,
    environment,
    interleaved_times,
    largest_difference,
    limits,
    peak_memory,
    ratio,
)
from mmdyn.models import PVT
from mmdyn.models.stage import run_blocks


def test_runs_in_turns_after_a_warm_up():
    calls = []
    times = interleaved_times(dict(a=lambda: calls.append('a'), b=lambda: calls.append('b')), rounds=3, warmup=2)
    assert ''.join(calls) == 'aabb' + 'ab' * 3
    assert {name: len(of) for name, of in times.items()} == dict(a=3, b=3)


def test_each_run_is_prepared_outside_of_its_time():
    calls = []

    def prepare(name):
        time.sleep(0.05)
        calls.append(f'<{name}>')

    cases = dict(a=lambda: calls.append('a'), b=lambda: calls.append('b'))
    times = interleaved_times(cases, rounds=1, warmup=1, prepare=prepare)
    assert ''.join(calls) == '<a>a<b>b' * 2 and max(times['a'] + times['b']) < 0.05


def test_ratio_is_the_median_of_neighbours():
    assert ratio(dict(a=[1.0, 4.0, 3.0], b=[1.0, 2.0, 1.0]), 'a', 'b') == 2.0


def test_measures_what_the_case_takes():
    times = interleaved_times(dict(nap=lambda: time.sleep(0.02)), rounds=2, warmup=0)
    assert min(times['nap']) >= 0.02


def test_peak_memory_of_tensors_that_come_and_go():
    kept = [torch.empty(5000)]

    def run():
        kept.pop()  # what was there before does not count, not even when it goes
        first, second = torch.empty(1000), torch.empty(2000, dtype=torch.double)
        del first
        third = torch.empty(10, dtype=torch.uint8)  # 4000 + 16000 are the most, not 16000 + 10
        del second, third
        kept.append(torch.empty(3000))

    assert peak_memory(run) == 4000 + 16000


def test_peak_memory_of_a_result_and_of_nothing():
    kept = []
    assert peak_memory(lambda: kept.append(torch.zeros(100, 100))) == 40000
    assert peak_memory(lambda: None) == 0


@torch.inference_mode()
def test_peak_memory_has_what_kernels_keep():
    """However often they ran before."""
    library = pytest.importorskip('mmdyn.kernels.library')
    stage = PVT('tiny', img_size=64).eval().stages[0]
    refused = run_blocks.why_not(stage, torch.randn(1, 64, 64), (8, 8))
    if reason := refused.get('mmdyn.kernels.stage.encode_blocks'):
        pytest.skip(reason)
    # The kernel overwrites its tokens, so that what it works in is all that it takes.
    peaks = [peak_memory(partial(run_blocks, stage, torch.randn(1, 64, 64), (8, 8))) for _ in range(2)]
    # Matrices of a panel of 64 queries: three of the channels and one of the hidden channels.
    assert peaks[0] == peaks[1] > 4 * 64 * (3 * 64 + 512)
    library.release()
    assert run_blocks(stage, torch.randn(1, 64, 64), (8, 8)).isfinite().all()


def test_largest_difference_is_relative_to_each_output():
    a, b = torch.tensor([1.0, -10.0]), torch.tensor([100.0, 0.0])
    assert largest_difference((a, b), (a, b)) == 0
    assert largest_difference((a + torch.tensor([0.5, 0.0]), b + 1), (a, b)) == pytest.approx(0.05)
    assert largest_difference(a * 2, (a,)) == pytest.approx(1)


def test_limits_count_operations_and_bytes(monkeypatch):
    monkeypatch.setattr(
        'mmdyn.analysis.latency.interleaved_times',
        lambda cases, rounds, device: {name: [0.001] * rounds for name in cases},
    )
    found = limits(side=100, megabytes=3, rounds=2)
    assert found.pop('copy') == pytest.approx(2 * 3e6 / 0.001 / 1e9)
    assert {'float32'} <= set(found) <= {'float32', 'bfloat16', 'oneDNN float32'}
    assert list(found.values()) == pytest.approx([2 * 100**3 / 0.001 / 1e9] * len(found))


def test_limits_run():
    assert all(value > 0 for value in limits(side=64, megabytes=1, rounds=1).values())


def test_allocator_is_what_the_variables_say(monkeypatch):
    for name in [name for name in os.environ if name == 'LD_PRELOAD' or name.startswith('MALLOC_')]:
        monkeypatch.delenv(name)
    assert environment()['allocator'] == 'default'
    monkeypatch.setenv('MALLOC_TOP_PAD_', '4096')
    monkeypatch.setenv('LD_PRELOAD', '/somewhere/libjemalloc.so.2')
    assert environment()['allocator'] == 'LD_PRELOAD=libjemalloc.so.2, MALLOC_TOP_PAD_=4096'


def test_environment(monkeypatch):
    found = environment()
    assert found['threads'] == torch.get_num_threads() and found['torch'] == torch.__version__
    assert {'date', 'cpu', 'capability', 'mmcv', 'mmdet', 'timm'} < set(found) and 'gpu' not in found
    assert found['cpu'] in {cpuinfo('model name'), platform.processor(), platform.machine()} - {''}
    monkeypatch.setattr(latency, 'cpuinfo', lambda field: '')
    assert environment()['cpu']
