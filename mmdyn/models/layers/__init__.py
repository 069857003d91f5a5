from .attention import Attention, packed_attention
from .block import FFN, EncoderBlock
from .deformable import DeformableAttention, deformable_sampling
from .embedding import ConvStem, PatchEmbed, project_patches, to_maps
from .macs import macs_of
from .position import Positions, fit_position_embedding, position_embedding, resize_position_embedding

__all__ = [
    'FFN',
    'Attention',
    'ConvStem',
    'DeformableAttention',
    'EncoderBlock',
    'PatchEmbed',
    'Positions',
    'deformable_sampling',
    'fit_position_embedding',
    'macs_of',
    'packed_attention',
    'position_embedding',
    'project_patches',
    'resize_position_embedding',
    'to_maps',
]
