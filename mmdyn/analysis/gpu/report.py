"""The page on what tools/gpu_check.sh found, docs/benchmark-gpu.md."""

from collections.abc import Iterable

from ..report import COLUMNS, aligned, cell, of_suite, table
from ..report import SUITES as SUITE_TEXTS
from .aims import aims_table

HEAD = """\
# On a GPU

Measured by `bash tools/gpu_check.sh OUT` ([how](gpu.md)), written by `python tools/gpu/report.py OUT/results.json`. Do
not edit it. What the columns of times mean is said in [benchmark.md](benchmark.md); here float16 and bfloat16 run under
autocast, and tf32 is float32 with rounded factors of products.
"""
MILLISECONDS = {
    'ms': ('seconds', 1e3, '{:.3f}'),
    'spread ms': ('spread', 1e3, '{:.3f}'),
    **{title: column for title, column in COLUMNS.items() if title not in ('seconds', 'spread')},
}
TRACE = {  # title: entry of a trace, its factor, format of its value
    'query ratio': ('query_ratio', 1, '{:.3f}'),
    'kernels': ('kernels', 1, '{}'),
    'copies': ('copies', 1, '{}'),
    'device ms': ('device_milliseconds', 1, '{:.3f}'),
    'busy ms': ('busy_milliseconds', 1, '{:.3f}'),
    'gaps ms': ('gap_milliseconds', 1, '{:.3f}'),
    'gaps': ('gaps', 1, '{}'),
    'largest gap ms': ('largest_gap_milliseconds', 1, '{:.3f}'),
}
TRAINING = {
    'iterations': ('iterations', 1, '{}'),
    'loss, first 20': ('first_loss', 1, '{:.3f}'),
    'loss, last 20': ('last_loss', 1, '{:.3f}'),
    'query ratio': ('query_ratio', 1, '{:.3f}'),
    'budget': ('budget', 1, '{}'),
    'ms of an iteration': ('seconds', 1e3, '{:.1f}'),
}


def rows(names: str, found: dict, columns: dict) -> str:
    """A table with a line for each entry."""
    lines = [
        [names, *columns],
        *([name, *(cell(entry, *column) for column in columns.values())] for name, entry in found.items()),
    ]
    return aligned(lines, 1)


def bullets(found: Iterable[str]) -> list[str]:
    """A list of Markdown, or no part where there is nothing to list."""
    lines = [f'- {line}' for line in found]
    return ['\n'.join(lines)] if lines else []


def markdown(results: dict) -> str:
    """The page on the results; what was not found has no part of it."""
    parts = [
        HEAD.rstrip(),
        '## Machine',
        aligned([['', ''], *([name, str(value)] for name, value in results.get('machine', {}).items())], 2),
    ]
    if steps := results.get('step'):
        parts += ['## Steps', rows('step', steps, {'seconds': ('seconds', 1, '{}'), 'exit status': ('code', 1, '{}')})]
    if tests := results.get('tests'):
        parts += ['## Tests', rows('tests', tests, {kind: (kind, 1, '{}') for kind in ('passed', 'failed', 'skipped')})]
        parts += bullets(f'`{name}`: {said}' for found in tests.values() for name, said in found['failures'].items())
    parts += benchmark_parts(results.get('benchmark', dict(groups=[])))
    if traces := results.get('traces'):
        parts += ['## Traces of one forward pass', rows('model', traces, TRACE)]
        parts += bullets(
            f'{name}: calls that wait {entry["synchronisations"] or "none"}; lines that wait {entry["waits"] or "none"}'
            for name, entry in traces.items()
        )
    if training := results.get('training'):
        parts += ["## Training on the demo's digits", rows('precision', training, TRAINING)]
        parts += bullets(f'{dtype}: {wrong}' for dtype, found in training.items() for wrong in found['wrong'])
    return '\n\n'.join(parts) + '\n'


def benchmark_parts(result: dict) -> list[str]:
    """The aims, the limits, then a table for each suite and precision."""
    parts, groups = [], result['groups']
    if groups:
        parts += [
            '## Aims',
            'Of each aim the value of the worst case, and how many of its cases ran. DGE has half of the queries.',
            aligned(list(aims_table(groups)), 1),
        ]
    if result.get('limits'):
        parts += [
            '## Times and memory',
            bullets(
                f'{"copy (read and written)" if name == "copy" else f"product of matrices, {name}"}: {value:.0f} '
                f'{"GB/s" if name == "copy" else "GFLOP/s"}'
                for name, value in result['limits'].items()
            )[0],
        ]
    for suite, text in SUITE_TEXTS.items():
        mine = of_suite(result, suite)
        for dtype in dict.fromkeys(group['dtype'] for group in mine):
            of = [group for group in mine if group['dtype'] == dtype and group['rows']]
            parts += [f'### {suite}, {dtype}: {text}', *([table(of, columns=MILLISECONDS)] if of else [])]
    failed = [group for group in groups if 'error' in group]
    return (
        parts
        + (['### What failed'] if failed else [])
        + bullets(
            f'{group["suite"]}, {group["arch"]}, {group["batch"]} x {group["shape"][0]} x {group["shape"][1]}, '
            f'{group["dtype"]}: {group["error"]}'
            for group in failed
        )
    )
