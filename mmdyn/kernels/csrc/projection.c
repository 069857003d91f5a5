#include "common.h"
#if HAS_VECTORS
#include "panels.h"
#include "projection.h"
#include <math.h>
#include <string.h>

/* Between which of count cells a cell of a map of size cells lies, and the weight of the second. */
static float interpolate(int64_t cell, int64_t size, int64_t count, int64_t *first, int64_t *second) {
    float place = fmaxf(((float)cell + 0.5f) * ((float)count / (float)size) - 0.5f, 0);
    *first = min((int64_t)place, count - 1), *second = min(*first + 1, count - 1);
    return place - (float)*first;
}

/* The position embedding of a patch. */
TARGET static void position_of(const Projection *g, int64_t patch, int64_t channels, float *restrict out) {
    int64_t top, bottom, left, right, line = g->positions_width * channels;
    float down = interpolate(patch / g->width % g->height, g->height, g->positions_height, &top, &bottom);
    float across = interpolate(patch % g->width, g->width, g->positions_width, &left, &right);
    const float *above = g->positions + top * line, *below = g->positions + bottom * line;
    const float *a = above + left * channels, *b = above + right * channels;
    const float *c = below + left * channels, *d = below + right * channels;
    for (int64_t i = 0; i < channels; i++)
        out[i] = (1 - down) * ((1 - across) * a[i] + across * b[i]) + down * ((1 - across) * c[i] + across * d[i]);
}

/* The first segment of a patch. */
static const float *patch_at(const Projection *g, int64_t patch) {
    int64_t row = patch / g->width;
    return g->input + row / g->height * g->image_stride + row % g->height * g->row_stride +
           patch % g->width * g->column_stride;
}

/* Where a panel's output will be, and the input of the next panel, if its patches all lie in one row. */
static void look_ahead(const Projection *g, const Panel *p, Prefetch *prefetch) {
    int64_t channels = g->kv.weight ? g->kv_channels : g->channels, number = sizeof(float);
    int64_t last = g->images * g->height * g->width - 1;
    const float *input = patch_at(g, min(p->first + p->count, last));
    prefetch[0] =
        (Prefetch){(const char *)input, g->outer, p->count * g->column_stride * number, g->outer_stride * number};
    prefetch[1] = (Prefetch){(const char *)(g->output + p->first * channels), 1, p->count * channels * number};
    for (int i = 0; i < PREFETCHES; i++)
        prefetch[i].lines_per_row = ceil_div(prefetch[i].rows * prefetch[i].bytes / CACHE_LINE, g->channels);
}

/* The router's products with a segment of each patch of a panel. */
TARGET static void write_scores(const Projection *g, const float *const *segment, int64_t count, const Vector *x,
                                int64_t ld) {
    int64_t segments = g->outer * g->inner, tokens = g->images * g->height * g->width * segments;
    Vector sums[g->num_options * MAX_VECTORS];
    product(count, g->router, g->length, 1, g->num_options, g->length, x, ld, 0, sums, ld, 0);
    for (int64_t k = 0; k < g->num_options; k++) {
        const float *sum = (const float *)(sums + k * ld);
        float *scores = g->scores + k * tokens;
        if (segments == 1) memcpy(scores + (segment[0] - g->input) / g->length, sum, count * sizeof(float));
        else
            for (int64_t j = 0; j < count; j++) scores[(segment[j] - g->input) / g->length] = sum[j];
    }
}

TARGET static void project_panels(const void *job, const Panel *panels, int64_t num, const Thread *t) {
    const Projection *g = job;
    int64_t segments = g->outer * g->inner, length = g->length, channels = g->kv.weight ? g->kv_channels : g->channels;
    const float *first[MAX_VECTORS * LANES], *segment[MAX_VECTORS * LANES]; /* of each patch of a panel */
    const Panel *located = 0;
    SHARE(num * segments, i) {
        const Panel *p = panels + i / segments;
        int64_t s = i % segments, ld = p->vectors;
        if (located != p) {
            located = p;
            for (int64_t j = 0, column = p->first % g->width; j < p->count; j++, column++) {
                if (column == g->width) column = 0;
                first[j] = j && column ? first[j - 1] + g->column_stride : patch_at(g, p->first + j);
            }
        }
        int64_t start = s / g->inner * g->outer_stride + s % g->inner * g->inner_stride;
        for (int64_t j = 0; j < p->count; j++) segment[j] = first[j] + start;
        Vector *x = p->matrix[A] + s * length * ld;
        for (int64_t r = 0; r < ld; r++)
            load_rows(segment + r * LANES, min(p->count - r * LANES, LANES), length, x + r, ld);
        if (g->num_options) write_scores(g, segment, p->count, x, ld);
        if (g->norm_before.weight)
            for (int64_t r = 0; r < ld; r++) layer_norm(x + r, ld, length, g->norm_before, g->eps_before, x + r);
    }
    wait_for_team(t);
    Prefetch prefetch[PREFETCHES];
    Thread fetching = *t;
    if (t->size == 1) fetching.prefetch = prefetch, look_ahead(g, panels, prefetch);
    linear(&fetching, panels, num, g->linear, g->channels, segments * length, A, Q, 0, 0);
    if (g->norm_after.weight) {
        COLUMNS(panels, num, i) {
            const Panel *p = panels + i / MAX_VECTORS;
            Vector *x = p->matrix[Q] + i % MAX_VECTORS;
            layer_norm(x, p->vectors, g->channels, g->norm_after, g->eps_after, x);
        }
        wait_for_team(t);
    }
    if (g->kv.weight) linear(t, panels, num, g->kv, channels, g->channels, Q, H, 0, 0);
    COLUMNS(panels, num, i) {
        const Panel *p = panels + i / MAX_VECTORS;
        int64_t r = i % MAX_VECTORS, count = min(p->count - r * LANES, LANES);
        float *rows[LANES];
        const float *base[LANES];
        for (int64_t j = 0; j < count; j++) {
            int64_t patch = p->first + r * LANES + j;
            float *position = (float *)t->scratch + j * channels;
            rows[j] = g->output + patch * channels, base[j] = g->positions ? position : 0;
            if (g->positions) position_of(g, patch, channels, position);
        }
        store_rows(p->matrix[g->kv.weight ? H : Q] + r, p->vectors, count, channels, base, rows);
    }
}

static Needs needs_of(const Projection *g) {
    int64_t length = g->outer * g->inner * g->length;
    int64_t vectors = length > 2048 ? MAX_VECTORS / 2 : MAX_VECTORS; /* so that a panel's patches stay in cache */
    return (Needs){g->images * g->height * g->width,
                   vectors,
                   {0, length, g->channels, g->kv_channels, 0},
                   g->positions ? g->channels : 0,
                   g->channels * (length + g->kv_channels)};
}

int64_t project_workspace(const Projection *g) {
    Needs needs = needs_of(g);
    return workspace_of(&needs, 0);
}

void project(const Projection *g, float *workspace) {
    Needs needs = needs_of(g);
    run(project_panels, g, &needs, workspace);
}
#endif
