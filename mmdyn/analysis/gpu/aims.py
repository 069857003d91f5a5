"""What the results of a GPU are to reach, and how far they do."""

from collections.abc import Iterator
from typing import NamedTuple

from .cases import CASES, DTYPES

LARGE, SMALL = ('det', 'seg'), ('cls',)


class Aim(NamedTuple):
    """A bound of what is measured.

    Attributes:
        name: for readers.
        suites, family, batch: the cases of :data:`~mmdyn.analysis.gpu.cases.CASES` that it is for.
        row, entry: what is compared of each.
        sign: ``'>='`` or ``'<='``.
        bound: that is to be kept.
    """

    name: str
    suites: tuple[str, ...]
    family: str
    batch: int
    row: str
    entry: str
    sign: str
    bound: float

    @property
    def cases(self) -> list[tuple]:
        """Those that the aim is for."""
        return [
            (suite, arch, shape, batch)
            for suite, arch, shape, batch in CASES
            if suite in self.suites and arch.startswith(self.family) and batch == self.batch
        ]

    def worst(self, groups: list[dict], dtype: str) -> tuple[float, int] | None:
        """The value of the case that is farthest from the aim, and how many there are; None without any."""
        values = [
            group['rows'][self.row][self.entry]
            for group in groups
            if group['dtype'] == dtype
            and (group['suite'], group['arch'], tuple(group['shape']), group['batch']) in self.cases
            and self.entry in group['rows'].get(self.row, {})
        ]
        return ((min if self.sign == '>=' else max)(values), len(values)) if values else None


AIMS = (
    Aim('PVT with DGE, a large image', LARGE, 'PVT', 1, 'DGE clustered', 'efficiency', '>=', 0.9),
    Aim('the same, graphed', LARGE, 'PVT', 1, 'DGE bounded graphed', 'efficiency', '>=', 0.9),
    Aim('DPVT with DGE, a large image', LARGE, 'DPVT', 1, 'DGE clustered', 'efficiency', '>=', 0.85),
    Aim('the same, graphed', LARGE, 'DPVT', 1, 'DGE bounded graphed', 'efficiency', '>=', 0.85),
    Aim('PVT and DeiT with DGE, 64 images', SMALL, '', 64, 'DGE clustered', 'efficiency', '>=', 0.9),
    Aim('one image, exact budget, graphed', SMALL, '', 1, 'DGE exact graphed', 'efficiency', '>=', 0.85),
    Aim('CF-ViT, half of 1024 images stop', ('cfvit',), '', 1024, 'CF-ViT, 50% stop', 'efficiency', '>=', 0.95),
    Aim('sparse training, time', ('train',), '', 64, 'DGE sparse', 'time_ratio', '<=', 0.667),
    Aim('sparse training, memory', ('train',), '', 64, 'DGE sparse', 'memory_ratio', '<=', 0.7),
    Aim("mmdet's PVT, time over ours", ('det',), 'PVT-small', 1, 'mmdet', 'time_ratio', '>=', 1.5),
)


def aims_table(groups: list[dict]) -> Iterator[list[str]]:
    """The lines of a table: each aim, and in each precision its worst case, with the number of cases that ran."""
    yield ['aim', 'value', 'bound', *DTYPES]
    for aim in AIMS:
        found = (aim.worst(groups, dtype) for dtype in DTYPES)
        cells = ('-' if worst is None else f'{worst[0]:.2f} ({worst[1]} of {len(aim.cases)})' for worst in found)
        yield [aim.name, aim.entry.replace('_', ' '), f'{aim.sign} {aim.bound:g}', *cells]
