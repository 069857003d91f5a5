#include "common.h"
#if HAS_VECTORS
#include "attention.h"
#include "projection.h"

/* Where the tokens of a vector of queries are, or the means of their patches; returns how many queries there are. */
static int64_t gather(const Encoding *e, const Panel *panel, int64_t r, float *means, const float **rows) {
    int64_t dim = e->block.dim, first = panel->first + r * LANES, count = min(panel->count - r * LANES, LANES);
    for (int64_t i = 0; i < count; i++) {
        Patch patch = patch_of(e, first + i);
        rows[i] = e->block.tokens + patch.token * dim;
        if (patch.rows * patch.columns == 1) continue;
        float *mean = means + i * dim;
        patch_mean(rows[i], e->block.map.width, dim, patch.rows, patch.columns, mean);
        rows[i] = mean;
    }
    return count;
}

/* Add the residuals of a vector of queries to all tokens of their patches. */
TARGET static void scatter(const Encoding *e, const Panel *panel, int64_t r, float *residuals) {
    int64_t dim = e->block.dim, first = panel->first + r * LANES, count = min(panel->count - r * LANES, LANES);
    float *rows[LANES];
    const float *base[LANES];
    for (int64_t i = 0; i < count; i++) {
        Patch patch = patch_of(e, first + i);
        int is_token = patch.rows * patch.columns == 1;
        rows[i] = is_token ? e->block.tokens + patch.token * dim : residuals + i * dim;
        base[i] = is_token ? rows[i] : 0;
    }
    store_rows(panel->matrix[X] + r, panel->vectors, count, dim, base, rows);
    for (int64_t i = 0; i < count; i++) {
        if (base[i]) continue;
        Patch patch = patch_of(e, first + i);
        for (int64_t row = 0; row < patch.rows; row++)
            for (int64_t column = 0; column < patch.columns; column++) {
                float *token = e->block.tokens + (patch.token + row * e->block.map.width + column) * dim;
                int64_t c = 0;
                for (; c + LANES <= dim; c += LANES)
                    *(UnalignedVector *)(token + c) += *(const UnalignedVector *)(rows[i] + c);
                for (; c < dim; c++) token[c] += rows[i][c];
            }
    }
}

TARGET static void encode_panels(const void *job, const Panel *panels, int64_t num, const Thread *t) {
    const Encoding *e = job;
    const Block *b = &e->block;
    int64_t dim = b->dim, points = b->heads * b->points;
    int bfloat16 = b->is_bfloat16;
    COLUMNS(panels, num, i) {
        const Panel *p = panels + i / MAX_VECTORS;
        int64_t r = i % MAX_VECTORS, ld = p->vectors;
        const float *rows[LANES];
        int64_t count = gather(e, p, r, (float *)t->scratch, rows);
        load_rows(rows, count, dim, p->matrix[X] + r, ld);
        layer_norm(p->matrix[X] + r, ld, dim, b->norm1, b->norm1_eps, p->matrix[A] + r);
    }
    wait_for_team(t);
    if (points) {
        linear(t, panels, num, b->offsets, 2 * points, dim, A, H, 0, bfloat16);
        linear(t, panels, num, b->point_weights, points, dim, A, Q, 0, bfloat16);
        SHARE(num * b->heads, i) attend_to_points(e, panels + i / b->heads, i % b->heads, (float *)t->scratch);
    } else {
        linear(t, panels, num, b->q, dim, dim, A, Q, 0, bfloat16);
        SHARE(num * b->heads, i) attend(e, panels + i / b->heads, i % b->heads, t->scratch);
    }
    wait_for_team(t);
    linear(t, panels, num, b->proj, dim, dim, A, Q, 0, bfloat16);
    COLUMNS(panels, num, i) {
        const Panel *p = panels + i / MAX_VECTORS;
        Vector *x = p->matrix[X] + i % MAX_VECTORS, *attended = p->matrix[Q] + i % MAX_VECTORS;
        for (int64_t c = 0; c < dim * p->vectors; c += p->vectors) x[c] += attended[c] *= b->residual_scale;
        layer_norm(x, p->vectors, dim, b->norm2, b->norm2_eps, p->matrix[A] + i % MAX_VECTORS);
    }
    wait_for_team(t);
    linear(t, panels, num, b->fc1, b->hidden, dim, A, H, 1, bfloat16);
    linear(t, panels, num, b->fc2, dim, b->hidden, H, X, 0, bfloat16);
    COLUMNS(panels, num, i) {
        const Panel *p = panels + i / MAX_VECTORS;
        Vector *residual = p->matrix[X] + i % MAX_VECTORS, *attended = p->matrix[Q] + i % MAX_VECTORS;
        for (int64_t c = 0; c < dim * p->vectors; c += p->vectors)
            residual[c] = attended[c] + residual[c] * b->residual_scale;
        scatter(e, p, i % MAX_VECTORS, (float *)t->scratch);
    }
}

static Needs needs_of(const Encoding *e) {
    const Block *b = &e->block;
    int64_t points = b->heads * b->points, hidden = max(b->hidden, 2 * points);
    int64_t pairs = b->is_bfloat16 ? max(b->dim, b->hidden) / 2 : 0;
    return (Needs){e->queries,
                   MAX_VECTORS,
                   {b->dim, b->dim, max(b->dim, points), hidden, pairs},
                   max((e->keys + b->dim / b->heads) * MAX_VECTORS, b->dim),
                   2 * b->dim * (b->dim + b->hidden)};
}

/* What makes keys and values, or values alone, of the normed tokens. */
static Projection kv_projection(const Encoding *e) {
    const Block *b = &e->block;
    int64_t dim = b->dim, side = b->sr_ratio, line = dim * b->map.width;
    Projection of_tokens = {.images = 1,
                            .height = 1,
                            .width = b->map.images * e->size,
                            .outer = 1,
                            .inner = 1,
                            .length = dim,
                            .channels = b->points ? dim : 2 * dim,
                            .column_stride = dim,
                            .eps_before = b->norm1_eps,
                            .norm_before = b->norm1,
                            .linear = b->kv,
                            .input = b->tokens,
                            .output = e->kv};
    Projection of_patches = {.images = b->map.images,
                             .height = b->map.height / side,
                             .width = b->map.width / side,
                             .outer = side,
                             .inner = side,
                             .length = dim,
                             .channels = dim,
                             .kv_channels = 2 * dim,
                             .image_stride = e->size * dim,
                             .row_stride = side * line,
                             .column_stride = side * dim,
                             .outer_stride = line,
                             .inner_stride = dim,
                             .eps_before = b->norm1_eps,
                             .eps_after = b->sr_norm_eps,
                             .norm_before = b->norm1,
                             .linear = b->sr,
                             .norm_after = b->sr_norm,
                             .kv = b->kv,
                             .input = b->tokens,
                             .output = e->kv};
    Projection projection = b->sr.weight ? of_patches : of_tokens;
    if (e->scores)
        projection.router = b->router.weight, projection.num_options = b->num_options, projection.scores = e->scores;
    return projection;
}

/* The linear layers of queries, and numbers of their weights; one that a block has not has none. */
enum { LAYERS = 6 };
static void layers_of(Block *b, Parameters **layers, int64_t *counts) {
    int64_t points = b->heads * b->points;
    Parameters *all[LAYERS] = {&b->q, &b->offsets, &b->point_weights, &b->proj, &b->fc1, &b->fc2};
    int64_t rows[LAYERS] = {points ? 0 : b->dim, 2 * points, points, b->dim, b->hidden, b->hidden};
    for (int i = 0; i < LAYERS; i++) layers[i] = all[i], counts[i] = rows[i] * b->dim;
}

/* Parts of the workspace, each in whole vectors; without one they are only counted. */
typedef struct {
    float *begin;
    int64_t used;
} Workspace;

static void *allocate(Workspace *w, int64_t numbers) {
    float *part = w->begin ? w->begin + w->used : 0;
    w->used += ceil_div(numbers, LANES) * LANES;
    return part;
}

/* Begin to encode a block: where all is in the workspace. */
static Encoding begin(const Block *b, Workspace *w) {
    int64_t images = b->map.images, size = b->map.num_extra + b->map.height * b->map.width;
    int64_t keys = b->points ? 0 : b->sr.weight ? b->map.height / b->sr_ratio * (b->map.width / b->sr_ratio) : size;
    Encoding e = {*b, size, keys, images * size};
    e.kv = allocate(w, images * (b->points ? size : 2 * keys) * b->dim);
    int is_covered = b->map.height % b->sr_ratio == 0 && b->map.width % b->sr_ratio == 0;
    if (b->router.weight && is_covered) e.scores = allocate(w, e.queries * b->num_options);
    if (b->router.weight && b->budget >= 0) {
        int64_t options = images * count_regions(&b->map) * b->num_options;
        e.logits = allocate(w, options);
        e.steps = allocate(w, 2 * options * (int64_t)(sizeof(Step) / sizeof(float)));
    }
    if (b->map.choice) e.patches = allocate(w, e.queries * (int64_t)(sizeof(Patch) / sizeof(float)));
    e.ends = allocate(w, images * (int64_t)(sizeof(int64_t) / sizeof(float)));
    if (b->is_bfloat16) {
        Parameters *layers[LAYERS];
        int64_t counts[LAYERS];
        layers_of(&e.block, layers, counts);
        for (int i = 0; i < LAYERS; i++) layers[i]->weight = allocate(w, counts[i] / 2);
    }
    return e;
}

/* The router's choice; the logits of a region's mean are the means of its cells'. */
static void write_choice(const Encoding *e) {
    const Block *b = &e->block;
    Map map = b->map;
    map.channels = b->dim, map.choice = b->chosen;
    if (e->scores) choose_by_scores(&map, e->scores, b->router.bias, b->num_options, e->logits);
    else choose(&map, b->tokens, b->router.weight, b->router.bias, b->num_options, e->logits);
    if (e->logits) choose_within(&map, e->logits, b->granularities, b->num_options, b->budget, e->steps);
}

static void encode_block(const Block *b, float *workspace) {
    Workspace w = {workspace};
    Encoding e = begin(b, &w);
    Projection projection = kv_projection(&e);
    project(&projection, workspace + w.used);
    if (b->router.weight) write_choice(&e);
    if (e.patches) route(&b->map, b->granularities, e.patches, b->lengths);
    else
        for (int64_t i = 0; i < b->map.images; i++) b->lengths[i] = e.size;
    e.queries = 0;
    for (int64_t i = 0; i < b->map.images; i++) e.ends[i] = e.queries += b->lengths[i];
    if (HAS_BFLOAT16 && b->is_bfloat16) {
        Block given = *b;
        Parameters *from[LAYERS], *to[LAYERS];
        int64_t counts[LAYERS];
        layers_of(&given, from, counts), layers_of(&e.block, to, counts);
#pragma omp parallel
        for (int i = 0; i < LAYERS; i++) round_weights(from[i]->weight, counts[i], (uint16_t *)to[i]->weight);
    }
    Needs needs = needs_of(&e);
    run(encode_panels, &e, &needs, workspace + w.used);
}

int64_t encode_blocks_workspace(const Block *blocks, int64_t count) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const Block *b = blocks + i;
        Workspace w = {0};
        Encoding e = begin(b, &w);
        Needs needs = needs_of(&e);
        Projection projection = kv_projection(&e);
        most = max(most, w.used + max(workspace_of(&needs, b->map.choice != 0), project_workspace(&projection)));
    }
    return most;
}

void encode_blocks(const Block *blocks, int64_t count, float *workspace) {
    for (int64_t i = 0; i < count; i++) encode_block(blocks + i, workspace);
}
#endif
