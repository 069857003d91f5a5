_base_ = './_base_/camvid.py'

model = dict(backbone=dict(type='mmdyn.DPVT', arch=dict(_delete_=True, **_base_.dpvt_mini)))
