_base_ = './pvt_cifar10.py'

model = dict(backbone=dict(type='mmdyn.DPVT', arch=dict(_delete_=True, **_base_.dpvt_mini), out_type='avg_featmap'))
