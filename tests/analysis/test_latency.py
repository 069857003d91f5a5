import time

from mmdyn.analysis.latency import interleaved_times, ratio


def test_runs_in_turns_after_a_warm_up():
    calls = []
    times = interleaved_times(dict(a=lambda: calls.append('a'), b=lambda: calls.append('b')), rounds=3, warmup=2)
    assert ''.join(calls) == 'aabb' + 'ab' * 3
    assert {name: len(of) for name, of in times.items()} == dict(a=3, b=3)


def test_ratio_is_the_median_of_neighbours():
    assert ratio(dict(a=[1., 4., 3.], b=[1., 2., 1.]), 'a', 'b') == 2.


def test_measures_what_the_case_takes():
    times = interleaved_times(dict(nap=lambda: time.sleep(0.02)), rounds=2, warmup=0)
    assert min(times['nap']) >= 0.02
