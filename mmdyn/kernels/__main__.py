"""`python -m mmdyn.kernels`: which kernels take a small example here, and why the others do not."""

import platform
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import nn

from ..models.dge.encoder import encode_queries
from ..models.dge.router import Router, choose
from ..models.dge.routing import route
from ..models.layers import Attention, EncoderBlock, deformable_sampling, packed_attention, project_patches, to_maps
from ..models.replaceable import Refused, Replaceable
from ..models.stage import run_blocks
from .library import library, runs


def examples(device: str) -> list[tuple[Replaceable, tuple]]:
    """Each replaceable function, and arguments that a model would call it with: 2 images of 4 x 4 cells."""
    dtype = torch.float32 if device == 'cpu' else torch.bfloat16
    with torch.device(device):
        tokens, maps = torch.zeros(2, 16, 16), torch.zeros(2, 3, 8, 8)
        block, regions = EncoderBlock(16, Attention(16, 2), 2).eval(), (torch.zeros(2, 2, 2).long(), (4, 4), (1, 2), 2)
        stage = SimpleNamespace(blocks=[block], dge=[], num_extra=0)
        queries, keys = torch.zeros(5, 2, 8, dtype=dtype), torch.zeros(2, 2, 16, 8, dtype=dtype)
        return [
            (run_blocks, (stage, tokens, (4, 4))),
            (choose, (Router(16, (1, 2)), tokens, (4, 4), 2, 0)),
            (route, regions),
            (encode_queries, (block, tokens, (4, 4), 0, route(*regions))),
            (project_patches, (maps, nn.Conv2d(3, 16, 2, 2), nn.LayerNorm(16))),
            (to_maps, (tokens, (4, 4))),
            (
                deformable_sampling,
                (torch.zeros(2, 16, 2, 8), torch.zeros(5, 2, 4, 2), torch.zeros(5, 2, 4), (4, 4), [2, 3]),
            ),
            (packed_attention, (queries, keys, keys, [2, 3])),
        ]


def report() -> Iterator[str]:
    """The lines of the answer."""
    functions = library()
    yield f'processor  {platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()} by torch'
    yield f'build      {functions.reason if isinstance(functions, Refused) else functions._name}'
    for kind, half in (('float32', False), ('bfloat16', True)):
        refused = runs(half)
        yield f'{kind:<11}{refused.reason if refused else "the stages run in compiled functions"}'
    for device in ('cpu', 'cuda') if torch.cuda.is_available() else ('cpu',):
        for function, args in examples(device):
            yield f'\n{function.__module__}.{function.__name__} on {device}'
            with torch.inference_mode():
                reasons = function.why_not(*args)
            for kernel in function.kernels:
                name = f'{kernel.__module__}.{kernel.__qualname__}'
                yield f'  {name}: ' + (f'off, {reasons[name]}' if name in reasons else 'on')


if __name__ == '__main__':
    print('\n'.join(report()))
