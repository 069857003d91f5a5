"""What was measured of a checkpoint at some prices: which price, and which share of each layer, makes a budget."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...values import check_type, is_number

KEYS = ('price', 'query_ratio', 'layers')
HINT = 'tools/analysis_tools/sweep_budget.py writes such a file.'


def are_numbers(values: Any) -> bool:
    """Whether all of a list are finite numbers."""
    return isinstance(values, (list, tuple)) and all(is_number(value, '(-inf, inf)') for value in values)


class Prices(NamedTuple):
    """P prices and what came of them on average over images, by ascending query ratio.

    Attributes:
        price: (P) lambda, by which a query of a layer of mean complexity C^l lowers a logit.
        query_ratio: (P) beta of eq. 7.
        layers: (P) query ratios of each dynamic layer, by its name.
    """

    price: list[float]
    query_ratio: list[float]
    layers: dict[str, list[float]]

    @classmethod
    def read(cls, source: 'str | Path | Mapping[str, Any] | Prices') -> 'Prices':
        """From a JSON file, or from what it holds.

        Raises:
            TypeError: for neither.
            ValueError: if there is no such file, or if it holds something else.
        """
        if isinstance(source, Prices):
            return source
        check_type('prices', source, (str, Path, Mapping), "the file that was measured, e.g. 'prices.json'")
        name = 'prices' if isinstance(source, Mapping) else f'prices={str(source)!r}'
        try:
            content = source if isinstance(source, Mapping) else json.loads(Path(source).read_text())
        except OSError as error:
            raise ValueError(f'{name} cannot be read: {error.strerror}. {HINT}') from error
        except ValueError as error:
            raise ValueError(f'{name} is no JSON file: {error}. {HINT}') from error
        if not isinstance(content, Mapping) or any(key not in content for key in KEYS):
            raise ValueError(f'{name} must have the keys {", ".join(KEYS)}. {HINT}')
        found, columns = cls(*(content[key] for key in KEYS)), [content[key] for key in KEYS[:2]]
        if isinstance(found.layers, Mapping):
            columns += found.layers.values()
        if not isinstance(found.layers, Mapping) or not all(map(are_numbers, columns)):
            raise ValueError(f'{name} must have lists of finite numbers, and in layers one for each of them. {HINT}')
        lengths = set(map(len, columns))
        if len(lengths) > 1 or 0 in lengths or list(found.query_ratio) != sorted(found.query_ratio):
            raise ValueError(
                f'{name} must have as many numbers for each key, at least one, by ascending query_ratio. {HINT}'
            )
        return found

    def at(self, budget: float) -> tuple[float, dict[str, float]]:
        """The price and the layers' query ratios of a budget, by linear interpolation.

        Raises:
            ValueError: for a budget outside of the query ratios that were measured.
        """
        least, most = self.query_ratio[0], self.query_ratio[-1]
        if not least - 5e-3 <= budget <= most + 5e-3:
            raise ValueError(
                f'budget={budget} is outside of the query ratios from {least:.4f} to {most:.4f} for which the '
                f'prices were measured: choose one between them, or measure more. {HINT}'
            )
        above = next((i for i, ratio in enumerate(self.query_ratio) if ratio >= budget), len(self.query_ratio) - 1)
        below = above if budget >= self.query_ratio[above] else max(above - 1, 0)
        gap = self.query_ratio[above] - self.query_ratio[below]
        part = (budget - self.query_ratio[below]) / gap if gap else 0.0

        def between(values: list[float]) -> float:
            return values[below] + part * (values[above] - values[below])

        return between(self.price), {name: between(ratios) for name, ratios in self.layers.items()}
