import copy
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.evaluation import DynamicFLOPs
from mmdyn.models import CFViT
from mmdyn.models.layers import EncoderBlock, packed_attention, project_patches
from mmdyn.models.stage import run_blocks

FAMILIES = ['deit', 'lvvit']
PLAIN = dict(embed_dim=16, depth=6, num_heads=2, mlp_ratio=2)
REUSES = ['mlp', 'linear', 'class_token', 'uninformative', None]


def images_of(model, batch=2, dtype=torch.double):
    return torch.randn(batch, 3, model.side, model.side, dtype=dtype)


def assert_equals(model, images, slow, count, **options):
    """Both outputs, the score's order and the regions are those of the slow model, which takes one image at a time."""
    coarse = model.coarse(images)
    tokens, chosen = model.fine(images, coarse)
    outputs = model(images)
    for i, image in enumerate(images):
        expected = slow(model, image, count, **options)
        assert chosen[i].tolist() == expected.chosen
        torch.testing.assert_close(outputs[0][i], expected.coarse, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(outputs[1][i], expected.fine, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(model.output(tokens)[i], expected.fine, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('reuse', REUSES)
@torch.no_grad()
def test_both_stages_equal_a_slow_model(family, reuse, make_cfvit, slow_cfvit):
    model = make_cfvit(family, reuse=reuse, out_type='raw')
    assert_equals(model, images_of(model), slow_cfvit, 5, reuse=reuse)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('score', ['global', 'last', 'negative'])
@pytest.mark.parametrize('coarse_size, alpha, count', [(3, 0.3, 3), (4, 0.5, 8), (4, 0.6, 10)])
@torch.no_grad()
def test_each_score_chooses_as_a_slow_model(family, score, coarse_size, alpha, count, make_cfvit, slow_cfvit):
    model = make_cfvit(family, score=score, coarse_size=coarse_size, alpha=alpha, reuse=None, out_type='raw')
    assert_equals(model, images_of(model), slow_cfvit, count, columns=coarse_size, score=score, reuse=None)


@pytest.mark.parametrize('alpha, count', [(0, 0), (1, 9)])
@pytest.mark.parametrize('start, decay', [(1, 0.5), (6, 0.0), (2, 1 - 1e-3)])
@torch.no_grad()
def test_ends_of_alpha_and_other_averages(alpha, count, start, decay, make_cfvit, slow_cfvit):
    model = make_cfvit(alpha=alpha, ema_start=start, ema_decay=decay, reuse=None, out_type='raw')
    assert_equals(model, images_of(model), slow_cfvit, count, reuse=None, start=start, decay=decay)


@pytest.mark.parametrize('patch', [2, 6])
@torch.no_grad()
def test_other_sides_of_a_patch(patch, make_cfvit, slow_cfvit):
    model = make_cfvit('lvvit', patch_size=patch, reuse=None)
    assert model.side == 6 * patch
    assert_equals(model, images_of(model), slow_cfvit, 5, side=patch, reuse=None)


@pytest.mark.parametrize('ema_start', [1, 4, 6])
@torch.no_grad()
def test_global_class_attention_starts_from_zero(ema_start, make_cfvit, slow_cfvit):
    """From block 4 to 6 with 0.9, none of it goes to a block before: the sum of the weights is 1 - 0.9^3."""
    model = make_cfvit(ema_start=ema_start, ema_decay=0.9)
    images = images_of(model)
    score = model.coarse(images).score
    for image, row in zip(images, score):
        expected = slow_cfvit(model, image, 5, start=ema_start, decay=0.9).attention
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-7)
    assert (score.sum(1) < 1 - 0.9 ** (7 - ema_start)).all()  # the class token has its own share
    negative = make_cfvit(ema_start=ema_start, ema_decay=0.9, score='negative')
    negative.load_state_dict(model.state_dict())
    assert torch.equal(negative.coarse(images).score, -score)


@torch.no_grad()
def test_random_score_chooses_each_patch_as_often(make_cfvit, slow_cfvit):
    """Of 9 patches 5; the tokens are those of the chosen ones. Images of a batch differ."""
    model = make_cfvit(score='random', reuse=None)
    images = images_of(model, 1)
    coarse = model.coarse(images)
    tokens, chosen = model.fine(images, coarse)
    expected = slow_cfvit(model, images[0], 5, reuse=None, chosen=chosen[0].tolist())
    torch.testing.assert_close(model.output(tokens), expected.fine[None, 0], rtol=1e-8, atol=1e-8)
    images, model.blocks = images.expand(2000, -1, -1, -1), model.blocks[:1]
    chosen = model.fine(images, model.coarse(images))[1]
    counts = torch.bincount(chosen.flatten(), minlength=9)
    # 5 standard deviations of a binomial of 2000 draws.
    assert (counts - 2000 * 5 / 9).abs().max() < 5 * (2000 * 5 / 9 * 4 / 9) ** 0.5
    assert len({tuple(row) for row in chosen.tolist()}) > 100  # of 126 sets


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
    'coarse_size, alpha, lengths',
    [(7, 0.5, (50, 125)), (9, 0.5, (82, 205)), (7, 0.4, (50, 110)), (7, 1, (50, 197)), (7, 0, (50, 50))],
)
@torch.no_grad()
def test_token_counts_are_those_of_the_paper(family, coarse_size, alpha, lengths):
    """Nc = 49 gives Nf = 124 and Nc = 81 gives 204, each with a class token; LV-ViT returns all tokens."""
    arch = dict(family=family, embed_dim=8, depth=4, num_heads=2, mlp_ratio=2)
    model = CFViT(arch, coarse_size, alpha=alpha).eval()
    assert model.side == 32 * coarse_size
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    outputs = model(torch.randn(1, 3, model.side, model.side))
    assert tuple(seen) == lengths
    if family == 'lvvit':
        assert tuple(output.shape for output in outputs) == tuple((1, length, 8) for length in lengths)
    else:
        assert tuple(output.shape for output in outputs) == ((1, 8), (1, 8))


def plain_of(model, family, make_backbone, side, pos_embed):
    """The plain model with the weights of a CF-ViT and one of its position embeddings."""
    plain = make_backbone(family, img_size=side, arch=PLAIN, out_type='cls_token').double().eval()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(('reuse.', 'coarse_pos'))}
    plain.load_state_dict({**state, 'pos_embed': pos_embed})
    return plain


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_stages_are_the_plain_model(family, make_cfvit, make_backbone):
    """The coarse one on the smaller image, and the fine one if it splits all patches, as attention knows no order."""
    model = make_cfvit(family, reuse=None, alpha=1, out_type='cls_token')
    images = images_of(model)
    half = interpolate(images, (12, 12), mode='bilinear', align_corners=True)
    coarse, fine = model(images)
    plain = plain_of(model, family, make_backbone, 12, model.coarse_pos_embed)
    torch.testing.assert_close(coarse, plain(half)[0], rtol=1e-8, atol=1e-8)
    plain = plain_of(model, family, make_backbone, 24, model.pos_embed)
    torch.testing.assert_close(fine, plain(images)[0], rtol=1e-8, atol=1e-8)


def test_split_all_counts_in_training_only(make_cfvit, slow_cfvit):
    model = make_cfvit(reuse=None)
    images = images_of(model)
    model.split_all = True
    for training, count in ((True, 9), (False, 5)):
        model.train(training)
        tokens, chosen = model.fine(images, model.coarse(images))
        assert tokens.shape[1] == 1 + 3 * count + 9 and chosen.shape[1] == count
        for image, output in zip(images, model.output(tokens)):
            expected = slow_cfvit(model, image, count, reuse=None).fine[0]
            torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-8)
    model.split_all = False
    assert model.train().fine(images, model.coarse(images))[1].shape[1] == 5


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_nor_on_earlier_ones(family, make_cfvit):
    model = make_cfvit(family)
    images = images_of(model, 4)
    together = model(images)
    alone = [torch.cat(outputs) for outputs in zip(*(model(image[None]) for image in images))]
    torch.testing.assert_close(together, tuple(alone), rtol=1e-8, atol=1e-8)
    assert all(map(torch.equal, together, model(images)))


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_threads_have_results_and_costs_of_their_own(family, make_cfvit):
    model = make_cfvit(family, out_type='cls_token').float()
    images = [images_of(model, 1 + i % 3, torch.float) for i in range(8)]

    @torch.no_grad()
    def run(x):
        coarse = model.coarse(x)
        spent = model.cost.spent
        tokens, chosen = model.fine(x, coarse)
        return model.output(coarse.tokens), model.output(tokens), chosen, spent, model.cost.spent

    expected, interval = list(map(run, images)), sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, images * 5))
    finally:
        sys.setswitchinterval(interval)
    torch.testing.assert_close(found, expected * 5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
    'options',
    [dict(reuse='class_token'), dict(reuse='uninformative', score='last'), dict(reuse=None, score='random')],
    ids=str,
)
@pytest.mark.parametrize('dtype', [torch.float, torch.double])
@pytest.mark.parametrize('training', [False, True])
def test_batches_without_images(family, options, dtype, training, make_cfvit):
    model = make_cfvit(family, **options).to(dtype).train(training)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            outputs, nothing = model(images_of(model, 1, dtype)), model(images_of(model, 0, dtype))
        assert [x.shape for x in nothing] == [(0, *x.shape[1:]) for x in outputs]
        assert model.cost.spent.shape == (0,)


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_builds_on_the_meta_device_and_takes_the_tensors_of_a_checkpoint(family, make_cfvit):
    model = make_cfvit(family)
    with torch.device('meta'):
        empty = CFViT(dict(PLAIN, family=family), 3, patch_size=4).eval()
    assert all(value.is_meta for value in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    images = images_of(model)
    assert all(map(torch.equal, empty(images), model(images)))


@pytest.mark.parametrize('family', FAMILIES)
def test_fake_tensors_leave_nothing_behind(family, make_cfvit):
    model = make_cfvit(family)
    images, twin = images_of(model), copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs = model(mode.from_tensor(images))
    assert [x.shape for x in outputs] == [x.shape for x in model(images)]
    assert all(map(torch.equal, model(images), twin(images)))


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_hooks_fire_on_each_module_that_a_user_can_name(family, make_cfvit):
    """In both stages, but for containers and for the reuse, which is of the fine stage alone."""
    model, called = make_cfvit(family).float(), []
    modules = {key: module for key, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    for key, module in modules.items():
        module.register_forward_hook(lambda module, args, output, key=key: called.append(key))
    model(images_of(model, dtype=torch.float))
    assert set(called) == set(modules)
    assert all(called.count(f'blocks.{i}.attn') == 2 for i in range(6)) and called.count('reuse.mlp') == 1


@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_kernels_change_nothing_but_the_speed(family, make_cfvit, monkeypatch):
    model = make_cfvit(family).float()
    images = images_of(model, 3, torch.float)
    found = model(images)
    for function in (run_blocks, project_patches, packed_attention):
        monkeypatch.setattr(function, 'kernels', [])
    torch.testing.assert_close(found, model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('family', FAMILIES)
def test_autocast_is_near_float32_and_trains(dtype, family, make_cfvit):
    """With the regions of float32: near ties may be chosen differently."""
    model = make_cfvit(family).float()
    images = images_of(model, dtype=torch.float)
    with torch.no_grad():
        exact = model.coarse(images)
        expected = model.output(exact.tokens), model.output(model.fine(images, exact)[0])
    with torch.autocast('cpu', dtype):
        coarse = model.coarse(images)
        fine, _ = model.fine(images, coarse._replace(score=exact.score))
        outputs = model.output(coarse.tokens), model.output(fine)
    assert coarse.score.dtype == torch.float32
    torch.testing.assert_close(coarse.score, exact.score, rtol=0.2, atol=1e-3)
    for output, wanted in zip(outputs, expected):
        assert (output - wanted).norm() < 64 * torch.finfo(dtype).eps * wanted.norm()
    sum(output.float().square().sum() for output in outputs).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('reuse', REUSES)
def test_all_weights_get_gradients(family, reuse, make_cfvit):
    model = make_cfvit(family, reuse=reuse, drop_path_rate=0.2).train()
    coarse, fine = model(images_of(model, 4))
    (coarse.square().sum() + fine.square().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]


def test_the_fine_stage_teaches_the_reuse_and_the_coarse_stage(make_cfvit):
    """Gradients go through the reused tokens into the coarse stage."""
    model = make_cfvit().train()
    fine = model(images_of(model))[1]
    fine.square().sum().backward()
    assert model.reuse.mlp.fc1.weight.grad.any() and model.coarse_pos_embed.grad[:, 0].any()


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('score', ['global', 'last', 'negative', 'random'])
def test_with_cp_recomputes_blocks_and_changes_no_gradient(family, score, make_cfvit):
    results, runs = [], []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = make_cfvit(family, score=score, drop_path_rate=0.3, with_cp=with_cp).train()
        calls = []
        for block in model.blocks:
            block.norm2.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        images = images_of(model, 3)
        coarse, fine = model(images)
        (coarse.square().sum() + fine.square().sum()).backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
        runs.append(len(calls))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert runs == [12, 24]


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
    'frozen_stages, prefixes',
    [
        (-1, ()),
        (0, ('patch_embed', 'pos_embed', 'coarse_pos_embed', 'cls_token')),
        (2, ('patch_embed', 'pos_embed', 'coarse_pos_embed', 'cls_token', 'blocks.0.', 'blocks.1.')),
        (6, ('patch_embed', 'pos_embed', 'coarse_pos_embed', 'cls_token', 'blocks.', 'norm')),
    ],
)
def test_frozen_parts_get_no_gradient_and_stay_in_evaluation_mode(family, frozen_stages, prefixes, make_cfvit):
    model = make_cfvit(family, frozen_stages=frozen_stages).train()
    modules = {
        name: module for name, module in model.named_modules() if not isinstance(module, (nn.ModuleList, type(model)))
    }
    assert {name for name, module in modules.items() if module.training} == {
        name for name in modules if not f'{name}.'.startswith(prefixes)
    }
    trainable = {name for name, _ in model.named_parameters() if not name.startswith(prefixes)}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    statistics = copy.deepcopy(dict(model.patch_embed.named_buffers()))
    coarse, fine = model(images_of(model))
    (coarse.square().sum() + fine.square().sum()).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable
    if frozen_stages >= 0:
        assert all(torch.equal(value, statistics[name]) for name, value in model.patch_embed.named_buffers())


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('img_size', [24, 48])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_plain_model_starts_both_stages(family, img_size, prefix, make_backbone, make_cfvit, randomise):
    """Strictly; both position embeddings are resized, the feature reuse is new."""
    state = randomise(make_backbone(family, img_size=img_size, arch=PLAIN)).double().state_dict()
    model = make_cfvit(family)
    before = copy.deepcopy(model.state_dict())
    owner = nn.ModuleDict(dict(backbone=model)) if prefix else model
    owner.load_state_dict({prefix + name: value for name, value in state.items()})
    maps = state['pos_embed'][:, 1:].transpose(1, 2).unflatten(2, (img_size // 4,) * 2)

    def resized(side):
        cells = interpolate(maps, (side, side), mode='bilinear', align_corners=False).flatten(2).transpose(1, 2)
        return torch.cat([state['pos_embed'][:, :1], cells], 1)

    for name, value in model.state_dict().items():
        if name.startswith('reuse.'):
            assert torch.equal(value, before[name])
        elif name == 'pos_embed':
            torch.testing.assert_close(value, resized(6), rtol=1e-12, atol=1e-12)
        elif name == 'coarse_pos_embed':
            # The fine embedding comes first: that of another size is resized twice.
            twice = model.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
            twice = interpolate(twice, (3, 3), mode='bilinear', align_corners=False).flatten(2).transpose(1, 2)
            torch.testing.assert_close(value[:, 1:], twice, rtol=1e-12, atol=1e-12)
            assert torch.equal(value[:, :1], state['pos_embed'][:, :1])
        else:
            assert torch.equal(value, state[name])


def test_distilled_and_dynamic_models_start_it_too(make_backbone, make_cfvit, randomise):
    plain = randomise(make_backbone('deit', img_size=24, arch=PLAIN, distilled=True, dge=dict(granularities=(1, 2))))
    model = make_cfvit()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.blocks[5].ffn.fc1.weight, plain.blocks[5].ffn.fc1.weight.double())
    assert torch.equal(model.pos_embed[:, 0], plain.pos_embed[:, 0].double())
    assert torch.equal(model.pos_embed[:, 1:], plain.pos_embed[:, 2:].double())


def test_plain_checkpoint_of_another_architecture(make_backbone, make_cfvit):
    state = make_backbone('deit', img_size=24).state_dict()
    with pytest.raises(ValueError, match='(?s)of another architecture than this CFViT.*blocks.5.*only in the model'):
        make_cfvit().load_state_dict(state)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('reuse', REUSES)
def test_checkpoints_of_its_own_load_strictly(family, reuse, make_cfvit, tmp_path):
    model, other = (make_cfvit(family, reuse=reuse) for _ in range(2))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    load_checkpoint(other, str(tmp_path / 'model.pth'), strict=True)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    images = images_of(model)
    assert all(map(torch.equal, model(images), other(images)))


@pytest.mark.parametrize('family', FAMILIES)
def test_checkpoint_of_another_coarse_size_gets_both_position_embeddings_resized(family, make_cfvit):
    """As between the paper's models on 7 x 7 and 9 x 9 patches."""
    saved, model = make_cfvit(family, coarse_size=5).state_dict(), make_cfvit(family)
    model.load_state_dict(saved)
    for name, source, target in (('pos_embed', 10, 6), ('coarse_pos_embed', 5, 3)):
        maps = saved[name][:, 1:].transpose(1, 2).unflatten(2, (source, source))
        cells = interpolate(maps, (target, target), mode='bilinear', align_corners=False).flatten(2).transpose(1, 2)
        expected = torch.cat([saved[name][:, :1], cells], 1)
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-12, atol=1e-12)
    others = [name for name in saved if not name.endswith('pos_embed')]
    assert all(torch.equal(model.state_dict()[name], saved[name]) for name in others)


def test_missing_tensors_of_its_own_are_still_reported(make_cfvit):
    model = make_cfvit()
    state = model.state_dict()
    del state['reuse.norm.weight']
    with pytest.raises(RuntimeError, match='(?s)Missing key.*reuse.norm.weight'):
        model.load_state_dict(state)


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
    'options',
    [
        *(dict(reuse=reuse) for reuse in REUSES),
        *(dict(score=score) for score in ('last', 'random', 'negative')),
        dict(ema_start=1),
        dict(alpha=0),
        dict(alpha=0.6),
        dict(coarse_size=4),
    ],
    ids=str,
)
@torch.no_grad()
def test_stage_macs_are_what_the_librarys_counter_sees(family, options, make_cfvit, monkeypatch):
    """A multiply-add is two operations. Attention is made of matrix products: the counter does not know all kernels."""
    monkeypatch.setattr(
        nn.functional,
        'scaled_dot_product_attention',
        lambda query, key, value: (query @ key.transpose(-2, -1)).softmax(-1) @ value,
    )
    model = make_cfvit(family, **options)
    images, stages = images_of(model, 3), []
    with FlopCounterMode(display=False) as counter:
        coarse = model.coarse(images)
    stages.append(counter.get_total_flops() / 2 / 3)
    assert model.cost.spent.tolist() == [stages[0]] * 3 and model.cost.dense == stages[0]
    with FlopCounterMode(display=False) as counter:
        model.fine(images, coarse)
    stages.append(counter.get_total_flops() / 2 / 3)
    assert model.stage_macs() == tuple(stages)
    assert model.cost.spent.tolist() == [stages[1]] * 3 and model.cost.dense == stages[1]


def deit_small_macs(tokens):
    """Patches are counted by the caller."""
    return 12 * (tokens * (4 * 384**2 + 2 * 4 * 384**2) + 2 * tokens**2 * 384)


@pytest.mark.parametrize(
    'alpha, count, in_paper',
    [(0.4, 20, 3.7), (0.5, 25, 4.0), (0.6, 30, 4.4), (0.7, 35, 4.7), (0.8, 40, 5.1), (0.9, 45, 5.5)],
)
def test_multiply_adds_of_deit_small_by_hand(alpha, count, in_paper):
    """Table 6 of the paper, which rounds and counts the classifiers; table 1 has 1.10G for the coarse stage alone."""
    coarse, fine = CFViT('deit-small', alpha=alpha).stage_macs()
    patch, reuse = 3 * 16 * 16 * 384, 2 * 4 * 384**2
    attention = 9 * 50 * 384  # one more row of scores for the class attention of blocks 4 to 12
    assert coarse == 49 * patch + deit_small_macs(50) + attention
    assert fine == 196 * patch + 49 * reuse + deit_small_macs(1 + 4 * count + 49 - count)
    assert abs((coarse + fine + 2 * 384 * 1000) / 1e9 - in_paper) < 0.06
    assert abs(coarse / 1e9 - 1.1) < 0.05


def test_multiply_adds_of_lvvit_small_by_hand():
    """Table 2 of the paper has 6.1G for both stages."""
    coarse, fine = CFViT('lvvit-small').stage_macs()

    def stem(side):
        return (8 * side) ** 2 * 64 * (3 * 49 + 2 * 64 * 9) + side**2 * 384 * 64 * 64

    def blocks(tokens):
        return 16 * (tokens * (4 * 384**2 + 2 * 3 * 384**2) + 2 * tokens**2 * 384)

    assert coarse == stem(7) + blocks(50) + 13 * 50 * 384
    assert fine == stem(14) + 49 * 2 * 3 * 384**2 + blocks(125)
    assert abs((coarse + fine + 175 * 384 * 1000) / 1e9 - 6.1) < 0.06


def test_split_all_costs_what_it_runs(make_cfvit):
    """stage_macs is that of inference."""
    model = make_cfvit(alpha=0.5).train()
    macs = model.stage_macs()
    model.split_all = True
    images = images_of(model)
    model.fine(images, model.coarse(images))
    everything = make_cfvit(alpha=1.0).stage_macs()
    assert model.cost.dense == everything[1] > macs[1] and model.stage_macs() == macs


@torch.no_grad()
def test_flops_metric_averages_over_images_of_which_some_stop(make_cfvit):
    """Of 4 images 1 goes on, then none of 2, then both of 2: 8 coarse passes and 3 fine ones."""
    model, metric = make_cfvit(), DynamicFLOPs()
    for batch, goes_on in ((4, 1), (2, 0), (2, 2)):
        images = images_of(model, batch)
        coarse = model.coarse(images)
        if goes_on:
            model.fine(images[:goes_on], type(coarse)(*(part[:goes_on] for part in coarse)))
        metric.process(None, [{}] * batch)
    coarse, fine = model.stage_macs()
    result = metric.evaluate(8)
    assert result['flops/gflops'] == pytest.approx((8 * coarse + 3 * fine) / 8 / 1e9)
    assert result['flops/query_ratio'] == 1


def test_cost_before_any_forward_pass(make_cfvit):
    with pytest.raises(ValueError, match='CFViT has not run yet: call it on images before you ask for its cost'):
        make_cfvit().cost
    assert not hasattr(make_cfvit(), 'cost')


@pytest.mark.parametrize('arch', ['deit-tiny', 'deit-small', 'deit-base', 'lvvit-small', 'lvvit-medium'])
def test_named_archs_are_the_plain_ones_and_a_little_more(arch):
    """A second position embedding, and an MLP with a norm."""
    family, name = arch.split('-')
    model = CFViT(arch)
    plain = MODELS.build(dict(type=f'mmdyn.{dict(deit="DeiT", lvvit="LVViT")[family]}', arch=name, img_size=224))
    dim, ratio = plain.pos_embed.shape[2], 4 if family == 'deit' else 3
    more = 50 * dim + 2 * dim + 2 * ratio * dim**2 + ratio * dim + dim
    count = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, plain)]
    assert count[0] - count[1] == more
    assert set(plain.state_dict()) < set(model.state_dict())


@pytest.mark.parametrize('dim, mlp_ratio', [(192, 4), (240, 2.7), (56, 1.1), (184, 4.4)])
def test_reuse_has_as_many_hidden_channels_as_the_blocks(dim, mlp_ratio):
    model = CFViT(dict(family='deit', embed_dim=dim, depth=4, num_heads=2, mlp_ratio=mlp_ratio), 2, patch_size=2)
    assert model.reuse.mlp.fc1.out_features == model.blocks[0].ffn.fc1.out_features


def test_stochastic_depth_and_blocks(make_cfvit):
    model = make_cfvit(drop_path_rate=0.5)
    rates = [block.drop_path_rate for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert len([module for module in model.modules() if isinstance(module, EncoderBlock)]) == 6


@pytest.mark.parametrize('side', [(20, 24), (12, 12), (48, 48)])
def test_image_must_fit_the_coarse_size(side, make_cfvit):
    message = f'Images of {side[0]} x {side[1]} do not fit coarse_size=3: resize or crop them to 24 x 24'
    with pytest.raises(ValueError, match=message):
        make_cfvit()(torch.randn(1, 3, *side, dtype=torch.double))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(img_size=32), 'img_size=32 does not fit coarse_size=3: twice 3 patches of 4 pixels are 24. Write im'),
        (dict(alpha=-0.1), 'alpha=-0.1: give a number in [0, 1]'),
        (dict(alpha=1.5), 'alpha=1.5: give a number in [0, 1]'),
        (dict(ema_decay=1.5), 'ema_decay=1.5: give a number in [0, 1]'),
        (dict(alpha=float('nan')), 'alpha=nan: give a number in [0, 1]'),
        (dict(score='best'), "score='best': choose from ('global', 'last', 'random', 'negative')"),
        (dict(reuse='none'), "reuse='none': choose from ('mlp', 'linear', 'class_token', 'uninformative', None)"),
        (dict(out_type='featmap'), "out_type='featmap': choose 'cls_token' or 'raw'; a fine sequence is no map"),
        (dict(ema_start=0), 'ema_start=0: choose a block from 1 to 6'),
        (dict(ema_start=7), 'ema_start=7: choose a block from 1 to 6'),
        (
            dict(arch='small'),
            "Unknown arch 'small': choose from ['deit-base', 'deit-small', 'deit-tiny', 'lvvit-medium', ",
        ),
        (dict(arch=dict(family='swin')), "arch has family='swin': choose from ('deit', 'lvvit')"),
        (dict(arch=PLAIN), 'arch has family=None: choose from ('),
        (
            dict(arch=dict(family='deit', depth=4)),
            "arch has the keys ['depth'], but needs exactly ['depth', 'embed_dim', ",
        ),
        (dict(frozen_stages=7), 'frozen_stages=7: choose from -1 (none) to 6'),
        (dict(arch=dict(PLAIN, family='lvvit'), patch_size=5), 'patch_size=5: the stem halves the resolution first'),
    ],
)
def test_unfit_options(options, message, make_backbone):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_backbone('cfvit', **options)


@pytest.mark.parametrize(
    'family, options, epsilon',
    [('deit', {}, 1e-6), ('lvvit', {}, 1e-5), ('deit', dict(norm_eps=0.1), 0.1), ('lvvit', dict(norm_eps=0.1), 0.1)],
)
def test_epsilon_of_all_norms(family, options, epsilon, make_cfvit):
    norms = [module for module in make_cfvit(family, **options).modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 6 * 2 + 2 and {norm.eps for norm in norms} == {epsilon}


@pytest.mark.parametrize('side', [None, 24])
def test_image_side_may_be_written_down(side, make_backbone):
    assert make_backbone('cfvit', img_size=side).stage_shapes == [(6, 6)]


@pytest.mark.parametrize('coarse_size', [0, -1])
def test_coarse_size_must_be_positive(coarse_size, make_backbone):
    with pytest.raises(ValueError, match='coarse_size|img_size'):
        make_backbone('cfvit', coarse_size=coarse_size)
