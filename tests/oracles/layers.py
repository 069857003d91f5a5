"""An encoder block of one image in loops, that takes a block's weights."""

import torch


def slow_attention(attn, queries, tokens, shape, num_extra):
    """Attention of the queries (n, C) of one image over its tokens (E + H*W, C), one head and one key at a time."""
    if attn.sr_ratio > 1:
        side, cells = attn.sr_ratio, tokens[num_extra:].unflatten(0, shape)
        patches = [
            cells[row : row + side, column : column + side]
            for row in range(0, shape[0] - side + 1, side)
            for column in range(0, shape[1] - side + 1, side)
        ]
        keys = [torch.einsum('ocij,ijc->o', attn.sr.weight, patch) + attn.sr.bias for patch in patches]
        tokens = torch.cat([tokens[:num_extra], attn.norm(torch.stack(keys))])
    key, value = attn.kv(tokens).chunk(2, -1)
    heads = []
    for q, k, v in zip(*(x.chunk(attn.num_heads, -1) for x in (attn.q(queries), key, value))):
        heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return attn.proj(torch.cat(heads, -1))


def slow_deformable_attention(attn, queries, tokens, shape, points):
    """Deformable attention of the queries (n, C) at the points (n, 2) of one image, one head and one point at a time.

    Each point takes all cells, of which the tent max(0, 1 - |x - column|) max(0, 1 - |y - row|) leaves its neighbours.
    """
    offsets, logits = attn.offsets(queries), attn.attn_weight(queries)
    if offsets.requires_grad:
        offsets.register_hook(lambda gradient: gradient / 10)
    row, column = (torch.arange(side).to(tokens) for side in shape)
    heads = []
    for head, value in enumerate(attn.v(tokens).chunk(attn.num_heads, -1)):
        first = head * attn.num_points
        weights, head_sum = logits[:, first : first + attn.num_points].softmax(-1), 0
        for i, weight in enumerate(weights.unbind(-1)):
            x, y = (points[:, axis] + offsets[:, 2 * (first + i) + axis] for axis in (0, 1))
            tent_x, tent_y = ((1 - (at[:, None] - cell).abs()).clamp(min=0) for at, cell in ((x, column), (y, row)))
            head_sum = head_sum + weight[:, None] * torch.einsum(
                'nr,nc,rcd->nd', tent_y, tent_x, value.unflatten(0, shape)
            )
        heads.append(head_sum)
    return attn.proj(torch.cat(heads, -1))


def slow_change(block, queries, tokens, shape, num_extra, points=None):
    """enc(q) - q of the queries (n, C) of one image: pre-norm attention to the tokens (E + H*W, C), then the FFN."""
    q, t = block.norm1(queries), block.norm1(tokens)
    attended = queries + (
        slow_attention(block.attn, q, t, shape, num_extra)
        if points is None
        else slow_deformable_attention(block.attn, q, t, shape, points)
    )
    hidden = block.ffn.fc1(block.norm2(attended))
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return attended + block.ffn.fc2(hidden) - queries
