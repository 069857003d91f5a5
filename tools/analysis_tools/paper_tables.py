"""Count the models of the DGE paper's tables 1 to 4 and print them beside the paper's numbers.

Protocol (supplement B.3): multiply-adds of linear layers, convolutions, both matrix products of attention and the
points sampled by deformable attention, on one image, of the whole model. With DGE each layer's queries cost their
share at the given query ratio; keys, values, spatial reduction, patch embeddings, routers, neck and head are spent in
any case. Detectors: 800 x 1280, RPN, box head at 1000 proposals; the mask head at no detections, which is what the
paper's totals agree with (see --detections). Segmentors: 512 x 2048. The last column is the query ratio at which our
count saves what the paper prints.
"""
import argparse
import json
from functools import lru_cache
from pathlib import Path

import mmdyn  # noqa: F401
import yaml
from mmdyn.analysis.flops import report
from mmengine.config import Config

HERE = Path(__file__).resolve()
CONFIGS = HERE.parents[2] / 'configs'
PAPER = yaml.safe_load(HERE.with_name('paper_numbers.yml').read_text())
LIMITS = dict(dense=0.015, saving=0.12)  # a difference from the paper beyond these gets explained
COLUMNS = dict(params='params (M)', extra='routers (K)', dense='dense (G)', spent='spent (G)', saving='saving (G)')


@lru_cache(maxsize=None)
def count(config: str, shape: tuple, query_ratio: float, detections: int) -> dict:
    """What we count of a config: parameters in millions, multiply-adds in G."""
    result = report(Config.fromfile(CONFIGS / config), shape, query_ratio, detections=detections)
    dense, spent = result['flops_dense'] / 1e9, result['flops'] / 1e9
    queries = sum(layer['flops_queries'] for layer in result['layers']) / 1e9
    return dict(
        params=result['params'] / 1e6,
        extra=(result['params'] - result['params_dense']) / 1e3,
        dense=dense,
        spent=spent,
        saving=dense - spent,
        blocks=sum(layer['flops_dense'] for layer in result['layers']) / 1e9,
        queries=queries,
        routers=(1 - query_ratio) * queries - (dense - spent))


def compare(row: dict, ours: dict, query_ratio: float) -> dict:
    """A row of a table: our numbers, the paper's, their relative differences, and why they differ where they do."""
    paper = dict(params=row['params'], dense=row['dense'], spent=row['spent'], saving=row['dense'] - row['spent'])
    if 'extra' in row:
        paper['extra'] = row['extra']
    difference = {name: ours[name] / paper[name] - 1 for name in paper}
    # saving = (1 - beta) * queries - routers
    beta = 1 - (paper['saving'] + ours['routers']) / ours['queries']
    why = []
    if abs(difference['dense']) > LIMITS['dense']:
        why.append(f'the dense models are not the same, {ours["dense"]:.2f} G and {paper["dense"]} G. The paper saves '
                   f'{paper["saving"] / paper["dense"]:.0%} of its own, ours {ours["saving"] / ours["dense"]:.0%}')
    elif abs(difference['saving']) > LIMITS['saving']:
        most = (1 - query_ratio) * ours['blocks']
        why.append(f'queries spend {ours["queries"]:.1f} of the {ours["blocks"]:.1f} G in the encoder blocks. A query '
                   f'ratio of {query_ratio} saves {ours["saving"]:.1f} G, and would save {most:.1f} G if nothing in '
                   f'them were static. The printed {paper["saving"]:g} G are what a query ratio of {beta:.2f} saves')
    return dict(model=row['model'], config=f'configs/{row["config"]}', ours=ours, paper=paper, difference=difference,
                query_ratio_of_papers_saving=beta, why=why)


def show(table: dict) -> None:
    """Print a table."""
    columns = {name: COLUMNS[name] for name in COLUMNS if name in table['rows'][0]['paper']}
    print(f'\nTable {table["table"]}: {table["title"]}, {table["shape"][0]} x {table["shape"][1]}, query ratio '
          f'{table["query_ratio"]}')
    print(f'{"":28}' + ''.join(f'{title:^25}' for title in columns.values()) + f'{"ratio of the":>14}')
    print(f'{"model":28}' + f'{"ours":>9}{"paper":>7}{"diff":>8} ' * len(columns) + f'{"paper saving":>14}')
    reasons = {}
    for row in table['rows']:
        print(f'{row["model"]:28}' + ''.join(
            f'{row["ours"][name]:9.2f}{row["paper"][name]:7.4g}{row["difference"][name]:+8.1%} ' for name in columns) +
              f'{row["query_ratio_of_papers_saving"]:14.2f}')
        for reason in row['why']:
            reasons.setdefault(reason, []).append(row['model'])
    for reason, models in reasons.items():
        print(f'- {", ".join(models)}: {reason}.')
    if 'note' in table:
        print(f'- {table["note"]}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--table', choices=['1', '2', '3', '4', 'all'], default='all')
    parser.add_argument('--query-ratio', type=float, default=0.5)
    parser.add_argument('--detections', type=int, default=0, help='boxes that the mask head looks at: 0.53 G each')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args()
    tables = []
    for table in PAPER:
        if args.table in (str(table['table']), 'all'):
            rows = [compare(row, count(row['config'], tuple(table['shape']), args.query_ratio, args.detections),
                            args.query_ratio) for row in table['rows']]
            tables.append(dict(table, query_ratio=args.query_ratio, detections=args.detections, rows=rows))
    if args.json:
        print(json.dumps(tables))
        return
    print(__doc__.partition('\n\n')[2].strip())
    for table in tables:
        show(table)


if __name__ == '__main__':
    main()
