/* Vectors of LANES float32: what is computed lane by lane, and the ways from and to rows of channels. setup.py compiles
 * all twice: for AVX-512 with 16 lanes, and for AVX2 with 8. */
#pragma once
#include "common.h"
#include <immintrin.h>

#if LANES == 16
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#define LANE_NUMBERS ((Integers){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#else
#define TARGET __attribute__((target("avx2,fma")))
#define LANE_NUMBERS ((Integers){0, 1, 2, 3, 4, 5, 6, 7})
#endif
#define TARGET_BFLOAT16                                                                                                \
    __attribute__((target("avx512f,avx512dq,avx512vl,fma,avx512bw,avx512bf16,prefer-vector-width=512")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 24")

enum { HAS_BFLOAT16 = LANES == 16 };
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float HalfVector __attribute__((vector_size(2 * LANES)));
typedef float UnalignedVector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

/* Sums over many rows are split into chains, so that an addition does not wait for the one before: row c goes to sum i. */
enum { CHAINS = 4 };
#define BY_CHAINS(rows, c, i)                                                                                          \
    for (int64_t c##_begin = 0; c##_begin < (rows); c##_begin += CHAINS)                                               \
    UNROLL for (int64_t i = 0, c = c##_begin; i < CHAINS; i++, c++) if (c < (rows))

#if LANES == 16
INLINE __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << min(LANES, count)) - 1); }
INLINE Vector load_first(const float *row, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), row); }
INLINE void store_first(float *row, int64_t count, Vector v) { _mm512_mask_storeu_ps(row, first_lanes(count), v); }
INLINE Vector sqrt_lanes(Vector x) { return _mm512_sqrt_ps(x); }
/* NaN if b is. */
INLINE Vector max_lanes(Vector a, Vector b) { return _mm512_max_ps(a, b); }
#else
INLINE __m256i first_lanes(int64_t count) { return (__m256i)(LANE_NUMBERS < (int32_t)min(LANES, count)); }
INLINE Vector load_first(const float *row, int64_t count) { return _mm256_maskload_ps(row, first_lanes(count)); }
INLINE void store_first(float *row, int64_t count, Vector v) { _mm256_maskstore_ps(row, first_lanes(count), v); }
INLINE Vector sqrt_lanes(Vector x) { return _mm256_sqrt_ps(x); }
INLINE Vector max_lanes(Vector a, Vector b) { return _mm256_max_ps(a, b); }
#endif

/* The next numbers of a row of which so many are left; the other lanes are zeros. Sanitizers do not see masked loads and
 * stores. */
INLINE Vector load_lanes(const float *row, int64_t left) {
#ifdef __SANITIZE_ADDRESS__
    Vector lanes = {};
    for (int i = 0; i < min(LANES, left); i++) lanes[i] = row[i];
    return lanes;
#else
    return load_first(row, left);
#endif
}

INLINE void store_lanes(float *row, int64_t left, Vector lanes) {
#ifdef __SANITIZE_ADDRESS__
    for (int i = 0; i < min(LANES, left); i++) row[i] = lanes[i];
#else
    store_first(row, left, lanes);
#endif
}

INLINE Vector select_lanes(Integers mask, Vector a, Vector b) {
    return (Vector)(((Integers)a & mask) | ((Integers)b & ~mask));
}

/* 2^n times a polynomial of the rest, as in the Cephes library; NaN stays. */
INLINE Vector exponential(Vector x) {
    x = max_lanes((Vector){} - 87.f, x);
    Vector power = (x * 1.44269504f + 12582912.f) - 12582912.f;
    Vector rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    Vector sum = (Vector){} + 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * (rest * rest) + rest + 1.f;
    return sum * (Vector)((__builtin_convertvector(power, Integers) + 127) << 23);
}

/* x P(N(0, 1) <= x), by 7.1.26 in Abramowitz and Stegun's Handbook of Mathematical Functions. */
INLINE Vector gelu(Vector x) {
    Vector size = (Vector)((Integers)x & INT32_MAX), t = 1.f / (1.f + 0.231641888f * size);
    Vector sum = (Vector){} + 1.061405429f;
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    return max_lanes((Vector){}, x) - size * (0.5f * sum * t * exponential(-0.5f * x * x));
}

/* Channels 0, 1, ... of up to LANES rows become vectors that are ld vectors apart; lanes without a row are zeros. */
void load_rows(const float *const *rows, int64_t count, int64_t channels, Vector *out, int64_t ld);

/* The reverse; rows of base, where they are not 0, are added. */
void store_rows(const Vector *in, int64_t ld, int64_t count, int64_t channels, const float *const *base,
                float *const *rows);

/* The LayerNorm of each lane over the channels, which are ld vectors apart. */
void layer_norm(const Vector *x, int64_t ld, int64_t channels, Parameters p, float eps, Vector *out);

/* Replace each lane's scores by exponentials, and return the factor that makes them a softmax. */
Vector softmax(Vector *scores, int64_t rows, int64_t ld, float scale) TARGET;

/* Tokens (images, cells, channels) become maps (images, channels, cells); cells are a multiple of 16. */
EXPORT void transpose_tokens(const float *tokens, int64_t images, int64_t cells, int64_t channels, float *maps);
