/* What inference on a CPU does between products, one pass over memory for each step: the routing of dynamic grained
 * queries, which grains.py explains, and the sampling of deformable attention.
 *
 * A table has extra + H * W rows of C numbers for each image. Regions of side x side cells are numbered row by row;
 * choice[image * regions + region] is an index into sides, the granularities (0 skips the region), and first the number
 * of the region's first query.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

/* Whether threads share the work on a table of so many rows. A row costs some time whatever its length. */
static int is_shared(int64_t rows, int64_t channels) { return rows * (channels + 16) > 65536; }

typedef struct {
    int64_t images, extra, height, width, channels, side;
    int64_t *choice, *first;
    const int64_t *sides;
    /* A band: regions begin to end of all images, its first query's number, its queries, and zeros behind them. */
    int64_t begin, end, start, count, surplus;
} Routing;

typedef struct {
    int64_t top, left, bottom, right;
} Area;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t regions_of(const Routing *g) { return ceil_div(g->height, g->side) * ceil_div(g->width, g->side); }

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The valid cells of a region. */
static Area area_of(const Routing *g, int64_t region) {
    int64_t columns = ceil_div(g->width, g->side);
    int64_t top = region / columns * g->side, left = region % columns * g->side;
    return (Area){top, left, smaller(top + g->side, g->height), smaller(left + g->side, g->width)};
}

static int64_t patches_of(Area area, int64_t side) {
    return side ? ceil_div(area.bottom - area.top, side) * ceil_div(area.right - area.left, side) : 0;
}

WIDE static void mean_of(const float *cells, int64_t width, int64_t channels, Area area, float *restrict out) {
    memset(out, 0, channels * sizeof(float));
    for (int64_t row = area.top; row < area.bottom; row++)
        for (int64_t column = area.left; column < area.right; column++) {
            const float *cell = cells + (row * width + column) * channels;
            for (int64_t c = 0; c < channels; c++) out[c] += cell[c];
        }
    float share = 1.f / (float)((area.bottom - area.top) * (area.right - area.left));
    for (int64_t c = 0; c < channels; c++) out[c] *= share;
}

WIDE static void add_row(float *restrict row, const float *restrict change, int64_t count) {
    for (int64_t c = 0; c < count; c++) row[c] += change[c];
}

WIDE static float product_of(const float *a, const float *b, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; c++) sum += a[c] * b[c];
    return sum;
}

/* Choose the option with the greatest logit of each region's mean. The weights are (options, channels). */
void choose(const Routing *g, const float *table, const float *weight, const float *bias, int64_t options) {
    int64_t regions = regions_of(g), n = g->channels, rows = g->extra + g->height * g->width;
#pragma omp parallel for if (is_shared(g->images * rows, n))
    for (int64_t i = 0; i < g->images * regions; i++) {
        const float *cells = table + (i / regions * rows + g->extra) * n;
        float mean[n], best = -INFINITY;
        mean_of(cells, g->width, n, area_of(g, i % regions), mean);
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

/* Number the queries, and count those of each image, extra rows included. */
void count_queries(const Routing *g, int64_t *lengths) {
    int64_t regions = regions_of(g), next = 0;
    for (int64_t image = 0; image < g->images; image++) {
        int64_t start = next;
        next += g->extra;
        for (int64_t i = image * regions; i < (image + 1) * regions; i++) {
            g->first[i] = next;
            next += patches_of(area_of(g, i % regions), g->sides[g->choice[i]]);
        }
        lengths[image] = next - start;
    }
}

/* A band's queries: extra rows, and means of the chosen patches. The tables of two images are stride rows apart. */
void gather_queries(const Routing *g, const float *table, int64_t stride, float *out) {
    int64_t regions = regions_of(g), n = g->channels;
    memset(out + g->count * n, 0, g->surplus * n * sizeof(float));
#pragma omp parallel for if (is_shared((g->end - g->begin) * g->side * g->side, n))
    for (int64_t i = g->begin; i < g->end; i++) {
        const float *image = table + i / regions * stride * n, *cells = image + g->extra * n;
        int64_t side = g->sides[g->choice[i]];
        float *query = out + (g->first[i] - g->start) * n;
        if (i % regions == 0 && g->extra) memcpy(query - g->extra * n, image, g->extra * n * sizeof(float));
        if (!side) continue;
        Area area = area_of(g, i % regions);
        for (int64_t top = area.top; top < area.bottom; top += side) {
            int64_t bottom = smaller(top + side, area.bottom);
            if (side == 1) {
                memcpy(query, cells + (top * g->width + area.left) * n, (area.right - area.left) * n * sizeof(float));
                query += (area.right - area.left) * n;
            } else
                for (int64_t left = area.left; left < area.right; left += side, query += n)
                    mean_of(cells, g->width, n, (Area){top, left, bottom, smaller(left + side, area.right)}, query);
        }
    }
}

/* Add to each row of the table the change of the query that serves it, if that is one of a band's. */
void add_changes(const Routing *g, float *table, const float *change) {
    int64_t regions = regions_of(g), n = g->channels, rows = g->extra + g->height * g->width;
#pragma omp parallel for if (is_shared((g->end - g->begin) * g->side * g->side, n))
    for (int64_t i = g->begin; i < g->end; i++) {
        float *image = table + i / regions * rows * n, *cells = image + g->extra * n;
        const float *query = change + (g->first[i] - g->start) * n;
        int64_t side = g->sides[g->choice[i]];
        if (i % regions == 0 && g->extra) add_row(image, query - g->extra * n, g->extra * n);
        if (!side) continue;
        Area area = area_of(g, i % regions);
        int64_t columns = ceil_div(area.right - area.left, side);
        for (int64_t row = area.top; row < area.bottom; row++) {
            float *line = cells + (row * g->width + area.left) * n;
            const float *changes = query + (row - area.top) / side * columns * n;
            if (side == 1)
                add_row(line, changes, columns * n);
            else
                for (int64_t column = 0; column < area.right - area.left; column++)
                    add_row(line + column * n, changes + column / side * n, n);
        }
    }
}

typedef struct {
    int64_t height, width, heads, points, channels;
} Sampling;

/* Sum of the values that a head's points have in a map, interpolated between the four cells around each. */
WIDE static void sample_points(const Sampling *g, const float *map, const float *points, const float *weights,
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
