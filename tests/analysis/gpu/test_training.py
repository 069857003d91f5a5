import json
import math
import runpy
from pathlib import Path

import pytest
from mmengine.config import Config

import mmdyn
from mmdyn.analysis.gpu.training import adapted, summary, train

ROOT = Path(mmdyn.__file__).parents[1]


@pytest.fixture
def config():
    return Config.fromfile(ROOT / 'configs/demo/pvt-mini-dge_digits.py')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    make = runpy.run_path(str(ROOT / 'tools/dataset_tools/make_demo_dataset.py'))['make_demo_dataset']
    return make(tmp_path_factory.mktemp('data') / 'demo', cls_train=40, cls_val=10, dense_train=1, dense_val=1)


def entries(losses, ratio=0.5):
    return [dict(loss=loss, query_ratio=ratio) for loss in losses]


@pytest.mark.parametrize(
    'losses, said',
    [
        (entries([2.0] * 20 + [9.0] * 5 + [1.0] * 20), []),
        (entries([2.0] * 20 + [1.7] * 20), ['the loss fell from 2.000 to 1.700 only']),
        (entries([2.0] * 20 + [1.0] * 20, 0.65), ['the query ratio is 0.650, the budget 0.5']),
        (entries([2.0] * 20 + [math.inf] + [1.0] * 20), ['the loss of iteration 21 is inf']),
        (entries([2.0] * 40 + [math.nan]), ['the loss of iteration 41 is nan', 'the loss fell from 2.000 to nan only']),
    ],
)
def test_summary(losses, said):
    found = summary(losses, 0.5)
    assert found['wrong'] == said and found['iterations'] == len(losses) and found['first_loss'] == 2
    json.dumps(found, allow_nan=False)


def test_trains(config, digits, tmp_path):
    found = train(adapted(config, digits, tmp_path, 'float32', 40, 4))
    assert found['iterations'] == 40 and found['budget'] == 0.5 and 0 < found['query_ratio'] <= 1
    assert 1.5 < found['first_loss'] < 4 and found['seconds'] > 0


def test_amp(config, tmp_path):
    cfg = adapted(config, tmp_path, tmp_path, 'bfloat16', 200, 64)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.optim_wrapper.dtype == 'bfloat16'
    assert cfg.optim_wrapper.clip_grad and cfg.train_cfg.max_iters == 200


@pytest.mark.cuda
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_trains_on_cuda(config, digits, tmp_path, dtype):
    found = train(adapted(config, digits, tmp_path, dtype, 40, 4))
    assert found['iterations'] == 40 and math.isfinite(found['last_loss'])
