import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler, pseudo_collate
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

import mmdyn  # noqa: F401
from mmdyn.engine.hooks.random_state_hook import pass_over_broken_checkpoint
from mmdyn.engine.seeded_batches import EndlessBatches, SeededDataset, number_batches, seed_generators, seeded

IMAGES, BATCH = 10, 3  # four batches in an epoch
PLAIN = dict(type='ImageClassifier', head=dict(type='LinearClsHead', num_classes=3, in_channels=24))
MODELS = {
    'dge': ('pvt', dict(dge=dict(granularities=(1, 2)), drop_path_rate=0.5, out_type='avg_featmap'), PLAIN),
    'cfvit': (
        'cfvit',
        dict(score='random', drop_path_rate=0.5),
        dict(type='mmdyn.CoarseToFineClassifier', head=dict(type='LinearClsHead', num_classes=3, in_channels=16)),
    ),
    'mix': (
        'lvvit',
        dict(drop_path_rate=0.5, out_type='cls_token'),
        dict(
            type='ImageClassifier',
            data_preprocessor=dict(type='mmdyn.MixTokenPreprocessor', patch_size=4, num_classes=3),
            head=dict(
                type='LinearClsHead', num_classes=3, in_channels=16, loss=dict(type='CrossEntropyLoss', use_soft=True)
            ),
        ),
    ),
}


class Images(torch.utils.data.Dataset):
    """Augmented by the random numbers of each library; an image is known by its label."""

    metainfo = dict(classes=('a', 'b', 'c'))

    def __init__(self, side):
        self.side = side

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample

        image = index + torch.rand(3, self.side, self.side) + np.random.rand() + random.random()
        return dict(inputs=image, data_samples=DataSample().set_gt_label(index % 3))


class Killed(Exception):
    pass


class Watch(Hook):
    """Notes the loss of each iteration, and stops before one as if the process had been killed."""

    priority = 'LOWEST'

    def __init__(self, kill_before=None):
        self.kill_before, self.losses = kill_before, {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.kill_before:
            raise Killed

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses[runner.iter] = outputs['loss'].item()


def make_runner(
    backbone_config,
    work_dir,
    name='dge',
    loop='epochs',
    save='epoch',
    workers=0,
    seed=0,
    hook=True,
    resume=False,
    kill_before=None,
    shift=0,
):
    backbone, options, classifier = MODELS[name]
    config = backbone_config(backbone, **options)
    side = 24 if name == 'cfvit' else 32
    sampler = 'InfiniteSampler' if loop == 'endless' else 'DefaultSampler'
    # A process that starts anew has other random numbers than the one before.
    seed_generators(99, int(resume), shift)
    hooks = [dict(type='mmdyn.RandomStateHook')] if hook else []
    if name == 'cfvit' and loop == 'epochs':
        hooks.append(dict(type='mmdyn.FineSelectionHook', begin=1))
    watch = Watch(kill_before)
    runner = Runner(
        dict(classifier, backbone=config),
        work_dir=str(work_dir),
        default_scope='mmpretrain',
        log_level='ERROR',
        train_dataloader=dict(
            dataset=Images(side),
            batch_size=BATCH,
            num_workers=workers,
            persistent_workers=workers > 0,
            sampler=dict(type=sampler, shuffle=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=3) if loop == 'epochs' else dict(by_epoch=False, max_iters=12),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        resume=resume,
        randomness=dict(seed=seed),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook', interval=1 if save == 'epoch' else 2, by_epoch=save == 'epoch', max_keep_ckpts=2
            )
        ),
        custom_hooks=[*hooks, watch],
        experiment_name=f'{work_dir}{resume}{shift}'.replace('/', '-'),
    )
    return runner, watch


def stop_workers(runner):
    """Workers that a garbage collection stops take five seconds for it."""
    loop, runner.train_loop.dataloader_iterator = runner.train_loop, None
    loop.dataloader = None


@pytest.fixture
def train(backbone_config, tmp_path):
    """Train without a break, and then killed before some iterations and resumed; return losses and weights of each."""

    def both(kills, **options):
        runner, watch = make_runner(backbone_config, tmp_path / 'whole', **options)
        runner.train()
        stop_workers(runner)
        wanted = watch.losses, runner.model.state_dict()
        losses = {}
        for number, kill in enumerate([*kills, None]):
            runner, watch = make_runner(
                backbone_config, tmp_path / 'killed', resume=number > 0, kill_before=kill, shift=number, **options
            )
            if kill is None:
                runner.train()
            else:
                with pytest.raises(Killed):
                    runner.train()
            stop_workers(runner)
            losses.update(watch.losses)
        return wanted, (losses, runner.model.state_dict(), min(watch.losses))

    return both


def check(wanted, got):
    assert list(got[0]) == list(range(12)) and got[0] == wanted[0]
    for name, weight in wanted[1].items():
        assert torch.equal(weight, got[1][name]), name


# Killed before iterations of the second and third epoch, in any order of places.
KILLS = [sorted(random.Random(seed).sample(range(5, 12), 2)) for seed in range(2)]


@pytest.mark.parametrize('kills', KILLS, ids=str)
@pytest.mark.parametrize('name', MODELS)
def test_resume_equals_uninterrupted(train, name, kills):
    wanted, got = train(kills, name=name)
    check(wanted, got)


@pytest.mark.parametrize(
    'name, options',
    [
        ('dge', dict(save='iter')),
        ('cfvit', dict(save='iter')),
        ('dge', dict(save='iter', workers=2)),
        ('dge', dict(workers=1)),
        ('dge', dict(loop='endless', save='iter')),
        ('mix', dict(loop='endless', save='iter', workers=2)),
        ('dge', dict(loop='iterations', save='iter')),
        ('dge', dict(seed=None)),
        ('mix', dict(seed=None, loop='endless', save='iter')),
    ],
    ids=lambda value: value if isinstance(value, str) else '-'.join(map(str, value.values())),
)
def test_loops_workers_and_places(train, name, options):
    """Without a seed in the config, a resumed run draws another one; the first runs of both trainings draw the same."""
    wanted, got = train([7, 9], name=name, **options)
    check(wanted, got)
    # Where checkpoints are of iterations, they are inside of an epoch (6) and at its last batch, before its end (8).
    assert got[2] == 8


def test_a_checkpoint_inside_of_an_epoch(train):
    wanted, got = train([7, 11], save='iter')
    check(wanted, got)
    assert got[2] == 10


def test_without_the_hook_it_goes_on_otherwise(train):
    wanted, got = train([6], hook=False)
    assert got[0] != wanted[0]


def test_each_epoch_and_process_has_random_numbers_of_its_own():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index, torch.rand(()).item(), np.random.rand(), random.random()

    def draw(rank, workers=0, begins=((0, 0, 0), (2, 1, 0))):
        loader = DataLoader(
            Numbers(),
            batch_sampler=BatchSampler(DefaultSampler(Numbers(), seed=5), 2, False),
            num_workers=workers,
            collate_fn=list,
        )
        numbered = number_batches(loader, 3, rank)
        drawn = []
        for begin in begins:
            numbered.batch_sampler.begin(*begin)
            drawn += [item for batch in numbered for item in batch]
        return drawn

    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    drawn = draw(0)
    assert random.getstate() == state[2] and np.array_equal(np.random.get_state()[1], state[1])
    values = [value for item in drawn for value in item[1:]]
    assert len(set(values)) == len(values) == 24 and sorted(item[0] for item in drawn) == sorted(2 * list(range(4)))
    assert draw(0, workers=2) == drawn  # whichever process loads them
    assert draw(0, begins=[(1, 0, 1), (2, 1, 0)]) == drawn[2:]
    assert not {value for item in draw(1) for value in item[1:]} & set(values)


def test_order_of_an_infinite_sampler_begins_anywhere():
    data = torch.arange(7)
    stream = iter(InfiniteSampler(data, seed=3))
    wanted = [[next(stream), next(stream)] for _ in range(30)]
    loader = DataLoader(data, batch_sampler=BatchSampler(InfiniteSampler(data, seed=3), 2, False), collate_fn=list)
    numbered = number_batches(loader, 0)
    for first in (0, 20, 11):
        numbered.batch_sampler.begin(first)
        assert [list(map(int, batch)) for batch, _ in zip(numbered, range(5))] == wanted[first : first + 5]
    numbered.batch_sampler.begin(4)
    endless = EndlessBatches(numbered, 4)
    assert [next(endless) for _ in range(4)] == [None] * 4 and list(map(int, next(endless))) == wanted[4]
    newer = EndlessBatches(numbered, 4)
    newer.skip_iter(4)
    assert list(map(int, next(newer))) == wanted[4]


def test_the_numbered_loader_is_like_the_one_it_passes_for():
    loader = DataLoader(
        Images(4),
        batch_size=3,
        drop_last=True,
        num_workers=2,
        pin_memory=False,
        timeout=7,
        persistent_workers=True,
        prefetch_factor=3,
    )
    numbered = number_batches(loader, 0)
    for name in (
        'batch_size',
        'drop_last',
        'num_workers',
        'timeout',
        'persistent_workers',
        'prefetch_factor',
        'collate_fn',
        'worker_init_fn',
    ):
        assert getattr(numbered, name) == getattr(loader, name), name
    assert len(numbered) == len(loader) == 3
    assert numbered.dataset.metainfo is Images.metainfo and len(numbered.dataset) == IMAGES
    assert numbered.batch_sampler.batch_size == 3


def test_attributes_of_the_data_set_are_set_through():
    data = Images(4)
    numbered = pickle.loads(pickle.dumps(SeededDataset(data, 1)))
    assert numbered.side == 4
    numbered.side = 5
    assert numbered.dataset.side == 5 and numbered[0]['inputs'].shape == (3, 5, 5)
    with pytest.raises(AttributeError, match='pipeline'):
        numbered.pipeline


def test_data_sets_that_load_batches_do_so():
    class Batches(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitems__(self, indices):
            return [tuple(indices), torch.rand(()).item()]

    def draw():
        return [*number_batches(DataLoader(Batches(), batch_size=2, collate_fn=tuple), 1)]

    first = draw()
    assert [batch[0] for batch in first] == [(0, 1), (2, 3)] and draw() == first


def test_random_numbers_follow_from_the_key_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    seed_generators(1, 2)
    first, second = draw(), draw()
    with seeded(1, 2):
        assert draw() == first
    third = draw()
    seed_generators(1, 2)
    assert [draw(), draw(), draw()] == [first, second, third]
    seed_generators(1, 3)
    assert not set(draw()) & {*first, *second, *third}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    'loader',
    [DataLoader(Stream(), batch_size=2), DataLoader(torch.arange(3), batch_size=None)],
    ids=['iterable', 'without batches'],
)
def test_loaders_whose_batches_cannot_be_numbered(loader):
    assert number_batches(loader, 0) is None


def checkpoint(path, whole=True):
    torch.save(dict(weight=torch.zeros(1000)), path)
    if not whole:
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    'files, named, wanted',
    [
        (dict(epoch_8=True, epoch_9=True, epoch_10=False), 'epoch_10', 'epoch_9'),
        (dict(epoch_9=False, epoch_10=True, best_top1_epoch_11=True), 'epoch_11', 'epoch_10'),
        (dict(iter_2=True, iter_10=True), '', 'iter_10'),
        (dict(epoch_1=True, epoch_2=True), 'epoch_1', 'epoch_1'),
        (dict(epoch_1=False), 'epoch_1', 'epoch_1'),
    ],
)
def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, files, named, wanted):
    for name, whole in files.items():
        checkpoint(tmp_path / f'{name}.pth', whole)
    note = tmp_path / 'last_checkpoint'
    note.write_text(str(tmp_path / f'{named}.pth') if named else '')
    pass_over_broken_checkpoint(str(tmp_path))
    assert note.read_text() == str(tmp_path / f'{wanted}.pth')


def test_work_dirs_without_a_checkpoint_or_with_a_remote_one(tmp_path):
    pass_over_broken_checkpoint(str(tmp_path))
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/epoch_1.pth')
    pass_over_broken_checkpoint(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ['last_checkpoint']


def test_only_a_training_touches_what_it_would_resume_from(backbone_config, tmp_path):
    checkpoint(tmp_path / 'epoch_1.pth')
    checkpoint(tmp_path / 'epoch_2.pth', whole=False)  # another process is about to write it
    note = tmp_path / 'last_checkpoint'
    note.write_text(str(tmp_path / 'epoch_2.pth'))
    runner, _ = make_runner(backbone_config, tmp_path)
    runner.call_hook('before_run')
    assert note.read_text() == str(tmp_path / 'epoch_2.pth')
    runner.train()
    assert note.read_text() == str(tmp_path / 'epoch_3.pth')


@pytest.mark.parametrize('keep, warned', [(1, True), (2, False), (-1, False)])
def test_warns_where_no_checkpoint_would_be_left(backbone_config, tmp_path, monkeypatch, keep, warned):
    runner, _ = make_runner(backbone_config, tmp_path)
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    hook.max_keep_ckpts, said = keep, []
    monkeypatch.setattr(runner.logger, 'warning', said.append)
    runner.train()
    assert any('max_keep_ckpts=1 removes the last checkpoint' in text for text in said) == warned


def test_a_data_loader_that_cannot_be_numbered_trains_and_warns(backbone_config, tmp_path, monkeypatch):
    class Loader(DataLoader):
        pass

    runner, watch = make_runner(backbone_config, tmp_path)
    data = Images(32)
    runner._train_dataloader = Loader(data, batch_size=5, collate_fn=pseudo_collate)
    said = []
    monkeypatch.setattr(runner.logger, 'warning', said.append)
    runner.train()
    assert len(watch.losses) == 6 and any('cannot be numbered' in text for text in said)


def test_a_checkpoint_of_longer_epochs(backbone_config, tmp_path, monkeypatch):
    runner, _ = make_runner(backbone_config, tmp_path, save='iter', kill_before=6)
    with pytest.raises(Killed):
        runner.train()
    path = tmp_path / 'iter_6.pth'
    saved = torch.load(path)
    saved['message_hub']['runtime_info']['done_of_epoch'] = 5  # of more than the four batches of an epoch now
    torch.save(saved, path)
    runner, watch = make_runner(backbone_config, tmp_path, save='iter', resume=True)
    said = []
    monkeypatch.setattr(runner.logger, 'warning', said.append)
    runner.train()
    assert any('more batches in an epoch than the 4 of this one' in text for text in said)
    assert list(watch.losses) == list(range(6, 14))  # the second epoch anew, and the third


def repeated():
    from mmpretrain.datasets import RepeatAugSampler

    return BatchSampler(RepeatAugSampler(range(30), seed=4), 4, False)


def by_aspect_ratio():
    pytest.importorskip('mmdet')
    from mmdet.datasets import AspectRatioBatchSampler

    class Sides(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def get_data_info(self, index):
            return dict(width=1 + index % 3, height=2)

    return AspectRatioBatchSampler(DefaultSampler(Sides(), seed=4), 4)


@pytest.mark.parametrize('make', [repeated, by_aspect_ratio])
def test_samplers_of_the_frameworks(make):
    def draw(*begin):
        numbered = number_batches(DataLoader(range(30), batch_sampler=make(), collate_fn=list), 0)
        numbered.batch_sampler.begin(*begin)
        return [*numbered]

    first, second = draw(0, 0, 0), draw(9, 1, 0)
    assert first != second and len(first) > 4
    assert draw(3, 0, 3) == first[3:] and draw(11, 1, 2) == second[2:]
    alone = make()
    alone.sampler.set_epoch(1)
    assert [*alone] == second
