#include "common.h"
#if HAS_VECTORS
#include "attention.h"
#include "sampling.h"
#include <math.h>

TARGET void attend(const Encoding *e, const Panel *panel, int64_t head, Vector *scratch) {
    int64_t row = 2 * e->block.dim, dim = e->block.dim / e->block.heads, keys = e->keys, ld = panel->vectors, image = 0;
    float scale = 1 / sqrtf((float)dim);
    const Vector *query = panel->matrix[Q] + head * dim * ld;
    Vector *out = panel->matrix[A] + head * dim * ld, *scores = scratch, *sums = scratch + keys * MAX_VECTORS;
    for (int64_t start = 0, stop; start < panel->count; start = stop) {
        while (e->ends[image] <= panel->first + start) image++;
        stop = min(e->ends[image] - panel->first, panel->count);
        const float *key = e->kv + image * keys * row + head * dim, *value = key + e->block.dim;
        /* Vectors that have queries of the image, and perhaps of its neighbours. */
        int64_t first = start / LANES, vectors = ceil_div(stop, LANES) - first;
        int64_t columns = stop - first * LANES;
        product(columns, key, row, 1, keys, dim, query + first, ld, 0, scores, vectors, 0);
        Vector factors[MAX_VECTORS];
        for (int64_t r = 0; r < vectors; r++) factors[r] = softmax(scores + r, keys, vectors, scale);
        if (e->block.class_rows && panel->first + start == (image ? e->ends[image - 1] : 0)) {
            float *weights = e->block.class_rows + (image * e->block.heads + head) * keys;
            for (int64_t j = 0, i = start % LANES; j < keys; j++) weights[j] = scores[j * vectors][i] * factors[0][i];
        }
        product(columns, value, 1, row, dim, keys, scores, vectors, 0, sums, vectors, 0);
        for (int64_t r = 0; r < vectors; r++) {
            Integers place = LANE_NUMBERS + (int32_t)((first + r) * LANES);
            Integers is_image = (place >= (int32_t)start) & (place < (int32_t)stop);
            for (int64_t c = 0; c < dim; c++) {
                Vector *target = out + c * ld + first + r;
                *target = select_lanes(is_image, sums[c * vectors + r] * factors[r], *target);
            }
        }
    }
}

TARGET void attend_to_points(const Encoding *e, const Panel *panel, int64_t head, float *scratch) {
    const Block *b = &e->block;
    int64_t dim = b->dim / b->heads, points = b->points, ld = panel->vectors, width = b->map.width;
    const Sampling sampling = {b->map.height, width, b->heads, points, dim};
    const Vector *offsets = panel->matrix[H] + head * points * 2 * ld;
    Vector *weights = panel->matrix[Q] + head * points * ld;
    for (int64_t r = 0; r < ld; r++) {
        Vector factor = softmax(weights + r, points, ld, 1);
        for (int64_t p = 0; p < points; p++) weights[p * ld + r] *= factor;
        const float *rows[LANES];
        int64_t count = min(panel->count - r * LANES, LANES);
        for (int64_t i = 0; i < count; i++) {
            Patch patch = patch_of(e, panel->first + r * LANES + i);
            int64_t image = patch.token / e->size, cell = patch.token % e->size;
            float place[2 * points], weight[points];
            const float centre[] = {(float)(cell % width) + (float)(patch.columns - 1) / 2,
                                    (float)(cell / width) + (float)(patch.rows - 1) / 2};
            for (int64_t p = 0; p < points; p++) {
                weight[p] = weights[p * ld + r][i];
                for (int64_t axis = 0; axis < 2; axis++)
                    place[2 * p + axis] = centre[axis] + offsets[(2 * p + axis) * ld + r][i];
            }
            sample_points(&sampling, e->kv + image * e->size * b->dim + head * dim, place, weight, scratch + i * dim);
            rows[i] = scratch + i * dim;
        }
        load_rows(rows, count, dim, panel->matrix[A] + head * dim * ld + r, ld);
    }
}
#endif
