import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdyn.models import native

pytestmark = pytest.mark.skipif(native.library() is None, reason='mmdyn was installed without a compiler')


def test_is_used_in_plain_inference_alone():
    tokens = torch.randn(2, 35, 4)
    assert not native.is_used(tokens)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert native.is_used(tokens)
            assert not native.is_used(tokens.double()) and not native.is_used(tokens.bfloat16())
            assert not native.is_used(tokens.mT) and not native.is_used(tokens.to('meta'))
            with FlopCounterMode(display=False):
                assert not native.is_used(tokens)


def test_functions_of_another_version_say_how_to_compile_them(monkeypatch):
    monkeypatch.setattr(native.ctypes, 'CDLL', lambda path: object())
    with pytest.raises(ImportError, match='_native.* another version of mmdyn: .*`make setup` or `pip install -e .`'):
        native.library.__wrapped__()


def test_processors_that_the_encoder_does_not_run_on(monkeypatch):
    """Its functions are not even looked for, because other compilers leave them out."""
    names = []

    class Functions:
        def __getattr__(self, name):
            assert name not in native.ENCODER
            names.append(name)
            return lambda: 0

    monkeypatch.setattr(native.ctypes, 'CDLL', lambda path: Functions())
    assert isinstance(native.library.__wrapped__(), Functions) and set(native.FUNCTIONS) <= set(names)
