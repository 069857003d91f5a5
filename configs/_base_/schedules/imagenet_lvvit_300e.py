# LV-ViT's recipe: as DeiT's, with a learning rate of 1.6e-3 for 1024 images.
_base_ = './imagenet_deit_300e.py'

optim_wrapper = dict(optimizer=dict(lr=1.6e-3))
