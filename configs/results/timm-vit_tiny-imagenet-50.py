_base_ = './_base_/tiny-imagenet-50.py'

# timm's ViT with the sizes of deit_tiny-imagenet-50.py, and weights as that one's: what timm calls 'jax'.
model = dict(
    type='mmdyn.WithDGE',
    backbone=dict(
        type='mmpretrain.TimmClassifier',
        model_name='vit_tiny_patch16_224',
        img_size=64,
        patch_size=8,
        embed_dim=64,
        depth=6,
        num_heads=4,
        num_classes=50,
        weight_init='jax',
        data_preprocessor=_base_.data_preprocessor,
    ),
)
# What is made dynamic is the whole classifier: it has no backbone of its own.
dge = dict(model=dict(dge=dict(granularities=(1, 2, 4))))
finetune = dict(model=dict(_delete_=True, dge=dict(train_mode='dense')))
