/* What all files use. */
#pragma once
#include <stdint.h>

/* Whether the compiler knows the instructions of the encoder, with GCC's vectors. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_VECTORS 1
#define MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HAS_VECTORS 0
#define MULTIVERSION
#endif

/* What Python calls. All else is hidden, so that functions of the same names in other libraries cannot take their place. */
#ifdef __GNUC__
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Whether threads gain more than starting them takes. A row costs some time whatever its length. */
static inline int is_parallel(int64_t rows, int64_t channels) { return rows * (channels + 16) > 65536; }

/* A layer's, as torch keeps them; 0 where there are none. */
typedef struct {
    const float *weight, *bias;
} Parameters;
