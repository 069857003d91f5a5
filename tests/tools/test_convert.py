"""Converted weights compute what they computed in the program that wrote them, and no tensor gets lost on the way."""
import argparse
import importlib.util
import math
import os
from pathlib import Path

import mmdyn  # noqa: F401
import pytest
import timm
import torch
import torch.nn.functional as F
from mmdet.models.backbones import PyramidVisionTransformer
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from mmpretrain.models import build_classifier

PATH = Path(__file__).parents[2] / 'tools/model_converters/convert.py'
CLASSES, SIDE = 5, 64
PVT = dict(embed_dims=(8, 16, 24, 32), depths=(2, 1, 1, 2), num_heads=(1, 2, 3, 4), mlp_ratios=(3, 2, 2, 2),
           sr_ratios=(8, 4, 2, 1))
DEIT = dict(embed_dim=32, depth=2, num_heads=2, mlp_ratio=2)
PYRAMID = dict(type='mmdyn.PVT', arch=PVT, img_size=SIDE, out_type='cls_token')
DEFORMABLE = dict(type='mmdyn.DPVT', arch={**{k: PVT[k] for k in PVT if k != 'sr_ratios'}, 'num_points': (4, ) * 4},
                  img_size=SIDE, out_type='avg_featmap')
PLAIN = dict(type='mmdyn.DeiT', arch=DEIT, img_size=SIDE, patch_size=8)
PLAIN_TIMM = dict(PLAIN, arch=dict(DEIT, mlp_ratio=4))
LINEAR = dict(type='LinearClsHead', num_classes=CLASSES, in_channels=32)
DISTILLED = dict(LINEAR, type='DeiTClsHead')
# Both with 4x4 pixels a patch, and deep enough for the global class attention, which begins at the 4th block.
FAMILIES = {'deit': dict(DEIT, depth=5), 'lvvit': dict(DEIT, depth=5, mlp_ratio=3)}
HEADS = {'deit': LINEAR, 'lvvit': dict(LINEAR, type='mmdyn.LVViTHead')}
EPS = {'deit': 1e-6, 'lvvit': 1e-5}


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('convert', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_scope_left_behind(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())


@pytest.fixture
def images():
    return torch.randn(2, 3, SIDE, SIDE)


# The models of the DGE, PVT, DeiT, LV-ViT and CF-ViT authors: shapes of their tensors, and one image at a time.


def tensors(shapes):
    """Random tensors of these shapes, none of them near a value that a model starts with."""
    made = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) in (2, 4) else 4
        made[name] = torch.randn(shape) / fan_in**0.5 * (20 if 'gate' in name else 1) + ('norm' in name)
    return made


def block_shapes(block, dim, ratio, reduction=1, splits=(), heads=0):
    """Shapes of a block, which is deformable if it is told its number of heads."""
    layers = {'attn.proj': (dim, dim), 'norm1': (dim, ), 'norm2': (dim, ), 'mlp.fc1': (ratio * dim, dim),
              'mlp.fc2': (dim, ratio * dim)}
    layers.update({'attn.v': (dim, dim), 'attn.offsets': (heads * 4 * 2, dim), 'attn.attn_weight': (heads * 4, dim)}
                  if heads else {'attn.q': (dim, dim), 'attn.kv': (2 * dim, dim)})
    if reduction > 1:
        layers.update({'attn.sr': (dim, dim, reduction, reduction), 'attn.norm': (dim, )})
    if splits:
        layers['dge.router.gate'] = (len(splits), dim)
    return {f'{block}.{name}.{part}': shape if part == 'weight' else shape[:1]
            for name, shape in layers.items() for part in ('weight', 'bias')}


def authors_pvt(splits=((), ) * 4, deformable=False):
    shapes = {'norm.weight': (32, ), 'norm.bias': (32, ), 'head.weight': (CLASSES, 32), 'head.bias': (CLASSES, )}
    if not deformable:
        shapes['cls_token'] = (1, 1, 32)
    given, channels, cells = {}, 3, SIDE
    for i, dim in enumerate(PVT['embed_dims']):
        patch = 2 if i else 4
        cells //= patch
        shapes.update({f'pos_embed{i + 1}': (1, cells**2 + (i == 3 and not deformable), dim),
                       f'patch_embed{i + 1}.proj.weight': (dim, channels, patch, patch),
                       f'patch_embed{i + 1}.proj.bias': (dim, ), f'patch_embed{i + 1}.norm.weight': (dim, ),
                       f'patch_embed{i + 1}.norm.bias': (dim, )})
        for j in range(PVT['depths'][i]):
            block = f'block{i + 1}.{j}'
            shapes.update(block_shapes(block, dim, PVT['mlp_ratios'][i], 1 if deformable else PVT['sr_ratios'][i],
                                       splits[i], PVT['num_heads'][i] * deformable))
            if splits[i]:
                given[f'{block}.dge.splits'] = torch.tensor(splits[i])
        channels = dim
    return {**tensors(shapes), **given}


def authors_dpvt(splits=((), ) * 4):
    return authors_pvt(splits, deformable=True)


def authors_deit(splits=()):
    shapes = {'cls_token': (1, 1, 32), 'pos_embed': (1, 65, 32), 'patch_embed.proj.weight': (32, 3, 8, 8),
              'patch_embed.proj.bias': (32, ), 'norm.weight': (32, ), 'norm.bias': (32, ),
              'head.weight': (CLASSES, 32), 'head.bias': (CLASSES, )}
    for j in range(DEIT['depth']):
        shapes.update(block_shapes(f'blocks.{j}', 32, DEIT['mlp_ratio'], 1, splits))
    given = {f'blocks.{j}.dge.splits': torch.tensor(splits) for j in range(DEIT['depth']) if splits}
    return {**tensors(shapes), **given}


def layer(name, *shape):
    return {f'{name}.weight': shape, f'{name}.bias': shape[:1]}


def authors_plain(family, **embeddings):
    """DeiT or LV-ViT with these position embeddings, each given by the side of its grid."""
    hidden = 32 * FAMILIES[family]['mlp_ratio']
    shapes = {'cls_token': (1, 1, 32), **layer('norm', 32), **layer('head', CLASSES, 32)}
    shapes.update({name: (1, 1 + side**2, 32) for name, side in embeddings.items()})
    for j in range(FAMILIES[family]['depth']):
        for name, shape in {'norm1': (32, ), 'attn.qkv': (96, 32), 'attn.proj': (32, 32), 'norm2': (32, ),
                            'mlp.fc1': (hidden, 32), 'mlp.fc2': (32, hidden)}.items():
            shapes.update(layer(f'blocks.{j}.{name}', *shape))
    if family == 'deit':
        return tensors({**shapes, **layer('patch_embed.proj', 32, 3, 4, 4)})
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith('qkv.bias')}
    shapes.update({**layer('patch_embed.proj', 32, 64, 2, 2), **layer('aux_head', CLASSES, 32)})
    for i, (channels, kernel) in enumerate(((3, 7), (64, 3), (64, 3)), start=1):
        shapes[f'patch_embed.conv{i}.weight'] = (64, channels, kernel, kernel)
        shapes.update({**layer(f'patch_embed.bn{i}', 64), f'patch_embed.bn{i}.running_mean': (64, )})
    given = {f'patch_embed.bn{i}.running_var': torch.rand(64) + 0.5 for i in (1, 2, 3)}
    given.update({f'patch_embed.bn{i}.num_batches_tracked': torch.tensor(i) for i in (1, 2, 3)})
    return {**tensors(shapes), **given}


def authors_cfvit(family, side):
    hidden = 32 * FAMILIES[family]['mlp_ratio']
    reuse = {**layer('reuse_block.0', 32), **layer('reuse_block.1.fc1', hidden, 32),
             **layer('reuse_block.1.fc2', 32, hidden)}
    return {**authors_plain(family, **{'pos_embed_list.0': side, 'pos_embed_list.1': 2 * side}), **tensors(reuse)}


def linear(w, name, x):
    return x @ w[f'{name}.weight'].T + w.get(f'{name}.bias', 0)


def norm(w, name, x):
    eps = EPS['lvvit' if 'aux_head.weight' in w else 'deit']
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f'{name}.weight'] + w[f'{name}.bias']


def mlp(w, name, x):
    hidden = linear(w, f'{name}.fc1', x)
    return linear(w, f'{name}.fc2', hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)


def conv(w, name, maps):
    return F.conv2d(maps, w[f'{name}.weight'], w[f'{name}.bias'], stride=w[f'{name}.weight'].shape[-1])


def bilinear(maps, x, y):
    """The value (C, ) of a map (H, W, C) between its cells; outside of the map there are zeros."""
    value = 0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < maps.shape[0] and 0 <= column < maps.shape[1]:
                value = value + maps[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return value + torch.zeros(maps.shape[2])


def sample(w, attn, queries, tokens, shape, heads, places):
    """Deformable attention of the queries (n, C), which stand at ``places``, one point at a time."""
    maps = linear(w, f'{attn}.v', tokens).reshape(*shape, -1).chunk(heads, -1)
    offsets = linear(w, f'{attn}.offsets', queries).reshape(-1, heads, 4, 2)
    weights = linear(w, f'{attn}.attn_weight', queries).reshape(-1, heads, 4).softmax(-1)
    return [torch.stack([
        sum(share * bilinear(maps[head], x + dx, y + dy) for (dx, dy), share in zip(points[head].tolist(), shares[head]))
        for (x, y), points, shares in zip(places, offsets, weights)
    ]) for head in range(heads)]


def change(w, block, queries, tokens, shape, heads, places):
    """enc(q) - q of the queries (n, C) at ``places``, whose keys and values are the tokens (E + H*W, C)."""
    keys, extra = norm(w, f'{block}.norm1', tokens), len(tokens) - math.prod(shape)
    if f'{block}.attn.sr.weight' in w:
        maps = conv(w, f'{block}.attn.sr', keys[extra:].T.reshape(1, -1, *shape))
        keys = torch.cat([keys[:extra], norm(w, f'{block}.attn.norm', maps[0].flatten(1).T)])
    if f'{block}.attn.v.weight' in w:
        attended = sample(w, f'{block}.attn', norm(w, f'{block}.norm1', queries), keys, shape, heads, places)
    else:
        query = linear(w, f'{block}.attn.q', norm(w, f'{block}.norm1', queries))
        key, value = linear(w, f'{block}.attn.kv', keys).chunk(2, -1)
        attended = [(q @ k.T / q.shape[1]**0.5).softmax(-1) @ v
                    for q, k, v in zip(*(x.chunk(heads, -1) for x in (query, key, value)))]
    middle = queries + linear(w, f'{block}.attn.proj', torch.cat(attended, -1))
    return middle + mlp(w, f'{block}.mlp', norm(w, f'{block}.norm2', middle)) - queries


def encode(w, block, tokens, shape, heads, chosen):
    """A block, dynamic if it has splits: y = x + unpool(enc(q) - q). The numbers of splits go into ``chosen``."""
    extra = len(tokens) - math.prod(shape)

    def place(patch):
        rows, columns = zip(*(divmod(i - extra, shape[1]) for i in patch))
        return sum(columns) / len(patch), sum(rows) / len(patch)

    if f'{block}.dge.splits' not in w:
        return tokens + change(w, block, tokens, tokens, shape, heads, [place([i]) for i in range(len(tokens))])
    splits = w[f'{block}.dge.splits'].tolist()
    region = max(splits)

    def square(top, left, side):
        return [extra + row * shape[1] + column
                for row in range(top, top + side) for column in range(left, left + side)]

    patches = [[i] for i in range(extra)]
    for top in range(0, shape[0], region):
        for left in range(0, shape[1], region):
            logits = linear(w, f'{block}.dge.router.gate', tokens[square(top, left, region)].mean(0))
            chosen.append(splits[logits.argmax()])
            side = region // chosen[-1]
            patches += [square(row, column, side) for row in range(top, top + region, side)
                        for column in range(left, left + region, side)]
    queries = torch.stack([tokens[patch].mean(0) for patch in patches])
    out = tokens.clone()
    for patch, delta in zip(patches, change(w, block, queries, tokens, shape, heads, [*map(place, patches)])):
        out[patch] += delta
    return out


def authors_logits(w, images):
    """(B, 3, H, W) images -> (B, classes), and the numbers of splits that the routers chose."""
    logits, chosen = [], []
    for x in images[:, None]:
        for i, heads in enumerate(PVT['num_heads'] if 'block1.0.norm1.weight' in w else [DEIT['num_heads']]):
            number, blocks = (f'{i + 1}', f'block{i + 1}') if 'pos_embed1' in w else ('', 'blocks')
            x = conv(w, f'patch_embed{number}.proj', x)
            shape, tokens = x.shape[2:], x[0].flatten(1).T
            if f'patch_embed{number}.norm.weight' in w:
                tokens = norm(w, f'patch_embed{number}.norm', tokens)
            if number in ('4', '') and 'cls_token' in w:
                tokens = torch.cat([w['cls_token'][0], tokens])
            tokens = tokens + w[f'pos_embed{number}'][0]
            for j in range(2):
                if f'{blocks}.{j}.norm1.weight' in w:
                    tokens = encode(w, f'{blocks}.{j}', tokens, shape, heads, chosen)
            x = tokens[-math.prod(shape):].T.reshape(1, -1, *shape)
        tokens = norm(w, 'norm', tokens)
        logits.append(linear(w, 'head', tokens[0] if 'cls_token' in w else tokens.mean(0)))
    return torch.stack(logits), chosen


def embed(w, image):
    """(3, H, W) -> (N, C), through LV-ViT's convolutions if there are any."""
    maps = image[None]
    for i in (1, 2, 3) if 'aux_head.weight' in w else ():
        kernel = w[f'patch_embed.conv{i}.weight']
        maps = F.conv2d(maps, kernel, stride=2 if i == 1 else 1, padding=kernel.shape[2] // 2)
        mean, variance, weight, bias = (w[f'patch_embed.bn{i}.{part}'][:, None, None]
                                        for part in ('running_mean', 'running_var', 'weight', 'bias'))
        maps = ((maps - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)
    return conv(w, 'patch_embed.proj', maps)[0].flatten(1).T


def run_blocks(w, tokens):
    """(n, C) -> the normed output (n, C), and the global class attention (n - 1, )."""
    share, score = 1 / 2 if 'aux_head.weight' in w else 1, 0
    for j in range(5):
        block = f'blocks.{j}'
        query, key, value = (x.unflatten(1, (2, 16)).transpose(0, 1) for x in linear(
            w, f'{block}.attn.qkv', norm(w, f'{block}.norm1', tokens)).chunk(3, -1))
        attention = (query @ key.mT / 4).softmax(-1)
        tokens = tokens + share * linear(w, f'{block}.attn.proj', (attention @ value).transpose(0, 1).flatten(1))
        tokens = tokens + share * mlp(w, f'{block}.mlp', norm(w, f'{block}.norm2', tokens))
        if j >= 3:
            score = 0.99 * score + 0.01 * attention[:, 0, 1:].mean(0)
    return norm(w, 'norm', tokens), score


def classify(w, tokens):
    logits = linear(w, 'head', tokens[0])
    if 'aux_head.weight' not in w:
        return logits
    return (logits + linear(w, 'aux_head', tokens[1:]).amax(0) / 4) / 1.25


def coarse_to_fine(w, images, side):
    """(B, 3, H, W) images -> coarse and fine logits (B, classes), and the split ones of side * side patches (B, k)."""
    places = torch.linspace(0, images.shape[2] - 1, images.shape[2] // 2)[:, None]
    shares = (1 - (places - torch.arange(images.shape[2])).abs()).clamp(min=0)  # half the side, corner on corner
    (class_token, ), (coarse_places, ), (fine_places, ) = (
        w[name] for name in ('cls_token', 'pos_embed_list.0', 'pos_embed_list.1'))
    coarse_logits, fine_logits, split = [], [], []
    for image in images:
        coarse = embed(w, shares @ image @ shares.T) + coarse_places[1:]
        tokens, score = run_blocks(w, torch.cat([class_token + coarse_places[:1], coarse]))
        coarse_logits.append(classify(w, tokens))
        reused = mlp(w, 'reuse_block.1', norm(w, 'reuse_block.0', tokens[1:]))
        fine = (embed(w, image) + fine_places[1:]).unflatten(0, (2 * side, 2 * side))
        split.append(score.topk((side**2 + 1) // 2)[1].sort()[0])
        sequence = [class_token + fine_places[:1]]
        for i in range(side**2):
            row, column = 2 * (i // side), 2 * (i % side)
            sequence.append(fine[row:row + 2, column:column + 2].flatten(0, 1) + reused[i] if i in split[-1] else
                            coarse[i:i + 1])
        fine_logits.append(classify(w, run_blocks(w, torch.cat(sequence))[0]))
    return torch.stack(coarse_logits), torch.stack(fine_logits), torch.stack(split)


# The same models in other libraries.


def in_timm(name):
    return timm.create_model(name, depth=2, embed_dim=32, num_heads=2, img_size=SIDE, patch_size=8, num_classes=CLASSES)


def in_mmdet(**options):
    return PyramidVisionTransformer(
        pretrain_img_size=SIDE, embed_dims=8, num_layers=PVT['depths'], num_heads=(1, 2, 3, 4),
        mlp_ratios=PVT['mlp_ratios'], sr_ratios=PVT['sr_ratios'], norm_cfg=dict(type='LN', eps=1e-6), **options)


def in_mmpretrain(backbone, head):
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    return classifier(dict(type=backbone, arch=arch, img_size=SIDE, patch_size=8), dict(LINEAR, type=head))


def classifier(backbone, head=LINEAR):
    kind = 'mmdyn.CoarseToFineClassifier' if backbone['type'] == 'mmdyn.CFViT' else 'ImageClassifier'
    return build_classifier(dict(type=kind, backbone=backbone, head=head))


def plain(family, side, **options):
    types = {'deit': 'mmdyn.DeiT', 'lvvit': 'mmdyn.LVViT'}
    return dict(type=types[family], arch=FAMILIES[family], img_size=4 * side, patch_size=4, norm_eps=EPS[family],
                **options)


def two_stages(family, side, **options):
    return dict(type='mmdyn.CFViT', arch=dict(FAMILIES[family], family=family), coarse_size=side, patch_size=4,
                norm_eps=EPS[family], **options)


def logits_of(model, images):
    with torch.no_grad():
        return model.eval()(images)


def convert(tool, folder, kind, content, **options):
    """Save, convert and return the path of the result."""
    torch.save(content, folder / 'src.pth')
    tool.convert(kind, folder / 'src.pth', folder / 'dst.pth', **options)
    return folder / 'dst.pth'


def loaded(path, backbone, head=LINEAR):
    model = classifier(backbone, head)
    load_checkpoint(model, str(path), map_location='cpu', strict=True)
    return model


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def write_config(path, backbone, head=LINEAR, **rest):
    model = dict(type='ImageClassifier', backbone=backbone, head=head)
    Config(dict(model=model, default_scope='mmpretrain', **rest)).dump(path)
    return str(path)


FINE_TO_COARSE = ((4, 2, 1), ) * 3 + ((2, 1), )
SHUFFLED = ((2, 4, 1), (1, 2, 4), (4, 1), (1, 2))


@pytest.mark.parametrize('kind, make, backbone', [
    ('vtpack', authors_pvt, PYRAMID),
    ('vtpack', authors_dpvt, DEFORMABLE),
    ('vtpack', authors_deit, PLAIN),
    ('pvt', authors_pvt, PYRAMID),
], ids=['vtpack-pvt', 'vtpack-dpvt', 'vtpack-deit', 'pvt'])
def test_dense_models_of_the_authors(tool, tmp_path, images, kind, make, backbone):
    weights = make()
    model = loaded(convert(tool, tmp_path, kind, weights), backbone)
    assert_close(logits_of(model, images), authors_logits(weights, images)[0])


@pytest.mark.parametrize('make, backbone', [(authors_pvt, PYRAMID), (authors_dpvt, DEFORMABLE)], ids=['pvt', 'dpvt'])
@pytest.mark.parametrize('splits', [FINE_TO_COARSE, SHUFFLED], ids=['fine-to-coarse', 'shuffled'])
def test_dynamic_pyramids_of_the_authors(tool, tmp_path, images, splits, make, backbone):
    weights = make(splits)
    path = convert(tool, tmp_path, 'vtpack', weights)
    grains = [tuple(max(numbers) // n for n in sorted(numbers, reverse=True)) for numbers in splits]
    model = loaded(path, dict(backbone, dge=dict(granularities=grains)))
    theirs, chosen = authors_logits(weights, images)
    assert set(chosen) == {1, 2, 4}
    assert_close(logits_of(model, images), theirs)
    assert torch.load(path)['meta']['granularities'] == {
        f'stages.{i}.dge.{j}': grains[i] for i, depth in enumerate(PVT['depths']) for j in range(depth)}


@pytest.mark.parametrize('splits', [(4, 2, 1), (1, 4, 2), (4, 2)])
def test_dynamic_deit_of_the_authors(tool, tmp_path, images, splits):
    weights = authors_deit(splits)
    path = convert(tool, tmp_path, 'vtpack', weights)
    meta = torch.load(path)['meta']
    grains = dict(granularities=meta['granularities']['dge.0'], region_size=meta['region_sizes']['dge.0'])
    assert grains == dict(granularities=tuple(sorted(4 // n for n in splits)), region_size=4)
    theirs, chosen = authors_logits(weights, images)
    assert set(chosen) == set(splits)
    assert_close(logits_of(loaded(path, dict(PLAIN, dge=grains)), images), theirs)


@pytest.mark.parametrize('name, distilled', [('deit_tiny_patch16_224', False),
                                             ('deit_tiny_distilled_patch16_224', True)])
def test_deit_of_timm(tool, tmp_path, images, randomise, name, distilled):
    theirs = randomise(in_timm(name))
    path = convert(tool, tmp_path, 'deit', theirs.state_dict())
    ours = loaded(path, dict(PLAIN_TIMM, distilled=distilled), DISTILLED if distilled else LINEAR)
    assert_close(logits_of(ours, images), logits_of(theirs, images))


def test_pvt_of_mmdet(tool, tmp_path, images, randomise, capsys):
    theirs = randomise(in_mmdet())
    alone = theirs.state_dict()
    rest = {'neck.conv.weight': torch.ones(1), 'bbox_head.cls.bias': torch.ones(1), 'head.bias': torch.ones(1)}
    detector = {**{f'backbone.{name}': value for name, value in alone.items()}, **rest}
    for content, left_out in ((alone, {}), (dict(meta=dict(epoch=1), state_dict=detector), rest)):
        model = loaded(convert(tool, tmp_path, 'mmdet-pvt', content), dict(PYRAMID, out_type='featmap'), None)
        for ours, expected in zip(logits_of(model, images), logits_of(theirs, images), strict=True):
            assert_close(ours, expected)
        out = capsys.readouterr().out
        assert {name for name in detector if f'left out: {name}\n' in out} == set(left_out)


@pytest.mark.parametrize('backbone, head', [('VisionTransformer', 'VisionTransformerClsHead'),
                                            ('DistilledVisionTransformer', 'DeiTClsHead')])
def test_deit_of_mmpretrain(tool, tmp_path, images, randomise, backbone, head):
    theirs = randomise(in_mmpretrain(backbone, head))
    distilled = head == 'DeiTClsHead'
    path = convert(tool, tmp_path, 'mmpretrain-deit', dict(state_dict=theirs.state_dict()))
    ours = loaded(path, dict(PLAIN, distilled=distilled), DISTILLED if distilled else LINEAR)
    assert_close(logits_of(ours, images), logits_of(theirs, images))


@pytest.mark.parametrize('side', [7, 9])
@pytest.mark.parametrize('family', ['deit', 'lvvit'])
def test_cfvit_of_the_authors(tool, tmp_path, capsys, family, side):
    weights, images = authors_cfvit(family, side), torch.randn(2, 3, 8 * side, 8 * side)
    model = loaded(convert(tool, tmp_path, 'cfvit', weights), two_stages(family, side), HEADS[family])
    size = sum(value.numel() for name, value in weights.items() if 'running' not in name and 'num_' not in name)
    assert f' {len(weights)} tensors converted, 0 left out, {size:,} parameters' in capsys.readouterr().out
    *theirs, split = coarse_to_fine(weights, images, side)
    for ours, expected in zip(logits_of(model, images), theirs, strict=True):
        assert_close(ours, expected)
    backbone = model.backbone
    with torch.no_grad():
        tokens, regions = backbone.fine(images, backbone.coarse(images))
    assert tokens.shape[1] == {7: 125, 9: 205}[side] and regions.equal(split)


def test_lvvit_of_the_authors(tool, tmp_path, images):
    weights = authors_plain('lvvit', pos_embed=16)
    model = loaded(convert(tool, tmp_path, 'lvvit', weights), plain('lvvit', 16), HEADS['lvvit'])
    tokens = torch.stack([run_blocks(weights, torch.cat([weights['cls_token'][0], embed(weights, image)])
                                     + weights['pos_embed'][0])[0] for image in images])
    # Programs differ in how they join the two.
    ours = logits_of(model.backbone, images)[0]
    assert_close(model.head.fc(ours[:, 0]).detach(), linear(weights, 'head', tokens[:, 0]))
    assert_close(model.head.aux_fc(ours[:, 1:]).detach(), linear(weights, 'aux_head', tokens[:, 1:]))
    assert logits_of(model, images).shape == (2, CLASSES)


@pytest.mark.parametrize('kind, make, options, types', [
    ('cfvit', lambda: authors_cfvit('deit', 7), dict(coarse_size=7, patch_size=4),
     ('mmdyn.CoarseToFineClassifier', 'mmdyn.CFViT', 'LinearClsHead')),
    ('cfvit', lambda: authors_cfvit('lvvit', 9), dict(coarse_size=9, patch_size=4),
     ('mmdyn.CoarseToFineClassifier', 'mmdyn.CFViT', 'mmdyn.LVViTHead')),
    ('lvvit', lambda: authors_plain('lvvit', pos_embed=24), dict(img_size=96, patch_size=4),
     ('ImageClassifier', 'mmdyn.LVViT', 'mmdyn.LVViTHead')),
    ('deit', lambda: authors_plain('deit', pos_embed=24), dict(img_size=96, patch_size=4),
     ('ImageClassifier', 'mmdyn.DeiT', 'LinearClsHead')),
], ids=['cfvit-deit', 'cfvit-lvvit', 'lvvit', 'deit'])
def test_classifier_that_the_names_tell_of(tool, kind, make, options, types):
    model = tool.infer_model(kind, tool.translate(kind, make())[0], {})
    assert (model['type'], model['backbone']['type'], model['head']['type']) == types
    assert {name: model['backbone'][name] for name in options} == options
    assert model['head']['num_classes'] == CLASSES and model['backbone']['arch']['depth'] == 5


@pytest.mark.parametrize('family', ['deit', 'lvvit'])
@pytest.mark.parametrize('source, side', [('authors', 14), ('authors', 10), ('dense', 14), ('dynamic', 16)])
def test_plain_checkpoints_start_cfvit(tool, tmp_path, randomise, family, source, side):
    if source == 'authors':
        path = convert(tool, tmp_path, family, authors_plain(family, pos_embed=side))
    else:
        path, dge = tmp_path / 'own.pth', dict(granularities=(1, 2)) if source == 'dynamic' else None
        model = randomise(classifier(plain(family, side, dge=dge), HEADS[family]))
        torch.save(dict(state_dict=model.state_dict()), path)
    given = torch.load(path)['state_dict']
    model = classifier(two_stages(family, 7), HEADS[family])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_checkpoint(model, str(path), map_location='cpu', strict=True)

    for name, value in model.state_dict().items():
        if name.startswith('backbone.reuse.'):
            assert value.equal(before[name])
        elif not name.endswith('pos_embed') or name == 'backbone.pos_embed' and side == 14:
            assert value.equal(given[name])
    fine, coarse = model.backbone.pos_embed, model.backbone.coarse_pos_embed
    assert fine.shape == (1, 197, 32) and fine[:, 0].equal(given['backbone.pos_embed'][:, 0])
    # Half the side between cells is the mean of four.
    cells = fine[0, 1:].unflatten(0, (7, 2, 7, 2)).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(coarse[0], torch.cat([fine[0, :1], cells]), rtol=0, atol=1e-6)

    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    backbone = MODELS.build(two_stages(family, 7, init_cfg=init_cfg))
    backbone.init_weights()
    assert backbone.coarse_pos_embed.equal(coarse) and backbone.blocks[4].ffn.fc2.weight.equal(
        given['backbone.blocks.4.ffn.fc2.weight'])


@pytest.mark.parametrize('family', ['deit', 'lvvit'])
def test_cfvit_that_splits_everything_is_the_plain_model(tool, tmp_path, family):
    images = torch.randn(2, 3, 56, 56)
    path = convert(tool, tmp_path, family, authors_plain(family, pos_embed=14))
    ours = logits_of(loaded(path, two_stages(family, 7, alpha=1, reuse=None), HEADS[family]), images)[1]
    assert_close(ours, logits_of(loaded(path, plain(family, 14), HEADS[family]), images))


@pytest.mark.parametrize('name, missing', [
    ('pos_embed_list.0', 'backbone.coarse_pos_embed'),
    ('pos_embed_list.1', 'backbone.pos_embed'),
    ('reuse_block.0.weight', 'backbone.reuse.norm.weight'),
    ('reuse_block.1.fc2.bias', 'backbone.reuse.mlp.fc2.bias'),
    ('blocks.2.attn.qkv.weight', 'backbone.blocks.2.attn.kv.weight'),
    ('patch_embed.bn3.running_var', 'backbone.patch_embed.convs.7.running_var'),
    ('aux_head.weight', 'head.aux_fc.weight'),
])
def test_missing_tensor_of_cfvit(tool, tmp_path, name, missing):
    weights = authors_cfvit('lvvit', 9)
    del weights[name]
    with pytest.raises(ValueError, match=f'{missing}: in the model, but not in SRC'):
        convert(tool, tmp_path, 'cfvit', weights)


@pytest.mark.parametrize('wrap', [
    lambda weights: dict(model=weights, args=argparse.Namespace(lr=0.1), epoch=1),
    lambda weights: dict(state_dict=weights),
    lambda weights: dict(state_dict={'other': torch.ones(1)}, state_dict_ema=weights),
    lambda weights: dict(state_dict_ema=None, model={f'module.{name}': value for name, value in weights.items()}),
    lambda weights: {name: torch.nn.Parameter(value) for name, value in weights.items()},
], ids=['model', 'state_dict', 'average first', 'module', 'parameters'])
def test_wrappers(tool, tmp_path, wrap):
    weights = authors_deit()
    bare = torch.load(convert(tool, tmp_path, 'vtpack', weights))['state_dict']
    wrapped = torch.load(convert(tool, tmp_path, 'vtpack', wrap(weights)))['state_dict']
    assert list(wrapped) == list(bare)
    assert all(wrapped[name].equal(bare[name]) and not wrapped[name].requires_grad for name in bare)


def test_init_cfg_loads_what_load_from_loads(tool, tmp_path, images):
    path = convert(tool, tmp_path, 'pvt', authors_pvt())
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    backbone = MODELS.build(dict(PYRAMID, init_cfg=init_cfg))
    backbone.init_weights()
    assert logits_of(backbone, images)[0].equal(logits_of(loaded(path, PYRAMID).backbone, images)[0])


def test_unexpected_tensor(tool, tmp_path, capsys):
    weights = {**authors_pvt(), 'block1.0.gamma': torch.ones(8)}
    with pytest.raises(ValueError, match=r'block1\.0\.gamma: in SRC, but not in the model'):
        convert(tool, tmp_path, 'pvt', weights)
    assert not (tmp_path / 'dst.pth').exists()
    loaded(convert(tool, tmp_path, 'pvt', weights, allow_partial=True), PYRAMID)
    tensors_kept, size = len(weights) - 1, sum(value.numel() for value in weights.values()) - 8
    out = capsys.readouterr().out
    assert f'left out: block1.0.gamma\n{tmp_path / "dst.pth"}: {tensors_kept} tensors converted, 1 left out' in out
    assert f', {size:,} parameters\n' in out


@pytest.mark.parametrize('name, missing', [
    ('block1.1.mlp.fc1.weight', 'stages.0.blocks.1.ffn.fc1.weight'),
    ('block3.0.attn.sr.weight', 'stages.2.blocks.0.attn.sr.weight'),
    ('block3.0.dge.router.gate.bias', 'stages.2.dge.0.router.bias'),
    ('block1.0.dge.splits', 'stages.0.dge.0.router.weight'),
    ('patch_embed1.proj.weight', 'stages.0.patch_embed.proj.weight'),
    ('pos_embed1', 'stages.0.pos_embed'),
    ('cls_token', 'backbone.cls_token'),
    ('head.weight', 'head.fc.weight'),
])
def test_missing_tensor(tool, tmp_path, name, missing):
    weights = authors_pvt(FINE_TO_COARSE)
    del weights[name]
    with pytest.raises(ValueError, match=f'{missing}: in the model, but not in SRC'):
        convert(tool, tmp_path, 'vtpack', weights)
    state = torch.load(convert(tool, tmp_path, 'vtpack', weights, allow_partial=True))['state_dict']
    assert not any(name.endswith(missing) for name in state) and len(state) > 80


@pytest.mark.parametrize('kind, weights', [
    ('deit', lambda: authors_pvt()),
    ('mmdet-pvt', lambda: authors_deit()),
    ('mmpretrain-deit', lambda: authors_deit()),
    ('pvt', lambda: authors_pvt(FINE_TO_COARSE)),
    ('vtpack', lambda: {'layer1.0.conv1.weight': torch.ones(8, 8, 3, 3)}),
    ('deit', lambda: authors_plain('lvvit', pos_embed=14)),
    ('deit', lambda: authors_cfvit('deit', 7)),
    ('lvvit', lambda: authors_plain('deit', pos_embed=14)),
    ('lvvit', lambda: authors_cfvit('lvvit', 7)),
    ('cfvit', lambda: authors_plain('lvvit', pos_embed=14)),
    ('cfvit', lambda: authors_pvt()),
])
def test_other_kinds(tool, tmp_path, kind, weights):
    with pytest.raises(ValueError, match='KIND'):
        convert(tool, tmp_path, kind, weights())


def test_tensors_of_one_checkpoint_agree(tool, tmp_path):
    weights = authors_pvt()
    weights['pos_embed2'] = torch.ones(1, 49, 16)
    with pytest.raises(ValueError, match=r'stages\.1\.pos_embed: \(1, 49, 16\) in SRC, \(1, 64, 16\) in the model'):
        convert(tool, tmp_path, 'pvt', weights, allow_partial=True)
    with pytest.raises(ValueError, match=r'0\.ffn\.fc1\.weight and block1\.0\.mlp\.fc1\.weight are both'):
        convert(tool, tmp_path, 'pvt', {'block1.0.mlp.fc1.weight': torch.ones(2, 2),
                                        'block1.0.ffn.fc1.weight': torch.ones(2, 2)})


@pytest.mark.parametrize('splits, message', [
    ([4, 3, 1], r'blocks\.0\.dge\.splits is \[4, 3, 1\], but has to be'),
    ([4, 4, 1], r'blocks\.0\.dge\.splits is \[4, 4, 1\], but has to be'),
    ([4, 2, 0], r'blocks\.0\.dge\.splits is \[4, 2, 0\], but has to be'),
    ([2, 1], r'router\.gate\.(weight|bias) has 3 rows'),
    ([8, 2, 1], r"dge\.0: .*\(1, 4, 8\).* in SRC, .*dge\.1: .*\(1, 2, 4\).* in SRC|"
                r"dge\.1: .*\(1, 2, 4\).* in SRC, .*\(1, 4, 8\)"),
])
def test_splits_that_no_model_has(tool, tmp_path, splits, message):
    weights = authors_deit((4, 2, 1))
    weights['blocks.0.dge.splits'] = torch.tensor(splits)
    with pytest.raises(ValueError, match=message):
        convert(tool, tmp_path, 'vtpack', weights, allow_partial=True)


def test_config_that_fits(tool, tmp_path, capsys):
    backbone = dict(PYRAMID, dge=dict(granularities=((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2))))
    weights = authors_pvt(FINE_TO_COARSE)
    size = sum(value.numel() for name, value in weights.items() if 'splits' not in name)
    for img_size in (SIDE, 96):
        config = write_config(tmp_path / 'config.py', dict(backbone, img_size=img_size))
        path = convert(tool, tmp_path, 'vtpack', weights, config=config)
        assert capsys.readouterr().out.splitlines()[-1] == (
            f'{path}: {len(weights)} tensors converted, 0 left out, {size:,} parameters')
    assert torch.load(path)['state_dict']['backbone.stages.0.pos_embed'].shape == (1, 256, 8)


def test_config_of_another_architecture(tool, tmp_path):
    arch = dict(PVT, embed_dims=(8, 16, 24, 40), depths=(2, 2, 1, 2))
    config = write_config(tmp_path / 'config.py', dict(PYRAMID, arch=arch), dict(LINEAR, in_channels=40))
    with pytest.raises(ValueError, match='in the model') as error:
        convert(tool, tmp_path, 'pvt', authors_pvt(), config=config)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert 'head.fc.weight: (5, 32) in SRC, (5, 40) in the model' in lines
    assert 'backbone.stages.3.blocks.1.attn.kv.weight: (64, 32) in SRC, (80, 40) in the model' in lines
    assert 'backbone.stages.3.pos_embed: (1, 5, 32) in SRC, (1, 5, 40) in the model' in lines
    assert 'backbone.stages.1.blocks.1.attn.q.weight: in the model, but not in SRC' in lines
    with pytest.raises(ValueError, match='attn.kv.weight'):
        convert(tool, tmp_path, 'pvt', authors_pvt(), config=config, allow_partial=True)


def test_config_of_other_granularities(tool, tmp_path):
    config = write_config(tmp_path / 'config.py', dict(PLAIN, dge=dict(granularities=(1, 2, 4))))
    with pytest.raises(ValueError, match=r'dge\.0: .*\(1, 4, 8\).* in SRC, .*\(1, 2, 4\).* in the model'):
        convert(tool, tmp_path, 'vtpack', authors_deit((8, 2, 1)), config=config)


def test_nothing_to_convert(tool, tmp_path):
    config = write_config(tmp_path / 'config.py', PLAIN)
    with pytest.raises(ValueError, match='layer1.weight: in SRC, but not in the model'):
        convert(tool, tmp_path, 'deit', {'layer1.weight': torch.ones(8)}, config=config, allow_partial=True)
    with pytest.raises(ValueError, match=r'stages\.0\.blocks\.0\.\*: only in the model'):
        convert(tool, tmp_path, 'deit', authors_deit(), allow_partial=True,
                config=write_config(tmp_path / 'other.py', PYRAMID))


def test_from_dynamic_to_dense_and_back(tool, tmp_path, capsys):
    dense = write_config(tmp_path / 'dense.py', PLAIN)
    dynamic = write_config(tmp_path / 'dynamic.py', dict(PLAIN, dge=dict(granularities=(1, 2, 4))))
    with pytest.raises(ValueError, match=r'blocks\.1\.dge\.splits: in SRC, but not in the model'):
        convert(tool, tmp_path, 'vtpack', authors_deit((4, 2, 1)), config=dense)
    convert(tool, tmp_path, 'vtpack', authors_deit((4, 2, 1)), config=dense, allow_partial=True)
    assert ' 6 left out, ' in capsys.readouterr().out
    with pytest.raises(ValueError, match=r'dge\.1\.router\.bias: in the model, but not in SRC'):
        convert(tool, tmp_path, 'vtpack', authors_deit(), config=dynamic)
    convert(tool, tmp_path, 'vtpack', authors_deit(), config=dynamic, allow_partial=True)


def test_config_of_a_detector(tool, tmp_path, capsys):
    detector = dict(
        type='RetinaNet',
        backbone=dict(PYRAMID, out_type='featmap'),
        neck=dict(type='FPN', in_channels=list(PVT['embed_dims']), out_channels=8, num_outs=5),
        bbox_head=dict(
            type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8,
            anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.], strides=[4, 8, 16, 32, 64]),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder')))
    Config(dict(model=detector, default_scope='mmdet')).dump(tmp_path / 'detector.py')
    convert(tool, tmp_path, 'mmdet-pvt', in_mmdet().state_dict(), config=str(tmp_path / 'detector.py'))
    assert ' 0 left out, ' in capsys.readouterr().out


class Unsafe:

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path, )


def test_files_that_are_no_checkpoints(tool, tmp_path):
    victim = tmp_path / 'victim'
    with pytest.raises(ValueError, match='safe loader.*mkdir'):
        convert(tool, tmp_path, 'vtpack', dict(model=authors_deit(), extra=Unsafe(str(victim))))
    assert not victim.exists()
    for content in ({}, [torch.ones(1)], dict(model=dict(weight=1.)), {1: torch.ones(1)}):
        with pytest.raises(ValueError, match='no dict of tensors'):
            convert(tool, tmp_path, 'vtpack', content)
    for content in (b'', b'hello', b'<html>'):
        (tmp_path / 'broken.pth').write_bytes(content)
        with pytest.raises(ValueError, match='broken.pth'):
            tool.load_weights(tmp_path / 'broken.pth')
    with pytest.raises(ValueError, match='There is no file'):
        tool.load_weights(tmp_path / 'nothing.pth')
    with pytest.raises(ValueError, match='Unknown kind'):
        convert(tool, tmp_path, 'vtpcak', authors_deit())


def test_config_and_destination(tool, tmp_path):
    weights = authors_deit()
    (tmp_path / 'empty.py').write_text('')
    with pytest.raises(ValueError, match='has no model'):
        convert(tool, tmp_path, 'vtpack', weights, config=str(tmp_path / 'empty.py'))
    with pytest.raises(ValueError, match='There is no config'):
        convert(tool, tmp_path, 'vtpack', weights, config=str(tmp_path / 'nothing.py'))
    with pytest.raises(ValueError, match='another name'):
        tool.convert('vtpack', tmp_path / 'src.pth', tmp_path / '.' / 'src.pth')


def test_command_line(tool, tmp_path, capsys):
    weights = authors_deit()
    weights['extra'] = torch.ones(1)
    src, dst = tmp_path / 'src.pth', tmp_path / 'new/folder/dst.pth'
    torch.save(weights, src)
    with pytest.raises(SystemExit) as exit:
        tool.main(['vtpack', str(src), str(dst)])
    # An exit with a text prints it and returns 1.
    assert exit.value.code.startswith('error: ') and 'extra' in exit.value.code and not dst.exists()
    tool.main(['vtpack', str(src), str(dst), '--allow-partial', '--config', write_config(tmp_path / 'c.py', PLAIN)])
    assert torch.load(dst)['meta'] == dict(mmdyn_version=mmdyn.__version__, kind='vtpack', source='src.pth',
                                           granularities={}, region_sizes={})
    assert '1 left out' in capsys.readouterr().out
