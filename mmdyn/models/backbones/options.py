"""Options that backbones have in common: what is allowed, and what is meant."""

import inspect
from collections.abc import Sequence

from ...values import MOST, check_choice, check_integer, check_number, check_type, is_integer, sides
from ..dge import DynamicGrainedEncoder

# Options of dge that are no encoder's, and what DynamicBackbone.set_budget calls them.
BUDGET_OPTIONS = dict(test_budget='budget', budget_mode='mode', prices='prices')
OUT_TYPES = ('featmap', 'cls_token', 'avg_featmap', 'raw')
MOST_BLOCKS = 1000  # of a stage
INTERPOLATIONS = ('bilinear', 'bicubic', 'nearest', 'nearest-exact', 'area')


def choose_arch(arch: str | dict, archs: dict) -> dict:
    """The numbers of an architecture, given by name or as a dict of them."""
    known = next(iter(archs.values()))
    if isinstance(arch, dict):
        if set(arch) != set(known):
            raise ValueError(f'arch has the keys {sorted(map(str, arch))}, but needs exactly {sorted(known)}.')
        for key, numbers in arch.items():
            _check_numbers_of_arch(key, numbers, of_stages=isinstance(known[key], tuple))
        return arch
    if arch not in [*archs]:
        raise ValueError(f'Unknown arch {arch!r}: choose from {sorted(archs)}, or give a dict of {sorted(known)}.')
    return archs[arch]


def _check_numbers_of_arch(key: str, numbers, of_stages: bool) -> None:
    if of_stages and not (isinstance(numbers, (tuple, list)) and numbers):
        raise ValueError(f'arch {key}={numbers!r}: give a sequence with one number for each stage.')
    for number in numbers if of_stages else [numbers]:
        if key.startswith('mlp_ratio'):
            check_number(f'arch {key}', number, '[0, 1000]', 'hidden channels in multiples of the others')
        else:
            check_integer(f'arch {key}', number, 1, MOST_BLOCKS if key.startswith('depth') else MOST)


def check_parts(
    in_channels: int,
    patch_size: int,
    drop_path_rate: float,
    with_cp: bool,
    interpolate_mode: str,
    init_cfg: dict | list[dict] | None,
    **norm_eps: float,
) -> None:
    """Raise ValueError or TypeError for what no backbone can be built with.

    Args:
        in_channels, patch_size, drop_path_rate, with_cp, interpolate_mode, init_cfg: as for the backbones.
        norm_eps: epsilons of norms, by the names of the options.
    """
    check_integer('in_channels', in_channels, 1, MOST, 'the channels of the images')
    check_integer('patch_size', patch_size, 1, MOST, 'the side of a patch in pixels')
    # At a rate of 1 nothing is left of a branch, and 0 / 0 of its scale.
    check_number('drop_path_rate', drop_path_rate, '[0, 1)', 'the probability to drop a branch of the last block')
    check_choice('with_cp', with_cp, (True, False))
    check_choice('interpolate_mode', interpolate_mode, INTERPOLATIONS)
    for name, value in norm_eps.items():
        check_number(name, value, '(0, inf)', 'the epsilon of norms')
    configs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg
    if configs is not None:
        example = "dict(type='Pretrained', checkpoint='FILE')"
        check_type('init_cfg', configs, (list, tuple), f'a dict such as {example}, or a list of such')
        if not all(isinstance(config, dict) and 'type' in config for config in configs):
            raise ValueError(f'init_cfg={init_cfg!r}: give dicts with the type of an initialisation, e.g. {example}.')


def check_frozen_stages(frozen_stages: int, most: int, what: str = '') -> None:
    """Raise ValueError for a number of stages, or blocks, that are not there."""
    if not is_integer(frozen_stages, -1, most):
        raise ValueError(f'frozen_stages={frozen_stages!r}: choose from -1 (none) to {most}{what}.')


def choose_out_indices(out_indices: int | Sequence[int] | None, num: int, default: Sequence[int]) -> list[int]:
    """Non-negative indices of the stages or blocks to return."""
    if out_indices is None:
        return list(default)
    indices = list(out_indices) if isinstance(out_indices, (tuple, list, range)) else [out_indices]
    if not indices or not all(is_integer(i, -num, num - 1) for i in indices):
        raise ValueError(
            f'out_indices={out_indices!r}: choose one or more of 0 to {num - 1} (negative ones count from the end).'
        )
    return [i % num for i in indices]


def image_sides(img_size: int | Sequence[int], patch: int) -> tuple[int, int]:
    """(H, W) of ``img_size``, which must hold a patch."""
    return sides('img_size', img_size, patch, ', which is the total stride')


def dge_of_stages(dge: dict | None, depths: dict[str, int]) -> list[dict | None]:
    """Split the ``dge`` option.

    ``granularities`` may be one set for all stages or a sequence of one for each. ``dense_layers`` are names of blocks
    or stages, as logs have them. What it says of a budget is left out, see :func:`budget_of`.

    Args:
        dge: the option.
        depths: of each stage the prefix of its blocks' names, and their number.

    Returns:
        For each stage None, or options of a DynamicGrainedEncoder and ``dense_layers``, indices of its dense blocks.
    """
    num_stages = len(depths)
    if dge is None:
        return [None] * num_stages
    if not isinstance(dge, dict):
        raise TypeError(f'dge={dge!r}: give None for the dense model, or a dict, e.g. dict(granularities=(1, 2, 4)).')
    allowed = set(inspect.signature(DynamicGrainedEncoder).parameters) - {'dim'} | {'dense_layers'}
    unknown = set(dge) - allowed - set(BUDGET_OPTIONS)
    if unknown:
        raise ValueError(
            f'dge has no option {sorted(map(str, unknown))}: it takes {sorted(allowed | set(BUDGET_OPTIONS))}.'
        )
    dge = {name: value for name, value in dge.items() if name in allowed}
    sets = dge.get('granularities', (1, 2, 4))
    if not isinstance(sets, (tuple, list)) or not sets or not isinstance(sets[0], (tuple, list)):
        sets = [sets] * num_stages
    if len(sets) != num_stages:
        raise ValueError(
            f'granularities={sets} are {len(sets)} sets for {num_stages} stages: give one for each stage, '
            'or one for all.'
        )
    dense = dense_layers(dge.get('dense_layers', ()), depths)
    return [{**dge, 'granularities': phis, 'dense_layers': of_stage} for phis, of_stage in zip(sets, dense)]


def dense_layers(names: Sequence[str], depths: dict[str, int]) -> list[list[int]]:
    """The indices of each stage's blocks that are named, or whose stage is."""
    blocks = [[f'{prefix}blocks.{i}' for i in range(depth)] for prefix, depth in depths.items()]
    everything = [name for of_stage in blocks for name in of_stage]
    stages = [prefix.removesuffix('.') for prefix in depths if prefix]
    if not isinstance(names, (tuple, list)) or not all(name in [*everything, *stages] for name in names):
        allowed = f'{everything[0]} to {everything[-1]}'
        if stages:
            allowed += f', or whole stages, {stages[0]} to {stages[-1]}'
        raise ValueError(f'dge dense_layers={names!r}: give a sequence of names of layers, {allowed}.')
    dense = [
        [i for i, name in enumerate(of_stage) if {name, prefix.removesuffix('.')} & set(names)]
        for prefix, of_stage in zip(depths, blocks)
    ]
    if sum(map(len, dense)) == len(everything):
        raise ValueError(f'dge dense_layers={names!r} leave no layer dynamic: write dge=None for the dense model.')
    return dense


def budget_of(dge: dict | None) -> dict:
    """What the ``dge`` option says of a budget, as arguments of :meth:`DynamicBackbone.set_budget`."""
    return {name: dge[option] for option, name in BUDGET_OPTIONS.items() if option in (dge or {})}
