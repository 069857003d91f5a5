/* The routing of dynamic grained queries on a CPU, one pass over memory for each direction; grains.py says what it means.
 *
 * A table has extra + H * W rows of C numbers for each image. Regions of side x side cells are numbered row by row;
 * choice[image * regions + region] is an index into sides, the granularities (0 skips the region).
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

typedef struct {
    int64_t images, extra, height, width, channels, side;
} Geometry;

typedef struct {
    int64_t top, left, bottom, right;
} Area;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t regions_of(const Geometry *g) { return ceil_div(g->height, g->side) * ceil_div(g->width, g->side); }

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* The valid cells of a region. */
static Area area_of(const Geometry *g, int64_t region) {
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

WIDE static void add_rows(const float *a, const float *b, int64_t channels, float *restrict out) {
    for (int64_t c = 0; c < channels; c++) out[c] = a[c] + b[c];
}

/* Means of the valid cells of each region: out is (images, regions, channels). */
void region_means(const Geometry *g, const float *table, float *out) {
    int64_t regions = regions_of(g), rows = g->extra + g->height * g->width;
#pragma omp parallel for if (g->images * rows * g->channels > 65536)
    for (int64_t i = 0; i < g->images * regions; i++)
        mean_of(table + (i / regions * rows + g->extra) * g->channels, g->width, g->channels, area_of(g, i % regions),
                out + i * g->channels);
}

/* The number of each region's first query, (images * regions), and the queries of each image, extra rows included. */
void count_queries(const Geometry *g, const int64_t *choice, const int64_t *sides, int64_t *first, int64_t *lengths) {
    int64_t regions = regions_of(g), next = 0;
    for (int64_t image = 0; image < g->images; image++) {
        int64_t start = next;
        next += g->extra;
        for (int64_t i = image * regions; i < (image + 1) * regions; i++) {
            first[i] = next;
            next += patches_of(area_of(g, i % regions), sides[choice[i]]);
        }
        lengths[image] = next - start;
    }
}

/* The extra rows and the means of the chosen patches. The tables of two images are stride rows apart. */
void gather_queries(const Geometry *g, const int64_t *choice, const int64_t *sides, const int64_t *first,
                    const float *table, float *out, int64_t stride) {
    int64_t regions = regions_of(g), n = g->channels;
#pragma omp parallel for if (g->images * g->height * g->width * n > 65536)
    for (int64_t i = 0; i < g->images * regions; i++) {
        const float *image = table + i / regions * stride * n, *cells = image + g->extra * n;
        int64_t side = sides[choice[i]];
        float *query = out + first[i] * n;
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

/* Each row of the table plus the change of the query that serves it. */
void add_changes(const Geometry *g, const int64_t *choice, const int64_t *sides, const int64_t *first,
                 const float *table, const float *change, float *out) {
    int64_t regions = regions_of(g), n = g->channels, rows = g->extra + g->height * g->width;
#pragma omp parallel for if (g->images * rows * n > 65536)
    for (int64_t i = 0; i < g->images * regions; i++) {
        int64_t start = i / regions * rows * n, side = sides[choice[i]];
        const float *query = change + first[i] * n;
        if (i % regions == 0 && g->extra)
            add_rows(table + start, query - g->extra * n, g->extra * n, out + start);
        start += g->extra * n;
        Area area = area_of(g, i % regions);
        int64_t columns = side ? ceil_div(area.right - area.left, side) : 0;
        for (int64_t row = area.top; row < area.bottom; row++) {
            int64_t place = start + (row * g->width + area.left) * n, length = (area.right - area.left) * n;
            const float *line = side ? query + (row - area.top) / side * columns * n : 0;
            if (!side)
                memcpy(out + place, table + place, length * sizeof(float));
            else if (side == 1)
                add_rows(table + place, line, length, out + place);
            else
                for (int64_t column = 0; column < area.right - area.left; column++, place += n)
                    add_rows(table + place, line + column / side * n, n, out + place);
        }
    }
}
