"""Section 3.2 of the DGE paper in loops: one image, one region and one patch after the other."""

import itertools

import torch

from .layers import slow_change


def slow_areas(granularities, shape, region, num_extra):
    """The queries of one image: a list of (the tokens that each is the mean of, its region), in the order of the image.

    Extra tokens, of no region, come first; then the patches by their first cells, row by row.

    Args:
        granularities: of each region, as a function of its row and column: the side of its patches, 0 for none.
    """
    queries = [([extra], None) for extra in range(num_extra)]
    for row, column in itertools.product(*map(range, shape)):
        place = row // region, column // region
        side = granularities(*place)
        if side and row % side == 0 and column % side == 0:
            # The range ends with the map, so what hangs over its edge is left out of the means.
            queries.append(
                (
                    [
                        num_extra + r * shape[1] + c
                        for r in range(row, min(row + side, shape[0]))
                        for c in range(column, min(column + side, shape[1]))
                    ],
                    place,
                )
            )
    return queries


def slow_centre(cells, width):
    """Mean x and y of cells, given as indices."""
    return [sum(cell % width for cell in cells) / len(cells), sum(cell // width for cell in cells) / len(cells)]


def gates_of_region(encoder, means, noise, forced):
    """Eq. 1 to 6 for one region: {index of a granularity that runs: gate}."""
    logits = encoder.router.weight @ means + encoder.router.bias
    if not encoder.training:
        return {logits.argmax().item() if forced is None else forced: 1}
    soft = ((logits + noise) / encoder.tau).softmax(0)
    chosen = soft.argmax().item() if forced is None else forced
    run = [chosen] if encoder.train_mode == 'sparse' else range(len(soft))
    return {k: (k == chosen) + soft[k] - soft[k].detach() for k in run}


def slow_dge(encoder, block, tokens, shape, num_extra):
    """Section 3.2: the output, and eq. 7's number of queries of each image."""
    (height, width), side, phis = shape, encoder.region, encoder.granularities
    regions = list(itertools.product(range(-(-height // side)), range(-(-width // side))))
    noise = torch.zeros(len(tokens), 1 if encoder.routing == 'layer' else len(regions), len(phis))
    if encoder.training:
        noise = -torch.log(torch.empty_like(noise).exponential_())
    outputs, counts = [], []
    for image, image_noise in zip(tokens, noise):
        cells, gates = image[num_extra:].unflatten(0, shape), {}
        for region_noise, (row, column) in zip(image_noise.expand(len(regions), -1), regions):
            region = cells[row * side : (row + 1) * side, column * side : (column + 1) * side]
            means = (cells if encoder.routing == 'layer' else region).mean((0, 1))
            forced = None if encoder.forced is None else encoder.forced[row, column].item()
            gates[row, column] = gates_of_region(encoder, means, region_noise, forced)
        # Extra tokens are queries of their own. In dense training the patches of all granularities are.
        queries = [(area, 1) for area, _ in slow_areas(lambda *_: 0, shape, side, num_extra)]
        for k, phi in enumerate(phis):
            ran = {place: phi if k in gates_of else 0 for place, gates_of in gates.items()}
            areas = slow_areas(lambda *place, ran=ran: ran[place], shape, side, num_extra)
            queries += [(area, gates[place][k]) for area, place in areas if place]
        output = list(image)
        if queries:
            points = tokens.new_tensor([slow_centre(area, width) for area, _ in queries]) if block.uses_points else None
            means = torch.stack([image[area].mean(0) for area, _ in queries])
            change = slow_change(block, means, image, shape, num_extra, points)
            for (area, gate), of_query in zip(queries, change):
                for token in area:
                    output[token] = output[token] + gate * of_query
        outputs.append(torch.stack(output))
        counts.append(torch.as_tensor(sum(gate for _, gate in queries)))
    return torch.stack(outputs), torch.stack(counts)
