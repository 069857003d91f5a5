"""The Swin Transformers of mmdet, mmseg and mmpretrain."""

from torch import nn

from .adapter import AdaptedStage, Stem
from .parts import drop
from .windows import Layout, WindowAdapter


class MMSwin(WindowAdapter):
    """The ``SwinBlock`` of the three."""

    block_types = (
        'mmdet.models.backbones.swin.SwinBlock',
        'mmseg.models.backbones.swin.SwinBlock',
        'mmpretrain.models.backbones.swin_transformer.SwinBlock',
    )
    part_types = {
        'attn.w_msa': (
            'mmdet.models.backbones.swin.WindowMSA',
            'mmseg.models.backbones.swin.WindowMSA',
            'mmpretrain.models.utils.attention.WindowMSA',
        ),
        'ffn': ('mmcv.cnn.bricks.transformer.FFN',),
    }

    @classmethod
    def stages(cls, model: nn.Module) -> list[AdaptedStage]:
        first = Stem([model.patch_embed], model.patch_embed.projection.stride[0])
        merged = [Stem([stage.downsample], 2) for stage in list(model.stages)[:-1]]
        return [
            AdaptedStage(list(stage.blocks), stage.blocks[0].attn.w_msa.qkv.in_features, stem)
            for stage, stem in zip(model.stages, [first, *merged])
        ]

    @property
    def window_attention(self):
        return self.block.attn.w_msa

    def layout(self, shape):
        attn = self.block.attn
        shift = attn.shift_size
        if hasattr(attn, 'pad_small_map') and not attn.pad_small_map:  # mmpretrain's
            if min(shape) < attn.window_size:
                raise ValueError(
                    f'A map of {shape[0]} x {shape[1]} cells is smaller than a window of {attn.window_size} x '
                    f'{attn.window_size}: use larger images, or pad_small_map=True.'
                )
            shift = 0 if min(shape) == attn.window_size else shift
        return Layout((attn.window_size,) * 2, (shift,) * 2, pads_first=True)

    def unpack(self, x, hw_shape):
        return x, tuple(hw_shape), {}

    def encode(self, queries, tokens, shape, num_extra, lengths, routing):
        block, ffn = self.block, self.block.ffn
        attended = self.attend(block.norm1(queries), block.norm1(tokens), shape, routing)
        queries = queries + drop(block.attn.drop, attended, lengths)
        return queries + drop(ffn.dropout_layer, ffn.gamma2(ffn.layers(block.norm2(queries))), lengths)

    def macs(self, shape, num_extra):
        return self.window_macs(shape, self.block.ffn)
