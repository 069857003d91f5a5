#include "sampling.h"
#include <math.h>
#include <string.h>

MULTIVERSION void sample_points(const Sampling *s, const float *values, const float *points, const float *weights,
                                float *restrict out) {
    int64_t n = s->channels, stride = s->heads * n;
    memset(out, 0, n * sizeof(float));
    for (int64_t p = 0; p < s->points; p++) {
        float x = points[2 * p], y = points[2 * p + 1], left = floorf(x), top = floorf(y);
        if (!isfinite(x) || !isfinite(y))
            for (int64_t c = 0; c < n; c++) out[c] = NAN;
        for (int corner = 0; corner < 4; corner++) {
            int is_right = corner & 1, is_bottom = corner >> 1;
            float column = left + is_right, row = top + is_bottom;
            if (!(row >= 0 && row < s->height && column >= 0 && column < s->width)) continue;
            float weight = weights[p] * (is_right ? x - left : 1 - (x - left)) * (is_bottom ? y - top : 1 - (y - top));
            const float *cell = values + ((int64_t)row * s->width + (int64_t)column) * stride;
            for (int64_t c = 0; c < n; c++) out[c] += weight * cell[c];
        }
    }
}

void sample(const Sampling *s, const float *values, const float *points, const float *weights, const int64_t *lengths,
            int64_t images, float *out) {
    int64_t n = s->channels, next = 0;
    for (int64_t image = 0; image < images; image++, values += s->height * s->width * s->heads * n) {
        int64_t begin = next;
        next += lengths[image] * s->heads;
#pragma omp parallel for if (is_parallel((next - begin) * s->points * 4, n))
        for (int64_t i = begin; i < next; i++) {
            int64_t first = i * s->points;
            sample_points(s, values + i % s->heads * n, points + 2 * first, weights + first, out + i * n);
        }
    }
}
