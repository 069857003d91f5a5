_base_ = './fpn_pvt-mini-dge_overfit-ade.py'

model = dict(backbone=dict(type='mmdyn.DPVT', arch=dict(_delete_=True, **_base_.dpvt_mini)))
