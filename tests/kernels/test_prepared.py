import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from mmdyn.kernels.prepared import Cache, Prepared, Refusal, refuse_rows, refuse_tensor
from mmdyn.models.dge import DynamicGrainedEncoder
from mmdyn.models.dge.router import Router, choose
from mmdyn.models.layers import project_patches
from mmdyn.models.stage import run_blocks


class Wrapped(Tensor):
    """A tensor whose numbers may lie elsewhere."""


@pytest.mark.parametrize(
    'x, reason',
    [
        (torch.ones(2, 3), None),
        (nn.Parameter(torch.ones(2, 3)), None),
        (torch.ones(3, 2).T, None),
        (torch.ones(2, 3).as_subclass(Wrapped), 'x is a Wrapped, whose numbers may lie elsewhere'),
        (nn.Parameter(torch.ones(2, 3).as_subclass(Wrapped)), 'x is a Wrapped, whose numbers may lie elsewhere'),
        (torch.ones(2, device='meta'), 'x is on meta'),
        (torch.eye(2).to_sparse(), 'x is not dense'),
        (torch.eye(2).to_mkldnn(), 'x is not dense'),
        (torch.ones(2, dtype=torch.cfloat).conj().imag, 'x is not dense'),
        (torch.ones(2).double(), 'x is float64, not float32'),
        (torch.ones(2).long(), 'x is int64, not float32'),
        (torch.ones(0, 3), 'x is empty'),
    ],
    ids=str,
)
def test_tensors_whose_memory_may_be_read(x, reason):
    assert refuse_tensor(x, 'x') == reason


def test_rows_have_no_gaps():
    assert refuse_rows(torch.ones(2, 3), 'x') is None
    for x in (torch.ones(3, 2).T, torch.ones(2, 6)[:, ::2], torch.ones(1, 3).expand(2, 3)):
        assert refuse_rows(x, 'x') == 'x is not contiguous'


class PreparedLinear(Prepared):
    def __init__(self, parent):
        super().__init__('parent.')
        self.module(parent, '', nn.Module, nn.Sequential)
        self.address = self.weights(self.child(parent, '', '0', nn.Linear), '0', 2, 3)


def parent_of(layer=None):
    return nn.Sequential(layer or nn.Linear(3, 2))


@pytest.fixture
def cache():
    """A cache and how often it prepared something."""
    cache, made = Cache(), []

    def get(parent):
        return cache.get(parent, None, lambda: made.append(parent) or PreparedLinear(parent))

    return get, made


def test_what_did_not_change_is_prepared_once(cache):
    (get, made), parent = cache, parent_of()
    first = get(parent)
    parent[0].weight.data.mul_(2)
    assert get(parent) is first and len(made) == 1 and first.address[0] == parent[0].weight.data_ptr()


@pytest.mark.parametrize(
    'change',
    [
        lambda parent: setattr(parent[0], 'weight', nn.Parameter(torch.ones(2, 3))),
        lambda parent: setattr(parent[0].weight, 'data', torch.ones(2, 3)),
        lambda parent: parent.__setitem__(0, nn.Linear(3, 2)),
        lambda parent: setattr(parent[0], 'bias', None),
    ],
)
def test_what_changed_is_prepared_anew(change, cache):
    (get, made), parent = cache, parent_of()
    first = get(parent)
    change(parent)
    assert get(parent) is not first and len(made) == 2 and get(parent).address[0] == parent[0].weight.data_ptr()


def test_what_is_refused_is_not_kept(cache):
    (get, _), parent = cache, parent_of()
    first = get(parent)
    handle = parent[0].register_forward_hook(lambda *args: None)
    for _ in range(2):
        with pytest.raises(Refusal, match='parent.0 has forward hooks'):
            get(parent)
    handle.remove()
    assert get(parent).address == first.address


def test_a_forward_of_none_is_one_of_its_own(cache):
    """The model cannot be called then, so that no kernel may stand in for it."""
    (get, _), parent = cache, parent_of()
    get(parent)
    parent[0].forward = None
    with pytest.raises(Refusal, match='parent.0 has a forward function of its own'):
        get(parent)


def test_what_is_gone_is_noticed_though_it_was_none(cache):
    (get, _), parent = cache, parent_of(nn.Linear(3, 2, bias=False))
    get(parent)
    del parent[0].bias
    with pytest.raises(Refusal, match='parent.0.bias is not what it was when the layer was made'):
        get(parent)


@torch.no_grad()
def test_models_are_not_kept_alive(make_block, stage_of, compiled):
    """Nor copied or saved with what was prepared for them."""
    block, encoder = make_block(), DynamicGrainedEncoder(12).eval()
    router, conv, norm = Router(12, (1, 2)), nn.Conv2d(3, 4, 2, 2), nn.LayerNorm(4)
    stage = stage_of(block, dge=[encoder])
    size = len(pickle.dumps(stage))
    run_blocks(stage, torch.randn(1, 16, 12), (4, 4))
    choose(router, torch.randn(1, 16, 12), (4, 4), 2, 0)
    project_patches(torch.randn(1, 3, 4, 4), conv, norm)
    assert len(pickle.dumps(stage)) == size
    twin = copy.deepcopy(stage)
    torch.testing.assert_close(
        run_blocks(twin, torch.ones(1, 16, 12), (4, 4)), run_blocks(stage, torch.ones(1, 16, 12), (4, 4))
    )
    alive = [weakref.ref(module) for module in (block, block.attn, encoder, router, conv, norm)]
    del block, encoder, router, conv, norm, stage
    gc.collect()
    assert not [found() for found in alive if found() is not None]
