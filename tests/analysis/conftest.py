"""A small list of rows that trains in a second, for the tests of results."""

import cv2
import numpy as np
import pytest

from mmdyn.analysis.results import Results, Row, import_frameworks

CONFIG = """
default_scope = 'mmpretrain'
data_root = {root!r}
data_source = 'ask the test'
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
loader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type='mmdyn.CustomDataset', data_root=data_root, data_prefix='train', pipeline=pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
train_dataloader = test_dataloader = loader
test_evaluator = [dict(type='Accuracy', topk=1), dict(type='mmdyn.DynamicFLOPs')]
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[127.5] * 3, std=[64.0] * 3),
    backbone=dict(
        type='mmdyn.DeiT', arch=dict(embed_dim=8, depth=1, num_heads=2, mlp_ratio=1), img_size=16, patch_size=4
    ),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=8, loss=dict(type='CrossEntropyLoss')),
)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
train_cfg = dict(by_epoch=True, max_epochs=3)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1), checkpoint=dict(type='CheckpointHook', interval=1))
still = dict(optim_wrapper=dict(optimizer=dict(lr=0.0)))
dge = dict(model=dict(backbone=dict(dge=dict(granularities=(1, 2)))))
watched = dict(custom_hooks=[dict(type='KilledOnce', file={file!r})])
"""
ROW = dict(config='small.py', table='small')


@pytest.fixture
def small(tmp_path):
    """Write a config, and make the results of rows."""
    rng = np.random.default_rng(0)
    for name in ('cat', 'dog'):
        (tmp_path / 'data/train' / name).mkdir(parents=True)
        for number in range(4):
            cv2.imwrite(
                str(tmp_path / f'data/train/{name}/{number}.png'), rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            )
    (tmp_path / 'small.py').write_text(CONFIG.format(root=str(tmp_path / 'data'), file=str(tmp_path / 'iterations')))

    def make(*rows):
        rows = {row['name']: Row(**{**ROW, 'label': row['name'], **row}) for row in rows}
        (tmp_path / 'runs').mkdir(exist_ok=True)
        results = Results(rows, tmp_path, tmp_path / 'runs')
        import_frameworks(results)
        return results

    return make
