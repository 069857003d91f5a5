"""Options that backbones have in common: what is allowed, and what is meant."""

import inspect
from collections.abc import Sequence

from ..dge import DynamicGrainedEncoder

# Options of dge that are no encoder's, and what DynamicBackbone.set_budget calls them.
BUDGET_OPTIONS = dict(test_budget='budget', budget_mode='mode', prices='prices')
OUT_TYPES = ('featmap', 'cls_token', 'avg_featmap', 'raw')


def choose_arch(arch: str | dict, archs: dict) -> dict:
    """The numbers of an architecture, given by name or as a dict of them."""
    keys = set(next(iter(archs.values())))
    if isinstance(arch, dict):
        if set(arch) != keys:
            raise ValueError(f'arch has the keys {sorted(arch)}, but needs exactly {sorted(keys)}.')
        return arch
    if arch not in archs:
        raise ValueError(f'Unknown arch {arch!r}: choose from {sorted(archs)}, or give a dict of {sorted(keys)}.')
    return archs[arch]


def choose_out_indices(out_indices: int | Sequence[int] | None, num: int, default: Sequence[int]) -> list[int]:
    """Non-negative indices of the stages or blocks to return."""
    if out_indices is None:
        return list(default)
    indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    wrong = [i for i in indices if not -num <= i < num]
    if wrong or not indices:
        raise ValueError(
            f'out_indices={out_indices}: choose one or more of 0 to {num - 1} (negative ones count from the end).'
        )
    return [i % num for i in indices]


def image_sides(img_size: int | Sequence[int], patch: int) -> tuple[int, int]:
    """(H, W) of ``img_size``, which must hold a patch."""
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < patch:
        raise ValueError(
            f'img_size={img_size}: give the side of a square, or (height, width), of at least {patch} '
            'pixels, which is the total stride.'
        )
    return sides


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
        raise ValueError(f'dge has no option {sorted(unknown)}: it takes {sorted(allowed | set(BUDGET_OPTIONS))}.')
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
    if not isinstance(names, (tuple, list)) or not {*names} <= {*everything, *stages}:
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
