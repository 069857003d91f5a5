_base_ = './mask-rcnn_pvt-mini-dge_overfit-coco.py'

model = dict(backbone=dict(type='mmdyn.DPVT', arch=dict(_delete_=True, **_base_.dpvt_mini)))
# With a smaller step regions stay undecided, and the query ratio in test, without noise, misses the one in training.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'.router': dict(lr_mult=10.0)}))
