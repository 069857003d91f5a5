"""Batches that follow from their number in the training alone, so that a training may go on at any of them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset


def seeds(*key: int) -> list[int]:
    """Seeds for Python's, numpy's and torch's generators, which follow from a key of integers >= 0."""
    return np.random.SeedSequence(key).generate_state(3).tolist()


def seed_generators(*key: int) -> None:
    """Seed the generators of Python, numpy and torch, its devices included, by a key of integers >= 0."""
    for_python, for_numpy, for_torch = seeds(*key)
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.manual_seed(for_torch)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within, the CPU's random numbers follow from a key; afterwards they go on as if nothing had been drawn."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for_python, for_numpy, for_torch = seeds(*key)
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.default_generator.manual_seed(for_torch)  # torch.manual_seed would seed the devices, too
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


class SeededDataset(Dataset[Any]):
    """Passes for a data set; its batches are loaded with random numbers that follow from a key and their number.

    Args:
        dataset: the data set, whose attributes are read and written through this one.
        key: integers >= 0.
    """

    def __init__(self, dataset: Dataset[Any], *key: int) -> None:
        self.__dict__.update(dataset=dataset, key=key)

    def __getattr__(self, name: str) -> Any:
        if name in ('dataset', 'key') or name.startswith('__'):  # a copy asks before it has them
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, numbered: tuple[int, list[Any]]) -> list[Any]:
        """What a batch of :class:`NumberedBatches` loads, which torch's DataLoader asks for."""
        number, batch = numbered
        with seeded(*self.key, number):
            several = getattr(self.dataset, '__getitems__', None)
            return list(several(batch) if several else map(self.dataset.__getitem__, batch))


class NumberedBatches:
    """Passes for a batch sampler; gives each batch with its number, and begins where it was told to.

    Args:
        batches: the batch sampler.
    """

    def __init__(self, batches: BatchSampler) -> None:
        self.batches = batches
        self.begin(0)

    def begin(self, number: int, epoch: int = 0, skip: int = 0) -> None:
        """Let the iterators from now on begin with batch ``skip`` of an epoch, which has ``number`` in the training.

        A sampler without end has no epochs: its first batch has the number 0.
        """
        self.number, self.epoch, self.skip = number, epoch, skip

    def __getattr__(self, name: str) -> Any:
        if name == 'batches' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, list[Any]]]:
        sampler, skip = self.batches.sampler, self.skip
        if isinstance(sampler, InfiniteSampler):
            # Its iterators go on where the last one stopped; only a new one begins at the beginning.
            self.batches.sampler = InfiniteSampler(sampler.dataset, sampler.shuffle, sampler.seed)
            skip = self.number
        elif hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(self.epoch)
        yield from enumerate(islice(self.batches, skip, None), self.number)


def number_batches(loader: DataLoader[Any], *key: int) -> DataLoader[Any] | None:
    """A loader like ``loader`` that gives the same batches, numbered and seeded by a key of integers >= 0.

    Returns:
        None for a loader whose batches cannot be numbered: one of a class of its own, without batches, or of an
        iterable data set.
    """
    batches: Any = getattr(loader, 'batch_sampler', None)
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or not hasattr(batches, 'sampler'):
        return None
    options = (
        'num_workers',
        'collate_fn',
        'pin_memory',
        'timeout',
        'worker_init_fn',
        'multiprocessing_context',
        'generator',
        'prefetch_factor',
        'persistent_workers',
        'pin_memory_device',
        'in_order',
    )
    # torch says that batches are lists; it hands them to the data set as they are.
    numbers: Any = NumberedBatches(batches)
    numbered = DataLoader(
        SeededDataset(loader.dataset, *key), batch_sampler=numbers, **{name: getattr(loader, name) for name in options}
    )
    # torch forgets them where there is a batch sampler, but hooks of the frameworks read them.
    vars(numbered).update(batch_size=loader.batch_size, drop_last=loader.drop_last)
    return numbered


class EndlessBatches:
    """What an iteration-based training takes its batches from: a loader, again and again.

    Args:
        loader: begins where the training goes on.
        passed: batches that the training did in an earlier run and asks for again to get there: they are not loaded.
    """

    def __init__(self, loader: DataLoader[Any], passed: int) -> None:
        self.loader, self.passed = loader, passed
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> 'EndlessBatches':
        return self

    def skip_iter(self, count: int) -> None:
        """How newer versions of mmengine ask for them."""
        self.passed -= count

    def __next__(self) -> Any:
        if self.passed > 0:
            self.passed -= 1
            return None
        if self._iterator is None:
            self._iterator = iter(self.loader)
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.loader)
            return next(self._iterator)
