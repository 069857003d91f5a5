"""Time a training iteration of the dense model, of DGE that trains sparsely and of DGE that trains densely, side by side.

The routers' weights are drawn so that all granularities occur and their biases so that about the given ratio of queries is
chosen; the ratio that was measured is printed. Ratios are medians over interleaved runs.
"""
import argparse
import json
import statistics

import mmdyn  # noqa: F401
import torch
from mmdyn.analysis.latency import interleaved_times, ratio
from mmdyn.models import PVT, DeiT
from mmdyn.models.dge import DynamicGrainedEncoder


def set_routing(model: torch.nn.Module, query_ratio: float) -> None:
    """Make the routers choose by the image, and the finest granularity with a probability that gives the ratio."""
    for encoder in model.modules():
        if isinstance(encoder, DynamicGrainedEncoder):
            share = torch.tensor([1 / phi**2 if phi else 0. for phi in encoder.granularities])
            coarse = share[share < 1].mean()
            fine = ((query_ratio - coarse) / (1 - coarse)).clamp(1e-3, 1 - 1e-3)
            probability = torch.where(share == 1, fine, (1 - fine) / (len(share) - 1))
            torch.nn.init.normal_(encoder.router.weight, std=1e-3)
            encoder.router.bias.data.copy_(probability.log())


def training_step(model: torch.nn.Module, images: torch.Tensor):
    """A function that runs one forward and backward pass."""
    def step():
        model.zero_grad()
        sum(out.float().pow(2).mean() for out in model(images)).backward()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', choices=['train'], default='train')
    parser.add_argument('--arch', default='PVT-small', help='PVT-... or DeiT-...')
    parser.add_argument('--shape', nargs=2, type=int, default=[256, 256], metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--query-ratio', type=float, default=0.5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    family, arch = args.arch.split('-')
    build = {'PVT': PVT, 'DeiT': DeiT}[family]
    models = {'dense': build(arch), **{f'DGE {mode}': build(arch, dge=dict(train_mode=mode)) for mode in ('sparse', 'dense')}}
    images, cases = torch.randn(args.batch, 3, *args.shape), {}
    for name, model in models.items():
        set_routing(model, args.query_ratio)
        cases[name] = training_step(model.train(), images)
    times = interleaved_times(cases, args.rounds)
    result = {
        name: dict(seconds=statistics.median(times[name]), spread=max(times[name]) - min(times[name]),
                   ratio_to_dense=ratio(times, name, 'dense'), query_ratio=models[name].cost.query_ratio.mean().item())
        for name in cases
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f'training iteration of {args.arch}, {args.batch} images of {args.shape[0]} x {args.shape[1]}, {args.threads} '
          f'threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}')
    for name, row in result.items():
        print(f'{name:12} {row["seconds"]:8.3f} s  (spread {row["spread"]:.3f})  {row["ratio_to_dense"]:5.2f} x dense  query '
              f'ratio {row["query_ratio"]:.3f}')


if __name__ == '__main__':
    main()
