#pragma once
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Whether threads share the work on a table of so many rows. A row costs some time whatever its length. */
static inline int is_shared(int64_t rows, int64_t channels) { return rows * (channels + 16) > 65536; }

typedef struct {
    int64_t height, width, heads, points, channels;
} Sampling;

/* Cells of a map: the number of the upper left one's row in the table, and how many there are. */
typedef struct {
    int64_t row;
    int32_t lines, columns;
} Patch;

/* A map, or the regions of side x side cells that a routing divides it into. */
typedef struct {
    int64_t images, extra, height, width, side, channels;
    int64_t *choice;
} Map;

/* Choose the option with the greatest logit of each region's mean. The weights are (options, channels). */
void choose(const Map *g, const float *table, const float *weight, const float *bias, int64_t options);

/* The same, when the products of the weights with each row are known, (options, images, rows). */
void choose_by_scores(const Map *g, const float *scores, const float *bias, int64_t options);

/* Write down the patches that the queries of all images are means of, and how many there are in each image. */
void route(const Map *g, const int64_t *sides, Patch *patches, int64_t *lengths);

/* The mean of lines x columns cells of a map, the first of which is given. */
void mean_of(const float *cells, int64_t width, int64_t channels, int64_t lines, int64_t columns, float *restrict out);

/* Sum of the values that a head's points have in a map, interpolated between the four cells around each. */
void sample_points(const Sampling *g, const float *map, const float *points, const float *weights, float *restrict out);
