import math

import numpy as np
import pytest

from mmdyn.values import check_choice, check_integer, check_number, check_type, is_integer, is_number, sides

NO_NUMBERS = [math.nan, True, '1', None, [1], 1j, 10**400]


@pytest.mark.parametrize(
    'interval, inside, outside',
    [
        ('[0, 1]', [0, 1, 0.5, np.float32(0.25), np.int64(1)], [-1e-9, 1.0001, math.inf]),
        ('[0, 1)', [0, 0.999], [1, 1.0, -1]),
        ('(0, 1)', [1e-9], [0, 1, 0.0]),
        ('(0, inf)', [1e-300, 1e300], [0, math.inf, -1]),
        ('(-inf, inf)', [-1e300, 0], [math.inf, -math.inf]),
    ],
)
def test_intervals(interval, inside, outside):
    for value in inside:
        assert is_number(value, interval)
        check_number('rate', value, interval)
    for value in (*outside, *NO_NUMBERS):
        assert not is_number(value, interval)
        with pytest.raises(ValueError, match=r'^rate=.*: give a number in [\[(].*[\])]\.$'):
            check_number('rate', value, interval)


@pytest.mark.parametrize('value', [0, 5, 1.0, 2.5, math.inf, *NO_NUMBERS])
def test_integers(value):
    assert not is_integer(value, 1, 4)
    with pytest.raises(ValueError, match=r'^depth=.*: give an integer >= 1 and <= 4\.$'):
        check_integer('depth', value, 1, 4)


def test_integers_that_are_allowed():
    for value in (1, 4, np.int64(2)):
        check_integer('depth', value, 1, 4)
    check_integer('depth', 10**30, 1)


def test_messages_say_what_is_meant():
    with pytest.raises(ValueError, match=r'^depth=-1: give an integer >= 0, the number of blocks\.$'):
        check_integer('depth', -1, 0, what='the number of blocks')
    with pytest.raises(ValueError, match=r"^rate='x': give a number in \[0, 1\], the rate\.$"):
        check_number('rate', 'x', '[0, 1]', 'the rate')
    with pytest.raises(ValueError, match=r"^mode=\[\]: choose from \('a', 'b'\)\.$"):
        check_choice('mode', [], {'a': 1, 'b': 2})
    with pytest.raises(TypeError, match=r'^root=3: give the path of a folder\.$'):
        check_type('root', 3, str, 'the path of a folder')
    check_choice('mode', 'b', {'a': 1, 'b': 2})
    check_type('root', 'x', (str, type(None)), 'the path of a folder')


@pytest.mark.parametrize('value', [3, (2, 4), (4, 3), [4], (4, 4, 4), 'ab', 4.0, True, (4, 4.0), None, 2**15 + 1])
def test_sides_that_are_none(value):
    with pytest.raises(ValueError, match=r'^size=.*: give the side of a square, or \(height, width\), of at least 4 '):
        sides('size', value, 4)


def test_sides():
    assert sides('size', 4, 4) == (4, 4)
    assert sides('size', [4, 7], 4) == (4, 7)
