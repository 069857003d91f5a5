/* The routing of dynamic grained queries, which grains.py explains.
 *
 * A table has extra + H * W rows of C numbers for each image. Regions of side x side cells are numbered row by row;
 * choice[image * regions + region] is an index into the granularities, of which 0 skips the region.
 */
#include "native.h"
#include <math.h>
#include <string.h>

typedef struct {
    int64_t top, left, bottom, right;
} Area;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t regions_of(const Map *g) { return ceil_div(g->height, g->side) * ceil_div(g->width, g->side); }

/* The valid cells of a region. */
static Area area_of(const Map *g, int64_t region) {
    int64_t columns = ceil_div(g->width, g->side);
    int64_t top = region / columns * g->side, left = region % columns * g->side;
    return (Area){top, left, smaller(top + g->side, g->height), smaller(left + g->side, g->width)};
}

WIDE void mean_of(const float *cells, int64_t width, int64_t channels, int64_t lines, int64_t columns,
                  float *restrict out) {
    enum { PART = 32 }; /* channels whose sums stay in registers */
    float share = 1.f / (float)(lines * columns);
    for (int64_t begin = 0; begin < channels; begin += PART) {
        int64_t count = smaller(PART, channels - begin);
        float sums[PART] = {};
        for (int64_t line = 0; line < lines; line++)
            for (int64_t column = 0; column < columns; column++) {
                const float *cell = cells + (line * width + column) * channels + begin;
                if (count == PART)
                    for (int c = 0; c < PART; c++) sums[c] += cell[c];
                else
                    for (int c = 0; c < count; c++) sums[c] += cell[c];
            }
        for (int64_t c = 0; c < count; c++) out[begin + c] = sums[c] * share;
    }
}

WIDE static float product_of(const float *a, const float *b, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; c++) sum += a[c] * b[c];
    return sum;
}

void choose(const Map *g, const float *table, const float *weight, const float *bias, int64_t options) {
    int64_t regions = regions_of(g), n = g->channels, rows = g->extra + g->height * g->width;
#pragma omp parallel for if (is_shared(g->images * rows, n))
    for (int64_t i = 0; i < g->images * regions; i++) {
        const float *cells = table + (i / regions * rows + g->extra) * n;
        float mean[n], best = -INFINITY;
        Area area = area_of(g, i % regions);
        mean_of(cells + (area.top * g->width + area.left) * n, g->width, n, area.bottom - area.top, area.right - area.left,
                mean);
        g->choice[i] = 0;
        for (int64_t k = 0; k < options; k++) {
            float logit = product_of(mean, weight + k * n, n) + bias[k];
            if (logit > best) {
                best = logit;
                g->choice[i] = k;
            }
        }
    }
}

/* The granularities are in sides. The queries of an image are its extra rows, then those of region after region. */
void route(const Map *g, const int64_t *sides, Patch *patches, int64_t *lengths) {
    int64_t regions = regions_of(g), rows = g->extra + g->height * g->width;
    Patch *next = patches;
    for (int64_t image = 0; image < g->images; image++) {
        const Patch *start = next;
        for (int64_t i = 0; i < g->extra; i++) *next++ = (Patch){image * rows + i, 1, 1};
        int64_t first = image * rows + g->extra;
        for (int64_t i = 0; i < regions; i++) {
            int64_t side = sides[g->choice[image * regions + i]];
            if (!side) continue;
            Area area = area_of(g, i);
            for (int64_t top = area.top; top < area.bottom; top += side)
                for (int64_t left = area.left; left < area.right; left += side)
                    *next++ = (Patch){first + top * g->width + left, smaller(side, area.bottom - top),
                                      smaller(side, area.right - left)};
        }
        lengths[image] = next - start;
    }
}
