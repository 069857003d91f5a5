/* One head's attention of the queries of a panel. */
#pragma once
#include "block.h"
#include "panels.h"

/* A block at work. */
typedef struct {
    Block block;
    int64_t size, keys, queries; /* tokens of an image, keys of an image, queries of all images */
    float *kv;      /* (images, keys, 2, dim), or the values of deformable attention, (images, size, dim) */
    float *scores;  /* the router's of all tokens, (num_options, images, size); 0 if not all are in patches of keys */
    float *logits;  /* (images, regions, num_options) if they share a budget, otherwise 0 */
    Step *steps;    /* room for them */
    Patch *patches; /* the queries', or 0 if they are the tokens */
    int64_t *ends;  /* where the queries of each image end */
} Encoding;

static inline Patch patch_of(const Encoding *e, int64_t query) {
    return e->patches ? e->patches[query] : (Patch){query, 1, 1};
}

/* From the queries in Q to A, by softmax attention, image by image. Scratch is (keys + dim / heads) * MAX_VECTORS. */
void attend(const Encoding *e, const Panel *panel, int64_t head, Vector *scratch);

/* From offsets in H and logits of the points' weights in Q to A, by deformable attention. Scratch is dim vectors. */
void attend_to_points(const Encoding *e, const Panel *panel, int64_t head, float *scratch);
