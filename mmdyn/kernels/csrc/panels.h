/* A job's queries, or patches, are cut into panels of up to 64, so that all that lies between its first and last layer
 * stays in the cache of one core. A panel's matrices have a row for each channel and a column for each query. */
#pragma once
#include "products.h"
#include <omp.h>

/* The matrices: X residual, A normed or attended, Q queries, H hidden; P has pairs of A's or H's rows in bfloat16. */
enum { X, A, Q, H, P, MATRICES };

typedef struct {
    int64_t first, count, vectors; /* queries, and vectors in a row */
    Vector *matrix[MATRICES];
} Panel;

/* One of a team, which shares the work on the same panels. */
typedef struct {
    int64_t rank, size;
    Vector *scratch;    /* workspace of this thread alone */
    Prefetch *prefetch; /* for products of a team of one, or 0 */
} Thread;

/* A thread's part of so many tasks, and of so many panels' columns of vectors: index i is panel i / MAX_VECTORS, vector
 * i % MAX_VECTORS. */
#define SHARE(total, i)                                                                                                \
    for (int64_t i = (total) * t->rank / t->size, i##_end = (total) * (t->rank + 1) / t->size; i < i##_end; i++)
#define COLUMNS(panels, num, i) SHARE((num) * MAX_VECTORS, i) if (i % MAX_VECTORS < panels[i / MAX_VECTORS].vectors)

static inline void wait_for_team(const Thread *t) {
    if (t->size > 1) {
#pragma omp barrier
    }
}

/* A linear layer of (rows, length) from one matrix of the panels to another; then the weights are bfloat16 if
 * is_bfloat16. */
void linear(const Thread *t, const Panel *panels, int64_t num, Parameters p, int64_t rows, int64_t length, int from,
            int to, int has_gelu, int is_bfloat16);

/* What is done with some panels, by a thread of their team. */
typedef void Task(const void *job, const Panel *panels, int64_t num, const Thread *t);

/* Of a job: queries, most vectors in a row, rows of each matrix, vectors of scratch for each thread, numbers of weights
 * that each panel reads. */
typedef struct {
    int64_t queries, max_vectors, rows[MATRICES], scratch, weights;
} Needs;

/* Numbers of workspace that run needs, for so many queries or also for any smaller number of them. */
int64_t workspace_of(const Needs *needs, int or_fewer);

/* The workspace begins at a multiple of 64 bytes. */
void run(Task *task, const void *job, const Needs *needs, float *workspace);
