#include "common.h"
#if HAS_VECTORS
#include "vectors.h"

/* In a matrix of blocks of side x side numbers, swap the upper right and the lower left block of each 2 x 2. */
INLINE void swap_blocks(Vector *rows, int side) {
    Integers lane = LANE_NUMBERS;
    /* Shuffles number the lanes of both vectors, first those of the first. */
    Integers left = lane + (((lane & side) != 0) & (LANES - side)), right = left + side;
    UNROLL for (int i = 0; i < LANES; i++) {
        if (i & side) continue;
        Vector top = rows[i], bottom = rows[i + side];
        rows[i] = __builtin_shuffle(top, bottom, left);
        rows[i + side] = __builtin_shuffle(top, bottom, right);
    }
}

INLINE void transpose(Vector *rows) {
    if (LANES == 16) swap_blocks(rows, 8);
    swap_blocks(rows, 4);
    swap_blocks(rows, 2);
    swap_blocks(rows, 1);
}

TARGET void load_rows(const float *const *rows, int64_t count, int64_t channels, Vector *out, int64_t ld) {
    for (int64_t c = 0; c < channels; c += LANES) {
        Vector block[LANES];
        for (int i = 0; i < LANES; i++) block[i] = i < count ? load_lanes(rows[i] + c, channels - c) : (Vector){};
        transpose(block);
        UNROLL for (int i = 0; i < LANES; i++)
            if (c + i < channels) out[(c + i) * ld] = block[i];
    }
}

TARGET void store_rows(const Vector *in, int64_t ld, int64_t count, int64_t channels, const float *const *base,
                       float *const *rows) {
    for (int64_t c = 0; c < channels; c += LANES) {
        Vector block[LANES];
        UNROLL for (int i = 0; i < LANES; i++) block[i] = c + i < channels ? in[(c + i) * ld] : (Vector){};
        transpose(block);
        for (int64_t i = 0; i < count; i++) {
            if (base[i]) block[i] += load_lanes(base[i] + c, channels - c);
            store_lanes(rows[i] + c, channels - c, block[i]);
        }
    }
}

TARGET void layer_norm(const Vector *x, int64_t ld, int64_t channels, Parameters p, float eps, Vector *out) {
    Vector sums[CHAINS] = {}, squares[CHAINS] = {};
    BY_CHAINS(channels, c, i) sums[i] += x[c * ld];
    Vector mean = (sums[0] + sums[1] + sums[2] + sums[3]) / (float)channels;
    BY_CHAINS(channels, c, i) squares[i] += (x[c * ld] - mean) * (x[c * ld] - mean);
    Vector variance = (squares[0] + squares[1] + squares[2] + squares[3]) / (float)channels;
    Vector factor = 1.f / sqrt_lanes(variance + eps);
    for (int64_t c = 0; c < channels; c++) out[c * ld] = (x[c * ld] - mean) * factor * p.weight[c] + p.bias[c];
}

TARGET Vector softmax(Vector *scores, int64_t rows, int64_t ld, float scale) {
    Vector most[CHAINS] = {scores[0], scores[0], scores[0], scores[0]}, sum = {};
    BY_CHAINS(rows, j, i) most[i] = max_lanes(most[i], scores[j * ld]);
    most[0] = max_lanes(max_lanes(most[0], most[1]), max_lanes(most[2], most[3]));
    for (int64_t i = 0; i < rows; i++) sum += scores[i * ld] = exponential((scores[i * ld] - most[0]) * scale);
    return 1.f / sum;
}

void transpose_tokens(const float *tokens, int64_t images, int64_t cells, int64_t channels, float *maps) {
    int64_t columns = cells / LANES;
#pragma omp parallel for
    for (int64_t i = 0; i < images * columns; i++) {
        const float *rows[LANES];
        for (int64_t j = 0; j < LANES; j++) rows[j] = tokens + (i * LANES + j) * channels;
        load_rows(rows, LANES, channels, (Vector *)(maps + i / columns * cells * channels) + i % columns, columns);
    }
}
#endif
