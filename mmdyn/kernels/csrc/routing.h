/* Dynamic grained queries: which granularity each region of a map chooses, and the patches that this makes. */
#pragma once
#include "common.h"

/* The maps of some images, each (num_extra + height * width, channels), in regions of region x region cells, of which
 * those at the lower and right edges may be smaller. Regions are numbered row by row. */
typedef struct {
    int64_t images, num_extra, height, width, region, channels;
    int64_t *choice; /* (images, regions): an index into the granularities; 0 if there is no routing */
} Map;

/* A patch of rows x columns cells, of which token is the first, counted through all images. */
typedef struct {
    int64_t token;
    int32_t rows, columns;
} Patch;

/* A step of a region from the option before it to one of more queries. A smaller key is a better step. */
typedef struct {
    uint32_t key;
    int32_t region, option;
} Step;

int64_t count_regions(const Map *map);

/* Write the choice: the option with the greatest logit of each region's mean. Weights are (options, channels). With room
 * for logits, (images, regions, options), these are written in its place. */
EXPORT void choose(const Map *map, const float *tokens, const float *weight, const float *bias, int64_t options,
                   float *logits);

/* The same, when the products of the weights with each token are known, (options, images, num_extra + height * width). */
void choose_by_scores(const Map *map, const float *scores, const float *bias, int64_t options, float *logits);

/* Write the choice of the greatest logits less a price of each query, the least of each image with which its regions make
 * no more queries than the budget. There is room for 2 * images * regions * options steps. */
EXPORT void choose_within(const Map *map, const float *logits, const int64_t *granularities, int64_t options,
                          int64_t budget, Step *steps);

/* Write the patches of all images' queries, and how many each image has. An image's extra tokens come first, then the
 * patches of region after region. Granularity 0 skips the region. */
void route(const Map *map, const int64_t *granularities, Patch *patches, int64_t *lengths);

/* The mean of a patch's cells, the first of which is given, on a map of this width. */
void patch_mean(const float *cells, int64_t width, int64_t channels, int64_t rows, int64_t columns,
                float *restrict out);
