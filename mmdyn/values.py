"""What an option may be: a mistake is told where it is made, in place of what would come of it."""

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

# More channels, pixels of a side, heads or blocks than any model has; a number beyond is a slip of the pen.
MOST = 2**15
MOST_CLASSES = 10**9


def is_number(value: Any, interval: str) -> bool:
    """Whether a value is a number in an interval such as '[0, 1)'; neither truth values nor NaN are any."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        number = float(value)
    except OverflowError:
        return False
    low, high = map(float, interval[1:-1].split(','))
    return low <= number <= high and (number != low or interval[0] == '[') and (number != high or interval[-1] == ']')


def is_integer(value: Any, least: float, most: float = float('inf')) -> bool:
    """Whether a value is an integer between two others; truth values are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most


def check_number(name: str, value: Any, interval: str, what: str = '') -> None:
    """Raise ValueError unless a value is a number in an interval.

    Args:
        name: of the option.
        value: that was given.
        interval: e.g. '[0, 1)'; '(0, inf)' for any that is greater than 0 and finite.
        what: the number is.
    """
    if not is_number(value, interval):
        raise ValueError(f'{name}={value!r}: give a number in {interval}{what and f", {what}"}.')


def check_integer(name: str, value: Any, least: int, most: float = float('inf'), what: str = '') -> None:
    """Raise ValueError unless a value is an integer from ``least`` to ``most``, both included."""
    if not is_integer(value, least, most):
        upto = '' if most == float('inf') else f' and <= {most}'
        raise ValueError(f'{name}={value!r}: give an integer >= {least}{upto}{what and f", {what}"}.')


def check_choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise ValueError unless a value is one of a few."""
    if value not in tuple(allowed):
        raise ValueError(f'{name}={value!r}: choose from {tuple(allowed)}.')


def check_type(name: str, value: Any, allowed: type | tuple[type, ...], what: str) -> None:
    """Raise TypeError unless a value is of one of a few types; ``what`` says it in words."""
    if not isinstance(value, allowed):
        raise TypeError(f'{name}={value!r}: give {what}.')


def sides(name: str, value: Any, least: int = 1, what: str = '', unit: str = 'pixels') -> tuple[int, int]:
    """(height, width) of an option that is one integer for both, or two.

    Args:
        name: of the option.
        value: that was given.
        least: it may be.
        what: to say of that.
        unit: of the sides.

    Raises:
        ValueError: for anything else, or less than ``least``.
    """
    pair = (value, value) if isinstance(value, Integral) else value
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not is_pair or not all(is_integer(side, least, MOST) for side in pair):
        raise ValueError(
            f'{name}={value!r}: give the side of a square, or (height, width), of at least {least} {unit}{what}.'
        )
    return pair[0], pair[1]
