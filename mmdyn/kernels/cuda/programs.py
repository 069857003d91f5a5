"""Programs in Triton. This module is imported when one is first needed: it compiles for the device that there is."""

import triton
import triton.language as tl


@triton.jit
def rate_regions(
    tokens,
    weight,
    bias,
    logits,
    height,
    width,
    num_extra,
    channels,
    SIDE: tl.constexpr,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each region: the logits of the mean of its tokens.

    tokens: (B, E + H*W, C); weight: (OPTIONS, C); bias: (OPTIONS); logits: (B, rows * columns, OPTIONS).
    """
    region, image = tl.program_id(0), tl.program_id(1)
    columns = tl.cdiv(width, SIDE)
    top, left = region // columns * SIDE, region % columns * SIDE
    lines, cells = tl.minimum(SIDE, height - top), tl.minimum(SIDE, width - left)
    channel = tl.arange(0, BLOCK)
    is_channel = channel < channels
    first = image.to(tl.int64) * (num_extra + height * width) + num_extra + top * width + left
    total = tl.zeros((BLOCK,), tl.float32)
    for line in range(lines):
        for cell in range(cells):
            address = tokens + (first + line * width + cell) * channels + channel
            total += tl.load(address, mask=is_channel, other=0).to(tl.float32)
    mean = total / (lines * cells).to(tl.float32)
    for k in tl.static_range(OPTIONS):
        row = tl.load(weight + k * channels + channel, mask=is_channel, other=0).to(tl.float32)
        logit = tl.sum(mean * row, 0) + tl.load(bias + k).to(tl.float32)
        tl.store(logits + (image * columns * tl.cdiv(height, SIDE) + region) * OPTIONS + k, logit)


@triton.jit
def number_queries(
    choice,
    starts,
    totals,
    height,
    width,
    num_extra,
    REGION: tl.constexpr,
    GRANULARITIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each image: the first query of each region, counted from 0 in the image, and how many queries there are.

    choice, starts: (B, rows * columns); totals: (B). The extra tokens are the first queries.
    """
    image = tl.program_id(0)
    columns = tl.cdiv(width, REGION)
    regions = columns * tl.cdiv(height, REGION)
    total = num_extra
    for begin in range(0, regions, BLOCK):
        region = begin + tl.arange(0, BLOCK)
        chosen = tl.load(choice + image * regions + region, mask=region < regions, other=0)
        lines = tl.minimum(REGION, height - region // columns * REGION)
        cells = tl.minimum(REGION, width - region % columns * REGION)
        count = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(len(GRANULARITIES)):
            if GRANULARITIES[k] > 0:
                patches = tl.cdiv(lines, GRANULARITIES[k]) * tl.cdiv(cells, GRANULARITIES[k])
                count = tl.where(chosen == k, patches, count)
        count = tl.where(region < regions, count, 0)
        ends = total + tl.cumsum(count, 0)
        tl.store(starts + image * regions + region, ends - count, mask=region < regions)
        total += tl.sum(count, 0)
    tl.store(totals + image, total)


@triton.jit
def write_queries(
    choice,
    starts,
    bases,
    query,
    patches,
    num,
    places,
    height,
    width,
    num_extra,
    REGION: tl.constexpr,
    GRANULARITIES: tl.constexpr,
    CELLS: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """Of each region: the query of each of its tokens, and the patch of each of its queries.

    bases: (B), the first query of each image, which has places for so many; query: (B, E + H*W), num where there is
    none; patches: (N, 3), first token through all images, rows, columns. CELLS and EXTRA are no less than a region's
    cells and the extra tokens.
    """
    region, image = tl.program_id(0), tl.program_id(1)
    columns = tl.cdiv(width, REGION)
    regions = columns * tl.cdiv(height, REGION)
    size = num_extra + height * width
    base = tl.load(bases + image)
    if region == 0:
        extra = tl.arange(0, EXTRA)
        is_extra = extra < num_extra
        tl.store(query + image * size + extra, tl.where(extra < places, base + extra, num), mask=is_extra)
        is_extra = is_extra & (extra < places)
        patch = patches + 3 * (base + extra)
        tl.store(patch, image * size + extra, mask=is_extra)
        tl.store(patch + 1, 1, mask=is_extra)
        tl.store(patch + 2, 1, mask=is_extra)

    chosen = tl.load(choice + image * regions + region)
    side = 0
    for k in tl.static_range(len(GRANULARITIES)):
        side = tl.where(chosen == k, GRANULARITIES[k], side)
    step = tl.maximum(side, 1)
    top, left = region // columns * REGION, region % columns * REGION
    lines, cells = tl.minimum(REGION, height - top), tl.minimum(REGION, width - left)
    cell = tl.arange(0, CELLS)
    line, column = cell // REGION, cell % REGION
    is_cell = (line < lines) & (column < cells)
    place = tl.load(starts + image * regions + region) + line // step * tl.cdiv(cells, step) + column // step
    has_query = (side > 0) & (place < places)
    token = image * size + num_extra + (top + line) * width + left + column
    tl.store(query + token, tl.where(has_query, base + place, num), mask=is_cell)
    is_first = is_cell & has_query & (line % step == 0) & (column % step == 0)
    patch = patches + 3 * (base + place)
    tl.store(patch, token, mask=is_first)
    tl.store(patch + 1, tl.minimum(step, lines - line), mask=is_first)
    tl.store(patch + 2, tl.minimum(step, cells - column), mask=is_first)


@triton.jit
def sum_of_patch(tokens, patches, query, size, image_stride, width, channels, BLOCK: tl.constexpr):
    """The sum of a query's tokens, (BLOCK) in float32, and their number."""
    first, rows = tl.load(patches + 3 * query), tl.load(patches + 3 * query + 1)
    columns = tl.load(patches + 3 * query + 2)
    channel = tl.arange(0, BLOCK)
    cell = tokens + (first // size) * image_stride + (first % size) * channels + channel
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        for column in range(columns):
            offset = (row * width + column) * channels
            total += tl.load(cell + offset, mask=channel < channels, other=0).to(tl.float32)
    return total, rows * columns


@triton.jit
def reduce_tokens(tokens, patches, out, size, image_stride, width, channels, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Of each query: the sum of its tokens, or their mean. tokens: (B, size, C), out: (N, C)."""
    query, channel = tl.program_id(0), tl.arange(0, BLOCK)
    total, count = sum_of_patch(tokens, patches, query, size, image_stride, width, channels, BLOCK)
    if MEAN:
        total = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(out + query.to(tl.int64) * channels + channel, total.to(out.dtype.element_ty), mask=channel < channels)


@triton.jit
def store_normed(value, row, weight, bias, epsilon, normed, statistics, channels, BLOCK: tl.constexpr):
    """Layer norm of a row (BLOCK) in float32; of ``statistics`` (N, 2) the mean and the inverse deviation."""
    channel = tl.arange(0, BLOCK)
    is_channel = channel < channels
    mean = tl.sum(tl.where(is_channel, value, 0.0), 0) / channels
    centred = tl.where(is_channel, value - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, 0) / channels + epsilon)
    scale = tl.load(weight + channel, mask=is_channel, other=0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0).to(tl.float32)
    address = normed + row.to(tl.int64) * channels + channel
    tl.store(address, (centred * inverse * scale + shift).to(normed.dtype.element_ty), mask=is_channel)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, inverse)


@triton.jit
def reduce_and_norm(
    tokens,
    patches,
    weight,
    bias,
    out,
    normed,
    statistics,
    size,
    image_stride,
    width,
    channels,
    epsilon,
    BLOCK: tl.constexpr,
):
    """Of each query: the mean of its tokens, and that after a layer norm. out, normed: (N, C)."""
    query, channel = tl.program_id(0), tl.arange(0, BLOCK)
    total, count = sum_of_patch(tokens, patches, query, size, image_stride, width, channels, BLOCK)
    mean = (total / tl.maximum(count, 1).to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + query.to(tl.int64) * channels + channel, mean, mask=channel < channels)
    store_normed(mean.to(tl.float32), query, weight, bias, epsilon, normed, statistics, channels, BLOCK)


@triton.jit
def add_and_norm(
    x,
    change,
    weight,
    bias,
    total,
    normed,
    statistics,
    channels,
    epsilon,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each row: the layer norm of the sum of two, and if it is to be kept the sum. x, change, total: (N, C)."""
    row, channel = tl.program_id(0), tl.arange(0, BLOCK)
    place, is_channel = row.to(tl.int64) * channels + channel, channel < channels
    value = tl.load(x + place, mask=is_channel, other=0).to(tl.float32)
    value += tl.load(change + place, mask=is_channel, other=0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    if KEEP:
        tl.store(total + place, rounded, mask=is_channel)
    store_normed(rounded.to(tl.float32), row, weight, bias, epsilon, normed, statistics, channels, BLOCK)


@triton.jit
def spread_queries(
    change,
    query,
    patches,
    tokens,
    out,
    num,
    total,
    channels,
    ADD: tl.constexpr,
    SHARE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each token: what its query has, or its equal share of that; added to the token, or alone.

    change: (N, C); tokens, out: (total, C).
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, BLOCK)
    served = tl.load(query + token, mask=token < total, other=num)
    has_query = served < num
    mask = has_query[:, None] & (channel < channels)[None]
    value = tl.load(change + served.to(tl.int64)[:, None] * channels + channel[None], mask=mask, other=0)
    if SHARE:
        rows = tl.load(patches + 3 * served + 1, mask=has_query, other=1)
        cells = rows * tl.load(patches + 3 * served + 2, mask=has_query, other=1)
        value = value.to(tl.float32) / cells.to(tl.float32)[:, None]
    place = token.to(tl.int64)[:, None] * channels + channel[None]
    inside = (token < total)[:, None] & (channel < channels)[None]
    if ADD:
        value = tl.load(tokens + place, mask=inside, other=0) + value.to(tokens.dtype.element_ty)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def corners(x, y, height, width):
    """Around a point: the first corner's cell, its distances from it, and which of the four corners are on the map."""
    left, top = tl.floor(x), tl.floor(y)
    column, row = left.to(tl.int32), top.to(tl.int32)
    has_left, has_right = (column >= 0) & (column < width), (column >= -1) & (column + 1 < width)
    has_top, has_bottom = (row >= 0) & (row < height), (row >= -1) & (row + 1 < height)
    inside = has_left & has_top, has_right & has_top, has_left & has_bottom, has_right & has_bottom
    return row * width + column, x - left, y - top, inside


@triton.jit
def sample_points(
    value, points, weights, image, out, height, width, heads, channels, POINTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each head of each query: the weighted sum of a map's values at its points.

    value: (B, H*W, heads, D); points: (N, heads, POINTS, 2); weights: (N, heads, POINTS); image: (N);
    out: (N, heads, D).
    """
    item, head = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    is_channel = channel < channels
    pitch = heads * channels
    start = tl.load(image + tl.program_id(0)).to(tl.int64) * height * width * pitch + head * channels + channel
    total = tl.zeros((BLOCK,), tl.float32)
    for point in tl.static_range(POINTS):
        place = points + 2 * (item * POINTS + point)
        cell, to_right, to_bottom, inside = corners(tl.load(place), tl.load(place + 1), height, width)
        weight = tl.load(weights + item * POINTS + point).to(tl.float32)
        sample = tl.zeros((BLOCK,), tl.float32)
        for corner in tl.static_range(4):
            share = (to_right if corner % 2 else 1 - to_right) * (to_bottom if corner // 2 else 1 - to_bottom)
            address = value + start + (cell + corner // 2 * width + corner % 2) * pitch
            sample += share * tl.load(address, mask=is_channel & inside[corner], other=0).to(tl.float32)
        total += weight * sample
    tl.store(out + item * channels + channel, total.to(out.dtype.element_ty), mask=is_channel)


@triton.jit
def sample_points_backward(
    of_out,
    value,
    points,
    weights,
    image,
    of_value,
    of_points,
    of_weights,
    height,
    width,
    heads,
    channels,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The derivatives of :func:`sample_points`; those of the values are added to what is there."""
    item, head = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    is_channel = channel < channels
    pitch = heads * channels
    start = tl.load(image + tl.program_id(0)).to(tl.int64) * height * width * pitch + head * channels + channel
    gradient = tl.load(of_out + item * channels + channel, mask=is_channel, other=0).to(tl.float32)
    for point in tl.static_range(POINTS):
        place = 2 * (item * POINTS + point)
        x, y = tl.load(points + place), tl.load(points + place + 1)
        cell, to_right, to_bottom, inside = corners(x, y, height, width)
        weight = tl.load(weights + item * POINTS + point).to(tl.float32)
        of_weight, of_x, of_y = 0.0, 0.0, 0.0
        for corner in tl.static_range(4):
            across = to_right if corner % 2 else 1 - to_right
            down = to_bottom if corner // 2 else 1 - to_bottom
            address = start + (cell + corner // 2 * width + corner % 2) * pitch
            mask = is_channel & inside[corner]
            product = tl.sum(gradient * tl.load(value + address, mask=mask, other=0).to(tl.float32), 0)
            of_weight += across * down * product
            of_x += weight * (down if corner % 2 else -down) * product
            of_y += weight * (across if corner // 2 else -across) * product
            tl.atomic_add(of_value + address, weight * across * down * gradient, mask=mask)
        tl.store(of_weights + item * POINTS + point, of_weight)
        tl.store(of_points + place, of_x)
        tl.store(of_points + place + 1, of_y)
