# DeiT classifier with a class token, as the DGE paper trains it.
_base_ = './pvt_cls.py'

model = dict(
    backbone=dict(_delete_=True, type='mmdyn.DeiT', arch='small', img_size=256, drop_path_rate=0.1),
    head=dict(in_channels=384),
)
