"""CF-ViT on one image in loops, that takes a model's weights."""

from types import SimpleNamespace

import torch

from . import vit


def half(image):
    """Bilinear, corners on corners: (3, H, H) -> (3, H / 2, H / 2)."""
    side = image.shape[1]
    at = torch.arange(side // 2).to(image)[:, None] * (side - 1) / (side // 2 - 1)
    tent = (1 - (at - torch.arange(side).to(image)).abs()).clamp(min=0)
    return torch.einsum('ir,jc,xrc->xij', tent, tent, image)


def slow_cfvit(
    model, image, count, *, side=4, columns=3, score='global', reuse='mlp', start=4, decay=0.99, chosen=None
):
    """Both stages' normed tokens (n, C), the global class attention (N,) and the ``count`` split patches.

    ``chosen`` gives the patches for a score that cannot be foreseen.
    """
    family = 'lvvit' if hasattr(model.patch_embed, 'convs') else 'deit'
    coarse = vit.patches(model.patch_embed, half(image), side) + model.coarse_pos_embed[0, 1:]
    class_token = model.cls_token[0] + model.coarse_pos_embed[0, :1]
    tokens, rows = vit.blocks(model.blocks, torch.cat([class_token, coarse]), family)
    coarse_out, attention = vit.norm(model.norm, tokens, family), torch.zeros(columns**2)
    for number, row in enumerate(rows, start=1):
        if number >= start:
            attention = decay * attention + (1 - decay) * row[1:]
    by = dict(negative=-attention, last=rows[-1][1:]).get(score, attention)
    if chosen is None:
        chosen = sorted(sorted(range(columns**2), key=by.tolist().__getitem__, reverse=True)[:count])

    def reused(token):
        # What the paper calls the stage's output is what the classifier takes: the tokens after the last norm.
        normed = vit.norm(model.reuse.norm, token, family)
        return model.reuse.mlp(normed) if reuse == 'linear' else vit.ffn(model.reuse.mlp, normed)

    fine = vit.patches(model.patch_embed, image, side)
    class_token = model.cls_token[0, 0] + model.pos_embed[0, 0]
    sequence = [class_token + reused(coarse_out[0]) if reuse == 'class_token' else class_token]
    for patch in chosen:
        row, column = divmod(patch, columns)
        for place in ((2 * row + i) * 2 * columns + 2 * column + j for i in (0, 1) for j in (0, 1)):
            token = fine[place] + model.pos_embed[0, 1 + place]
            sequence.append(token + reused(coarse_out[1 + patch]) if reuse else token)
    for patch in range(columns**2):
        if patch not in chosen:
            token = coarse[patch]
            sequence.append(token + reused(coarse_out[1 + patch]) if reuse == 'uninformative' else token)
    fine_out = vit.norm(model.norm, vit.blocks(model.blocks, torch.stack(sequence), family)[0], family)
    return SimpleNamespace(coarse=coarse_out, fine=fine_out, attention=attention, chosen=chosen)
