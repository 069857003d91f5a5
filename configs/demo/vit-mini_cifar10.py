# The small DeiT for images of 32 pixels, on CIFAR-10 in ImageNet's layout: data/cifar10/{train,val}/<class>/*.
_base_ = './pvt-mini_cifar10.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdyn.DeiT',
        arch=dict(embed_dim=64, depth=6, num_heads=4, mlp_ratio=2),
        img_size=32,
        patch_size=4,
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
    ),
    head=dict(in_channels=64),
)
