/* Products of weights, as torch keeps them, with a matrix of up to 64 columns. */
#pragma once
#include "vectors.h"

enum { MAX_VECTORS = 64 / LANES };

/* Memory that the thread reads or writes soon. A product fetches some lines of it for each row that it makes, so that the
 * memory arrives while the product computes. */
typedef struct {
    const char *row;                                  /* the first that is not completely fetched, */
    int64_t rows, bytes, stride, lines_per_row, done; /* and how many of its bytes are */
} Prefetch;

enum { PREFETCHES = 2, CACHE_LINE = 64 };

/* out (rows, columns) = weight (rows, length) * x (length, columns) + bias (rows), which may be 0. Whole vectors are
 * written.
 *
 * Rows of the weights are row numbers apart, their columns step; rows of x and out are ldx and ldo vectors apart.
 */
void product(int64_t columns, const float *weight, int64_t row, int64_t step, int64_t rows, int64_t length,
             const Vector *x, int64_t ldx, const float *bias, Vector *out, int64_t ldo, Prefetch *prefetch);

/* The same in bfloat16, with sums in float32. Weights and x are pairs of two numbers, of which length counts half as many;
 * nothing lies between rows. */
typedef void BFloat16Product(const int32_t *weight, int64_t rows, int64_t length, const __m512i *x, const float *bias,
                             Vector *out);
BFloat16Product *bfloat16_product_of(int64_t vectors);

/* Round a vector of columns of so many rows, which are ld vectors apart, and pair row 2 i with row 2 i + 1. */
void pair_rows(const Vector *x, int64_t ld, int64_t rows, __m512i *pairs);

/* Round count weights, by the threads of the team that calls. */
void round_weights(const float *weight, int64_t count, uint16_t *rounded);
