"""Train and test configs with mim, one after the other, and print their results as one table."""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

MIM = Path(sys.executable).with_name('mim')
COLUMNS = {  # title: metric, format of its value
    'top-1 %': ('accuracy/top1', '{:.1f}'),
    'query ratio': ('flops/query_ratio', '{:.3f}'),
    'dense MMACs': ('flops/gflops_dense', '{:.2f}'),
    'spent MMACs': ('flops/gflops', '{:.2f}'),
    'training s': ('seconds', '{:.0f}'),
}


def run(config: Path, work_dir: Path) -> dict:
    """Train a config, test its last checkpoint and return the metrics."""
    start = time.perf_counter()
    subprocess.run([MIM, 'train', 'mmdyn', config, '--work-dir', work_dir], check=True)
    seconds = time.perf_counter() - start
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    subprocess.run([MIM, 'test', 'mmdyn', config, '--checkpoint', checkpoint, '--work-dir', work_dir / 'test'], check=True)
    newest = max((work_dir / 'test').glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    metrics = json.loads(newest.read_text().splitlines()[-1])
    scale = {name: metrics[name] * 1e3 for name in ('flops/gflops', 'flops/gflops_dense')}
    return {**metrics, **scale, 'seconds': seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    args = parser.parse_args()
    results = {config.stem: run(config, args.work_dir / config.stem) for config in args.configs}
    width = max(map(len, results))
    print('\n' + ' ' * width + ''.join(f'{title:>14}' for title in COLUMNS))
    for name, metrics in results.items():
        print(f'{name:{width}}' + ''.join(f'{form.format(metrics[metric]):>14}' for metric, form in COLUMNS.values()))
    print('(MMACs: millions of multiply-adds of the backbone for one image, mean over the validation images)\n')


if __name__ == '__main__':
    main()
