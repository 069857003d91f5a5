/* The sampling of deformable attention. */
#pragma once
#include "common.h"

/* Of a map of height x width cells, with so many points and channels of each head. */
typedef struct {
    int64_t height, width, heads, points, channels;
} Sampling;

/* Values are (images, height * width, heads, channels), points (queries, heads, points, 2), weights (queries, heads,
 * points), and the queries those of all images, of these lengths. */
EXPORT void sample(const Sampling *s, const float *values, const float *points, const float *weights,
                   const int64_t *lengths, int64_t images, float *out);

/* One head of one query: the weighted sum of the values at its points, interpolated between the four cells around each. */
void sample_points(const Sampling *s, const float *values, const float *points, const float *weights,
                   float *restrict out);
