"""Curves from what the tools and mmengine's logs have written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

KNOWN = (
    'sweep.json of sweep_budget.py, curve.json of sweep_threshold.py, report.json of report.py, scalars.json of a '
    'training, or the JSON file that a test leaves in its folder'
)
RATIO = 'query_ratio/'


class Source(NamedTuple):
    """What one file tells; what it does not tell is empty.

    Attributes:
        name: for the legend.
        cost: (multiply-adds in 1e9, accuracy) of points.
        time: (milliseconds, accuracy) of points.
        metric: name of the accuracy.
        layers: query ratio of each layer, as the routers decide.
        stages: (multiply-adds in 1e9, images right at the coarse stage, at the fine stage) of points.
        training: (step, value) of each quantity of a training.
    """

    name: str
    cost: list[tuple[float, float]] = []
    time: list[tuple[float, float]] = []
    metric: str = ''
    layers: dict[str, float] = {}
    stages: list[tuple[float, float, float]] = []
    training: dict[str, list[tuple[float, float]]] = {}


def read_source(path: str | Path, name: str | None = None, metric: str | None = None) -> list[Source]:
    """Read a file; a sweep of several checkpoints or modes has several sources.

    Args:
        path: of the file.
        name: for the legend. Defaults to the folder that has the file, or what has a place for it.
        metric: accuracy to take. Defaults to the file's own, or to the first that is no cost.

    Raises:
        ValueError: if the file cannot be read or is none of those that are known.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'Cannot read {path}: {getattr(error, "strerror", None) or error}.') from error
    try:
        content = [json.loads('\n'.join(lines))]
    except ValueError:
        try:
            content = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise ValueError(f'{path} is no JSON file: {error}.') from error
    if not content or not all(isinstance(part, dict) for part in content):
        raise ValueError(f'{path} is none of the files that are known: {KNOWN}.')
    first, name = content[0], name or default_name(path)
    if 'rows' in first and 'metric' in first:
        return of_sweep(first, name, metric)
    if 'points' in first and 'metric' in first:
        rows = [dict(point, mode='', checkpoint='') for point in first['points']]
        found = of_rows(rows, name, choose_metric(rows, metric or first['metric'], path))
        as_set = first['points'][first['start']]
        return [found._replace(layers=as_set.get('layers', {}), stages=stages_of(first['points']))]
    if 'curve' in first and 'coarse_macs' in first:
        columns = first['curve']
        points = [dict(zip(columns, values)) for values in zip(*columns.values())]
        cost = [(point['macs'] / 1e9, point['top1']) for point in points]
        return [Source(name, cost, metric='accuracy/top1', stages=stages_of(points))]
    if len(content) > 1 or 'lr' in first or 'step' in first:
        return [Source(name, training=training_of(content))]
    if 'flops/gflops' in first or 'cf/gflops' in first:
        return [of_test(first, name, metric, path)]
    raise ValueError(f'{path} is none of the files that are known: {KNOWN}.')


def default_name(path: Path) -> str:
    """The folder of a run: the first above a file that is not named by its time or purpose."""
    dull = {'vis_data', 'budget', 'threshold', 'report', 'test'}
    for parent in path.resolve().parents:
        if parent.name not in dull and not parent.name.replace('_', '').isdigit():
            return parent.name
    return path.stem


def choose_metric(rows: Sequence[dict[str, Any]], metric: str, path: Path) -> str:
    """The metric, if it is there.

    Raises:
        ValueError: if it is not.
    """
    numbers = [name for name, value in rows[0].items() if isinstance(value, (int, float))]
    if metric not in numbers:
        raise ValueError(f'{path} has no metric {metric}: choose from {numbers}.')
    return metric


def of_sweep(content: dict[str, Any], name: str, metric: str | None) -> list[Source]:
    """A source for each checkpoint and mode of a sweep; the routers' own decision is in each."""
    rows = content['rows']
    metric = choose_metric(rows, metric or content['metric'], Path('sweep.json'))
    found = []
    for checkpoint, mode in dict.fromkeys((row['checkpoint'], row['mode']) for row in rows):
        same = [row for row in rows if row['checkpoint'] == checkpoint and row['mode'] in (mode, 'router')]
        if mode == 'router' and len(same) < len([row for row in rows if row['checkpoint'] == checkpoint]):
            continue
        several = len({row['checkpoint'] for row in rows}) > 1
        source = of_rows(same, f'{name}{", " + checkpoint if several else ""}, {mode}', metric)
        router = next((row for row in same if row['mode'] == 'router'), {})
        found.append(source._replace(layers=router.get('layers', {})))
    return found


def of_rows(rows: Sequence[dict[str, Any]], name: str, metric: str) -> Source:
    """A source of rows that have their cost and time; points in order of their cost."""
    rows = sorted((row for row in rows if row.get(metric) is not None), key=lambda row: row['gflops'])
    return Source(
        name,
        [(row['gflops'], row[metric]) for row in rows],
        [(row['milliseconds'], row[metric]) for row in rows],
        metric,
    )


def stages_of(points: Sequence[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Figure 8 of the CF-ViT paper, where the points tell it."""
    return [
        (point['macs'] / 1e9, point['coarse_right'], point['fine_right']) for point in points if 'coarse_right' in point
    ]


def training_of(lines: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Each quantity of mmengine's scalars over its step.

    Validations count epochs where a training counts iterations; they get the step of the line before them.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    step = 0.0
    for line in lines:
        validates = 'iter' not in line and 'lr' not in line and not any(name.startswith(RATIO) for name in line)
        step = step if validates else line.get('step', line.get('iter', step))
        for name, value in line.items():
            if name not in ('step', 'iter', 'epoch') and isinstance(value, (int, float)):
                found.setdefault(name, []).append((step, value))
    return found


def of_test(content: dict[str, Any], name: str, metric: str | None, path: Path) -> Source:
    """The one point of a test."""
    costs = ('flops/', 'cf/', 'data_time', 'time', 'gates/')
    own = [key for key, value in content.items() if isinstance(value, (int, float)) and not key.startswith(costs)]
    if not own and metric is None:
        raise ValueError(f'{path} has no accuracy beside its cost.')
    metric = choose_metric([content], metric or own[0], path)
    gflops = content.get('cf/gflops', content.get('flops/gflops'))
    prefix = f'flops/{RATIO}'
    layers = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    return Source(name, [(gflops, content[metric])], metric=metric, layers=layers)


def joined(sources: Sequence[Source]) -> list[Source]:
    """Sources of the same name as one, with their points in order of cost: models of several sizes are a curve."""
    found: dict[str, Source] = {}
    for source in sources:
        before = found.get(source.name)
        if before is None:
            found[source.name] = source
            continue
        found[source.name] = Source(
            source.name,
            sorted([*before.cost, *source.cost]),
            sorted([*before.time, *source.time]),
            before.metric or source.metric,
            before.layers or source.layers,
            sorted([*before.stages, *source.stages]),
            {**source.training, **before.training},
        )
    return list(found.values())
