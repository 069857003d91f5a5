from .attention import Attention, packed_attention
from .block import FFN, EncoderBlock
from .embedding import PatchEmbed, fit_position_embedding, position_embedding, resize_position_embedding

__all__ = [
    'FFN', 'Attention', 'EncoderBlock', 'PatchEmbed', 'fit_position_embedding', 'packed_attention',
    'position_embedding', 'resize_position_embedding'
]
