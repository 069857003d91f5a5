/* The sampling of deformable attention. */
#include "cpu.h"
#include <math.h>
#include <string.h>

WIDE void sample_points(const Sampling *g, const float *map, const float *points, const float *weights,
                        float *restrict out) {
    int64_t n = g->channels, stride = g->heads * n;
    memset(out, 0, n * sizeof(float));
    for (int64_t p = 0; p < g->points; p++) {
        float x = points[2 * p], y = points[2 * p + 1], left = floorf(x), top = floorf(y);
        if (!isfinite(x) || !isfinite(y))
            for (int64_t c = 0; c < n; c++) out[c] = NAN;
        for (int corner = 0; corner < 4; corner++) {
            int right = corner & 1, bottom = corner >> 1;
            float column = left + right, row = top + bottom;
            if (!(row >= 0 && row < g->height && column >= 0 && column < g->width)) continue;
            float share = weights[p] * (right ? x - left : 1 - (x - left)) * (bottom ? y - top : 1 - (y - top));
            const float *cell = map + ((int64_t)row * g->width + (int64_t)column) * stride;
            for (int64_t c = 0; c < n; c++) out[c] += share * cell[c];
        }
    }
}

/* Values are (images, height * width, heads, channels), points (queries, heads, points, 2), weights (queries, heads,
 * points), and the queries those of all images, of these lengths. */
void sample(const Sampling *g, const float *value, const float *points, const float *weights, const int64_t *lengths,
            int64_t images, float *out) {
    int64_t n = g->channels, next = 0;
    for (int64_t image = 0; image < images; image++, value += g->height * g->width * g->heads * n) {
        int64_t begin = next;
        next += lengths[image] * g->heads;
#pragma omp parallel for if (is_shared((next - begin) * g->points * 4, n))
        for (int64_t i = begin; i < next; i++) {
            int64_t first = i * g->points;
            sample_points(g, value + i % g->heads * n, points + 2 * first, weights + first, out + i * n);
        }
    }
}
