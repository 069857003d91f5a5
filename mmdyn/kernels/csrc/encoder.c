/* Inference on a CPU with AVX-512: all steps of an encoder block on its queries in one call, and projections of patches.
 *
 * Work is done on panels of up to 64 queries. A panel is a matrix with a row for each channel and its queries as columns,
 * in vectors of 16. A linear layer is then a sum of rows with factors that are read as torch keeps them, without packing,
 * and all that lies between two layers stays in the cache of one core.
 */
#include "cpu.h"
#include <math.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#include <omp.h>

#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define TARGET_HALF __attribute__((target("avx512f,avx512dq,avx512vl,fma,avx512bw,avx512bf16,prefer-vector-width=512")))
#define UNROLL _Pragma("GCC unroll 24")

/* Numbers in a vector, most vectors in a row of a panel, rows of weights that a thread takes at a time; few panels for a
 * thread, weights that stay in cache, and weights for an idle vector in which sharing takes as long as waiting. */
enum { LANES = 16, MOST = 4, CHUNK = 24, FEW = 10, CACHED = 1 << 21, MUCH = 150000 };
typedef float Vector __attribute__((vector_size(64)));
typedef float HalfVector __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(64), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(64)));

typedef struct {
    const float *weight, *bias;
} Parameters;

/* Matrices that a panel's steps read and write. In P, bfloat16 numbers of two rows are side by side. */
enum { X, A, Q, H, P, MATRICES };

typedef struct {
    int64_t first, count, vectors; /* of its queries, and in a row */
    Vector *matrix[MATRICES];
} Panel;

/* Memory that a thread needs soon, rows of so many bytes. A product fetches so many lines of it for each row that it makes,
 * so that they come while it computes. */
typedef struct {
    const char *row; /* the first that is not yet fetched, but for the bytes that are done */
    int64_t rows, bytes, stride, lines, done;
} Range;

enum { RANGES = 2, LINE = 64 };

static void fetch(Range *ranges, int64_t rows) {
    for (Range *a = ranges; a < ranges + RANGES; a++)
        for (int64_t i = 0; i < rows * a->lines && a->rows; i++) {
            __builtin_prefetch(a->row + a->done, 0, 2);
            if ((a->done += LINE) >= a->bytes) a->row += a->stride, a->rows--, a->done = 0;
        }
}

/* A team of threads shares the tasks of a step. */
typedef struct {
    int64_t rank, size;
    Vector *own;  /* memory of this thread */
    Range *ahead; /* what products of one thread alone fetch, or 0 */
} Member;

#define SHARE(total, i)                                                                                                \
    for (int64_t i = (total)*m->rank / m->size, i##_end = (total) * (m->rank + 1) / m->size; i < i##_end; i++)
#define COLUMNS(panels, num, i) SHARE((num)*MOST, i) if (i % MOST < panels[i / MOST].vectors)

/* Sums of many rows do not wait for each other in chains: i says which one row c goes to. */
enum { CHAINS = 4 };
#define BY_CHAINS(rows, c, i)                                                                                          \
    for (int64_t c##_begin = 0; c##_begin < (rows); c##_begin += CHAINS)                                               \
        UNROLL for (int64_t i = 0, c = c##_begin; i < CHAINS; i++, c++) if (c < (rows))

static void wait_for_team(const Member *m) {
    if (m->size > 1) {
#pragma omp barrier
    }
}

static int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* out = weight * x + bias, of ROWS rows and R vectors of columns, only half of the last of which counts if NARROW. */
INLINE void tile(const float *weight, int64_t row, int64_t step, int64_t length, const Vector *x, int64_t ldx,
                 const float *bias, Vector *out, int64_t ldo, Range *ahead, int ROWS, int R, int NARROW) {
    const int WHOLE = R - NARROW;
    if (ahead) fetch(ahead, ROWS);
    Vector sum[24];
    HalfVector rest[12];
    UNROLL for (int i = 0; i < ROWS; i++) {
        UNROLL for (int r = 0; r < WHOLE; r++) sum[i * R + r] = (Vector){} + (bias ? bias[i] : 0.f);
        if (NARROW) rest[i] = (HalfVector){} + (bias ? bias[i] : 0.f);
    }
    for (int64_t j = 0; j < length; j++) {
        if (step == 1 && j % LANES == 0) /* the rows of the next tile */
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
                  int64_t ldx, const float *bias, Vector *out, int64_t ldo, Range *ahead, int ROWS, int R, int NARROW) {
    int64_t i = 0;
#define NEXT(N)                                                                                                        \
    tile(weight + i * row, row, step, length, x, ldx, bias ? bias + i : 0, out + i * ldo, ldo, ahead, N, R, NARROW)
    for (; i + ROWS <= rows; i += ROWS) NEXT(ROWS);
    for (; i + 4 <= rows; i += 4) NEXT(4);
    for (; i + 3 <= rows; i += 3) NEXT(3);
    for (; i < rows; i++) NEXT(1);
}

/* out (rows, R vectors) = weight (rows, length) * x (length, R vectors) + bias (rows), which may be 0.
 *
 * The weights' rows are row numbers apart, those of a row step; rows of x and out are ldx and ldo vectors apart.
 */
typedef void Product(const float *weight, int64_t row, int64_t step, int64_t rows, int64_t length, const Vector *x,
                     int64_t ldx, const float *bias, Vector *out, int64_t ldo, Range *ahead);

/* As many sums as there are registers for them. */
#define PRODUCT(NAME, R, ROWS, NARROW)                                                                                 \
    TARGET static void NAME##R(const float *weight, int64_t row, int64_t step, int64_t rows, int64_t length,           \
                               const Vector *x, int64_t ldx, const float *bias, Vector *out, int64_t ldo,              \
                               Range *ahead) {                                                                         \
        tiles(weight, row, step, rows, length, x, ldx, bias, out, ldo, ahead, ROWS, R, NARROW);                        \
    }
PRODUCT(whole, 1, 8, 0)
PRODUCT(whole, 2, 12, 0)
PRODUCT(whole, 3, 8, 0)
PRODUCT(whole, 4, 6, 0)
PRODUCT(narrow, 1, 12, 1)
PRODUCT(narrow, 2, 12, 1)
PRODUCT(narrow, 3, 8, 1)
PRODUCT(narrow, 4, 6, 1)

/* The product for so many columns. */
static Product *product_of_columns(int64_t columns) {
    static Product *const whole[] = {0, whole1, whole2, whole3, whole4};
    static Product *const narrow[] = {0, narrow1, narrow2, narrow3, narrow4};
    int64_t vectors = (columns + LANES - 1) / LANES;
    return vectors * LANES - columns < LANES / 2 ? whole[vectors] : narrow[vectors];
}

/* The same in bfloat16, with sums in float32: weights and x are pairs, of which there are half as many. */
#define HALF_PRODUCT(R, ROWS)                                                                                          \
    TARGET_HALF static void half_product##R(const int32_t *weight, int64_t rows, int64_t length, const __m512i *x,     \
                                            const float *bias, Vector *out) {                                          \
        for (int64_t i = 0; i < rows; i += ROWS) {                                                                     \
            int64_t first = i + ROWS <= rows ? i : larger_of(rows - ROWS, 0), last = smaller(ROWS, rows) - 1;          \
            __m512 sum[24];                                                                                            \
            UNROLL for (int n = 0; n < ROWS; n++)                                                                      \
                UNROLL for (int r = 0; r < R; r++)                                                                     \
                    sum[n * R + r] = _mm512_set1_ps(bias ? bias[first + smaller(n, last)] : 0.f);                      \
            const int32_t *row[ROWS];                                                                                  \
            UNROLL for (int n = 0; n < ROWS; n++) row[n] = weight + (first + smaller(n, last)) * length;               \
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
HALF_PRODUCT(1, 8)
HALF_PRODUCT(2, 12)
HALF_PRODUCT(3, 8)
HALF_PRODUCT(4, 6)
typedef void HalfProduct(const int32_t *weight, int64_t rows, int64_t length, const __m512i *x, const float *bias,
                         Vector *out);
static HalfProduct *const half_product[] = {0, half_product1, half_product2, half_product3, half_product4};

/* The first lanes of a vector. */
INLINE __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << smaller(LANES, count)) - 1); }

/* A column of pairs from one of twice as many rows. */
TARGET_HALF static void pair_rows(const Vector *x, int64_t ld, int64_t rows, __m512i *pairs) {
    for (int64_t j = 0; j < rows * ld; j += 2 * ld) {
        __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[j]));
        __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[j + ld]));
        pairs[j / 2] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
}

/* Round count numbers to bfloat16, by the threads of a team. */
TARGET_HALF static void round_weights(const float *weight, int64_t count, uint16_t *rounded) {
    int64_t vectors = (count + LANES - 1) / LANES;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < vectors; i++) {
        __mmask16 lanes = first_lanes(count - i * LANES);
        __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, weight + i * LANES));
        _mm256_mask_storeu_epi16(rounded + i * LANES, lanes, half);
    }
}

INLINE Vector choose_lanes(Integers mask, Vector a, Vector b) {
    return (Vector)(((Integers)a & mask) | ((Integers)b & ~mask));
}

/* NaN if b is. */
INLINE Vector larger(Vector a, Vector b) { return (Vector)_mm512_max_ps(a, b); }

/* By the powers of two, and a polynomial of what remains; NaN stays. */
INLINE Vector exponential(Vector x) {
    x = larger((Vector){} - 87.f, x);
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
    return larger((Vector){}, x) - size * (0.5f * sum * t * exponential(-0.5f * x * x));
}

/* Exchange the upper right and lower left blocks of a matrix's 2 * side x 2 * side blocks. */
INLINE void exchange(Vector *rows, int side) {
    Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    /* Shuffles number the lanes of both vectors, 0 to 15 and 16 to 31. */
    Integers left = lane + (((lane & side) != 0) & (LANES - side)), right = left + side;
    UNROLL for (int i = 0; i < LANES; i++) {
        if (i & side) continue;
        Vector top = rows[i], bottom = rows[i + side];
        rows[i] = __builtin_shuffle(top, bottom, left);
        rows[i + side] = __builtin_shuffle(top, bottom, right);
    }
}

/* A 16 x 16 matrix. */
INLINE void transpose(Vector *rows) {
    exchange(rows, 8);
    exchange(rows, 4);
    exchange(rows, 2);
    exchange(rows, 1);
}

/* Up to 16 rows of numbers become a column of vectors; rows that are missing are zeros. */
TARGET static void load_rows(const float *const *rows, int64_t count, int64_t channels, Vector *out, int64_t ld) {
    for (int64_t c = 0; c < channels; c += LANES) {
        Vector block[LANES];
        __mmask16 lanes = first_lanes(channels - c);
        for (int i = 0; i < LANES; i++)
            block[i] = i < count ? (Vector)_mm512_maskz_loadu_ps(lanes, rows[i] + c) : (Vector){};
        transpose(block);
        UNROLL for (int i = 0; i < LANES; i++)
            if (c + i < channels) out[(c + i) * ld] = block[i];
    }
}

/* The other way, added to the rows of base, where there is one. */
TARGET static void store_rows(const Vector *in, int64_t ld, int64_t count, int64_t channels, const float *const *base,
                              float *const *rows) {
    for (int64_t c = 0; c < channels; c += LANES) {
        Vector block[LANES];
        __mmask16 lanes = first_lanes(channels - c);
        UNROLL for (int i = 0; i < LANES; i++) block[i] = c + i < channels ? in[(c + i) * ld] : (Vector){};
        transpose(block);
        for (int64_t i = 0; i < count; i++) {
            if (base[i]) block[i] += (Vector)_mm512_maskz_loadu_ps(lanes, base[i] + c);
            _mm512_mask_storeu_ps(rows[i] + c, lanes, block[i]);
        }
    }
}

/* A LayerNorm of each query of a column of vectors. */
TARGET static void norm(const Vector *x, int64_t ld, int64_t channels, Parameters p, float eps, Vector *out) {
    Vector sums[CHAINS] = {}, squares[CHAINS] = {};
    BY_CHAINS(channels, c, i) sums[i] += x[c * ld];
    Vector mean = (sums[0] + sums[1] + sums[2] + sums[3]) / (float)channels;
    BY_CHAINS(channels, c, i) squares[i] += (x[c * ld] - mean) * (x[c * ld] - mean);
    Vector variance = (squares[0] + squares[1] + squares[2] + squares[3]) / (float)channels;
    Vector factor = 1.f / (Vector)_mm512_sqrt_ps(variance + eps);
    for (int64_t c = 0; c < channels; c++) out[c * ld] = (x[c * ld] - mean) * factor * p.weight[c] + p.bias[c];
}

/* A linear layer from one matrix of the panels to another, whose weights are bfloat16 if is_half. */
TARGET static void linear(const Member *m, const Panel *panels, int64_t num, Parameters p, int64_t rows, int64_t length,
                          int from, int to, int has_gelu, int is_half) {
    int64_t chunk = m->size > 1 ? CHUNK : rows, chunks = (rows + chunk - 1) / chunk;
    if (is_half) {
        COLUMNS(panels, num, i) {
            const Panel *panel = panels + i / MOST;
            pair_rows(panel->matrix[from] + i % MOST, panel->vectors, length, (__m512i *)panel->matrix[P] + i % MOST);
        }
        wait_for_team(m);
    }
    SHARE(chunks * num, i) {
        const Panel *panel = panels + i % num; /* all panels meet the same weights before the next ones */
        int64_t ld = panel->vectors, begin = i / num * chunk, count = smaller(chunk, rows - begin);
        const float *bias = p.bias ? p.bias + begin : 0;
        Vector *out = panel->matrix[to] + begin * ld;
        if (is_half)
            half_product[ld]((const int32_t *)p.weight + begin * length / 2, count, length / 2,
                             (const __m512i *)panel->matrix[P], bias, out);
        else
            product_of_columns(panel->count)(p.weight + begin * length, length, 1, count, length, panel->matrix[from], ld,
                                             bias, out, ld, m->ahead);
        if (has_gelu)
            for (int64_t j = 0; j < count * ld; j++) out[j] = gelu(out[j]);
    }
    wait_for_team(m);
}

typedef void Work(const void *job, const Panel *panels, int64_t num, const Member *m);

/* What a job needs: memory in vectors, rows of each matrix of a panel and some for each thread, and numbers of weights. */
typedef struct {
    int64_t queries, widest, rows[MATRICES], own, weights;
} Needs;

/* How it is cut into panels. */
typedef struct {
    int64_t vectors, panels, threads, shared, size;
} Plan;

/* Each thread takes panels of its own, so that it reads what it wrote, or all share all panels and read each weight once:
 * few panels, if they do not divide evenly and have much to do with each query, or if the weights do not stay in cache from
 * panel to panel. */
static Plan plan_of(const Needs *n) {
    Plan p = {(n->queries + LANES - 1) / LANES, .threads = omp_get_max_threads()};
    int64_t idle = (p.vectors + p.threads - 1) / p.threads * p.threads - p.vectors;
    p.panels = (p.vectors + n->widest - 1) / n->widest;
    int waits = idle * n->weights > p.vectors * MUCH, reloads = n->weights > CACHED && p.panels > 2 * p.threads;
    p.shared = p.panels < FEW * p.threads && (waits || reloads);
    if (!p.shared) p.panels = smaller((p.panels + p.threads - 1) / p.threads * p.threads, p.vectors);
    for (int i = 0; i < MATRICES; i++) p.size += n->rows[i] * n->widest;
    return p;
}

/* Numbers of memory for so many queries; also if there are fewer, of which threads may share more panels. */
static int64_t memory_of(const Needs *n, int or_fewer) {
    Plan p = plan_of(n);
    int64_t panels = p.shared ? p.panels : p.threads, vectors = p.vectors;
    if (or_fewer) {
        if (n->weights <= CACHED) vectors = smaller(vectors, (p.threads - 1) * n->weights / MUCH); /* that threads wait for */
        panels = larger_of(smaller((vectors + n->widest - 1) / n->widest, FEW * p.threads), p.threads);
    }
    return (panels * p.size + p.threads * n->own) * LANES;
}

static Panel panel_at(const Needs *n, const Plan *p, int64_t index, Vector *memory) {
    int64_t begin = p->vectors * index / p->panels, end = p->vectors * (index + 1) / p->panels;
    Panel panel = {begin * LANES, smaller(end * LANES, n->queries) - begin * LANES, end - begin};
    for (int i = 0; i < MATRICES; memory += n->rows[i++] * n->widest) panel.matrix[i] = memory;
    return panel;
}

static int64_t take_panel(int64_t *next) {
    int64_t taken;
#pragma omp atomic capture
    taken = (*next)++;
    return taken;
}

/* A thread begins with the same part of the panels in each job, so that it finds in its cache what it had in the one before;
 * then it takes what is left of other parts. */
static void run(Work *work, const void *job, const Needs *n, float *scratch) {
    Plan p = plan_of(n);
    int64_t next[p.threads];
    for (int64_t part = 0; part < p.threads; part++) next[part] = p.panels * part / p.threads;
#pragma omp parallel
    {
        Member m = {omp_get_thread_num(), omp_get_num_threads()};
        Vector *memory = (Vector *)scratch;
        m.own = memory + (p.shared ? p.panels : p.threads) * p.size + m.rank * n->own;
        if (p.shared) {
            Panel panels[FEW * p.threads];
            for (int64_t i = 0; i < p.panels; i++) panels[i] = panel_at(n, &p, i, memory + i * p.size);
            work(job, panels, p.panels, &m);
        } else {
            int64_t first = m.rank;
            memory += m.rank * p.size;
            m.rank = 0, m.size = 1;
            for (int64_t i, part = first; part < first + p.threads; part++)
                while ((i = take_panel(&next[part % p.threads])) < p.panels * (part % p.threads + 1) / p.threads) {
                    Panel panel = panel_at(n, &p, i, memory);
                    work(job, &panel, 1, &m);
                }
        }
    }
}

/* A linear layer of patches with a norm before it, one of the result behind it, and then another linear layer; all but the
 * first are left out if they have no weight. A patch consists of outer x inner segments of length numbers that lie side
 * by side, the cells of a map of tokens or the lines of an image's channels, and the norm before is one of segments. The
 * weights are (channels, outer, inner, length), then (then_channels, channels). Strides are numbers. */
typedef struct {
    int64_t images, height, width, outer, inner, length, channels, then_channels; /* height and width in patches */
    int64_t image_stride, line_stride, patch_stride, outer_stride, inner_stride;
    float eps_before, eps_after;
    Parameters before, weights, after, then;
    const float *table;
    float *out;
    const float *positions; /* of lines x columns patches, which are resized and added, or 0 */
    int64_t lines, columns;
    const float *router; /* (options, length), whose products with the segments are written to scores, if there are any */
    int64_t options;
    float *scores; /* (options, segments), where the segments, all cells of the table, have the order of the table */
} Projection;

/* The line of a map of so many that is at the middle of one of another's lines: two lines and the share of the second. */
static float between(int64_t line, int64_t of, int64_t count, int64_t *first, int64_t *second) {
    float place = fmaxf(((float)line + 0.5f) * ((float)count / (float)of) - 0.5f, 0);
    *first = smaller((int64_t)place, count - 1), *second = smaller(*first + 1, count - 1);
    return place - (float)*first;
}

/* The position embedding of a patch, interpolated bilinearly between four. */
TARGET static void position_of(const Projection *g, int64_t patch, int64_t channels, float *restrict out) {
    int64_t top, bottom, left, right;
    float down = between(patch / g->width % g->height, g->height, g->lines, &top, &bottom);
    float across = between(patch % g->width, g->width, g->columns, &left, &right);
    const float *above = g->positions + top * g->columns * channels, *below = g->positions + bottom * g->columns * channels;
    const float *a = above + left * channels, *b = above + right * channels;
    const float *c = below + left * channels, *d = below + right * channels;
    for (int64_t i = 0; i < channels; i++)
        out[i] = (1 - down) * ((1 - across) * a[i] + across * b[i]) + down * ((1 - across) * c[i] + across * d[i]);
}

/* The first number of a patch. */
static const float *numbers_of(const Projection *g, int64_t patch) {
    int64_t line = patch / g->width;
    return g->table + line / g->height * g->image_stride + line % g->height * g->line_stride +
           patch % g->width * g->patch_stride;
}

/* Where a panel's results will be, and the cells of the next one's patches, if its first line of patches has them all. */
static void look_ahead(const Projection *g, const Panel *p, Range *ahead) {
    int64_t channels = g->then.weight ? g->then_channels : g->channels, number = sizeof(float);
    const float *cells = numbers_of(g, p->first + p->count);
    ahead[0] = (Range){(const char *)cells, g->outer, p->count * g->patch_stride * number, g->outer_stride * number};
    ahead[1] = (Range){(const char *)(g->out + p->first * channels), 1, p->count * channels * number};
    for (int i = 0; i < RANGES; i++)
        ahead[i].lines = (ahead[i].rows * ahead[i].bytes / LINE + g->channels - 1) / g->channels;
}

/* The router's products with the segments of a panel's columns, of which x has the numbers. */
TARGET static void score_rows(const Projection *g, const float *const *rows, int64_t count, const Vector *x, int64_t ld) {
    int64_t segments = g->outer * g->inner, cells = g->images * g->height * g->width * segments;
    Vector sums[g->options * MOST];
    product_of_columns(count)(g->router, g->length, 1, g->options, g->length, x, ld, 0, sums, ld, 0);
    for (int64_t k = 0; k < g->options; k++) {
        const float *sum = (const float *)(sums + k * ld);
        float *scores = g->scores + k * cells;
        if (segments == 1)
            memcpy(scores + (rows[0] - g->table) / g->length, sum, count * sizeof(float));
        else
            for (int64_t j = 0; j < count; j++) scores[(rows[j] - g->table) / g->length] = sum[j];
    }
}

TARGET static void project_panels(const void *job, const Panel *panels, int64_t num, const Member *m) {
    const Projection *g = job;
    int64_t segments = g->outer * g->inner, length = g->length, channels = g->then.weight ? g->then_channels : g->channels;
    const float *first[MOST * LANES], *rows[MOST * LANES]; /* segments of a panel's patches */
    const Panel *located = 0;
    SHARE(num * segments, i) {
        const Panel *p = panels + i / segments;
        int64_t segment = i % segments, ld = p->vectors;
        if (located != p) {
            located = p;
            for (int64_t j = 0, column = p->first % g->width; j < p->count; j++, column++) {
                if (column == g->width) column = 0;
                first[j] = j && column ? first[j - 1] + g->patch_stride : numbers_of(g, p->first + j);
            }
        }
        int64_t start = segment / g->inner * g->outer_stride + segment % g->inner * g->inner_stride;
        for (int64_t j = 0; j < p->count; j++) rows[j] = first[j] + start;
        Vector *x = p->matrix[A] + segment * length * ld;
        for (int64_t r = 0; r < ld; r++)
            load_rows(rows + r * LANES, smaller(p->count - r * LANES, LANES), length, x + r, ld);
        if (g->options) score_rows(g, rows, p->count, x, ld);
        if (g->before.weight)
            for (int64_t r = 0; r < ld; r++) norm(x + r, ld, length, g->before, g->eps_before, x + r);
    }
    wait_for_team(m);
    Range ahead[RANGES];
    Member fetching = *m;
    if (m->size == 1) fetching.ahead = ahead, look_ahead(g, panels, ahead);
    linear(&fetching, panels, num, g->weights, g->channels, segments * length, A, Q, 0, 0);
    if (g->after.weight) {
        COLUMNS(panels, num, i) {
            const Panel *p = panels + i / MOST;
            Vector *x = p->matrix[Q] + i % MOST;
            norm(x, p->vectors, g->channels, g->after, g->eps_after, x);
        }
        wait_for_team(m);
    }
    if (g->then.weight) linear(m, panels, num, g->then, channels, g->channels, Q, H, 0, 0);
    COLUMNS(panels, num, i) {
        const Panel *p = panels + i / MOST;
        int64_t r = i % MOST, count = smaller(p->count - r * LANES, LANES);
        float *rows[LANES];
        const float *base[LANES];
        for (int64_t j = 0; j < count; j++) {
            int64_t patch = p->first + r * LANES + j;
            float *position = (float *)m->own + j * channels;
            rows[j] = g->out + patch * channels, base[j] = g->positions ? position : 0;
            if (g->positions) position_of(g, patch, channels, position);
        }
        store_rows(p->matrix[g->then.weight ? H : Q] + r, p->vectors, count, channels, base, rows);
    }
}

static Needs needs_of_projection(const Projection *g) {
    int64_t length = g->outer * g->inner * g->length;
    /* The patches of a panel stay in cache. */
    return (Needs){g->images * g->height * g->width, length > 2048 ? MOST / 2 : MOST,
                   {0, length, g->channels, g->then_channels, 0}, g->positions ? g->channels : 0,
                   g->channels * (length + g->then_channels)};
}

/* Numbers of memory that project needs. */
int64_t project_memory(const Projection *g) {
    Needs needs = needs_of_projection(g);
    return memory_of(&needs, 0);
}

/* Memory for jobs begins at a multiple of 64 bytes. */
void project(const Projection *g, float *memory) {
    Needs needs = needs_of_projection(g);
    run(project_panels, g, &needs, memory);
}

/* An encoder block and the tokens of some images, to which what it changes is added. */
typedef struct {
    int64_t dim, hidden, heads, points, side; /* points of a head in deformable attention, or 0; side of a key's patch */
    float eps1, eps2, eps_keys, scale;        /* of the norms, and of both branches */
    Parameters norm1, query, weights, proj, norm2, fc1, fc2, reduce, norm_keys, memory;
    int64_t is_half; /* whether the queries' linear layers compute in bfloat16 */
    float *tokens;   /* (images, extra + height * width, dim) */
    Map map;         /* of a choice, without which each token is a query */
    const int64_t *sides;
    Parameters router; /* that first makes another choice of so many sides, which may be the same */
    int64_t options, *chosen;
    int64_t *lengths; /* queries of each image, which encode_block writes down */
} Block;

/* What is known when all tokens have been seen. Values of deformable attention are (images, tokens, dim); otherwise keys
 * and values are (images, keys, 2, dim). */
typedef struct {
    Block block;
    int64_t tokens, keys, queries; /* of an image, of an image, of all */
    float *memory;
    float *scores;  /* of the router, (options, images, tokens), or 0 if not all cells are in the patches of keys */
    Patch *patches; /* that queries are means of, 0 if they are the tokens */
    int64_t *ends;  /* where the queries of each image end */
} Encoding;

static Patch patch_of(const Encoding *e, int64_t query) { return e->patches ? e->patches[query] : (Patch){query, 1, 1}; }

/* Means of the patches of a column's queries, of those that are no tokens themselves; returns where each is. */
TARGET static int64_t rows_of(const Encoding *e, const Panel *panel, int64_t r, float *means, const float **rows) {
    int64_t dim = e->block.dim, first = panel->first + r * LANES, count = smaller(panel->count - r * LANES, LANES);
    for (int64_t i = 0; i < count; i++) {
        Patch patch = patch_of(e, first + i);
        rows[i] = e->block.tokens + patch.row * dim;
        if (patch.lines * patch.columns == 1) continue;
        float *mean = means + i * dim;
        mean_of(rows[i], e->block.map.width, dim, patch.lines, patch.columns, mean);
        rows[i] = mean;
    }
    return count;
}

/* Add the changes of a column's queries to all cells of their patches. */
TARGET static void add_changes(const Encoding *e, const Panel *panel, int64_t r, float *changes) {
    int64_t dim = e->block.dim, first = panel->first + r * LANES, count = smaller(panel->count - r * LANES, LANES);
    float *rows[LANES];
    const float *base[LANES];
    for (int64_t i = 0; i < count; i++) {
        Patch patch = patch_of(e, first + i);
        int is_cell = patch.lines * patch.columns == 1;
        rows[i] = is_cell ? e->block.tokens + patch.row * dim : changes + i * dim;
        base[i] = is_cell ? rows[i] : 0;
    }
    store_rows(panel->matrix[X] + r, panel->vectors, count, dim, base, rows);
    for (int64_t i = 0; i < count; i++) {
        if (base[i]) continue;
        Patch patch = patch_of(e, first + i);
        for (int64_t line = 0; line < patch.lines; line++)
            for (int64_t column = 0; column < patch.columns; column++) {
                float *cell = e->block.tokens + (patch.row + line * e->block.map.width + column) * dim;
                int64_t c = 0;
                for (; c + LANES <= dim; c += LANES) *(Unaligned *)(cell + c) += *(const Unaligned *)(rows[i] + c);
                for (; c < dim; c++) cell[c] += rows[i][c];
            }
    }
}

/* Exponentials of a column, of which a softmax has the share that is returned. */
TARGET static Vector softmax(Vector *scores, int64_t rows, int64_t ld, float scale) {
    Vector most[CHAINS] = {scores[0], scores[0], scores[0], scores[0]}, sum = {};
    BY_CHAINS(rows, j, i) most[i] = larger(most[i], scores[j * ld]);
    most[0] = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    for (int64_t i = 0; i < rows; i++) sum += scores[i * ld] = exponential((scores[i * ld] - most[0]) * scale);
    return 1.f / sum;
}

/* Softmax attention of the queries of a panel by one head, image by image. */
TARGET static void attend(const Encoding *e, const Panel *panel, int64_t head, Vector *scores) {
    int64_t row = 2 * e->block.dim, dim = e->block.dim / e->block.heads, keys = e->keys, ld = panel->vectors, image = 0;
    float scale = 1 / sqrtf((float)dim);
    const Vector *query = panel->matrix[Q] + head * dim * ld;
    Vector *out = panel->matrix[A] + head * dim * ld, *sums = scores + keys * MOST;
    Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t start = 0, stop; start < panel->count; start = stop) {
        while (e->ends[image] <= panel->first + start) image++;
        stop = smaller(e->ends[image] - panel->first, panel->count);
        const float *key = e->memory + image * keys * row + head * dim, *value = key + e->block.dim;
        /* Vectors that have queries of the image. */
        int64_t first = start / LANES, vectors = (stop + LANES - 1) / LANES - first;
        Product *product = product_of_columns(stop - first * LANES);
        product(key, row, 1, keys, dim, query + first, ld, 0, scores, vectors, 0);
        Vector shares[MOST];
        for (int64_t r = 0; r < vectors; r++) shares[r] = softmax(scores + r, keys, vectors, scale);
        product(value, 1, row, dim, keys, scores, vectors, 0, sums, vectors, 0);
        for (int64_t r = 0; r < vectors; r++) {
            Integers place = lane + (int32_t)((first + r) * LANES);
            Integers mine = (place >= (int32_t)start) & (place < (int32_t)stop);
            for (int64_t c = 0; c < dim; c++) {
                Vector *target = out + c * ld + first + r;
                *target = choose_lanes(mine, sums[c * vectors + r] * shares[r], *target);
            }
        }
    }
}

/* Deformable attention of the queries of a panel by one head: offsets are in H, logits of the points' weights in Q. */
TARGET static void sample_panel(const Encoding *e, const Panel *panel, int64_t head, float *rows) {
    const Block *b = &e->block;
    int64_t dim = b->dim / b->heads, points = b->points, ld = panel->vectors, width = b->map.width;
    const Sampling sampling = {b->map.height, width, b->heads, points, dim};
    const Vector *offsets = panel->matrix[H] + head * points * 2 * ld;
    Vector *weights = panel->matrix[Q] + head * points * ld;
    for (int64_t r = 0; r < ld; r++) {
        Vector share_of_all = softmax(weights + r, points, ld, 1);
        for (int64_t p = 0; p < points; p++) weights[p * ld + r] *= share_of_all;
        const float *of_lane[LANES];
        int64_t count = smaller(panel->count - r * LANES, LANES);
        for (int64_t i = 0; i < count; i++) {
            Patch patch = patch_of(e, panel->first + r * LANES + i);
            int64_t image = patch.row / e->tokens, cell = patch.row % e->tokens;
            float place[2 * points], share[points];
            const float centre[] = {(float)(cell % width) + (float)(patch.columns - 1) / 2,
                                    (float)(cell / width) + (float)(patch.lines - 1) / 2};
            for (int64_t p = 0; p < points; p++) {
                share[p] = weights[p * ld + r][i];
                for (int64_t axis = 0; axis < 2; axis++)
                    place[2 * p + axis] = centre[axis] + offsets[(2 * p + axis) * ld + r][i];
            }
            sample_points(&sampling, e->memory + image * e->tokens * b->dim + head * dim, place, share, rows + i * dim);
            of_lane[i] = rows + i * dim;
        }
        load_rows(of_lane, count, dim, panel->matrix[A] + head * dim * ld + r, ld);
    }
}

TARGET static void encode_panels(const void *job, const Panel *panels, int64_t num, const Member *m) {
    const Encoding *e = job;
    const Block *b = &e->block;
    int64_t dim = b->dim, points = b->heads * b->points;
    int half = b->is_half;
    COLUMNS(panels, num, i) {
        const Panel *p = panels + i / MOST;
        int64_t r = i % MOST, ld = p->vectors;
        const float *rows[LANES];
        int64_t count = rows_of(e, p, r, (float *)m->own, rows);
        load_rows(rows, count, dim, p->matrix[X] + r, ld);
        norm(p->matrix[X] + r, ld, dim, b->norm1, b->eps1, p->matrix[A] + r);
    }
    wait_for_team(m);
    if (points) {
        linear(m, panels, num, b->query, 2 * points, dim, A, H, 0, half);
        linear(m, panels, num, b->weights, points, dim, A, Q, 0, half);
        SHARE(num * b->heads, i) sample_panel(e, panels + i / b->heads, i % b->heads, (float *)m->own);
    } else {
        linear(m, panels, num, b->query, dim, dim, A, Q, 0, half);
        SHARE(num * b->heads, i) attend(e, panels + i / b->heads, i % b->heads, m->own);
    }
    wait_for_team(m);
    linear(m, panels, num, b->proj, dim, dim, A, Q, 0, half);
    COLUMNS(panels, num, i) {
        const Panel *p = panels + i / MOST;
        Vector *x = p->matrix[X] + i % MOST, *attended = p->matrix[Q] + i % MOST;
        for (int64_t c = 0; c < dim * p->vectors; c += p->vectors) x[c] += attended[c] *= b->scale;
        norm(x, p->vectors, dim, b->norm2, b->eps2, p->matrix[A] + i % MOST);
    }
    wait_for_team(m);
    linear(m, panels, num, b->fc1, b->hidden, dim, A, H, 1, half);
    linear(m, panels, num, b->fc2, dim, b->hidden, H, X, 0, half);
    COLUMNS(panels, num, i) {
        const Panel *p = panels + i / MOST;
        Vector *change = p->matrix[X] + i % MOST, *attended = p->matrix[Q] + i % MOST;
        for (int64_t c = 0; c < dim * p->vectors; c += p->vectors) change[c] = attended[c] + change[c] * b->scale;
        add_changes(e, p, i % MOST, (float *)m->own);
    }
}

/* The next numbers of memory, in whole vectors. */
static void *take(float **memory, int64_t numbers) {
    void *taken = *memory;
    *memory += (numbers + LANES - 1) / LANES * LANES;
    return taken;
}

static Needs needs_of(const Encoding *e) {
    const Block *b = &e->block;
    int64_t points = b->heads * b->points, hidden = larger_of(b->hidden, 2 * points);
    int64_t pairs = b->is_half ? larger_of(b->dim, b->hidden) / 2 : 0;
    return (Needs){e->queries, MOST, {b->dim, b->dim, larger_of(b->dim, points), hidden, pairs},
                   larger_of((e->keys + b->dim / b->heads) * MOST, b->dim), 2 * b->dim * (b->dim + b->hidden)};
}

/* What makes keys and values, or values alone, of the normed tokens. */
static Projection memory_of_tokens(const Encoding *e) {
    const Block *b = &e->block;
    int64_t n = b->dim, side = b->side, columns = b->points ? n : 2 * n;
    int64_t line = n * b->map.width;
    Projection rows = {1, 1, b->map.images * e->tokens, 1, 1, n, columns, .patch_stride = n, .eps_before = b->eps1,
                       .before = b->norm1, .weights = b->memory, .table = b->tokens, .out = e->memory};
    Projection patches = {b->map.images, b->map.height / side, b->map.width / side, side, side, n, n, columns,
                          e->tokens * n, side * line, side * n, line, n, b->eps1, b->eps_keys,
                          b->norm1, b->reduce, b->norm_keys, b->memory, b->tokens, e->memory};
    Projection projection = b->reduce.weight ? patches : rows;
    if (e->scores) projection.router = b->router.weight, projection.options = b->options, projection.scores = e->scores;
    return projection;
}

/* Layers of a block's queries, and numbers of their weights. */
enum { LAYERS = 5 };
static void layers_of(Block *b, Parameters **layers, int64_t *counts) {
    int64_t points = b->heads * b->points, queries = points ? 2 * points : b->dim;
    Parameters *all[LAYERS] = {&b->query, &b->weights, &b->proj, &b->fc1, &b->fc2};
    int64_t rows[LAYERS] = {queries, points, b->dim, b->hidden, b->hidden};
    for (int i = 0; i < LAYERS; i++) layers[i] = all[i], counts[i] = rows[i] * b->dim;
}

/* Begin the encoding of a block: where its parts are in memory. Returns what is left of it. */
static float *lay_out(const Block *b, float *memory, Encoding *e) {
    int64_t images = b->map.images, tokens = b->map.extra + b->map.height * b->map.width;
    int64_t keys = b->points ? 0 : b->reduce.weight ? b->map.height / b->side * (b->map.width / b->side) : tokens;
    *e = (Encoding){*b, tokens, keys, images * tokens};
    e->memory = take(&memory, images * (b->points ? tokens : 2 * keys) * b->dim);
    int is_covered = b->map.height % b->side == 0 && b->map.width % b->side == 0;
    e->scores = b->router.weight && is_covered ? take(&memory, e->queries * b->options) : 0;
    e->patches = b->map.choice ? take(&memory, e->queries * (int64_t)(sizeof(Patch) / sizeof(float))) : 0;
    e->ends = take(&memory, 2 * images);
    if (b->is_half) {
        Parameters *layers[LAYERS];
        int64_t counts[LAYERS];
        layers_of(&e->block, layers, counts);
        for (int i = 0; i < LAYERS; i++) layers[i]->weight = take(&memory, counts[i] / 2);
    }
    return memory;
}

/* Numbers of memory that a block needs. */
static int64_t memory_of_block(const Block *b) {
    Encoding e;
    float *begin = 0, *end = lay_out(b, begin, &e);
    Needs needs = needs_of(&e);
    Projection projection = memory_of_tokens(&e);
    return end - begin + larger_of(memory_of(&needs, e.patches != 0), project_memory(&projection));
}

/* The router's choice; the logits of a region's mean are the means of its cells'. */
static void make_choice(const Encoding *e) {
    const Block *b = &e->block;
    Map map = b->map;
    map.channels = b->dim, map.choice = b->chosen;
    if (e->scores)
        choose_by_scores(&map, e->scores, b->router.bias, b->options);
    else
        choose(&map, b->tokens, b->router.weight, b->router.bias, b->options);
}

/* Make keys and values, find the patches that are queries, round weights, and encode. */
static void encode_block(const Block *b, float *memory) {
    Encoding e;
    memory = lay_out(b, memory, &e);
    Projection projection = memory_of_tokens(&e);
    project(&projection, memory);
    if (b->router.weight) make_choice(&e);
    if (e.patches)
        route(&b->map, b->sides, e.patches, b->lengths);
    else
        for (int64_t i = 0; i < b->map.images; i++) b->lengths[i] = e.tokens;
    e.queries = 0;
    for (int64_t i = 0; i < b->map.images; i++) e.ends[i] = e.queries += b->lengths[i];
    if (b->is_half) {
        Block given = *b;
        Parameters *from[LAYERS], *to[LAYERS];
        int64_t counts[LAYERS];
        layers_of(&given, from, counts), layers_of(&e.block, to, counts);
#pragma omp parallel
        for (int i = 0; i < LAYERS; i++) round_weights(from[i]->weight, counts[i], (uint16_t *)to[i]->weight);
    }
    Needs needs = needs_of(&e);
    run(encode_panels, &e, &needs, memory);
}

/* Numbers of memory that encode_blocks needs. */
int64_t encode_blocks_memory(const Block *blocks, int64_t count) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) most = larger_of(most, memory_of_block(blocks + i));
    return most;
}

/* One block after another. */
void encode_blocks(const Block *blocks, int64_t count, float *memory) {
    for (int64_t i = 0; i < count; i++) encode_block(blocks + i, memory);
}

/* Transpose the tokens of each image, (cells, channels), whose cells are a multiple of 16. */
void transpose_tokens(const float *tokens, int64_t images, int64_t cells, int64_t channels, float *maps) {
    int64_t columns = cells / LANES;
#pragma omp parallel for
    for (int64_t i = 0; i < images * columns; i++) {
        const float *rows[LANES];
        for (int64_t j = 0; j < LANES; j++) rows[j] = tokens + (i * LANES + j) * channels;
        load_rows(rows, LANES, channels, (Vector *)(maps + i / columns * cells * channels) + i % columns, columns);
    }
}

/* Whether this processor has the instructions. */
int runs(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

/* Whether it has those for bfloat16. */
int runs_half(void) {
    return runs() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
}
#else
int runs(void) { return 0; }
int runs_half(void) { return 0; }
#endif

/* The version of the interface, and the sizes of the structs, as the caller must have them. */
void layout(int64_t *numbers) {
    numbers[0] = 1;
    numbers[1] = sizeof(Map), numbers[2] = sizeof(Sampling);
    numbers[3] = sizeof(Block), numbers[4] = sizeof(Projection);
}
