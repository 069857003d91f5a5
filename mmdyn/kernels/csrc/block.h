/* Encoder blocks on all tokens, or on the queries that a router chose. */
#pragma once
#include "common.h"
#include "routing.h"

/* A block, and the tokens of some images, which are overwritten by its results. */
typedef struct {
    int64_t dim, hidden, heads, points, sr_ratio; /* points of a head in deformable attention, 0 in softmax attention */
    float norm1_eps, norm2_eps, sr_norm_eps, residual_scale;
    Parameters norm1, q, kv, sr, sr_norm; /* sr has no weight without spatial reduction; */
    Parameters offsets, point_weights; /* in deformable attention, kv are the values, and these take the place of q */
    Parameters proj, norm2, fc1, fc2;
    int64_t is_bfloat16; /* whether the linear layers of queries compute in bfloat16; dim and hidden are even then */
    float *tokens;       /* (images, num_extra + height * width, dim) */
    Map map;             /* without a choice each token is a query */
    const int64_t *granularities;
    Parameters router;            /* of num_options granularities; no weight if none is asked */
    int64_t num_options, *chosen; /* what the router chose: the map's choice, or not, if that is forced */
    int64_t budget;               /* most queries of an image's patches; less than 0 if each region decides alone */
    int64_t *lengths;             /* queries of each image, which are written */
    float *class_rows; /* (images, heads, keys), how much each image's first query attends to the keys, or 0 */
} Block;

/* Numbers of workspace that encode_blocks needs. */
EXPORT int64_t encode_blocks_workspace(const Block *blocks, int64_t count);

/* Run one block after another. */
EXPORT void encode_blocks(const Block *blocks, int64_t count, float *workspace);
