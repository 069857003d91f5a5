#include "common.h"
#if HAS_VECTORS
#include "panels.h"

/* Rows of weights that a thread of a team takes at a time; panels of a thread that are few; numbers of weights that stay
 * in cache, and that a thread which has no vector left reads while the others work on one. */
enum { CHUNK = 24, FEW_PANELS = 10, CACHED_WEIGHTS = 1 << 21, IDLE_WEIGHTS = 150000 };

TARGET void linear(const Thread *t, const Panel *panels, int64_t num, Parameters p, int64_t rows, int64_t length,
                   int from, int to, int has_gelu, int is_bfloat16) {
    int64_t chunk = t->size > 1 ? CHUNK : rows, chunks = ceil_div(rows, chunk);
    if (HAS_BFLOAT16 && is_bfloat16) {
        COLUMNS(panels, num, i) {
            const Panel *panel = panels + i / MAX_VECTORS;
            int64_t r = i % MAX_VECTORS;
            pair_rows(panel->matrix[from] + r, panel->vectors, length, (__m512i *)panel->matrix[P] + r);
        }
        wait_for_team(t);
    }
    SHARE(chunks * num, i) {
        const Panel *panel = panels + i % num; /* all panels meet the same weights before the next ones */
        int64_t ld = panel->vectors, begin = i / num * chunk, count = min(chunk, rows - begin);
        const float *bias = p.bias ? p.bias + begin : 0;
        Vector *out = panel->matrix[to] + begin * ld;
        if (HAS_BFLOAT16 && is_bfloat16)
            bfloat16_product_of(ld)((const int32_t *)p.weight + begin * length / 2, count, length / 2,
                                    (const __m512i *)panel->matrix[P], bias, out);
        else
            product(panel->count, p.weight + begin * length, length, 1, count, length, panel->matrix[from], ld, bias,
                    out, ld, t->prefetch);
        if (has_gelu)
            for (int64_t j = 0; j < count * ld; j++) out[j] = gelu(out[j]);
    }
    wait_for_team(t);
}

/* How a job is cut into panels, each of so many vectors of workspace. */
typedef struct {
    int64_t vectors, panels, threads, is_shared, size;
} Plan;

/* Either each thread takes panels of its own, and reads what it wrote itself, or the team shares all panels, and reads
 * each weight once. It shares few panels, if they do not divide evenly and have much to do with each query, or if the
 * weights do not stay in cache from panel to panel. */
static Plan plan_of(const Needs *n) {
    Plan p = {ceil_div(n->queries, LANES), .threads = omp_get_max_threads()};
    int64_t idle = ceil_div(p.vectors, p.threads) * p.threads - p.vectors;
    p.panels = ceil_div(p.vectors, n->max_vectors);
    int waits = idle * n->weights > p.vectors * IDLE_WEIGHTS;
    int reloads = n->weights > CACHED_WEIGHTS && p.panels > 2 * p.threads;
    p.is_shared = p.panels < FEW_PANELS * p.threads && (waits || reloads);
    if (!p.is_shared) p.panels = min(ceil_div(p.panels, p.threads) * p.threads, p.vectors);
    for (int i = 0; i < MATRICES; i++) p.size += n->rows[i] * n->max_vectors;
    return p;
}

int64_t workspace_of(const Needs *n, int or_fewer) {
    Plan p = plan_of(n);
    int64_t panels = p.is_shared ? p.panels : p.threads, vectors = p.vectors;
    if (or_fewer) { /* which may be shared although these are not */
        if (n->weights <= CACHED_WEIGHTS) vectors = min(vectors, (p.threads - 1) * n->weights / IDLE_WEIGHTS);
        panels = max(min(ceil_div(vectors, n->max_vectors), FEW_PANELS * p.threads), p.threads);
    }
    return (panels * p.size + p.threads * n->scratch) * LANES;
}

static Panel panel_at(const Needs *n, const Plan *p, int64_t index, Vector *workspace) {
    int64_t begin = p->vectors * index / p->panels, end = p->vectors * (index + 1) / p->panels;
    Panel panel = {begin * LANES, min(end * LANES, n->queries) - begin * LANES, end - begin};
    for (int i = 0; i < MATRICES; workspace += n->rows[i++] * n->max_vectors) panel.matrix[i] = workspace;
    return panel;
}

static int64_t take_panel(int64_t *next) {
    int64_t taken;
#pragma omp atomic capture
    taken = (*next)++;
    return taken;
}

/* A thread begins with the same part of the panels in each job, so that it finds in its cache what it had in the one before;
 * then it takes what is left of other parts. */
void run(Task *task, const void *job, const Needs *n, float *workspace) {
    Plan p = plan_of(n);
    int64_t next[p.threads];
    for (int64_t part = 0; part < p.threads; part++) next[part] = p.panels * part / p.threads;
#pragma omp parallel
    {
        Thread t = {omp_get_thread_num(), omp_get_num_threads()};
        Vector *matrices = (Vector *)workspace;
        t.scratch = matrices + (p.is_shared ? p.panels : p.threads) * p.size + t.rank * n->scratch;
        if (p.is_shared) {
            Panel panels[FEW_PANELS * p.threads];
            for (int64_t i = 0; i < p.panels; i++) panels[i] = panel_at(n, &p, i, matrices + i * p.size);
            task(job, panels, p.panels, &t);
        } else {
            int64_t first = t.rank;
            matrices += t.rank * p.size;
            t.rank = 0, t.size = 1;
            for (int64_t i, part = first; part < first + p.threads; part++)
                while ((i = take_panel(&next[part % p.threads])) < p.panels * (part % p.threads + 1) / p.threads) {
                    Panel panel = panel_at(n, &p, i, matrices);
                    task(job, &panel, 1, &t);
                }
        }
    }
}
#endif
