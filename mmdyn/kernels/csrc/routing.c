/* The routing of dynamic grained queries, which grains.py explains.
 *
 * A table has extra + H * W rows of C numbers for each image. Regions of side x side cells are numbered row by row;
 * choice[image * regions + region] is an index into the granularities, of which 0 skips the region.
 */
#include "cpu.h"
#include <math.h>
#include <omp.h>

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

/* The first of the greatest. */
static int64_t greatest(const float *logits, int64_t count) {
    int64_t found = 0;
    float most = -INFINITY;
    for (int64_t k = 0; k < count; k++)
        if (logits[k] > most) most = logits[k], found = k;
    return found;
}

void choose(const Map *g, const float *table, const float *weight, const float *bias, int64_t options) {
    int64_t regions = regions_of(g), n = g->channels, rows = g->extra + g->height * g->width;
#pragma omp parallel for if (is_shared(g->images * rows, n))
    for (int64_t i = 0; i < g->images * regions; i++) {
        const float *cells = table + (i / regions * rows + g->extra) * n;
        float mean[n], logits[options];
        Area area = area_of(g, i % regions);
        mean_of(cells + (area.top * g->width + area.left) * n, g->width, n, area.bottom - area.top, area.right - area.left,
                mean);
        for (int64_t k = 0; k < options; k++) logits[k] = product_of(mean, weight + k * n, n) + bias[k];
        g->choice[i] = greatest(logits, options);
    }
}

void choose_by_scores(const Map *g, const float *scores, const float *bias, int64_t options) {
    int64_t regions = regions_of(g), rows = g->extra + g->height * g->width;
#pragma omp parallel for if (is_shared(g->images * rows, options))
    for (int64_t i = 0; i < g->images * regions; i++) {
        float logits[options];
        Area area = area_of(g, i % regions);
        float share = 1.f / (float)((area.bottom - area.top) * (area.right - area.left));
        for (int64_t k = 0; k < options; k++) {
            const float *cells = scores + (k * g->images + i / regions) * rows + g->extra;
            float sum = 0;
            for (int64_t line = area.top; line < area.bottom; line++)
                for (int64_t column = area.left; column < area.right; column++) sum += cells[line * g->width + column];
            logits[k] = sum * share + bias[k];
        }
        g->choice[i] = greatest(logits, options);
    }
}

/* How many patches a region is divided into. */
static int64_t patches_of(Area area, int64_t side) {
    return side ? ceil_div(area.bottom - area.top, side) * ceil_div(area.right - area.left, side) : 0;
}

/* The granularities are in sides. The queries of an image are its extra rows, then those of region after region. Each
 * thread has a part of the regions, and begins where the parts before it end. */
void route(const Map *g, const int64_t *sides, Patch *patches, int64_t *lengths) {
    int64_t regions = regions_of(g), rows = g->extra + g->height * g->width, counts[omp_get_max_threads()], total = 0;
#pragma omp parallel if (is_shared(g->images * rows, 0))
    {
        int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        int64_t begin = g->images * regions * part / parts, end = g->images * regions * (part + 1) / parts, count = 0;
        for (int64_t i = begin; i < end; i++)
            count += patches_of(area_of(g, i % regions), sides[g->choice[i]]) + (i % regions ? 0 : g->extra);
        counts[part] = count;
#pragma omp atomic
        total += count;
#pragma omp barrier
        Patch *next = patches;
        for (int64_t i = 0; i < part; i++) next += counts[i];
        for (int64_t i = begin; i < end; i++) {
            int64_t image = i / regions, first = image * rows + g->extra, side = sides[g->choice[i]];
            if (i % regions == 0) {
                lengths[image] = next - patches;
                for (int64_t j = 0; j < g->extra; j++) *next++ = (Patch){image * rows + j, 1, 1};
            }
            if (!side) continue;
            Area area = area_of(g, i % regions);
            for (int64_t top = area.top; top < area.bottom; top += side)
                for (int64_t left = area.left; left < area.right; left += side)
                    *next++ = (Patch){first + top * g->width + left, smaller(side, area.bottom - top),
                                      smaller(side, area.right - left)};
        }
    }
    for (int64_t image = 0; image < g->images; image++)
        lengths[image] = (image + 1 < g->images ? lengths[image + 1] : total) - lengths[image];
}
