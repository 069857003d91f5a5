"""A plain ViT of one image in loops, that takes a model's weights."""

import torch

# Factor of the branches, and epsilon of the norms.
FAMILIES = dict(deit=(1, 1e-6), lvvit=(0.5, 1e-5))


def norm(layer, x, family):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + FAMILIES[family][1]).sqrt() * layer.weight + layer.bias


def ffn(layer, x):
    hidden = layer.fc1(x)
    return layer.fc2(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)


def patches(embed, image, side):
    """(3, H, W) -> (h*w, C), of a linear projection or, where there are convolutions, of LV-ViT's stem."""
    if hasattr(embed, 'convs'):
        side //= 2
        for conv, batch_norm, stride in zip(embed.convs[0::3], embed.convs[1::3], (2, 1, 1), strict=True):
            x = torch.conv2d(image[None], conv.weight, None, stride, conv.weight.shape[2] // 2)[0]
            x = (x - batch_norm.running_mean[:, None, None]) / (batch_norm.running_var[:, None, None] + 1e-5).sqrt()
            image = (x * batch_norm.weight[:, None, None] + batch_norm.bias[:, None, None]).clamp(min=0)
    return (
        torch.stack(
            [
                torch.einsum('ocij,cij->o', embed.proj.weight, image[:, row : row + side, column : column + side])
                for row in range(0, image.shape[1], side)
                for column in range(0, image.shape[2], side)
            ]
        )
        + embed.proj.bias
    )


def blocks(layers, tokens, family):
    """(n, C) tokens -> the last block's output, and each block's (n,) class attention, mean of the heads."""
    rows, scale = [], FAMILIES[family][0]
    for block in layers:
        attn, normed = block.attn, norm(block.norm1, tokens, family)
        query, (key, value) = attn.q(normed), attn.kv(normed).chunk(2, -1)
        matrices, heads = [], []
        for q, k, v in zip(*(x.chunk(attn.num_heads, -1) for x in (query, key, value))):
            matrices.append((q @ k.T / q.shape[1] ** 0.5).softmax(-1))
            heads.append(matrices[-1] @ v)
        rows.append(torch.stack(matrices).mean(0)[0])
        tokens = tokens + scale * attn.proj(torch.cat(heads, -1))
        tokens = tokens + scale * ffn(block.ffn, norm(block.norm2, tokens, family))
    return tokens, rows
