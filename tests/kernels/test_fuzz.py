"""Random models and inputs, many of them broken: a kernel equals the plain function, refuses, or raises what it raises.

Each case comes from its seed alone. `make sanitize` runs thousands of them with the sanitizers, which find what is read
or written outside of any tensor.
"""

import math
import os
import random
import subprocess
import sys
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mmdyn.kernels import functions, stage
from mmdyn.kernels.library import release
from mmdyn.models.dge import DynamicGrainedEncoder
from mmdyn.models.dge.router import Router
from mmdyn.models.layers import Attention, DeformableAttention, EncoderBlock, Positions
from mmdyn.models.replaceable import Refused

CALLS, FIRST = int(os.environ.get('MMDYN_FUZZ_CALLS', 400)), int(os.environ.get('MMDYN_FUZZ_SEED', 0))
GROUP = 50


class Case(NamedTuple):
    """A call: a kernel, the arguments by name, contexts around it, whether these ask for bfloat16, and threads."""

    kernel: Any
    arguments: dict
    contexts: list
    half: bool
    threads: int


class Stage(nn.Module):
    def __init__(self, blocks, dge, num_extra):
        super().__init__()
        self.blocks, self.dge, self.num_extra = nn.ModuleList(blocks), nn.ModuleList(dge), num_extra


class Shifted(Tensor):
    """A tensor whose numbers are not those in its memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [x.as_subclass(Tensor) + 1 if isinstance(x, cls) else x for x in args]
        return (
            func(*plain, **(kwargs or {}))
            if func is torch.nn.functional.linear
            else super().__torch_function__(func, types, args, kwargs or {})
        )


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def randomize(module: nn.Module) -> nn.Module:
    """Parameters none of which is 0 or 1, with results of a size near 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape)
            is_norm = parameter.ndim == 1 and name.endswith('weight')
            parameter.copy_(
                1 + 0.2 * noise
                if is_norm
                else noise * (0.1 if parameter.ndim == 1 else max(math.prod(parameter.shape[1:]), 1) ** -0.5)
            )
    return module


# Cases that are whole.


def a_map(r: random.Random) -> tuple[int, int]:
    if r.random() < 0.1:
        return r.randint(20, 45), r.randint(20, 45)
    return r.randint(1, 14), r.randint(1, 14)


def a_stage(r: random.Random) -> dict:
    heads = r.choice([1, 1, 2, 3, 4])
    dim, num, shape = heads * r.choice([1, 2, 3, 5, 8, 16, 17, 24]), r.randint(1, 3), a_map(r)
    kind, extra = r.choice(['softmax', 'softmax', 'reduced', 'deformable']), 0
    if kind == 'softmax':
        extra = r.choice([0, 0, 1, 2])
    blocks = []
    for _ in range(num):
        attn = dict(
            softmax=lambda: Attention(dim, heads, qkv_bias=r.random() < 0.7),
            reduced=lambda: Attention(dim, heads, r.choice([2, 3, 4]), qkv_bias=r.random() < 0.7),
            deformable=lambda: DeformableAttention(dim, heads, r.randint(1, 9)),
        )[kind]()
        ratio = r.choice([0.5, 1, 2, 4, 4]) if r.random() < 0.9 else r.choice([0, r.random() * 5])
        blocks.append(
            EncoderBlock(
                dim, attn, ratio, norm_eps=r.choice([1e-6, 1e-5, 1e-2]), residual_scale=r.choice([1.0, 1, 0.5])
            )
        )
    dge = []
    if r.random() < 0.6:
        granularities = r.choice([(1, 2, 4), (1, 2), (0, 1, 2), (2,), (1,), (0, 3), (2, 4), (1, 3)])
        region = r.choice([None, None, max(granularities) * 2])
        dge = [
            DynamicGrainedEncoder(dim, granularities, region, 'region' if r.random() < 0.95 else 'layer')
            for _ in blocks
        ]
    stage_of = randomize(Stage(blocks, dge, extra)).eval()
    for encoder in dge:
        with torch.no_grad():
            encoder.router.weight.normal_(std=2.0)
        give_budget(r, encoder.router)
        if r.random() < 0.2:
            rows, columns = (-(-side // encoder.region) for side in shape)
            encoder.forced = torch.randint(len(encoder.granularities), (rows, columns))
    tokens = torch.randn(r.randint(1, 4), extra + math.prod(shape), dim)
    bounds = r.choice([{}, {}, {}, dict(start=r.randint(-3, 2), stop=r.choice([None, r.randint(-1, 4)]))])
    return dict(stage=stage_of, tokens=tokens, shape=shape, **bounds)


def give_budget(r: random.Random, router: Router) -> None:
    """Let some routers choose at a price, and others within a budget."""
    kind = r.random()
    if kind < 0.2:
        router.price = torch.randn(len(router.bias))
    elif kind < 0.4:
        router.share = r.random()


def a_choice(r: random.Random) -> dict:
    dim, shape, extra = r.randint(1, 70), a_map(r), r.choice([0, 0, 1, 2])
    router, region = randomize(Router(dim, r.choice([(1, 2, 3), (1, 2), (0, 1), (1,), (0, 2, 6)]))), r.randint(1, 6)
    give_budget(r, router)
    return dict(
        router=router,
        tokens=torch.randn(r.randint(1, 4), extra + math.prod(shape), dim),
        shape=shape,
        region=region,
        num_extra=extra,
    )


def a_projection(r: random.Random) -> dict:
    side, depth, dim, images = (
        r.choice([1, 2, 3, 4, 7]),
        r.choice([1, 2, 3, 4, 16, 33]),
        r.randint(1, 70),
        r.randint(1, 3),
    )
    proj, norm = nn.Conv2d(depth, dim, side, side, bias=r.random() < 0.8), r.choice([nn.LayerNorm(dim), nn.Identity()])
    height, width = (r.randint(1, 9) * side + r.choice([0, 0, 1, side - 1]) for _ in range(2))
    if r.random() < 0.5:
        proj, maps = (
            proj.to(memory_format=torch.channels_last),
            torch.randn(images, height, width, depth).permute(0, 3, 1, 2),
        )
    else:
        maps = torch.randn(images, depth, height, width)
    if r.random() < 0.3:
        maps = torch.randn(images, depth, height + 2, width + 3)[..., 1 : height + 1, 2 : width + 2]
    positions = None
    if r.random() < 0.5:
        shape = (height // side, width // side) if r.random() < 0.5 else (r.randint(1, 9), r.randint(1, 9))
        positions = Positions(torch.randn(1, math.prod(shape), dim), shape, r.choice(['bilinear'] * 4 + ['bicubic']))
    return dict(maps=maps, proj=randomize(proj), norm=randomize(norm), positions=positions)


def a_sampling(r: random.Random) -> dict:
    shape, heads, points, dim = a_map(r), r.randint(1, 4), r.randint(1, 6), r.randint(1, 40)
    lengths = [r.randint(0, 40) for _ in range(r.randint(1, 4))]
    places = torch.randn(sum(lengths), heads, points, 2) * max(shape)
    return dict(
        value=torch.randn(len(lengths), math.prod(shape), heads, dim),
        points=places,
        weights=torch.rand(sum(lengths), heads, points),
        shape=shape,
        lengths=lengths,
    )


def some_maps(r: random.Random) -> dict:
    shape = a_map(r) if r.random() < 0.4 else (r.randint(1, 6) * 4, r.randint(1, 6) * 4)
    return dict(tokens=torch.randn(r.randint(1, 4), math.prod(shape), r.randint(1, 70)), shape=shape)


MAKERS = [
    *[(stage.encode_blocks, a_stage)] * 4,
    (functions.choose_by_means, a_choice),
    (functions.project_panels, a_projection),
    (functions.sample_points, a_sampling),
    (functions.transpose_tokens, some_maps),
]

# Ways to break them.


def other_shape(r: random.Random, x: Tensor) -> Tensor:
    """One dimension longer, shorter or gone, or one more."""
    way = r.choice(['longer', 'shorter', 'half', 'flat', 'more', 'none'])
    if not x.ndim or way == 'more':
        return x[None].clone()
    axis = r.randrange(x.ndim)
    if way == 'longer':
        return torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)
    if way == 'flat':
        return x.flatten().clone()
    keep = dict(shorter=max(x.shape[axis] - 1, 0), half=x.shape[axis] // 2, none=0)[way]
    return x.narrow(axis, 0, keep).clone()


def other_strides(r: random.Random, x: Tensor) -> Tensor:
    """The same numbers, or one of them in many places."""
    if not x.ndim:
        return x
    axis = r.randrange(x.ndim)
    way = r.choice(['gaps', 'order', 'expanded', 'channels_last'])
    if way == 'channels_last' and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if way == 'gaps':
        return torch.stack([x, torch.full_like(x, 9)], axis + 1).flatten(axis, axis + 1).unfold(axis, 1, 2).squeeze(-1)
    if way == 'expanded' and x.shape[axis]:
        return x.narrow(axis, 0, 1).expand(x.shape)
    return x.transpose(axis, -1).contiguous().transpose(axis, -1)


def other_kind(r: random.Random, x: Tensor) -> Tensor:
    """Another dtype, type, device or layout."""
    return r.choice(
        [
            lambda: x.double(),
            lambda: x.bfloat16(),
            lambda: x.half(),
            lambda: x.int(),
            lambda: x.as_subclass(Shifted),
            lambda: x.to('meta'),
            lambda: torch._neg_view(x),
            lambda: x.to_sparse(),
            lambda: x.to(torch.complex64),
        ]
    )()


def other_tensor(r: random.Random, x: Tensor) -> Tensor:
    return r.choice([other_shape, other_strides, other_kind])(r, x.detach())


def break_module(r: random.Random, root: nn.Module) -> None:
    """Change a module or a parameter somewhere."""
    modules = list(root.named_modules())
    path, module = r.choice(modules)
    parent_path, _, name = path.rpartition('.')
    parent = root.get_submodule(parent_path)
    parameters = [(m, key) for _, m in modules for key, p in m._parameters.items() if p is not None]
    owner, key = r.choice(parameters) if parameters else (None, None)

    def replace(new):
        if name:
            parent._modules[name] = new

    def parameter(new):
        if owner is None:
            return
        value = getattr(owner, key)
        new = new(value)
        if isinstance(new, Tensor):
            kept = new.is_floating_point() or new.is_complex()
            new = nn.Parameter(new, requires_grad=kept)
        owner._parameters[key] = new

    def data():
        if owner is not None:
            getattr(owner, key).data = other_shape(r, getattr(owner, key).detach())

    def bare():
        if owner is None:
            return
        value = owner._parameters.pop(key)
        setattr(owner, key, value.detach())

    def attribute():
        found = [
            (m, k)
            for _, m in modules
            for k, v in vars(m).items()
            if not k.startswith('_') and isinstance(v, (int, float, tuple, str))
        ]
        target, k = r.choice(found)
        value = getattr(target, k)
        if isinstance(value, bool):
            new = not value
        elif isinstance(value, tuple):
            new = r.choice([value[1:], value + value[:1], tuple(reversed(value)), tuple(-v for v in value)])
        elif isinstance(value, str):
            new = r.choice(['layer', 'tanh', 'same'])
        else:
            new = r.choice([0, 1, 2, 3, -1, 0.5, value + 1, value * 2])
        if k in ('drop_path_rate', 'tau', 'train_mode'):
            return
        setattr(target, k, new)

    def forced():
        encoders = [m for _, m in modules if isinstance(m, DynamicGrainedEncoder)]
        if encoders:
            size = (r.randint(1, 4), r.randint(1, 4)) if r.random() < 0.5 else (1, r.randint(1, 3), r.randint(1, 3))
            r.choice(encoders).forced = r.choice(
                [torch.randint(-1, 5, size), torch.randint(0, 2, size, dtype=torch.int32), torch.zeros(size)]
            )

    def own_forward():
        plain = module.forward
        module.forward = lambda *args, **kwargs: plain(*args, **kwargs)

    def parametrized():
        if type(owner) is nn.Linear and key == 'weight':
            r.choice([parametrizations.weight_norm, parametrizations.spectral_norm])(owner)

    r.choice(
        [
            lambda: parameter(lambda x: other_tensor(r, x)),
            lambda: parameter(lambda x: other_tensor(r, x)),
            lambda: parameter(lambda x: None),
            data,
            bare,
            attribute,
            attribute,
            forced,
            own_forward,
            parametrized,
            lambda: module.register_forward_hook(lambda m, args, out: out * 2 if isinstance(out, Tensor) else out),
            lambda: module.register_forward_pre_hook(lambda m, args: None),
            lambda: setattr(owner, '__class__', DoubledLinear) if type(owner) is nn.Linear else None,
            lambda: replace(Wrapped(module)),
            lambda: replace(r.choice([nn.Identity(), nn.ReLU(), nn.GELU('tanh'), nn.Linear(8, 8), nn.LayerNorm(8)])),
            lambda: module.to(r.choice([torch.double, torch.bfloat16])),
            lambda: parent._modules.pop(name, None),
        ]
    )()


def break_arguments(r: random.Random, arguments: dict) -> None:
    """Change an argument that is no module."""
    key = r.choice([key for key, value in arguments.items() if not isinstance(value, nn.Module) and value is not None])
    value = arguments[key]
    if isinstance(value, Positions):
        arguments[key] = value._replace(
            **r.choice(
                [
                    dict(embedding=other_tensor(r, value.embedding)),
                    dict(shape=(value.shape[1], value.shape[0] + 1)),
                    dict(mode='nearest'),
                ]
            )
        )
    elif isinstance(value, Tensor):
        arguments[key] = other_tensor(r, value)
    elif isinstance(value, tuple):
        arguments[key] = r.choice(
            [
                value[::-1],
                tuple(-side for side in value),
                (value[0] + 1, *value[1:]),
                (math.prod(value), 1),
                value[:1],
                (0, *value[1:]),
                (float(value[0]), *value[1:]),
            ]
        )
    elif isinstance(value, list):
        arguments[key] = r.choice(
            [
                value[::-1],
                value[1:],
                [*value, 0],
                [float(x) for x in value],
                [x + 3 * (-1) ** i for i, x in enumerate(value)],
                [-x for x in value],
            ]
        )
    else:
        arguments[key] = r.choice([value + 1, value - 1, -value, 0, float(value), 1000])


def around(r: random.Random) -> tuple[list, bool]:
    """Contexts, and whether they ask for bfloat16."""
    half, contexts = r.random() < 0.15, []
    if half:
        contexts.append(lambda: torch.autocast('cpu', torch.bfloat16))
    elif r.random() < 0.02:
        contexts.append(lambda: torch.autocast('cpu', torch.float16))
    contexts.append(
        r.choice([torch.no_grad, torch.no_grad, torch.inference_mode]) if r.random() < 0.98 else torch.enable_grad
    )
    return contexts, half


class Outcome(NamedTuple):
    """What a call returned or raised, and what the encoders decided."""

    result: Any
    error: Exception | None
    decisions: list


def outcome(function: Any, arguments: dict, contexts: list) -> Outcome:
    encoders = (
        [m for m in arguments['stage'].modules() if isinstance(m, DynamicGrainedEncoder)]
        if 'stage' in arguments
        else []
    )
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        try:
            result, error = function(**arguments), None
        except Exception as raised:
            result, error = None, raised
    return Outcome(result, error, [getattr(encoder, 'decision', None) for encoder in encoders])


def plain_outcome(kernel: Any, arguments: dict, contexts: list) -> tuple[Outcome, list[Tensor]]:
    """The plain function all the way down, and the logits of the routers."""
    function = next(
        f
        for f in (
            stage.run_blocks,
            functions.choose,
            functions.project_patches,
            functions.deformable_sampling,
            functions.to_maps,
        )
        if kernel in f.kernels
    )
    logits: list[Tensor] = []

    def watch(router: Router, args: Any, out: Tensor) -> None:
        # What is chosen within a budget depends on all regions, and a rounding error on others than its own.
        logits.append(
            torch.zeros_like(out) if router.share is not None else out if router.price is None else out - router.price
        )

    for value in arguments.values():
        if isinstance(value, nn.Module):
            for module in value.modules():
                if isinstance(module, Router):
                    module.register_forward_hook(watch)
    with torch.backends.mkldnn.flags(enabled=False):  # all kernels refuse then
        return outcome(function, arguments, contexts), logits


def is_tie(choices: list[tuple[Tensor, Tensor]], logits: list[Tensor]) -> bool:
    """Whether the first different choices are of logits that rounding may exchange."""
    for (mine, plain), values in zip(choices, logits):
        differ = mine != plain
        if differ.any() and values.shape[:-1] == differ.shape:
            gaps = values.topk(2).values[differ]
            return bool(((gaps[:, 0] - gaps[:, 1]) < 1e-3 * (1 + gaps.abs().amax(1))).all())
    return False


def build(seed: int, warm: bool) -> Case:
    """The case of a seed.

    Args:
        seed: of all that is random.
        warm: whether some cases call their kernel before they break anything, so that what it prepared is old.
    """
    torch.manual_seed(seed)
    r = random.Random(seed)
    kernel, make = r.choice(MAKERS)
    arguments, (contexts, half), threads = make(r), around(r), r.choice([1, 1, 2, 3])
    if r.random() < 0.4:
        return Case(kernel, arguments, contexts, half, threads)
    if r.random() < 0.5 and warm:
        tensors = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
        outcome(kernel, tensors, contexts)
    for _ in range(r.choice([1, 1, 2])):
        module = r.choice([value for value in arguments.values() if isinstance(value, nn.Module)] or [None])
        with suppress(
            RuntimeError, NotImplementedError
        ):  # where torch cannot make such a tensor of what is broken already
            if module is not None and r.random() < 0.7:
                break_module(r, module)
            else:
                break_arguments(r, arguments)
    return Case(kernel, arguments, contexts, half, threads)


def exact_result(seed: int) -> Tensor:
    """What the plain function returns in double precision."""
    kernel, arguments, *_ = build(seed, False)
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[key] = value.detach().double()
        elif isinstance(value, nn.Module):
            value.double()
        elif isinstance(value, Positions):
            arguments[key] = value._replace(embedding=value.embedding.double())
    return plain_outcome(kernel, arguments, [torch.no_grad])[0].result


def check(seed: int) -> str:
    """Run a case; returns 'ran', 'refused' or 'raised'."""
    (kernel, arguments, contexts, half, threads), others = build(seed, True), build(seed, False).arguments
    torch.set_num_threads(threads)
    release()  # a workspace of exactly this case's size
    mine = outcome(kernel, arguments, contexts)
    if isinstance(mine.result, Refused):
        assert mine.result.reason
        for key, value in others.items():
            if type(value) is Tensor and value.device.type == 'cpu':
                given, value = (x.to_dense() if x.is_sparse else x for x in (arguments[key], value))
                assert torch.equal(given, value), f'refused, but wrote to {key}'
        return 'refused'
    plain, logits = plain_outcome(kernel, others, contexts)
    if mine.error is not None:
        assert type(mine.error) is type(plain.error), f'raised {mine.error!r}, not {plain.error!r}'
        return 'raised'
    assert plain.error is None, f'ran, but the plain function raises {plain.error!r}'
    if kernel is functions.choose_by_means:
        assert torch.equal(mine.result, plain.result) or is_tie([(mine.result, plain.result)], logits)
        return 'ran'
    made = [(a, b) for a, b in zip(mine.decisions, plain.decisions) if b is not None]
    for a, b in made:
        if half and not torch.equal(a.choice, b.choice):  # after a block in bfloat16 logits are not the same
            return 'ran'
        if not torch.equal(a.choice, b.choice):
            assert is_tie([(a.choice, b.choice) for a, b in made], logits), 'other choices'
            return 'ran'
        assert torch.equal(a.queries, b.queries)
    assert mine.result.shape == plain.result.shape
    tolerance = 0.05 if half else 1e-4
    scale = max(1.0, plain.result.abs().nan_to_num().amax().item())
    if not torch.allclose(mine.result.float(), plain.result.float(), tolerance, tolerance * scale, equal_nan=True):
        # A norm of few channels makes much of little errors: then the plain function's own are as large, somewhere.
        exact = exact_result(seed)
        errors = [(x.result.double() - exact).abs().mean().item() for x in (mine, plain)]
        assert errors[0] < 10 * errors[1], (
            f'mean errors of kernel and plain function {errors}, in numbers up to {scale}'
        )
    return 'ran'


@pytest.mark.parametrize('first', range(FIRST, FIRST + CALLS, GROUP))
def test_kernels_equal_the_plain_functions(first, avx):
    threads, wrong, counts = torch.get_num_threads(), [], dict(ran=0, refused=0, raised=0)
    try:
        for seed in range(first, first + GROUP):
            os.write(2, f'\rseed {seed} '.encode())  # in case that the process ends here
            try:
                counts[check(seed)] += 1
            except Exception as error:
                wrong.append(f'seed {seed}: {type(error).__name__}: {error}')
    finally:
        torch.set_num_threads(threads)
        release()
    print(counts)
    assert not wrong, '\n'.join(wrong)
    assert counts['ran'] > GROUP / 5 and counts['refused'], counts


@pytest.mark.skipif(
    'MMDYN_SANITIZED' not in os.environ, reason='make sanitize builds the functions with the sanitizers'
)
@pytest.mark.parametrize('read, written', [(63, 64), (64, 63)])
def test_sanitizers_see_what_lies_behind_a_tensor(read, written):
    script = (
        'import torch; from mmdyn.kernels.library import library; '
        f'tokens, maps = torch.empty({read} * 4), torch.empty({written} * 4); '
        'library().transpose_tokens(tokens.data_ptr(), 1, 64, 4, maps.data_ptr())'
    )
    ended = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert ended.returncode and 'ERROR: AddressSanitizer' in ended.stderr
