import copy
import gc
import pickle
import threading
import weakref

import torch
from torch import nn

from mmdyn.models.thread_local import ThreadLocal


class Module(nn.Linear):
    last: ThreadLocal[object] = ThreadLocal()
    other: ThreadLocal[object] = ThreadLocal()

    def __init__(self):
        super().__init__(2, 2)

    def forward(self, x):
        self.last = super().forward(x)
        return 2 * self.last


def test_a_value_is_that_of_a_module_and_an_attribute():
    one, two = Module(), Module()
    one.last, two.last, one.other = 1, 2, 3
    assert (one.last, two.last, one.other, two.other) == (1, 2, 3, None)
    assert set(one.state_dict()) == {'weight', 'bias'}


def test_a_value_is_the_threads_own():
    module, seen, turns = Module(), [], threading.Barrier(2)
    module.last = 'main'

    def work(number):
        seen.append(module.last)
        module.last = number
        turns.wait(timeout=60)
        seen.append(module.last)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[:2] == [None, None] and sorted(seen[2:]) == [1, 2] and module.last == 'main'


def test_the_class_has_no_value():
    """What lists the attributes of a class asks for it."""
    Module().last = 1
    assert Module.last is None


def test_copies_start_without_a_value():
    module = Module()
    module.last = lambda: 'what cannot be pickled'
    assert copy.deepcopy(module).last is pickle.loads(pickle.dumps(module)).last is None


def test_a_value_lives_no_longer_than_its_module():
    module, value = Module(), threading.Event()
    module.last, kept = value, weakref.ref(value)
    del value
    gc.collect()
    assert kept() is module.last is not None
    del module
    gc.collect()
    assert kept() is None


def test_a_traced_pass_leaves_integers_for_sizes_and_an_export_nothing():
    class Sizes(Module):
        def forward(self, x):
            self.last = x.shape[0], x
            return x

    module, x = Sizes(), torch.ones(3, 2)
    torch.jit.trace(module, x, check_trace=False)
    assert type(module.last[0]) is int and module.last[0] == 3 and torch.equal(module.last[1], x)
    torch.export.export(module, (torch.ones(4, 2),), strict=False)
    assert module.last[0] == 3


def test_compiled_code_depends_on_no_value():
    """Of other modules, either, which come and go in the meantime."""
    module, others, graphs, x = Module(), [Module() for _ in range(3)], [], torch.randn(3, 2)
    compiled = torch.compile(module, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(2):  # the first call makes the value
        compiled(x)
    count = len(graphs)
    for other in others:
        other.last = 1
        assert torch.equal(compiled(x), 2 * module.last)
    assert len(graphs) == count > 0
