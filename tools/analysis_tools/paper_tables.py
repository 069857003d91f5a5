"""Count the models of the DGE paper's tables 1 to 4 and of the CF-ViT paper's 1, 2 and 6, beside the papers' numbers.

Protocol of DGE (supplement B.3): multiply-adds of linear layers, convolutions, both matrix products of attention and
the points sampled by deformable attention, on one image, of the whole model. With DGE each layer's queries cost their
share at the given query ratio; keys, values, spatial reduction, patch embeddings, routers, neck and head are spent in
any case. Detectors: 800 x 1280, RPN, box head at 1000 proposals; the mask head at no detections, which is what the
paper's totals agree with (see --detections). Segmentors: 512 x 2048. The last column is the query ratio at which our
count saves what the paper prints.

Protocol of CF-ViT: the same operations of a classifier with 1000 classes. Both stages run for each image; where the
paper's threshold lets images stop at the coarse stage, the share of them is told at which our count is what it prints.
"""

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml
from mmengine.config import Config

import mmdyn  # noqa: F401
from mmdyn.analysis.flops import build_model, count_macs, report
from mmdyn.engine.command import command, only_results

HERE = Path(__file__).resolve()
CONFIGS = HERE.parents[2] / 'configs'
PAPER = yaml.safe_load(HERE.with_name('paper_numbers.yml').read_text())
# A difference from the paper beyond these gets explained.
LIMITS = dict(params=0.015, params_dge=0.015, dense=0.015, saving=0.12)


@cache
def count(config: str, shape: tuple, query_ratio: float, detections: int) -> dict:
    """What we count of a config: parameters in millions, multiply-adds in G.

    ``params`` and ``dense`` are of the dense model, ``params_dge`` and ``spent`` of the one with DGE.
    """
    result = report(Config.fromfile(CONFIGS / config), shape, query_ratio, detections=detections)
    dense, spent = result['flops_dense'] / 1e9, result['flops'] / 1e9
    queries = sum(layer['flops_queries'] for layer in result['layers']) / 1e9
    return dict(
        params=result['params_dense'] / 1e6,
        params_dge=result['params'] / 1e6,
        dense=dense,
        spent=spent,
        saving=dense - spent,
        blocks=sum(layer['flops_dense'] for layer in result['layers']) / 1e9,
        queries=queries,
        routers=(1 - query_ratio) * queries - (dense - spent),
    )


def printed_heads() -> list:
    """Parameters of Mask R-CNN less those of Semantic FPN by what is printed for each backbone, in millions."""
    tables = [table for table in PAPER if table['paper'] == 'dge' and table['table'] in (2, 3)]
    det, seg = ({row['model']: row['params'] for row in table['rows']} for table in tables)
    return [det[model] - seg[model] for model in det]


def compare(row: dict, ours: dict, query_ratio: float) -> dict:
    """A model of a table: our numbers, the paper's, their relative differences, and why they differ where they do."""
    paper = dict(
        params=row['params'],
        params_dge=row['params'] + row.get('routers', 0) / 1e3,
        dense=row['dense'],
        spent=row['spent'],
        saving=row['dense'] - row['spent'],
    )
    difference = {name: ours[name] / paper[name] - 1 for name in paper}
    far = {name for name, limit in LIMITS.items() if abs(difference[name]) > limit}
    # saving = (1 - beta) * queries - routers
    beta = 1 - (paper['saving'] + ours['routers']) / ours['queries']
    why = []
    if 'dense' in far:
        why.append(
            f'the dense models are not the same, {ours["dense"]:.2f} G and {paper["dense"]} G. The paper saves '
            f'{paper["saving"] / paper["dense"]:.0%} of its own, ours {ours["saving"] / ours["dense"]:.0%}'
        )
        far.clear()
    if far & {'params', 'params_dge'}:
        why.append(
            f'{paper["params"]} M parameters are printed, {ours["params"]:.2f} M counted. By what is printed, '
            f'Mask R-CNN has from {min(printed_heads()):.1f} to {max(printed_heads()):.1f} M more than Semantic FPN, '
            'although the heads are the same for each backbone'
        )
    if 'saving' in far:
        why.append(
            f'queries spend {ours["queries"]:.1f} of the {ours["blocks"]:.1f} G in the encoder blocks. A query '
            f'ratio of {query_ratio} saves {ours["saving"]:.1f} G, and would save '
            f'{(1 - query_ratio) * ours["blocks"]:.1f} G if nothing in them were static. The printed '
            f'{paper["saving"]:g} G are what a query ratio of {beta:.2f} saves'
        )
    return dict(
        model=row['model'],
        config=f'configs/{row["config"]}',
        ours=ours,
        paper=paper,
        difference=difference,
        query_ratio_of_papers_saving=beta,
        why=why,
    )


def show(table: dict) -> Iterator[str]:
    """The lines of a table, two for each model."""
    height, width = table['shape']
    yield f'\nDGE, table {table["table"]}: {table["title"]}, {height} x {width}, query ratio {table["query_ratio"]}'
    titles = ('params (M)', 'multiply-adds (G)', 'saving (G)')
    yield f'{"":26}' + ''.join(f'{title:^25}' for title in titles) + f'{"ratio of the":>14}'
    yield f'{"model":26}' + f'{"ours":>9}{"paper":>7}{"diff":>8} ' * 3 + f'{"paper saving":>14}'
    shown, reasons = set(), {}
    for row in table['rows']:
        base = row['model'].partition('+')[0]
        lines = [(base, ('params', 'dense'), '')] * (base not in shown)
        lines += [(row['model'], ('params_dge', 'spent', 'saving'), f'{row["query_ratio_of_papers_saving"]:14.2f}')]
        for name, columns, end in lines:
            yield (
                f'{name:26}'
                + ''.join(
                    f'{row["ours"][column]:9.2f}{row["paper"][column]:7.4g}{row["difference"][column]:+8.1%} '
                    for column in columns
                )
                + end
            )
        shown.add(base)
        for reason in row['why']:
            reasons.setdefault(reason, []).append(row['model'])
    for reason, models in reasons.items():
        yield f'- {", ".join(models)}: {reason}.'
    if 'note' in table:
        yield f'- {table["note"]}'


def classifier(backbone: dict) -> Config:
    """Config of a classifier of 1000 classes on a plain or a coarse-to-fine vision transformer."""
    lvvit = 'LVViT' in backbone['type'] or backbone['arch'].startswith('lvvit')
    head = dict(type='mmdyn.LVViTHead' if lvvit else 'LinearClsHead', num_classes=1000, in_channels=384)
    kind = 'mmdyn.CoarseToFineClassifier' if backbone['type'] == 'mmdyn.CFViT' else 'ImageClassifier'
    return Config(dict(default_scope='mmpretrain', model=dict(type=kind, backbone=backbone, head=head)))


def compare_stages(row: dict) -> dict:
    """A row of the CF-ViT paper: our multiply-adds in G, of each stage too, and the paper's."""
    model = build_model(classifier(row['backbone']))
    side = row['backbone'].get('img_size', 224)
    ours = dict(macs=count_macs(model, (side, side)) / 1e9)
    result = dict(model=row['model'], ours=ours, paper=dict(macs=row['macs']))
    if 'eta' in row:
        coarse, fine = (macs / 1e9 for macs in model.backbone.stage_macs())
        head = (ours['macs'] - coarse - fine) / 2
        ours.update(coarse=coarse + head, fine=fine + head)
        result['exits'] = 1 - (row['macs'] - ours['coarse']) / ours['fine']
    else:
        result['difference'] = dict(macs=ours['macs'] / row['macs'] - 1)
    return result


def show_stages(table: dict) -> Iterator[str]:
    """The lines of a table of the CF-ViT paper."""
    yield f'\nCF-ViT, table {table["table"]}: {table["title"]}'
    yield f'{"multiply-adds (G)":30}{"ours":>8}{"paper":>7}{"diff":>8}'
    for row in table['rows']:
        ours, printed = row['ours'], f'{row["paper"]["macs"]:7.4g}'
        if 'exits' in row:
            yield (
                f'{row["model"]:30}{"":8}{printed}{"":8}  {ours["coarse"]:.2f} coarse, {ours["fine"]:.2f} more for fine'
                f': what is printed if {row["exits"]:.0%} of the images stop'
            )
        else:
            yield f'{row["model"]:30}{ours["macs"]:8.2f}{printed}{row["difference"]["macs"]:+8.1%}'


@command
@only_results
def main() -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--paper', choices=['dge', 'cfvit', 'all'], default='all')
    parser.add_argument('--table', choices=['1', '2', '3', '4', '6', 'all'], default='all')
    parser.add_argument('--query-ratio', type=float, default=0.5)
    parser.add_argument('--detections', type=int, default=0, help='boxes that the mask head looks at: 0.53 G each')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args()
    tables = []
    for table in PAPER:
        if args.table not in (str(table['table']), 'all') or args.paper not in (table['paper'], 'all'):
            continue
        if table['paper'] == 'cfvit':
            tables.append(dict(table, rows=[compare_stages(row) for row in table['rows']]))
            continue
        rows = [
            compare(
                row, count(row['config'], tuple(table['shape']), args.query_ratio, args.detections), args.query_ratio
            )
            for row in table['rows']
        ]
        tables.append(dict(table, query_ratio=args.query_ratio, detections=args.detections, rows=rows))
    if args.json:
        return json.dumps(tables)
    lines = [line for table in tables for line in (show_stages if table['paper'] == 'cfvit' else show)(table)]
    return '\n'.join([__doc__.partition('\n\n')[2].strip(), *lines])


if __name__ == '__main__':
    main()
