_base_ = [
    '../_base_/models/pvt_cls.py',
    '../_base_/datasets/imagenet_256.py',
    '../_base_/schedules/imagenet_dense_pre_30e.py',
    '../_base_/default_runtime.py',
]

load_from = 'work_dirs/pvt-large_8xb16_in1k-256px/epoch_300.pth'
model = dict(backbone=dict(arch='large', drop_path_rate=0.3, dge=dict(granularities=(1, 2, 4))))
