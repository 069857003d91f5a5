/* What the caller asks before anything else. */
#include "block.h"
#include "common.h"
#include "projection.h"
#include "routing.h"
#include "sampling.h"
#include <stddef.h>

/* Of the arguments and structs of all functions; kernels/library.py has the same. */
enum { VERSION = 4 };

/* The version, then the size of each struct and where its last field begins. The caller must have the same. */
EXPORT void layout(int64_t *numbers) {
    const int64_t all[] = {VERSION,
                           sizeof(Map),
                           offsetof(Map, choice),
                           sizeof(Step),
                           offsetof(Step, option),
                           sizeof(Sampling),
                           offsetof(Sampling, channels),
                           sizeof(Block),
                           offsetof(Block, class_rows),
                           sizeof(Projection),
                           offsetof(Projection, scores)};
    for (unsigned i = 0; i < sizeof(all) / sizeof(*all); i++) numbers[i] = all[i];
}

/* Whether this processor has the instructions of the encoder, and those for bfloat16. */
EXPORT int runs(void);
EXPORT int runs_half(void);
#if HAS_VECTORS
#include "vectors.h"
static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

int runs(void) {
    return __builtin_cpu_supports("fma") && (LANES == 16 ? has_avx512() : __builtin_cpu_supports("avx2"));
}

int runs_half(void) {
    return HAS_BFLOAT16 && runs() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
}
#else
int runs(void) { return 0; }
int runs_half(void) { return 0; }
#endif
