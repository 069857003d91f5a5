#include "common.h"
#if HAS_VECTORS
#include "products.h"
#include <string.h>

static void fetch(Prefetch *prefetch, int64_t rows) {
    for (Prefetch *p = prefetch; p < prefetch + PREFETCHES; p++)
        for (int64_t i = 0; i < rows * p->lines_per_row && p->rows; i++) {
            __builtin_prefetch(p->row + p->done, 0, 2);
            if ((p->done += CACHE_LINE) >= p->bytes) p->row += p->stride, p->rows--, p->done = 0;
        }
}

/* A product of ROWS rows and R vectors, of the last of which only the lower half counts if NARROW. */
INLINE void tile(const float *weight, int64_t row, int64_t step, int64_t length, const Vector *x, int64_t ldx,
                 const float *bias, Vector *out, int64_t ldo, Prefetch *prefetch, int ROWS, int R, int NARROW) {
    const int WHOLE = R - NARROW;
    if (prefetch) fetch(prefetch, ROWS);
    Vector sum[24];
    HalfVector rest[12];
    UNROLL for (int i = 0; i < ROWS; i++) {
        UNROLL for (int r = 0; r < WHOLE; r++) sum[i * R + r] = (Vector){} + (bias ? bias[i] : 0.f);
        if (NARROW) rest[i] = (HalfVector){} + (bias ? bias[i] : 0.f);
    }
    for (int64_t j = 0; j < length; j++) {
        if (step == 1 && j % (CACHE_LINE / (int)sizeof(float)) == 0) /* the rows of the next tile */
            UNROLL for (int i = 0; i < ROWS; i++) __builtin_prefetch(weight + (i + ROWS) * row + j, 0, 2);
        UNROLL for (int i = 0; i < ROWS; i++) {
            UNROLL for (int r = 0; r < WHOLE; r++) sum[i * R + r] += weight[i * row + j * step] * x[j * ldx + r];
            if (NARROW) rest[i] += weight[i * row + j * step] * *(const HalfVector *)(x + j * ldx + WHOLE);
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) {
        UNROLL for (int r = 0; r < WHOLE; r++) out[i * ldo + r] = sum[i * R + r];
        if (NARROW) *(HalfVector *)(out + i * ldo + WHOLE) = rest[i];
    }
}

INLINE void tiles(const float *weight, int64_t row, int64_t step, int64_t rows, int64_t length, const Vector *x,
                  int64_t ldx, const float *bias, Vector *out, int64_t ldo, Prefetch *prefetch, int ROWS, int R,
                  int NARROW) {
    int64_t i = 0;
#define NEXT(N)                                                                                                        \
    tile(weight + i * row, row, step, length, x, ldx, bias ? bias + i : 0, out + i * ldo, ldo, prefetch, N, R, NARROW)
    for (; i + ROWS <= rows; i += ROWS) NEXT(ROWS);
    for (; i + 4 <= rows; i += 4) NEXT(4);
    for (; i + 3 <= rows; i += 3) NEXT(3);
    for (; i < rows; i++) NEXT(1);
}

typedef void Product(const float *weight, int64_t row, int64_t step, int64_t rows, int64_t length, const Vector *x,
                     int64_t ldx, const float *bias, Vector *out, int64_t ldo, Prefetch *prefetch);

/* ROWS * R sums, the vectors that they are made of and a weight take as many registers as there are. */
#define PRODUCT(NAME, R, ROWS, NARROW)                                                                                 \
    TARGET static void NAME##R(const float *weight, int64_t row, int64_t step, int64_t rows, int64_t length,           \
                               const Vector *x, int64_t ldx, const float *bias, Vector *out, int64_t ldo,              \
                               Prefetch *prefetch) {                                                                   \
        tiles(weight, row, step, rows, length, x, ldx, bias, out, ldo, prefetch, ROWS, R, NARROW);                     \
    }
#if LANES == 16
PRODUCT(whole, 1, 8, 0)
PRODUCT(whole, 2, 12, 0)
PRODUCT(whole, 3, 8, 0)
PRODUCT(whole, 4, 6, 0)
PRODUCT(narrow, 1, 12, 1)
PRODUCT(narrow, 2, 12, 1)
PRODUCT(narrow, 3, 8, 1)
PRODUCT(narrow, 4, 6, 1)

void product(int64_t columns, const float *weight, int64_t row, int64_t step, int64_t rows, int64_t length,
             const Vector *x, int64_t ldx, const float *bias, Vector *out, int64_t ldo, Prefetch *prefetch) {
    static Product *const whole[] = {0, whole1, whole2, whole3, whole4};
    static Product *const narrow[] = {0, narrow1, narrow2, narrow3, narrow4};
    int64_t vectors = ceil_div(columns, LANES);
    Product *of_columns = vectors * LANES - columns < LANES / 2 ? whole[vectors] : narrow[vectors];
    of_columns(weight, row, step, rows, length, x, ldx, bias, out, ldo, prefetch);
}
#else
PRODUCT(whole, 1, 8, 0)
PRODUCT(whole, 2, 6, 0)
PRODUCT(whole, 3, 4, 0)

/* Two or three vectors at a time, and so many rows that their weights stay in cache from the first vectors to the last. */
void product(int64_t columns, const float *weight, int64_t row, int64_t step, int64_t rows, int64_t length,
             const Vector *x, int64_t ldx, const float *bias, Vector *out, int64_t ldo, Prefetch *prefetch) {
    static Product *const whole[] = {0, whole1, whole2, whole3};
    enum { ROWS = 12 };
    for (int64_t i = 0; i < rows; i += ROWS)
        for (int64_t r = 0, vectors = ceil_div(columns, LANES), some; r < vectors; r += some) {
            some = vectors - r <= 3 ? vectors - r : 2;
            whole[some](weight + i * row, row, step, min(rows - i, ROWS), length, x + r, ldx, bias ? bias + i : 0,
                        out + i * ldo + r, ldo, r ? 0 : prefetch);
        }
}
#endif

#if LANES == 16
/* The last tile begins earlier if there are enough rows; otherwise it repeats the last row. */
#define BFLOAT16_PRODUCT(R, ROWS)                                                                                      \
    TARGET_BFLOAT16 static void bfloat16_product##R(const int32_t *weight, int64_t rows, int64_t length,               \
                                                    const __m512i *x, const float *bias, Vector *out) {                \
        for (int64_t i = 0; i < rows; i += ROWS) {                                                                     \
            int64_t first = i + ROWS <= rows ? i : max(rows - ROWS, 0), last = min(ROWS, rows) - 1;                    \
            __m512 sum[24];                                                                                            \
            UNROLL for (int n = 0; n < ROWS; n++)                                                                      \
                UNROLL for (int r = 0; r < R; r++)                                                                     \
                    sum[n * R + r] = _mm512_set1_ps(bias ? bias[first + min(n, last)] : 0.f);                          \
            const int32_t *row[ROWS];                                                                                  \
            UNROLL for (int n = 0; n < ROWS; n++) row[n] = weight + (first + min(n, last)) * length;                   \
            for (int64_t j = 0; j < length; j++)                                                                       \
                UNROLL for (int n = 0; n < ROWS; n++)                                                                  \
                    UNROLL for (int r = 0; r < R; r++)                                                                 \
                        sum[n * R + r] = _mm512_dpbf16_ps(sum[n * R + r], (__m512bh)x[j * R + r],                      \
                                                          (__m512bh)_mm512_set1_epi32(row[n][j]));                     \
            UNROLL for (int n = 0; n < ROWS; n++)                                                                      \
                if (n <= last)                                                                                         \
                    UNROLL for (int r = 0; r < R; r++) out[(first + n) * R + r] = sum[n * R + r];                      \
        }                                                                                                              \
    }
BFLOAT16_PRODUCT(1, 8)
BFLOAT16_PRODUCT(2, 12)
BFLOAT16_PRODUCT(3, 8)
BFLOAT16_PRODUCT(4, 6)

BFloat16Product *bfloat16_product_of(int64_t vectors) {
    static BFloat16Product *const products[] = {0, bfloat16_product1, bfloat16_product2, bfloat16_product3,
                                                bfloat16_product4};
    return products[vectors];
}

TARGET_BFLOAT16 void pair_rows(const Vector *x, int64_t ld, int64_t rows, __m512i *pairs) {
    for (int64_t j = 0; j < rows * ld; j += 2 * ld) {
        __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[j]));
        __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[j + ld]));
        pairs[j / 2] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
}

TARGET_BFLOAT16 void round_weights(const float *weight, int64_t count, uint16_t *rounded) {
    int64_t vectors = ceil_div(count, LANES);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < vectors; i++) {
        int64_t begin = i * LANES, left = min(LANES, count - begin);
        __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)load_lanes(weight + begin, left));
        if (left == LANES)
            *(__m256i_u *)(rounded + begin) = half;
        else
            memcpy(rounded + begin, &half, left * sizeof(*rounded));
    }
}
#endif
#endif
