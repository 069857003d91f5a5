# DPVT classifier: as PVT's, on the mean of all tokens.
_base_ = './pvt_cls.py'

model = dict(backbone=dict(type='mmdyn.DPVT', out_type='avg_featmap'))
