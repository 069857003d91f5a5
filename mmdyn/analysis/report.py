"""The report on what benchmark.py measured: tables and a plot.

The tables have all columns for the CPU, and seconds and the ratio of times for a GPU. Of a GPU alone they have all.
"""

import json
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

COLUMNS = {  # title: entry of a row, its factor, format of its value
    'seconds': ('seconds', 1, '{:.3f}'),
    'spread': ('spread', 1, '{:.3f}'),
    'time': ('time_ratio', 1, '{:.2f}'),
    'multiply-adds': ('macs_ratio', 1, '{:.2f}'),
    'efficiency': ('efficiency', 1, '{:.2f}'),
    'query ratio': ('query_ratio', 1, '{:.3f}'),
    'peak MB': ('peak_memory', 1e-6, '{:.0f}'),
    'memory': ('memory_ratio', 1, '{:.2f}'),
    'difference': ('max_difference', 1, '{:.0e}'),
}
SUITES = dict(
    cls='backbones on images for classification',
    det='backbones on images for detection',
    seg='backbones on images for segmentation',
    cfvit='classification by CF-ViT, when a share of the images stops at the coarse stage',
    train='one training iteration, forward and backward',
    any='models of other libraries, as they are and with DGE',
    peers='backbones by what runs the dense model on a CPU, and with DGE',
)
# What the README shows: models, by whose code in PyTorch they run, and by which runtimes.
SUMMARY = (
    ('PVT-small', (224, 224), 'mmdet'),
    ('PVT-small', (800, 1280), 'mmdet'),
    ('DPVT-small', (800, 1280), 'mmcv fallback'),
    ('DeiT-small', (224, 224), 'timm'),
)
RUNTIMES = ('onnxruntime', 'OpenVINO')
LEGEND = """\
A model's name is followed by the shape of its images, batch x height x width. The first case of a model is what the
ratios of the others refer to.

- **seconds**: median of the runs, which took turns, five times as many of small images in cls and peers; **spread**:
  the slowest of them less the fastest.
- **time**: ratio of times, median over neighbouring runs; **multiply-adds**: their ratio, as we count them.
- **efficiency**: multiply-adds over time. At 1 the whole promised saving arrives.
- **query ratio**: queries over those of the dense model in the layers that choose, each counted by what it costs.
- **peak MB**: 10^6 bytes that a run allocates in torch's tensors at its worst moment, beside weights and images;
  **memory**: their ratio.
- **difference**: largest difference of the outputs from the first case's, relative to their largest value, of cases
  that have to agree with it.

DGE has the granularities 1, 2 and 4 and a routing that is given. *Clustered* and *random* are made for the query ratio
{ratio}: the finest regions lie together as on the objects of a natural image, or anywhere, which is the worst case.
*Trained* is what a trained demo model chooses on an image, stretched to the map, with that model's granularities.
*Finest* has granularity 1 everywhere, so that there is nothing to save. *mmdet*, *timm* and *mmcv fallback* (DPVT that
samples with mmcv's function for the CPU) are peers with the weights of the dense model. *onnxruntime* and *OpenVINO*
run the dense model, exported to ONNX for images of that shape, with as many threads; in peers each run follows 50 ms of
rest, in which the threads of the library before fall asleep. *Attention* behind a model's name is all its attention
layers on random tokens. *bfloat16* runs under autocast, or is OpenVINO's precision; its ratios refer to the float32 of
the first case. In training, *DGE dense* runs all granularities, but those that its gates reject are not counted.
"""


def read(files: Iterable[Path]) -> dict[str, dict]:
    """The results of files, by their paths; that of the CPU comes first.

    Raises:
        ValueError: if one is no result of benchmark.py, or two ran on the same device.
    """
    results, seen = {}, {}
    for file in files:
        try:
            result = json.loads(Path(file).read_text())
            device, _ = result['device'], result['groups']
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{file} is no result of benchmark.py ({type(error).__name__}: {error}): give a '
                'benchmark.json that it wrote.'
            ) from error
        if device in seen:
            raise ValueError(f'{seen[device]} and {file} are both of device {device}: give one file of each device.')
        seen[device], results[str(file)] = file, result
    return dict(sorted(results.items(), key=lambda item: item[1]['device']))


def runs_of(result: dict) -> list[dict]:
    """The runs that a result has its groups from, the newest last."""
    return [*result.get('earlier', []), result]


def of_suite(result: dict, suite: str) -> list[dict]:
    """The groups of a suite."""
    return [group for run in runs_of(result) for group in run['groups'] if group['suite'] == suite]


def with_earlier(result: dict, before: dict) -> dict:
    """A result, and what one before has of suites that it lacks.

    In ``earlier`` these groups stay with the command, the environment and the limits of their own run, to which their
    ratios belong.
    """
    new = {group['suite'] for group in result['groups']}
    earlier = []
    for run in runs_of(before):
        groups = [group for group in run['groups'] if group['suite'] not in new]
        if groups:
            earlier.append({key: value for key, value in run.items() if key != 'earlier'} | dict(groups=groups))
    return {**result, 'earlier': earlier} if earlier else result


def title(group: dict) -> str:
    """A model and the shape of its images."""
    return f'{group["arch"]} {" x ".join(map(str, (group["batch"], *group["shape"])))}'


def table(groups: list[dict], gpu: list[dict] | None = None, columns: dict[str, tuple] = COLUMNS) -> str:
    """Groups of rows as a Markdown table; with ``gpu``, which need not have the same groups, in two columns more."""
    lines = [['model', 'case', *columns, *([] if gpu is None else ['GPU seconds', 'GPU time'])]]
    here, there = ({title(group): group['rows'] for group in of} for of in (groups, gpu or []))
    for model in {**here, **there}:
        mine, theirs = here.get(model, {}), there.get(model, {})
        for case in {**mine, **theirs}:
            row, far = mine.get(case, {}), theirs.get(case, {})
            # These do not depend on the device.
            row = {**{name: far[name] for name in ('macs_ratio', 'query_ratio') if name in far}, **row}
            cells = [cell(row, *column) for column in columns.values()]
            cells += [cell(far, *COLUMNS[name]) for name in ('seconds', 'time') if gpu is not None]
            lines.append([model, case, *cells])
    return aligned(lines, 2)


def aligned(lines: list[list[str]], names: int) -> str:
    """A Markdown table of lines of cells, the first of which has the titles; all but ``names`` columns stand right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ['-' * width if i < names else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
    padded = (
        [text.ljust(width) if i < names else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths))]
        for line in (lines[0], rule, *lines[1:])
    )
    return '\n'.join(f'| {" | ".join(line)} |' for line in padded)


def cell(row: dict, name: str, factor: float, form: str) -> str:
    """An entry of a row, or a dash."""
    return form.format(row[name] * factor) if name in row else '-'


def summary(result: dict) -> str:
    """The README's table: seconds of dense backbones in PyTorch, in runtimes and of ours, and with DGE.

    Raises:
        ValueError: if none of its models was measured.
    """
    # Of what several suites have measured, the last one's counts: that of peers.
    groups = {
        (group['arch'], tuple(group['shape'])): group['rows']
        for suite in SUITES
        for group in of_suite(result, suite)
        if group['batch'] == 1
    }
    lines = [
        f'| | image | PyTorch | {" | ".join(RUNTIMES)} | ours, dense | ours with DGE | its multiply-adds |',
        '|---' * (6 + len(RUNTIMES)) + '|',
    ]
    for arch, shape, package in SUMMARY:
        rows = groups.get((arch, shape))
        if rows:
            cases = (package, *RUNTIMES, 'dense', 'DGE clustered')
            seconds, *others = (cell(rows.get(case, {}), *COLUMNS['seconds']) for case in cases)
            macs = cell(rows.get('DGE clustered', {}), 'macs_ratio', 100, '{:.0f} %')
            cells = arch.replace('small', 'S'), 'x'.join(map(str, shape)), f'{seconds} ({package})', *others, macs
            lines.append(f'| {" | ".join(cells)} |')
    if len(lines) == 2:
        raise ValueError('None of the models of the summary was measured: run benchmark.py --suite peers.')
    return '\n'.join(lines)


def markdown(results: dict[str, dict]) -> str:
    """The report on results by file."""
    first, *others = results.values()
    runs = [run for result in results.values() for run in runs_of(result)]
    commands = [run['command'] for run in runs]
    commands.append(f'python tools/analysis_tools/benchmark_report.py {" ".join(results)}')
    parts = [
        '# Speed and memory',
        'Measured and written by',
        '```bash\n' + '\n'.join(commands) + '\n```',
        f'The last command alone writes this file and the plot from {" and ".join(results)}. Do not edit it.',
        environments(runs),
        '## How to read it',
        LEGEND.format(ratio=' or '.join(dict.fromkeys(f'{run["query_ratio"]:g}' for run in runs))).rstrip(),
        '![Ratio of times and of multiply-adds](benchmark.png)',
    ]
    # The columns of a GPU are there before there are any numbers for them.
    gpu = others[0] if others else dict(groups=[])
    for suite, text in SUITES.items():
        mine, theirs = of_suite(first, suite), of_suite(gpu, suite)
        if mine or theirs:
            parts += [f'## {suite}: {text}', table(mine, None if first['device'] == 'cuda' else theirs)]
    return '\n\n'.join(parts) + '\n'


def environments(runs: Iterable[dict]) -> str:
    """A Markdown table of what was measured on what, with a column for each run."""
    columns = []
    for run in runs:
        found = {
            'device': run['device'],
            'suites': ', '.join(dict.fromkeys(group['suite'] for group in run['groups'])),
            'precision': run['dtype'],
            'runs of each case': run['rounds'],
            **run['environment'],
        }
        for name, value in run['limits'].items():
            text = 'copy, GB/s (read and written)' if name == 'copy' else f'product of matrices, {name}, GFLOP/s'
            found[text] = f'{value:.0f}'
        columns.append(found)
    names = dict.fromkeys(name for found in columns for name in found)
    lines = [f'| {name} | ' + ' | '.join(str(found.get(name, '-')) for found in columns) + ' |' for name in names]
    return '\n'.join([lines[0], '|---' * (1 + len(columns)) + '|', *lines[1:]])


def draw_panel(axes: Axes, groups: list[dict], limit: float = 2.0) -> int:
    """Bars of the ratio of times, with a mark at that of multiply-adds; returns the number of lines."""
    names, line = {}, 0
    for group in groups:
        names[line] = title(group)
        for case, row in list(group['rows'].items())[1:]:
            line += 1
            time, macs, names[line] = row['time_ratio'], row['macs_ratio'], case
            shown = min(time, limit)
            axes.barh(line, shown, color='C0', height=0.7)
            axes.plot([macs, macs], [line - 0.3, line + 0.3], color='C1', linewidth=2.5)
            # Beyond the limit a bar is cut.
            axes.annotate(
                f'{time:.2f}' + ' →' * (time > limit),
                (max(shown, macs), line),
                (4, 0),
                textcoords='offset points',
                fontsize=7,
                va='center',
                bbox=dict(fc='white', ec='none', pad=0.5),
            )
        line += 2
    axes.axvline(1, color='black', linewidth=0.8, zorder=0)
    axes.set_yticks(list(names), list(names.values()), fontsize=7)
    for label in axes.get_yticklabels():
        label.set_fontweight('bold' if ' x ' in label.get_text() else 'normal')
    axes.tick_params(axis='x', labelsize=7)
    axes.tick_params(axis='y', length=0)
    axes.set_xlabel('time (bar) and multiply-adds (mark)', fontsize=7)
    axes.set_xlim(0, limit * 1.3)
    return line - 1


def draw(result: dict, path: Path) -> None:
    """Plot a panel for each suite, in three columns of about the same height."""

    def height(suite: str) -> float:  # in inches
        return 0.8 + 0.16 * sum(len(group['rows']) + 1 for group in of_suite(result, suite))

    suites = [suite for suite in SUITES if of_suite(result, suite)]
    columns: list[list[str]] = [[] for _ in suites[:3]]
    for suite in sorted(suites, key=height, reverse=True):
        min(columns, key=lambda column: sum(map(height, column))).append(suite)
    tallest = max(sum(map(height, column)) for column in columns)
    figure = Figure(figsize=(4.6 * len(columns), tallest), layout='constrained')
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns):
        heights = list(map(height, column))
        *panels, rest = part.subplots(
            len(column) + 1, height_ratios=[*heights, max(tallest - sum(heights), 1e-3)], squeeze=False
        )[:, 0]
        rest.remove()
        for axes, suite in zip(panels, column):
            axes.set_ylim(draw_panel(axes, of_suite(result, suite)), -1)
            axes.set_title(suite, fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=100)
    Image.open(buffer).quantize(32).save(path)  # a few colours, in a sixth of the bytes


def write_report(results: dict[str, dict], out: Path) -> None:
    """Write benchmark.md and benchmark.png into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / 'benchmark.md').write_text(markdown(results))
    draw(next(iter(results.values())), out / 'benchmark.png')
    print(f'benchmark.md and benchmark.png are in {out}')
