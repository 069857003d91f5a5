"""Checkpoints of other programs, in mmdyn's names and shapes."""

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from math import isqrt
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from ..engine.command import read_config
from ..models import DPVT, PVT
from ..models.backbones.base import find_backbones
from ..models.backbones.checkpoint import foreign_kind, load_from_safetensors
from ..models.dge import DynamicGrainedEncoder
from ..models.layers.position import square_side
from ..version import __version__

Rules = list[tuple[str, str | Callable]]


def _less_one(match):
    return str(int(match[0]) - 1)


# All rules of a kind are applied to each name, one after the other: (regex, replacement).
_AUTHORS: Rules = [
    (r'\.mlp\.', '.ffn.'),
    (r'^head\.', 'head.fc.'),
    (r'^head_dist\.', 'head.layers.head_dist.'),
]
_PYRAMID: Rules = [
    (r'^pos_embed(\d)$', r'stages.\1.pos_embed'),
    (r'^patch_embed(\d)\.', r'stages.\1.patch_embed.'),
    (r'^block(\d)\.', r'stages.\1.blocks.'),
    (r'(?<=^stages\.)\d', _less_one),
]
_LVVIT: Rules = [
    *_AUTHORS,
    # Each convolution is followed by its norm and an activation.
    (r'^patch_embed\.conv(\d)\.', lambda match: f'patch_embed.convs.{3 * int(match[1]) - 3}.'),
    (r'^patch_embed\.bn(\d)\.', lambda match: f'patch_embed.convs.{3 * int(match[1]) - 2}.'),
    (r'^aux_head\.', 'head.aux_fc.'),
]
KINDS: dict[str, Rules] = {
    'vtpack': [
        *_AUTHORS,
        *_PYRAMID,
        (r'blocks\.(\d+)\.dge\.', r'dge.\1.'),
        (r'router\.gate\.', 'router.'),
    ],
    'pvt': [*_AUTHORS, *_PYRAMID],
    'deit': _AUTHORS,
    'lvvit': _LVVIT,
    'cfvit': [
        *_LVVIT,
        (r'^pos_embed_list\.0$', 'coarse_pos_embed'),
        (r'^pos_embed_list\.1$', 'pos_embed'),
        (r'^reuse_block\.0\.', 'reuse.norm.'),
        (r'^reuse_block\.1\.', 'reuse.mlp.'),
    ],
    'mmdet-pvt': [
        (r'^backbone\.', ''),
        (r'^layers\.(\d)\.0\.projection\.', r'stages.\1.patch_embed.proj.'),
        (r'^layers\.(\d)\.0\.norm\.', r'stages.\1.patch_embed.norm.'),
        (r'^layers\.(\d)\.1\.0\.pos_embed$', r'stages.\1.pos_embed'),
        (r'^layers\.(\d)\.1\.', r'stages.\1.blocks.'),
        (r'(?<=^stages\.\d\.blocks\.)\d+', _less_one),
        (r'attn\.attn\.in_proj_', 'attn.qkv.'),
        (r'attn\.attn\.out_proj\.', 'attn.proj.'),
        (r'ffn\.layers\.0\.', 'ffn.fc1.'),
        (r'ffn\.layers\.3\.', 'ffn.fc2.'),
    ],
    'mmpretrain-deit': [
        (r'^backbone\.', ''),
        (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
        (r'^layers\.', 'blocks.'),
        (r'^ln1\.', 'norm.'),
        (r'^(blocks\.\d+)\.ln(\d)\.', r'\1.norm\2.'),
        (r'ffn\.layers\.0\.0\.', 'ffn.fc1.'),
        (r'ffn\.layers\.1\.', 'ffn.fc2.'),
        (r'^head\.layers\.head\.', 'head.fc.'),
    ],
}
_DISTILLED: Rules = [(r'^head\.fc\.', 'head.layers.head.')]
_LAST: Rules = [(r'^(?!head\.)', 'backbone.')]
BACKBONES = ('mmdet-pvt',)  # kinds without a classifier's head
# What a pyramid's tensors do not tell: the epsilon of the norms behind patch embeddings and spatial reductions, and
# whether the class token stays when it makes maps.
TRAINED_WITH: dict[str, dict] = {
    'vtpack': dict(embed_norm_eps=1e-5, with_cls_token=True),
    'pvt': dict(embed_norm_eps=1e-5, with_cls_token=False),
    'mmdet-pvt': dict(embed_norm_eps=1e-6, with_cls_token=False),
}


def split_qkv(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """(3C, ...) of queries, keys and values -> (C, ...) of the queries and (2C, ...) of keys and values."""
    parts = tensor.tensor_split([len(tensor) // 3])
    return {name.replace('.qkv.', f'.{part}.'): value for part, value in zip(('q', 'kv'), parts)}


def flatten_conv1x1(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """(D, C, 1, 1) -> (D, C), and (D, C) as it is."""
    return {name: tensor.flatten(1)}


TENSORS = [(r'.*\.attn\.qkv\.(weight|bias)', split_qkv), (r'.*\.ffn\.fc\d\.weight', flatten_conv1x1)]


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save or of safetensors (``.safetensors``).

    They may lie under a key of their own, or have ``module.`` in front of their names.

    Raises:
        ImportError: if the file is of safetensors, which is not installed.
        ValueError: if the file is missing, not safe to load, or holds no dict of tensors.
    """
    if not Path(path).is_file():
        raise ValueError(f'There is no file {path}: give the path of a checkpoint.')
    if Path(path).suffix == '.safetensors':
        content = load_from_safetensors(str(path))
        content = content.get('state_dict', content)
        return {name.removeprefix('module.'): value for name, value in content.items()}
    try:
        # Training programs keep their options, which are no code, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a broken file can make the loader stumble over anything
        code = re.search(r'GLOBAL ([\w.]+)', str(error))
        reason = f'it asks for {code[1]}' if code else f'{type(error).__name__}: {str(error)[:100]}'
        raise ValueError(
            f"torch's safe loader, torch.load(..., weights_only=True), refuses {path} ({reason}). If the file is "
            'broken or not from torch.save, get it again. If it holds more than weights and you trust its author, load '
            'it with weights_only=False and torch.save its dict of tensors alone.'
        ) from error
    keys = ('state_dict_ema', 'state_dict', 'model')  # averaged weights come first: they are what gets published
    weights = content
    if isinstance(content, dict):
        weights = next((content[key] for key in keys if isinstance(content.get(key), dict)), content)
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items())
    ):
        raise ValueError(
            f'{path} holds no dict of tensors, neither bare nor under one of {keys}: torch.save the '
            "model's state_dict()."
        )
    return {name.removeprefix('module.'): value.detach() for name, value in weights.items()}


def translate(kind: str, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, dict]]:
    """Give the tensors of a kind of checkpoint mmdyn's names and shapes.

    Returns:
        The tensors; the source's name of each of them, and of the splits; and of each dynamic layer its
        ``granularities`` and ``region_size``.

    Raises:
        ValueError: if two tensors get one name, or the splits of a dynamic layer do not fit a region or its router.
    """
    if kind in BACKBONES and any(name.startswith('backbone.') for name in weights):
        weights = {name: value for name, value in weights.items() if name.startswith('backbone.')}
    distilled = any(re.search('dist_token|head_dist', name) for name in weights)
    state, sources = {}, {}
    for source, tensor in weights.items():
        name = source
        for pattern, replacement in [*KINDS[kind], *(_DISTILLED if distilled else []), *_LAST]:
            name = re.sub(pattern, replacement, name)
        change = next((change for pattern, change in TENSORS if re.fullmatch(pattern, name)), None)
        for part, value in (change(name, tensor) if change else {name: tensor}).items():
            if part in state:
                raise ValueError(f'{source} and {sources[part]} are both {part}: remove one of them.')
            state[part], sources[part] = value, source
    return state, sources, _order_routers(state, sources)


def _order_routers(state, sources):
    """Take the splits out of ``state``, and bring the rows of routers, (K, C) and (K,), into ascending granularity."""
    grains = {}
    for name in [name for name in state if re.search(r'\bdge\.\d+\.splits$', name)]:
        # The finest patch is taken to be one cell, so the greatest number of splits is the region's side.
        layer, splits = name.removesuffix('.splits'), [int(n) for n in state.pop(name).flatten()]
        region = max(splits, default=0)
        if not splits or len(set(splits)) < len(splits) or any(n < 1 or region % n for n in splits):
            raise ValueError(
                f'{sources[name]} is {splits}, but has to be different positive numbers that divide the '
                'greatest of them, e.g. [4, 2, 1].'
            )
        order = sorted(range(len(splits)), key=lambda k: -splits[k])
        grains[layer] = dict(granularities=tuple(region // splits[k] for k in order), region_size=region)
        for router in {f'{layer}.router.weight', f'{layer}.router.bias'} & set(state):
            if len(state[router]) != len(splits):
                raise ValueError(
                    f'{sources[router]} has {len(state[router])} rows, but {sources[name]} is {splits}: '
                    'they are not of one model.'
                )
            state[router] = state[router][order]
    for name in [name for name in state if '.router.' in name and name.split('.router.')[0] not in grains]:
        del state[name]  # the order of its rows is unknown
    return grains


def infer_model(kind: str, state: dict[str, Tensor], grains: dict[str, dict]) -> dict:
    """Config of a classifier that takes ``state``, right in everything that its tensors' names and shapes tell.

    Raises:
        ValueError: if no architecture of mmdyn has such tensors.
    """

    def side(pattern, axis=0):
        """Length of this axis of the first tensor with such a name, or 0."""
        return next(
            (value.shape[axis] for name, value in state.items() if value.ndim > axis and re.fullmatch(pattern, name)), 0
        )

    def count(pattern):
        return 1 + max((int(m[1]) for m in (re.match(pattern, name) for name in state) if m), default=-1)

    stages = count(r'backbone\.stages\.(\d+)\.')
    prefixes = [rf'backbone\.stages\.{i}\.' for i in range(stages)] or [r'backbone\.']
    dims = [side(rf'{p}(patch_embed\.(proj|norm)|blocks\.\d+\.norm\d)\.(weight|bias)') for p in prefixes]
    depths = [count(rf'{p}blocks\.(\d+)\.') for p in prefixes]
    if not all(dims) or not all(depths):
        like = foreign_kind(name.removeprefix('backbone.') for name in state)
        raise ValueError(
            f'SRC does not look like {kind}: its names, as far as the rules of {kind} translate them, are '
            f'{", ".join(list(state)[:4])}, ... Choose another KIND of {sorted(KINDS)}'
            + (f': it looks like {like}.' if like else '.')
        )
    # Fractions, because dim times a float may fall short of the hidden channels.
    hidden = [side(rf'{p}blocks\.\d+\.ffn\.fc1\.(weight|bias)') for p in prefixes]
    ratios = [Fraction(width, dim) or 4 for width, dim in zip(hidden, dims)]
    reductions = [
        side(rf'{p}blocks\.\d+\.attn\.sr\.weight', 3) or 1 + bool(side(rf'{p}blocks\.\d+\.attn\.sr\.bias'))
        for p in prefixes
    ]
    rows = [side(rf'{p}pos_embed', 1) for p in prefixes]
    has_stem = kind == 'lvvit' or any(name.startswith('backbone.patch_embed.convs.') for name in state)
    patch = side(rf'{prefixes[0]}patch_embed\.proj\.weight', 3) * (2 if has_stem else 1) or (4 if stages else 16)
    distilled = any('dist' in name for name in state)

    sampled = [side(rf'{p}blocks\.\d+\.attn\.attn_weight\.(weight|bias)') for p in prefixes]
    if stages:
        has_class_token = 'backbone.cls_token' in state or isqrt(rows[-1]) ** 2 < rows[-1]
        arch = dict(embed_dims=dims, depths=depths, mlp_ratios=ratios)
        # Heads times points is all that the shapes tell; the authors' models have 4 points per head.
        arch.update(
            dict(num_heads=[num // 4 or 1 for num in sampled], num_points=[4] * stages)
            if any(sampled)
            else dict(num_heads=[1] * stages, sr_ratios=reductions)
        )
        options = dict(
            type='mmdyn.DPVT' if any(sampled) else 'mmdyn.PVT',
            arch=arch,
            out_type='featmap' if kind in BACKBONES else 'cls_token' if has_class_token else 'avg_featmap',
        )
        if kind in TRAINED_WITH:
            options['embed_norm_eps'] = TRAINED_WITH[kind]['embed_norm_eps']
    else:
        arch = dict(embed_dim=dims[0], depth=depths[0], num_heads=1, mlp_ratio=ratios[0])
        if kind == 'cfvit':
            arch['family'] = 'lvvit' if has_stem else 'deit'
            coarse_size = isqrt(side(r'backbone\.coarse_pos_embed', 1)) or isqrt(rows[0]) // 2 or 7
            options = dict(type='mmdyn.CFViT', arch=arch, coarse_size=coarse_size)
        elif has_stem:
            options = dict(type='mmdyn.LVViT', arch=arch)
        else:
            options = dict(type='mmdyn.DeiT', arch=arch, distilled=distilled)
    if grains:
        some, regions = next(iter(grains.values())), {grain['region_size'] for grain in grains.values()}
        options['dge'] = dict(
            granularities=[
                next((grain for layer, grain in grains.items() if re.match(p, layer)), some)['granularities']
                for p in prefixes
            ],
            region_size=regions.pop() if len(regions) == 1 else None,
        )
    if kind != 'cfvit':  # whose coarse_size tells its images' size
        options['img_size'] = max(isqrt(n) * patch * 2**i for i, n in enumerate(rows)) or 224
    first = r'convs\.0' if has_stem else 'proj'
    backbone = dict(
        in_channels=side(rf'{prefixes[0]}patch_embed\.{first}\.weight', 1) or 3, patch_size=patch, **options
    )
    head = dict(
        type='mmdyn.LVViTHead' if has_stem else 'DeiTClsHead' if distilled else 'LinearClsHead',
        num_classes=side(r'head\..*\.(weight|bias)') or 1000,
        in_channels=dims[-1],
    )
    return dict(
        type='mmdyn.CoarseToFineClassifier' if kind == 'cfvit' else 'ImageClassifier',
        backbone=backbone,
        head=None if kind in BACKBONES else head,
    )


def convert(
    kind: str, src: str | Path, dst: str | Path, config: str | None = None, allow_partial: bool = False
) -> list[str]:
    """Convert a checkpoint, let a model load it, and save it as ``state_dict`` and ``meta``.

    ``meta['backbone']`` has the options of a backbone for maps that the tensors do not tell: with them it computes what
    the source's did.

    Args:
        kind: one of ``KINDS``.
        src, dst: files to read and to write.
        config: config of the model. Without it, the model is the one that the tensors tell of.
        allow_partial: leave out tensors that the model lacks, and do without those that the source lacks.

    Returns:
        Lines that say what became of the tensors, and what the model needs to compute what the source did.

    Raises:
        ValueError: if the source is not of this kind, or not of the model's architecture.
    """
    if kind not in KINDS:
        raise ValueError(f'Unknown kind {kind!r}: choose from {sorted(KINDS)}.')
    if Path(src).resolve() == Path(dst).resolve():
        raise ValueError(f'{dst} is both SRC and DST: give DST another name.')
    if Path(dst).suffix == '.safetensors':
        raise ValueError(
            f'{dst} will be a file of torch.save: give DST a name such as {Path(dst).with_suffix(".pth")}.'
        )
    weights = load_weights(src)
    state, sources, grains = translate(kind, weights)
    cfg = read_config(config) if config else dict(model=infer_model(kind, state, grains))
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    model = MODELS.build(cfg['model'])

    own = {
        name: value
        for name, value in model.state_dict().items()
        if kind not in BACKBONES or name.startswith('backbone.')
    }
    state = OrderedDict((name, value) for name, value in state.items() if name in own)
    # Splits are used with the router that they order.
    used = {source for name, source in sources.items() if name.replace('splits', 'router.weight') in state}
    other = _differences(model, state, own, grains, fits=config is not None)
    partial = [
        f'{source}: in SRC, but not in the model' for source in dict.fromkeys(sources.values()) if source not in used
    ]
    partial += [f'{name}: in the model, but not in SRC' for name in own if name not in state]
    if other or not state or (partial and not allow_partial):
        fix = '' if other or not state else ', or --allow-partial to go on without the tensors above'
        raise ValueError(
            f'{src} does not fit {config or "the architecture that its names tell of"}:\n  '
            + '\n  '.join(other + partial)
            + f'\nGive the KIND that it is of, a --config that fits{fix}.'
        )
    state._metadata = dict(backbone=dict(grids=_square_grids(state)))
    model.load_state_dict(state, strict=False)

    layers = {name.removeprefix('backbone.'): grain for name, grain in grains.items()}
    options, notes = _untold(kind, find_backbones(model), 'backbone.cls_token' in sources, config)
    meta = dict(
        mmdyn_version=__version__,
        kind=kind,
        source=Path(src).name,
        granularities={name: grain['granularities'] for name, grain in layers.items()},
        region_sizes={name: grain['region_size'] for name, grain in layers.items()},
        backbone=options,
    )
    Path(dst).parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=state, meta=meta), dst)
    left_out = [name for name in weights if name not in used]
    size = sum(state[name].numel() for name, _ in model.named_parameters() if name in state)
    return [
        *(f'left out: {name}' for name in left_out),
        *notes,
        f'{dst}: {len(used)} tensors converted, {len(left_out)} left out, {size:,} parameters',
    ]


def _square_grids(state):
    """(h, w) of the map of each position embedding of the backbone, by name; all kinds are trained on squares."""
    sides = {
        name.removeprefix('backbone.'): square_side(value.shape[1])
        for name, value in state.items()
        if re.match(r'backbone\..*pos_embed$', name)
    }
    return {name: (side, side) for name, side in sides.items() if side}


def _untold(kind, backbones, has_class_token, config):
    """Options of a pyramid for maps that its tensors do not tell, and lines that say them and how the model differs."""
    backbone = next((backbone for backbone in backbones if isinstance(backbone, PVT)), None)
    if backbone is None or kind not in TRAINED_WITH:
        return {}, []
    options, here = dict(TRAINED_WITH[kind]), dict(embed_norm_eps=backbone.stages[0].patch_embed.norm.eps)
    if isinstance(backbone, DPVT):
        del options['with_cls_token']
    else:
        options['with_cls_token'] &= has_class_token
        if backbone.out_type == 'featmap':
            here['with_cls_token'] = backbone.stages[-1].num_extra > 0
    notes = [f'To compute what SRC did, a backbone for maps needs {", ".join(f"{k}={v}" for k, v in options.items())}.']
    notes += [
        f'{config} has {name}={value}: write {name}={options[name]} in its backbone.'
        for name, value in here.items()
        if name in options and value != options[name]
    ]
    return options, notes


def _differences(model: nn.Module, state, own, grains, fits):
    """What is of another shape, or of other granularities, in the checkpoint and in the model."""
    found = []
    for name, value in state.items():
        here, there = tuple(value.shape), tuple(own[name].shape)
        # A model fits these to itself, but those of one checkpoint have to agree with each other.
        positions = name.endswith('pos_embed') and here[::2] == there[::2]
        from_rgb = len(here) == 4 and here[1] == 3 and (here[0], *here[2:]) == (there[0], *there[2:])
        if here != there and not (fits and (positions or from_rgb)):
            found.append(f'{name}: {here} in SRC, {there} in the model')
    for name, encoder in model.named_modules():
        if isinstance(encoder, DynamicGrainedEncoder) and name in grains:
            options = dict(granularities=encoder.granularities, region_size=encoder.region)
            if options != grains[name]:
                found.append(f'{name}: {grains[name]} in SRC, {options} in the model')
    return found
