"""Blocks of timm, mmdet, mmseg and mmpretrain on the queries of one image in loops, that take a block's weights.

A query is the mean of its cells, and its score with a key is the mean of those that its content has at each of them.
"""

import torch

from .dge import slow_areas, slow_centre


def softmax_attention(query, key, value, num_heads, scale, bias=None):
    """(n, C) queries over (m, C) keys, one query and one head at a time; ``bias`` of a query, a key and a head."""
    rows = []
    for i, row in enumerate(query):
        heads = []
        for head, (q, k, v) in enumerate(zip(*(x.chunk(num_heads, -1) for x in (row, key, value)))):
            scores = scale * k @ q
            if bias is not None:
                scores = scores + torch.stack([torch.as_tensor(bias(i, j, head)).to(q) for j in range(len(k))])
            heads.append(scores.softmax(0) @ v)
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def fused(layer, x):
    """Queries, keys and values of a fused layer."""
    return layer(x).chunk(3, -1)


def timm_vit(block, areas, image, shape, num_extra, context):
    attn, means = block.attn, mean_of(areas, image)
    q, k, v = fused(attn.qkv, block.norm1(means))[0], *fused(attn.qkv, block.norm1(image))[1:]
    q, k = (norm(x.unflatten(-1, (attn.num_heads, -1))).flatten(-2) for norm, x in ((attn.q_norm, q), (attn.k_norm, k)))
    attended = attn.norm(softmax_attention(q, k, v, attn.num_heads, attn.scale))
    means = means + block.ls1(attn.proj(attended))
    return means + block.ls2(block.mlp(block.norm2(means)))


def timm_eva(block, areas, image, shape, num_extra, context):
    from timm.layers import apply_rot_embed_cat

    attn, means = block.attn, mean_of(areas, image)
    if attn.qkv is None:
        projected = [
            [layer(block.norm1(x)) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)] for x in (means, image)
        ]
    else:
        bias = 0 if getattr(attn, 'q_bias', None) is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        projected = [(attn.qkv(block.norm1(x)) + bias).chunk(3, -1) for x in (means, image)]
    q, k, v = projected[0][0], *projected[1][1:]
    heads, rope = attn.num_heads, context['rope']
    rope = (rope[None] if rope.ndim == 2 else rope).expand(heads, -1, -1)
    q, k = (norm(x.unflatten(-1, (heads, -1))) for norm, x in ((attn.q_norm, q), (attn.k_norm, k)))

    def rotated(x, token, head):
        """(D) of a head, at the place of a token."""
        if token < num_extra:
            return x
        return apply_rot_embed_cat(x, rope[head, token - num_extra].to(x), half=attn.rotate_half)

    rows = []
    for query, area in zip(q, areas):
        row = []
        for head in range(heads):
            keys = torch.stack([rotated(k[token, head], token, head) for token in range(len(image))])
            scores = torch.stack([keys @ rotated(query[head], token, head) for token in area]).mean(0)
            row.append((attn.scale * scores).softmax(0) @ v.unflatten(-1, (heads, -1))[:, head])
        rows.append(torch.cat(row))
    attended = attn.proj(attn.norm(torch.stack(rows)))
    means = means + (attended if block.gamma_1 is None else block.gamma_1 * attended)
    change = block.mlp(block.norm2(means))
    return means + (change if block.gamma_2 is None else block.gamma_2 * change)


def mm_vit(block, areas, image, shape, num_extra, context):
    attn, means = block.attn, mean_of(areas, image)
    q, k, v = fused(attn.qkv, block.ln1(means))[0], *fused(attn.qkv, block.ln1(image))[1:]
    attended = softmax_attention(q, k, v, attn.num_heads, attn.head_dims**-0.5)
    means = means + attn.gamma1(attn.proj(attended))
    norm = block.ln1 if 'DeiT3' in type(block).__name__ else block.ln2
    return block.ffn(norm(means), identity=means)


def convolved(conv, hidden, areas, shape):
    """The convolution of a map with each query's value at its cells; (n, C) means of the queries' cells."""
    cells = hidden.new_zeros(shape[0] * shape[1], hidden.shape[1])
    for value, area in zip(hidden, areas):
        for cell in area:
            cells[cell] = value
    done = conv(cells.T.unflatten(1, shape)[None])[0].flatten(1).T
    return torch.stack([done[area].mean(0) for area in areas])


def timm_pvt(block, areas, image, shape, num_extra, context):
    attn, mlp, means = block.attn, block.mlp, mean_of(areas, image)
    tokens = block.norm1(image)
    if attn.sr is not None:
        map_ = tokens.T.unflatten(1, shape)[None]
        tokens = attn.norm(attn.sr(map_ if attn.pool is None else attn.pool(map_))[0].flatten(1).T)
        tokens = tokens if attn.act is None else attn.act(tokens)
    k, v = attn.kv(tokens).chunk(2, -1)
    attended = softmax_attention(attn.q(block.norm1(means)), k, v, attn.num_heads, attn.scale)
    means = means + attn.proj(attended)
    hidden = convolved(mlp.dwconv, mlp.relu(mlp.fc1(block.norm2(means))), areas, shape)
    return means + mlp.fc2(mlp.act(hidden))


def mm_pyramid(block, areas, image, shape, num_extra, context):
    attn, inner, means = block.attn, block.attn.attn, mean_of(areas, image)
    tokens = block.norm1(image)
    if attn.sr_ratio > 1:
        tokens = attn.norm(attn.sr(tokens.T.unflatten(1, shape)[None])[0].flatten(1).T)
    q, k, v = (
        x @ weight.T + bias
        for x, weight, bias in zip(
            (block.norm1(means), tokens, tokens), inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3)
        )
    )
    attended = softmax_attention(q, k, v, inner.num_heads, (inner.embed_dim // inner.num_heads) ** -0.5)
    means = means + inner.out_proj(attended)
    hidden = block.norm2(means)
    for layer in block.ffn.layers:
        if getattr(layer, 'kernel_size', None) == (3, 3):
            hidden = convolved(layer, hidden, areas, shape)
        else:
            hidden = layer(hidden.T[None, :, :, None])[0, :, :, 0].T
    return means + hidden


def swin(block, areas, image, shape, attn, window, shift, pads_first, ffn):
    """Windows by the coordinates of each cell."""
    (height, width), means = [-(-side // length) * length for side, length in zip(shape, window)], mean_of(areas, image)
    turns = (height, width) if pads_first else shape
    normed = torch.cat([block.norm1(image), torch.zeros_like(image[:1])])
    q, k, v = fused(attn.qkv, block.norm1(means))[0], *fused(attn.qkv, normed)[1:]

    def shifted(cell):
        return [(at - by) % turn for at, by, turn in zip(divmod(cell, shape[1]), shift, turns)]

    def cell_at(place):
        """The cell at a shifted place, or the last row, of zeros."""
        if any(at >= turn for at, turn in zip(place, turns)):
            return len(image)
        row, column = ((at + by) % turn for at, by, turn in zip(place, shift, turns))
        return row * shape[1] + column if row < shape[0] and column < shape[1] else len(image)

    def window_of(place):
        return [at // length for at, length in zip(place, window)]

    def area_of(place):
        """Before the last window, in it, or in what the shift has brought around."""
        return [
            (at >= side - length) + (at >= side - by) if by else 0
            for at, side, length, by in zip(place, (height, width), window, shift)
        ]

    rows = []
    for query, area in zip(q, areas):
        x, y = slow_centre(area, shape[1])
        centre = shifted(int(y) * shape[1] + int(x))
        first = [at * length for at, length in zip(window_of(centre), window)]
        places = [(first[0] + i, first[1] + j) for i in range(window[0]) for j in range(window[1])]
        keys = [cell_at(place) for place in places]
        own = [
            place
            for place in map(shifted, area)
            if window_of(place) == window_of(centre) and area_of(place) == area_of(centre)
        ]

        def bias(_, key, head, own=own, places=places, centre=centre):
            of_cells = [
                attn.relative_position_bias_table[
                    (at[0] - places[key][0] + window[0] - 1) * (2 * window[1] - 1)
                    + (at[1] - places[key][1] + window[1] - 1),
                    head,
                ]
                for at in own
            ]
            return sum(of_cells) / len(own) - 100 * (area_of(places[key]) != area_of(centre))

        rows.append(softmax_attention(query[None], k[keys], v[keys], attn.num_heads, attn.scale, bias)[0])
    means = means + attn.proj(torch.stack(rows))
    return means + ffn(block.norm2(means))


def timm_swin(block, areas, image, shape, num_extra, context):
    return swin(block, areas, image, shape, block.attn, block.window_size, block.shift_size, False, block.mlp)


def mm_swin(block, areas, image, shape, num_extra, context):
    attn, shift = block.attn, block.attn.shift_size
    if getattr(attn, 'pad_small_map', True) is False and min(shape) == attn.window_size:
        shift = 0
    windows = [(side, side) for side in (attn.window_size, shift)]
    return swin(block, areas, image, shape, attn.w_msa, *windows, True, block.ffn.layers)


def mean_of(areas, image):
    return torch.stack([image[area].mean(0) for area in areas])


def slow_adapted(encode, block, tokens, choice, granularities, region, shape, num_extra, context):
    """What a block with DGE makes of tokens (B, E + H*W, C), whose regions' choices (B, rows, columns) are given."""
    outputs = []
    for image, of_image in zip(tokens, choice.tolist()):

        def side(row, column, of_image=of_image):
            return granularities[of_image[row][column]]

        areas, output = [area for area, _ in slow_areas(side, shape, region, num_extra)], list(image)
        if areas:
            change = encode(block, areas, image, shape, num_extra, context) - mean_of(areas, image)
            for area, of_query in zip(areas, change):
                for token in area:
                    output[token] = output[token] + of_query
        outputs.append(torch.stack(output))
    return torch.stack(outputs)
