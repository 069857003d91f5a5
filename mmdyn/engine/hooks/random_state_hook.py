import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ...registry import HOOKS
from ..seeded_batches import EndlessBatches, NumberedBatches, number_batches, seed_generators

# Names in mmengine's message hub, which checkpoints hold and resuming restores in each process.
SAMPLER_SEED, DONE_OF_EPOCH = 'sampler_seed', 'done_of_epoch'


def is_whole(checkpoint: Path) -> bool:
    """Whether a file was written to its end: the table of contents of torch's format comes last."""
    return checkpoint.is_file() and zipfile.is_zipfile(checkpoint)


@master_only
def pass_over_broken_checkpoint(work_dir: str) -> None:
    """Where ``last_checkpoint`` names a file that was not written to its end, name the newest one that was."""
    note = Path(work_dir) / 'last_checkpoint'
    named = note.read_text().strip() if note.is_file() else None
    if named is None or '://' in named or is_whole(Path(named)):
        return
    folder = Path(named).parent if named else Path(work_dir)
    found = [
        (int(match[1]), path)
        for path in folder.glob('*.pth')
        if (match := re.fullmatch(r'(?:epoch|iter)_(\d+)\.pth', path.name)) and is_whole(path)
    ]
    said = f'{note} names {named or "no file"}, which is missing or was not written to its end'
    if found:
        newest = max(found)[1]
        print_log(f'{said}: going on from {newest}.', 'current', logging.WARNING)
        note.write_text(str(newest))
    else:
        print_log(f'{said}, and there is no other checkpoint in {folder}.', 'current', logging.WARNING)


def begin_iteration(batches: NumberedBatches, iteration: int) -> None:
    """Let an iteration-based training, whose epochs follow one another in its iterations, begin with one of them."""
    batches.begin(iteration, *divmod(iteration, max(len(batches), 1)))


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Let a training that was killed and resumed go on exactly as if it had not been.

    All random numbers of an iteration follow from the run's seed and the number of the iteration: gates, drop path,
    mixing and whatever else draws from the generators of Python, numpy or torch, on the CPU or a device. Those of a
    batch's crops and augmentations follow from its number and the process as well, whichever worker loads it. So no
    process has a state to save. Epoch-based trainings go on at the batch where they stopped, also inside of an epoch;
    iteration-based ones pass over the batches that they did without loading them. The order of the data goes on,
    whether the config sets a seed or not.

    A checkpoint whose writing was cut off is passed over for the newest whole one.

    The order goes on for mmengine's DefaultSampler and InfiniteSampler, and for those that shuffle by ``seed`` and
    ``set_epoch``. Transforms that keep something from one image to the next, such as a cache of images to mix, begin
    anew; on a GPU, sums are reproducible only with ``randomness=dict(deterministic=True)``. As in mmengine, processes
    draw the same numbers in the model unless ``randomness=dict(diff_rank_seed=True)``.
    """

    # Before the hooks that draw random numbers or save checkpoints.
    priority = 'VERY_HIGH'

    _batches: NumberedBatches | None = None
    _endless, _done = False, 0

    def before_run(self, runner: Runner) -> None:
        """Make sure that there is a whole checkpoint to resume from, now and after the next kill."""
        if runner.optim_wrapper is None or isinstance(runner.optim_wrapper, dict):
            return  # not a training: mmengine builds the optimizer before
        pass_over_broken_checkpoint(runner.work_dir)
        barrier()
        if any(isinstance(hook, CheckpointHook) and hook.max_keep_ckpts == 1 for hook in runner.hooks):
            runner.logger.warning(
                'max_keep_ckpts=1 removes the last checkpoint before the next one is written: a run that is killed in '
                'between cannot be resumed. Write checkpoint=dict(max_keep_ckpts=2), or more, in default_hooks.'
            )

    def before_train(self, runner: Runner) -> None:
        """Number the batches, and put back the seed of their order."""
        loop, hub = runner.train_loop, runner.message_hub
        if not isinstance(getattr(loop.dataloader, 'batch_sampler', None), NumberedBatches):
            loader = number_batches(loop.dataloader, runner.seed, 1 + runner.rank)
            if loader is None:
                self._batches = None
                runner.logger.warning(
                    'RandomStateHook: the batches of this train_dataloader cannot be numbered, so that a resumed '
                    'training will see other data. Give it a data set with a length, and a sampler or batch_sampler.'
                )
                return
            loop.dataloader = loader
        batches = self._batches = loop.dataloader.batch_sampler
        sampler = batches.sampler
        if hasattr(sampler, 'seed'):
            if runner.iter > 0:
                sampler.seed = hub.get_info(SAMPLER_SEED, sampler.seed)
            hub.update_info(SAMPLER_SEED, sampler.seed)
        self._endless = hasattr(loop, 'dataloader_iterator')
        if self._endless:
            begin_iteration(batches, runner.iter)
            loop.dataloader_iterator = EndlessBatches(loop.dataloader, runner.iter)
        else:
            self._done = hub.get_info(DONE_OF_EPOCH, 0) if runner.iter > 0 else 0
            if self._done > len(batches):
                runner.logger.warning(
                    f'The checkpoint is of a training with more batches in an epoch than the {len(batches)} of '
                    'this one: the epoch begins anew.'
                )
                self._done = 0

    def before_train_epoch(self, runner: Runner) -> None:
        """Begin where the epoch was left."""
        seed_generators(runner.seed, 0, runner.iter)
        if self._batches is not None and not self._endless:
            self._batches.begin(runner.iter, runner.epoch, self._done)
            runner.message_hub.update_info(DONE_OF_EPOCH, self._done)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the iteration."""
        seed_generators(runner.seed, 0, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Note the place, before a checkpoint may be saved."""
        if self._batches is None:
            return
        if self._endless:
            begin_iteration(self._batches, runner.iter + 1)
        else:
            self._done += 1
            runner.message_hub.update_info(DONE_OF_EPOCH, self._done)

    def after_train_epoch(self, runner: Runner) -> None:
        """The next epoch has its first batch yet to come."""
        if self._batches is not None and not self._endless:
            self._done = 0
            runner.message_hub.update_info(DONE_OF_EPOCH, 0)
