"""Trace one forward pass of a backbone, and count what keeps a GPU from computing.

Kernels, the time that they take and the gaps between them, and the synchronisations, in which the host waits for the
device: as the trace has them, and with the line that asked for each. DGE decides by a routing that is given, the real
routers decide as well. Writes profile.json and a trace of each model, which chrome://tracing and ui.perfetto.dev show.
"""

import argparse
import json
from pathlib import Path

import torch

from mmdyn.analysis.passes import AUTOCAST
from mmdyn.analysis.synthetic import PATTERNS
from mmdyn.analysis.trace import arch_of, trace_backbone
from mmdyn.engine.command import command, output_folder


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['PVT-small', 'PVT-small+DGE'])
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), default=(800, 1280))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtype', choices=AUTOCAST, default='float32')
    parser.add_argument('--query-ratio', type=float, default=0.5)
    parser.add_argument('--pattern', choices=PATTERNS, default='clustered')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/profile'))
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('no device: torch finds no CUDA device.')
    for name in args.models:
        try:
            arch_of(name)
        except ValueError as error:
            raise ValueError(f'--models {error}') from error
    output_folder(args.out)
    found = []
    for name in args.models:
        found.append(
            trace_backbone(
                name,
                tuple(args.shape),
                args.out,
                batch=args.batch,
                device=args.device,
                dtype=args.dtype,
                query_ratio=args.query_ratio,
                pattern=args.pattern,
            )
        )
        (args.out / 'profile.json').write_text(json.dumps(found, indent=1) + '\n')
        print(*(f'{key}: {value}' for key, value in found[-1].items() if key != 'top_kernels'), '', sep='\n')


if __name__ == '__main__':
    main()
