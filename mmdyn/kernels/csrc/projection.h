/* Patches of a map or image, projected: patch embeddings, and keys and values. */
#pragma once
#include "common.h"

/* An optional norm, a linear layer, an optional norm, and an optional linear layer of each patch. What is optional has no
 * weight if it is left out.
 *
 * A patch consists of outer x inner segments of length numbers that lie side by side: cells of a map of tokens, or lines
 * of an image's channels. The first norm is one of segments. The weights of the first layer are (channels, outer, inner,
 * length), those of the second (kv_channels, channels). Strides count numbers.
 */
typedef struct {
    int64_t images, height, width, outer, inner, length, channels, kv_channels; /* height and width in patches */
    int64_t image_stride, row_stride, column_stride, outer_stride, inner_stride;
    float eps_before, eps_after;
    Parameters norm_before, linear, norm_after, kv;
    const float *input;
    float *output;
    const float *positions; /* an embedding of a map that is resized bilinearly and added to the output, or 0 */
    int64_t positions_height, positions_width;
    const float *router; /* (num_options, length), whose products with the segments are written to scores */
    int64_t num_options; /* 0 if there are no scores */
    float *scores;       /* (num_options, segments), where the segments are all tokens in the order of the input */
} Projection;

/* Numbers of workspace that project needs. */
EXPORT int64_t project_workspace(const Projection *g);

/* Write the output, (images, height * width, channels or kv_channels). */
EXPORT void project(const Projection *g, float *workspace);
