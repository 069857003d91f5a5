"""Published checkpoints: what is kept, what is told, and that the frameworks and torch.hub take them."""

import hashlib
import json
import sys

import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from torch.utils.data import Dataset

from mmdyn.analysis.conversion import load_weights
from mmdyn.analysis.flops import build_model
from mmdyn.analysis.publish import budget_of, publish

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmdyn.DeiT',
        arch=dict(embed_dim=16, depth=1, num_heads=2, mlp_ratio=2),
        img_size=(16, 32),
        patch_size=4,
        dge=dict(granularities=(1, 2), test_budget=0.5),
    ),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16),
)
custom_hooks = [dict(type='mmdyn.BudgetHook', budget=0.75)]
load_from = None
resume = False
work_dir = '/home/somebody/run'
"""


@METRICS.register_module()
class Falling(BaseMetric):
    """Worse at each validation: 2, 1, ..."""

    value = 3

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Falling.value -= 1
        return dict(score=Falling.value)


class Noise(Dataset):
    """Two images."""

    metainfo = dict(classes=('a', 'b', 'c'))

    def __len__(self):
        return 2

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample

        return dict(inputs=torch.randn(3, 16, 32), data_samples=DataSample().set_gt_label(index))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The checkpoints of two epochs; the first is the best, so that it was saved again after its validation."""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'config.py').write_text(CONFIG)
    cfg = Config.fromfile(folder / 'config.py')
    loader = dict(
        batch_size=2, dataset=Noise(), sampler=dict(type='DefaultSampler'), collate_fn=dict(type='default_collate')
    )
    Falling.value = 3
    Runner(
        cfg.model,
        str(folder),
        train_dataloader=loader,
        val_dataloader=loader,
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        val_cfg=dict(),
        val_evaluator=[dict(type='Falling', prefix='toy')],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='toy/score', rule='greater')),
        custom_hooks=cfg.custom_hooks,
        default_scope='mmpretrain',
        cfg=cfg,
        experiment_name=folder.name,
    ).train()
    return folder


@pytest.fixture
def src(folder):
    return folder / 'epoch_1.pth'


def test_what_is_kept(src, tmp_path):
    (path,) = publish(src, tmp_path / 'new/model.pth')
    trained, content = CheckpointLoader.load_checkpoint(str(src), 'cpu'), torch.load(path)
    assert 'optimizer' in trained and set(content) == {'state_dict', 'meta'}
    for name, tensor in trained['state_dict'].items():
        assert torch.equal(content['state_dict'][name], tensor)
    meta = content['meta']
    assert meta['budget'] == dict(train=0.75, test=0.5) and meta['metrics'] == {'toy/score': 2.0}
    assert meta['epoch'] == 1 and meta['dataset_meta'] == trained['meta']['dataset_meta']
    assert Config.fromstring(meta['cfg'], '.py').model.backbone.type == 'mmdyn.DeiT'
    assert '/home/somebody' not in meta['cfg'] and str(src.parent) not in path.read_bytes().decode('latin1')
    assert path.stat().st_size < src.stat().st_size / 2


def test_the_name_has_the_hash_that_torch_hub_compares(src, tmp_path):
    (path,) = publish(src, tmp_path / 'model.pth')
    assert path.name == f'model-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth'
    torch.hub.load_state_dict_from_url(f'file://{path}', tmp_path / 'hub', check_hash=True, progress=False)
    other = path.rename(tmp_path / 'model-00000000.pth')
    with pytest.raises(RuntimeError, match='invalid hash value'):
        torch.hub.load_state_dict_from_url(f'file://{other}', tmp_path / 'hub', check_hash=True, progress=False)


def test_metrics_of_an_earlier_validation_are_not_its_own(folder, tmp_path):
    (path,) = publish(folder / 'epoch_2.pth', tmp_path / 'model.pth')
    assert torch.load(path)['meta']['metrics'] == {}


def test_metrics_of_a_test(src, tmp_path):
    (tmp_path / 'test.json').write_text(json.dumps({'accuracy/top1': 80.5, 'data_time': 0.1, 'time': 0.2}))
    (path,) = publish(src, tmp_path / 'model.pth', metrics=tmp_path / 'test.json')
    assert torch.load(path)['meta']['metrics'] == {'accuracy/top1': 80.5}
    for content in ('', 'hello', '[1]'):
        (tmp_path / 'test.json').write_text(content)
        with pytest.raises(ValueError, match=r'--metrics .*test.json: .* Give the .json file that a test writes'):
            publish(src, tmp_path / 'model.pth', metrics=tmp_path / 'test.json')


def test_safetensors_say_the_same(src, tmp_path):
    paths = publish(src, tmp_path / 'model.pth', tmp_path / 'model.safetensors')
    models = [build_model(Config.fromfile(src.parent / 'config.py')) for _ in paths]
    told = [load_checkpoint(model, str(path))['meta'] for model, path in zip(models, paths, strict=True)]
    assert json.loads(json.dumps(told[0])) == told[1] and told[1]['metrics'] == {'toy/score': 2.0}
    images = torch.randn(2, 3, 16, 32)
    assert torch.equal(*[model(images) for model in models])
    assert load_weights(paths[1]).keys() == load_weights(paths[0]).keys()


def test_mmdet_needs_nothing_but_the_file(tmp_path):
    import mmdyn

    name = mmdyn.apis.models.MIM / 'configs/demo/mask-rcnn_pvt-mini-dge_digits.py'
    cfg = mmdyn.get_config(name)
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=tuple('0123456789'), palette=[(0, 0, 0)] * 10))
    torch.save(dict(state_dict=build_model(cfg).state_dict(), meta=meta), tmp_path / 'src.pth')
    for path in publish(tmp_path / 'src.pth', tmp_path / 'model.pth', tmp_path / 'model.safetensors'):
        detect = DetInferencer(weights=str(path), device='cpu', show_progress=False)
        assert type(detect.model.backbone) is mmdyn.models.PVT
        assert list(detect.model.dataset_meta['classes']) == list('0123456789')


def test_threshold_of_coarse_to_fine():
    model = dict(type='mmdyn.CoarseToFineClassifier', backbone=dict(type='mmdyn.CFViT'), test_cfg=dict(threshold=0.7))
    assert budget_of(Config(dict(model=model))) == dict(threshold=0.7)


def test_what_is_refused(src, tmp_path):
    with pytest.raises(ValueError, match=r'model.onnx: give a name that ends in .pth or .safetensors'):
        publish(src, tmp_path / 'model.onnx')
    with pytest.raises(ValueError, match='There is no checkpoint nowhere.pth'):
        publish('nowhere.pth', tmp_path / 'model.pth')
    content = CheckpointLoader.load_checkpoint(str(src), 'cpu')
    torch.save(dict(weights=content['state_dict']), tmp_path / 'bare.pth')
    with pytest.raises(ValueError, match=r'bare.pth has no state_dict'):
        publish(tmp_path / 'bare.pth', tmp_path / 'model.pth')
    torch.save(dict(state_dict=content['state_dict']), tmp_path / 'alone.pth')
    with pytest.raises(ValueError, match=r'alone.pth does not hold its config, .*: give it with --config'):
        publish(tmp_path / 'alone.pth', tmp_path / 'model.pth')
    (path,) = publish(tmp_path / 'alone.pth', tmp_path / 'model.pth', config=src.parent / 'config.py')
    assert torch.load(path)['meta']['metrics'] == {}
    del content['state_dict']['head.fc.bias']
    torch.save(content, tmp_path / 'less.pth')
    with pytest.raises(ValueError, match=r'differ in 1 tensors:\n  head.fc.bias: - in SRC, \(3,\) in the model\n'):
        publish(tmp_path / 'less.pth', tmp_path / 'model.pth')


def test_without_safetensors(src, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(ImportError, match='install it: pip install safetensors'):
        publish(src, tmp_path / 'model.pth', tmp_path / 'model.safetensors')
    assert not list(tmp_path.iterdir())
