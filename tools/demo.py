"""Train and test configs with mim, one after the other, and print their results as one table."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mmdyn.engine.command import command, output_folder, read_config

MIM = Path(sys.executable).with_name('mim')
COLUMNS = {  # title: metric, its factor, format of its value
    'top-1 %': ('accuracy/top1', 1, '{:.1f}'),
    'coarse %': ('cf/coarse_top1', 1, '{:.1f}'),
    'exit %': ('cf/exit_share', 100, '{:.1f}'),
    'box AP50 %': ('coco/bbox_mAP_50', 100, '{:.1f}'),
    'mask AP50 %': ('coco/segm_mAP_50', 100, '{:.1f}'),
    'mIoU %': ('mIoU', 1, '{:.1f}'),
    'query ratio': ('flops/query_ratio', 1, '{:.3f}'),
    'dense MMACs': ('flops/gflops_dense', 1000, '{:.2f}'),
    'spent MMACs': ('flops/gflops', 1000, '{:.2f}'),
    'training s': ('seconds', 1, '{:.0f}'),
}


def run_mim(*args: str | Path) -> None:
    """Run a command of mim.

    Threads that wait must not spin for long: beside another busy process, each step would wait for its time slices to
    end. If they do not spin at all, each step of a small model waits for them to wake up.
    """
    spin = {} if 'OMP_WAIT_POLICY' in os.environ else {'GOMP_SPINCOUNT': '1000'}
    subprocess.run([MIM, *args], check=True, env={**spin, **os.environ})


def run(config: Path, work_dir: Path) -> dict:
    """Train a config, test its last checkpoint and return the metrics."""
    start = time.perf_counter()
    options = []
    if start_from := read_config(config).get('load_from'):  # what a config before it leaves, below its default folder
        options = ['--cfg-options', f'load_from={work_dir.parent.joinpath(*Path(start_from).parts[-2:])}']
    run_mim('train', 'mmdyn', config, '--work-dir', work_dir, *options)
    seconds = time.perf_counter() - start
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    run_mim('test', 'mmdyn', config, '--checkpoint', checkpoint, '--work-dir', work_dir / 'test')
    newest = max((work_dir / 'test').glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return {**json.loads(newest.read_text().splitlines()[-1]), 'seconds': seconds}


def table(results: dict) -> str:
    """The results of configs, {name: metrics}, with a column for each metric that any of them has."""
    reported = set().union(*results.values())
    columns = {title: column for title, column in COLUMNS.items() if column[0] in reported}
    width = max(map(len, results))
    lines = [' ' * width + ''.join(f'{title:>14}' for title in columns)]
    for name, found in results.items():
        cells = [
            form.format(found[metric] * factor) if metric in found else '-' for metric, factor, form in columns.values()
        ]
        lines.append(f'{name:{width}}' + ''.join(f'{cell:>14}' for cell in cells))
    return '\n'.join(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    args = parser.parse_args()
    for config in args.configs:
        read_config(config)
    output_folder(args.work_dir)
    try:
        results = {config.stem: run(config, args.work_dir / config.stem) for config in args.configs}
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(error.returncode)
    print('\n' + table(results))
    print('(MMACs: millions of multiply-adds of the backbone for one image, mean over the validation images)\n')


if __name__ == '__main__':
    main()
