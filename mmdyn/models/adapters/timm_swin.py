"""timm's Swin Transformer."""

from torch import nn

from .adapter import AdaptedStage, Stem
from .parts import drop
from .windows import Layout, WindowAdapter


class TimmSwin(WindowAdapter):
    """timm's ``SwinTransformerBlock``, on maps (B, H, W, C)."""

    block_types = ('timm.models.swin_transformer.SwinTransformerBlock',)
    part_types = dict(attn=('timm.models.swin_transformer.WindowAttention',))

    @classmethod
    def stages(cls, model: nn.Module) -> list[AdaptedStage]:
        first = Stem([model.patch_embed], model.patch_embed.patch_size[0])
        merged = [Stem([stage.downsample], 2) for stage in list(model.layers)[1:]]
        return [
            AdaptedStage(list(stage.blocks), stage.blocks[0].dim, stem)
            for stage, stem in zip(model.layers, [first, *merged])
        ]

    @property
    def window_attention(self):
        return self.block.attn

    def layout(self, shape):
        return Layout(self.block.window_size, self.block.shift_size, pads_first=False)

    def unpack(self, x):
        return x.flatten(1, 2), tuple(x.shape[1:3]), {}

    def encode(self, queries, tokens, shape, num_extra, lengths, routing):
        block = self.block
        attended = self.attend(block.norm1(queries), block.norm1(tokens), shape, routing)
        queries = queries + drop(block.drop_path1, attended, lengths)
        return queries + drop(block.drop_path2, block.mlp(block.norm2(queries)), lengths)

    def macs(self, shape, num_extra):
        return self.window_macs(shape, self.block.mlp)
