"""CF-ViT: a plain vision transformer that looks at an image coarsely, and again more finely where it matters."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from ...registry import MODELS
from ...values import MOST, check_choice, check_integer, check_number, is_integer
from ..cfvit import FeatureReuse, fine_sequence, num_informative, select, update_score
from ..cost import BackboneCost, CostMeter, LayerCost
from ..layers import position_embedding, resize_position_embedding
from ..stage import run_blocks
from ..thread_local import ThreadLocal
from .base import NoPassError
from .options import choose_arch
from .vit import PlainViT

SCORES = ('global', 'last', 'random', 'negative')
REUSES = ('mlp', 'linear', 'class_token', 'uninformative', None)
FAMILIES_OF_ARCHS = {
    **{f'deit-{name}': ('deit', name) for name in PlainViT.families['deit']['archs']},
    **{f'lvvit-{name}': ('lvvit', name) for name in PlainViT.families['lvvit']['archs']},
}


class CoarseStage(NamedTuple):
    """What the coarse stage leaves to the fine one.

    Attributes:
        tokens: (B, 1 + N, C), normed output of the last block.
        embedded: (B, N, C), coarse patches with their position embedding.
        score: (B, N), how informative each coarse patch is.
    """

    tokens: Tensor
    embedded: Tensor
    score: Tensor


@MODELS.register_module()
class CFViT(PlainViT):
    """`CF-ViT <https://arxiv.org/abs/2203.03821>`_ on DeiT or LV-ViT.

    The coarse stage sees the image at half the side as ``coarse_size`` x ``coarse_size`` patches, the fine stage four
    patches in place of each informative one. Both share all weights but the position embeddings. Weights have the names
    of :class:`DeiT` and :class:`LVViT`, whose checkpoints can start a training.

    Args:
        arch: ``'deit-tiny'``, ``'deit-small'``, ``'deit-base'``, ``'lvvit-small'``, ``'lvvit-medium'``, or a dict of
            ``family`` (``'deit'`` or ``'lvvit'``), ``embed_dim, depth, num_heads, mlp_ratio``.
        coarse_size: rows and columns of coarse patches.
        img_size: side of the images; 2 * patch_size * coarse_size, which is the default.
        alpha: share of the coarse patches that is split, in [0, 1].
        ema_decay: beta of eq. 9.
        ema_start: block, counted from 1, at which the global class attention begins.
        score: ``'global'`` class attention, that of the ``'last'`` block, ``'random'``, or ``'negative'`` global class
            attention (table 4).
        reuse: ``'mlp'``, ``'linear'``, MLP with the ``'class_token'`` or with ``'uninformative'`` tokens as well, or
            None (table 5).
        in_channels, patch_size, drop_path_rate, frozen_stages, with_cp, interpolate_mode, norm_eps, init_cfg: as for
            :class:`DeiT`.
        out_type: ``'cls_token'`` (B, C) or ``'raw'`` (B, n, C). Defaults to the class token for DeiT, and for LV-ViT to
            all tokens, of which its head needs the patches.

    Attributes:
        plain_config: the config of the plain backbone that a stage on all patches is, DeiT or LV-ViT.
        split_all: in training, split all patches, whatever their score; see
            :class:`~mmdyn.engine.FineSelectionHook`.
        last_stage: images and tokens of the stage that the thread ran last, and whether it was the fine one.
    """

    last_stage: ThreadLocal[tuple[int, int, bool]] = ThreadLocal()

    def __init__(
        self,
        arch: str | dict = 'deit-small',
        coarse_size: int = 7,
        img_size: int | None = None,
        alpha: float = 0.5,
        ema_decay: float = 0.99,
        ema_start: int = 4,
        score: str = 'global',
        reuse: str | None = 'mlp',
        in_channels: int = 3,
        patch_size: int = 16,
        out_type: str | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        interpolate_mode: str = 'bilinear',
        norm_eps: float | None = None,
        init_cfg: dict | list[dict] | None = None,
    ):
        family, numbers = self._family_of(arch)
        check_integer('coarse_size', coarse_size, 1, MOST, 'the rows and columns of coarse patches')
        check_integer('patch_size', patch_size, 1, MOST, 'the side of a patch in pixels')
        side = 2 * patch_size * coarse_size
        if img_size not in (None, side):
            raise ValueError(
                f'img_size={img_size!r} does not fit coarse_size={coarse_size}: twice {coarse_size} patches '
                f'of {patch_size} pixels are {side}. Write img_size={side}, or another coarse_size.'
            )
        for name, value in (('alpha', alpha), ('ema_decay', ema_decay)):
            check_number(name, value, '[0, 1]')
        for name, value, allowed in (('score', score, SCORES), ('reuse', reuse, REUSES)):
            check_choice(name, value, allowed)
        out_type = out_type if out_type is not None else ('raw' if family == 'lvvit' else 'cls_token')
        if out_type not in ('raw', 'cls_token'):
            raise ValueError(f"out_type={out_type!r}: choose 'cls_token' or 'raw'; a fine sequence is no map.")
        plain = dict(
            arch=numbers,
            img_size=side,
            in_channels=in_channels,
            patch_size=patch_size,
            out_type=out_type,
            interpolate_mode=interpolate_mode,
            norm_eps=norm_eps,
        )
        super().__init__(
            family,
            **plain,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.plain_config = dict(plain, type='mmdyn.LVViT' if family == 'lvvit' else 'mmdyn.DeiT')
        if not is_integer(ema_start, 1, len(self.blocks)):
            raise ValueError(f'ema_start={ema_start!r}: choose a block from 1 to {len(self.blocks)}.')
        self.coarse_size, self.side, self.alpha = coarse_size, side, alpha
        self.score, self.reuse_kind = score, reuse
        self.ema_decay, self.ema_start, self.split_all = ema_decay, ema_start, False
        dim = self.pos_embed.shape[2]
        self.coarse_pos_embed = position_embedding(1, (coarse_size,) * 2, dim)
        if reuse:
            ratio = choose_arch(numbers, self.families[family]['archs'])['mlp_ratio']
            self.reuse = FeatureReuse(dim, ratio, 'linear' if reuse == 'linear' else 'mlp', self.norm.eps)
        self._register_load_state_dict_pre_hook(start_from_plain, with_module=True)
        self.freeze()

    def _family_of(self, arch):
        if isinstance(arch, dict):
            numbers = dict(arch)
            family = numbers.pop('family', None)
            if family not in [*self.families]:
                raise ValueError(f'arch has family={family!r}: choose from {tuple(self.families)}.')
            return family, numbers
        if arch not in [*FAMILIES_OF_ARCHS]:
            raise ValueError(
                f'Unknown arch {arch!r}: choose from {sorted(FAMILIES_OF_ARCHS)}, or give a dict of '
                'family, embed_dim, depth, num_heads, mlp_ratio.'
            )
        return FAMILIES_OF_ARCHS[arch]

    def position_embeddings(self):
        yield from super().position_embeddings()
        yield 'coarse_pos_embed', (self.coarse_size,) * 2, 1

    def coarse(self, images: Tensor) -> CoarseStage:
        """The coarse stage: (B, 3, H, W) images."""
        if tuple(images.shape[-2:]) != (self.side, self.side):
            raise ValueError(
                f'Images of {images.shape[-2]} x {images.shape[-1]} do not fit coarse_size='
                f'{self.coarse_size}: resize or crop them to {self.side} x {self.side}.'
            )
        half = F.interpolate(images, (self.side // 2,) * 2, mode='bilinear', align_corners=True)
        patches, _ = self.patch_embed(half)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1).type_as(patches), patches], dim=1)
        tokens = tokens + self.coarse_pos_embed
        embedded, shape = tokens[:, 1:], (1, tokens.shape[1] - 1)
        score = torch.zeros(embedded.shape[:2], device=images.device)
        tokens, rows = run_blocks(self, tokens.clone(), shape, stop=self._first_watched), []
        tokens = run_blocks(self, tokens, shape, self._first_watched, class_rows=rows)
        for row in rows:
            score = update_score(score, row[:, 1:], self.ema_decay)
        if self.score == 'random':
            score = torch.rand_like(score)
        self._spent(images.shape[0], tokens.shape[1], fine=False)
        return CoarseStage(self.norm(tokens), embedded, -score if self.score == 'negative' else score)

    def fine(self, images: Tensor, coarse: CoarseStage) -> tuple[Tensor, Tensor]:
        """The fine stage: images and their coarse stage -> (B, n, C) normed output, (B, k) split patches."""
        every = self.training and self.split_all
        num = self.coarse_size**2
        count = num if every else num_informative(self.alpha, num)
        chosen, rest = select(coarse.score, count)
        patches, _ = self.patch_embed(images)
        class_token = self.cls_token.expand(images.shape[0], -1, -1).type_as(patches)
        others = coarse.embedded
        if self.reuse_kind:
            reused = self.reuse(coarse.tokens if self.reuse_kind == 'class_token' else coarse.tokens[:, 1:])
            if self.reuse_kind == 'class_token':
                class_token, reused = class_token + reused[:, :1], reused[:, 1:]
            patches = patches + self._upsample(reused)
            if self.reuse_kind == 'uninformative':
                others = others + reused
        tokens = fine_sequence(
            class_token + self.pos_embed[:, :1], patches + self.pos_embed[:, 1:], others, chosen, rest, self.coarse_size
        )
        tokens = run_blocks(self, tokens, (1, tokens.shape[1] - 1))
        self._spent(images.shape[0], tokens.shape[1], fine=True)
        return self.norm(tokens), chosen

    def output(self, tokens: Tensor) -> Tensor:
        """What ``out_type`` names of a stage's (B, n, C) tokens."""
        return tokens[:, 0] if self.out_type == 'cls_token' else tokens

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) images -> the outputs of the coarse and of the fine stage, without early exit."""
        coarse = self.coarse(x)
        return self.output(coarse.tokens), self.output(self.fine(x, coarse)[0])

    @property
    def _first_watched(self) -> int:
        """The block from which on class attention enters the score."""
        return dict(last=len(self.blocks) - 1, random=len(self.blocks)).get(self.score, self.ema_start - 1)

    def _upsample(self, tokens: Tensor) -> Tensor:
        """(B, N, C) tokens of the coarse grid -> (B, 4 * N, C), each four times."""
        grid = tokens.transpose(1, 2).unflatten(2, (self.coarse_size,) * 2)
        return F.interpolate(grid, scale_factor=2, mode='nearest').flatten(2).transpose(1, 2)

    def stage_macs(self) -> tuple[int, int]:
        """Multiply-adds that the coarse stage spends on an image, and those that the fine stage adds."""
        num = self.coarse_size**2
        fine = 1 + num + 3 * num_informative(self.alpha, num)
        return self._stage_cost(1, 1 + num, fine=False).dense, self._stage_cost(1, fine, fine=True).dense

    def _stage_cost(self, images: int, tokens: int, fine: bool) -> BackboneCost:
        layers, queries = [], torch.full((images,), tokens)
        for index, block in enumerate(self.blocks):
            query, static = block.macs((1, tokens - 1), 1)
            if index >= self._first_watched and not fine:
                static += tokens * self.norm.weight.numel()  # one row of attention scores for each head
            layers.append(LayerCost(f'blocks.{index}', query, static, 0, queries, tokens, False))
        reused = self.coarse_size**2 + (self.reuse_kind == 'class_token')
        grid = self.shape if fine else (self.coarse_size,) * 2
        stem = self.patch_embed.macs(grid) + (reused * self.reuse.macs() if fine and self.reuse_kind else 0)
        return BackboneCost(layers, stem)

    def _spent(self, images: int, tokens: int, fine: bool) -> None:
        self.last_stage = images, tokens, fine
        CostMeter.publish(self)

    def _cost(self) -> BackboneCost:
        """Of the stage that ran last; each stage is an account of its own."""
        if self.last_stage is None:
            raise NoPassError.of(self)
        return self._stage_cost(*self.last_stage)

    def frozen_modules(self):
        yield from super().frozen_modules()
        if self.frozen_stages >= 0 and hasattr(self, 'coarse_pos_embed'):
            yield self.coarse_pos_embed


def start_from_plain(backbone: CFViT, state: dict, prefix: str, *_) -> None:
    """Before loading: let a plain DeiT or LV-ViT start the two stages."""
    fine, coarse = f'{prefix}pos_embed', f'{prefix}coarse_pos_embed'
    if fine not in state or coarse in state:
        return
    state[coarse] = resize_position_embedding(
        state[fine], backbone.shape, (backbone.coarse_size,) * 2, 1, backbone.interpolate_mode
    )
    state.update({prefix + name: value for name, value in backbone.state_dict().items() if name.startswith('reuse.')})
    print_log(
        'CFViT: the checkpoint is of a plain model. The coarse position embedding is resized from its own; the '
        'feature reuse keeps its initial values.',
        logger='current',
    )
