import pytest
import torch

from mmdyn.models.replaceable import Refused, replaceable


@pytest.fixture
def double():
    """A function without kernels."""

    @replaceable
    def double(x, times=2):
        """Twice."""
        return times * x

    return double


def refuse_all(x, times=2):
    return Refused('it is Sunday')


def refuse_others(x, times=2):
    return x + x if times == 2 else Refused(f'times={times} is not 2')


def test_a_function_without_kernels_is_its_body(double):
    assert double(3) == 6 and double(3, times=5) == double.plain(3, 5) == 15
    assert (double.__name__, double.__doc__, double.__module__) == ('double', 'Twice.', __name__)
    assert double.why_not(3) == {}


def test_the_first_kernel_that_does_not_refuse_stands_in(double):
    calls = []
    for number, refuses in enumerate((True, False, False)):

        @double.register
        def kernel(x, times=2, number=number, refuses=refuses):
            calls.append(number)
            return Refused('no') if refuses else number

    assert double(3) == 1 and calls == [0, 1]
    assert double.plain(3) == 6 and calls == [0, 1]


def test_the_body_runs_where_all_kernels_refuse(double):
    double.register(refuse_all), double.register(refuse_others)
    assert double(3, times=5) == 15 and double(3) == 6


@pytest.mark.parametrize('result', [None, 0, [], ('no',)])
def test_whatever_a_kernel_returns_is_the_result(double, result):
    double.register(lambda x: result)
    assert double(3) is result


def test_a_kernel_stays_what_it_was(double):
    assert double.register(refuse_all) is refuse_all and double.kernels == [refuse_all]


def test_errors_of_a_kernel_are_no_refusals(double):

    @double.register
    def kernel(x):
        raise RuntimeError('out of memory')

    with pytest.raises(RuntimeError, match='out of memory'):
        double(3)


def test_why_not_names_the_kernels_and_their_reasons(double):
    double.register(refuse_all), double.register(refuse_others)
    assert double.why_not(3) == {f'{__name__}.refuse_all': 'it is Sunday'}
    assert double.why_not(3, times=5) == {
        f'{__name__}.refuse_all': 'it is Sunday',
        f'{__name__}.refuse_others': 'times=5 is not 2',
    }


def test_why_not_leaves_the_tensors_as_they_are(double):
    """Also those in lists; a kernel may overwrite what it is given."""
    double.register(lambda x, times=2: x[0].zero_() + times.zero_())
    tensors = torch.ones(2), torch.ones(2)
    assert double.why_not([tensors[0]], times=tensors[1]) == {}
    assert all(tensor.all() for tensor in tensors)


def test_compilers_and_tracers_see_the_body(double):

    @double.register
    def kernel(x):
        raise AssertionError('called')

    x = torch.ones(3)
    compiled = torch.compile(lambda x: double(x), backend='eager', fullgraph=True)
    assert torch.equal(compiled(x), 2 * x)
    reasons = []
    torch.jit.trace(lambda x: reasons.append(double.why_not(x)) or x, x, check_trace=False)
    assert list(reasons[0].values()) == ['a compiler or tracer records the body']
    traced = torch.jit.trace(lambda x: double(x), x, check_trace=False)  # the check calls it outside of the trace
    assert torch.equal(traced(2 * x), 4 * x)
    with pytest.raises(AssertionError, match='called'):
        double(x)
