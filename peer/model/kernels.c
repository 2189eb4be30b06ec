/* What a decoder step does between its matrix products, one pass over memory each.
 *
 * Built on the volunteer's machine with -march=native (kernels.py), once with values of the products
 * in bf16 and once in fp32 (-DMUSTER_FP32); sums, norms, softmax and the residual stream are fp32
 * in both. Plain loops that GCC and Clang vectorise; rows are shared among the threads of torch's own
 * OpenMP pool, so no second pool competes with it.
 *
 * Letters: N = B * T rows (tokens), D model width, F MLP width, H query heads, G key/value heads,
 * R = H / G, K head width, V vocabulary; queries lie in blocks of M positions: [T/M][B][G][R][M][K].
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;

#define MUSTER_MAX_POSITIONS 8192

#ifdef MUSTER_FP32
typedef float value;
typedef int32_t ordered;
#define ORDERED_MAGNITUDE 0x7fffffff
static inline float load(value x) { return x; }
static inline value store(float x) { return x; }
#else
typedef uint16_t value;
typedef int16_t ordered;
#define ORDERED_MAGNITUDE 0x7fff
static inline float load(value x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
static inline value store(float x) { /* nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0; /* rounded, a NaN may become a zero */
    return (value)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#endif

/* Threads ------------------------------------------------------------------------------------- */

typedef void (*rows_fn)(const void *arguments, i64 begin, i64 end);
static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*gomp_thread_num)(void);
static int (*gomp_num_threads)(void);

void muster_use_pool(void *parallel, void *thread_num, void *num_threads) {
    gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    gomp_thread_num = (int (*)(void))thread_num;
    gomp_num_threads = (int (*)(void))num_threads;
}

struct share { rows_fn run; const void *arguments; i64 rows; };

static void run_share(void *data) {
    const struct share *share = data;
    i64 count = gomp_num_threads(), index = gomp_thread_num();
    share->run(share->arguments, share->rows * index / count, share->rows * (index + 1) / count);
}

static void for_rows(rows_fn run, const void *arguments, i64 rows, i64 threads) {
    struct share share = {run, arguments, rows};
    if (threads > 1 && gomp_parallel)
        gomp_parallel(run_share, &share, (unsigned)threads, 0);
    else
        run(arguments, 0, rows);
}

/* exp, relative error below 3e-7 -------------------------------------------------------------- */

static inline float fast_exp(float x) {
    float n = rintf(x * 1.44269504088896341f);
    float r = fmaf(n, -0.693359375f, x);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p, r * r, r) + 1.0f;
    int32_t exponent = (int32_t)n + 127; /* 0 below -88, at most 2^127 */
    exponent = exponent < 0 ? 0 : exponent;
    exponent = exponent > 254 ? 254 : exponent;
    uint32_t bits = (uint32_t)exponent << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* Largest of a row, NaN above all: as integers in the order of the values, whose maximum the compiler
 * may take in any order */
static inline float row_max(const value *row, i64 count) {
    ordered most = (ordered)1 << (8 * sizeof(ordered) - 1);
    for (i64 i = 0; i < count; i++) {
        ordered bits;
        memcpy(&bits, row + i, sizeof(bits));
        bits ^= (bits >> (8 * sizeof(ordered) - 1)) & ORDERED_MAGNITUDE;
        most = bits > most ? bits : most;
    }
    most ^= (most >> (8 * sizeof(ordered) - 1)) & ORDERED_MAGNITUDE;
    value out;
    memcpy(&out, &most, sizeof(out));
    return load(out);
}

/* Residual add and RMSNorm -------------------------------------------------------------------- */

struct norm {
    const float *x; const value *add; const float *gain; float *sum; value *out; float *rsqrt;
    i64 D; float epsilon;
};

static void norm_rows(const void *arguments, i64 begin, i64 end) {
    const struct norm a = *(const struct norm *)arguments;
    for (i64 row = begin; row < end; row++) {
        const float *x = a.x + row * a.D;
        value *out = a.out + row * a.D;
        float square = 0.0f;
        if (a.add) {
            const value *add = a.add + row * a.D;
            float *sum = a.sum + row * a.D;
            for (i64 d = 0; d < a.D; d++) sum[d] = x[d] + load(add[d]);
            x = sum;
        }
        for (i64 d = 0; d < a.D; d++) square += x[d] * x[d];
        float r = 1.0f / sqrtf(square / (float)a.D + a.epsilon);
        a.rsqrt[row] = r;
        for (i64 d = 0; d < a.D; d++) out[d] = store(x[d] * r * a.gain[d]);
    }
}

/* sum[N,D] = x + add, or with add NULL nothing and sum stands for x below;
 * out = sum * rsqrt(mean sum^2 + epsilon) * gain */
void muster_norm(const float *x, const value *add, const float *gain, float *sum, value *out,
                 float *rsqrt, i64 N, i64 D, float epsilon, i64 threads) {
    struct norm a = {x, add, gain, sum, out, rsqrt, D, epsilon};
    for_rows(norm_rows, &a, N, threads);
}

struct norm_grad {
    const value *dn; const float *x, *gain, *rsqrt; float *dx, *dgain_parts; value *dx_value;
    i64 D, N, parts;
};

static void norm_grad_parts(const void *arguments, i64 first, i64 last) {
    const struct norm_grad a = *(const struct norm_grad *)arguments;
    for (i64 part = first; part < last; part++) {
        float *dgain = a.dgain_parts + part * a.D;
        memset(dgain, 0, sizeof(float) * (size_t)a.D);
        for (i64 row = a.N * part / a.parts; row < a.N * (part + 1) / a.parts; row++) {
            const value *dn = a.dn + row * a.D;
            const float *x = a.x + row * a.D;
            float *dx = a.dx + row * a.D, r = a.rsqrt[row], dot = 0.0f;
            for (i64 d = 0; d < a.D; d++) dot += load(dn[d]) * a.gain[d] * x[d];
            float scale = dot * r * r * r / (float)a.D;
            for (i64 d = 0; d < a.D; d++) {
                float g = load(dn[d]);
                dgain[d] += g * x[d] * r;
                dx[d] += g * a.gain[d] * r - x[d] * scale;
            }
            if (a.dx_value) {
                value *copy = a.dx_value + row * a.D;
                for (i64 d = 0; d < a.D; d++) copy[d] = store(dx[d]);
            }
        }
    }
}

/* dx += gradient through the norm; dx_value (or NULL) = dx in the products' type; the gain's gradient
 * comes in `parts` rows, each the sum over a fixed share of the tokens, whatever the threads */
void muster_norm_grad(const value *dn, const float *x, const float *gain, const float *rsqrt,
                      float *dx, value *dx_value, float *dgain_parts, i64 N, i64 D, i64 parts,
                      i64 threads) {
    struct norm_grad a = {dn, x, gain, rsqrt, dx, dgain_parts, dx_value, D, N, parts};
    for_rows(norm_grad_parts, &a, parts, threads);
}

/* Heads: rotary positions and the layouts of attention ---------------------------------------- */

struct heads {
    value *flat, *q, *k, *v; const float *cos, *sin; i64 B, T, H, G, K, M; float scale; int is_grad;
};

static inline void rotate(const value *from, value *to, const float *cos, const float *sin, i64 K,
                          float scale, float sign) {
    i64 half = K / 2;
    for (i64 k = 0; k < half; k++) {
        float a = load(from[k]), b = load(from[k + half]), s = sign * sin[k];
        to[k] = store((a * cos[k] - b * s) * scale);
        to[k + half] = store((b * cos[k] + a * s) * scale);
    }
}

static void head_rows(const void *arguments, i64 begin, i64 end) {
    const struct heads a = *(const struct heads *)arguments;
    i64 R = a.H / a.G, width = (a.H + 2 * a.G) * a.K;
    for (i64 row = begin; row < end; row++) {
        i64 b = row / a.T, t = row % a.T;
        const float *cos = a.cos + t * a.K, *sin = a.sin + t * a.K;
        value *flat = a.flat + row * width;
        for (i64 h = 0; h < a.H + 2 * a.G; h++, flat += a.K) {
            value *head;
            float scale = 1.0f;
            if (h < a.H) {
                i64 g = h / R, r = h % R;
                head = a.q + (((((t / a.M) * a.B + b) * a.G + g) * R + r) * a.M + t % a.M) * a.K;
                scale = a.scale;
            } else {
                i64 g = (h - a.H) % a.G;
                head = (h < a.H + a.G ? a.k : a.v) + ((b * a.G + g) * a.T + t) * a.K;
            }
            if (h >= a.H + a.G)
                memcpy(a.is_grad ? flat : head, a.is_grad ? head : flat, sizeof(value) * (size_t)a.K);
            else if (a.is_grad)
                rotate(head, flat, cos, sin, a.K, scale, -1.0f);
            else
                rotate(flat, head, cos, sin, a.K, scale, 1.0f);
        }
    }
}

/* flat[N, (H+2G) K] -> q (rotated, times scale, in blocks), k (rotated) and v as [B][G][T][K] */
void muster_split_heads(value *flat, value *q, value *k, value *v, const float *cos, const float *sin,
                        i64 B, i64 T, i64 H, i64 G, i64 K, i64 M, float scale, i64 threads) {
    struct heads a = {flat, q, k, v, cos, sin, B, T, H, G, K, M, scale, 0};
    for_rows(head_rows, &a, B * T, threads);
}

/* The gradient of it: dq, dk, dv -> dflat */
void muster_split_heads_grad(value *dflat, value *dq, value *dk, value *dv, const float *cos,
                             const float *sin, i64 B, i64 T, i64 H, i64 G, i64 K, i64 M, float scale,
                             i64 threads) {
    struct heads a = {dflat, dq, dk, dv, cos, sin, B, T, H, G, K, M, scale, 1};
    for_rows(head_rows, &a, B * T, threads);
}

struct merge { value *flat, *blocks; i64 B, T, H, G, K, M; int is_grad; };

static void merge_rows(const void *arguments, i64 begin, i64 end) {
    const struct merge a = *(const struct merge *)arguments;
    i64 R = a.H / a.G;
    for (i64 row = begin; row < end; row++) {
        i64 b = row / a.T, t = row % a.T;
        for (i64 h = 0; h < a.H; h++) {
            value *flat = a.flat + (row * a.H + h) * a.K;
            value *head = a.blocks
                + (((((t / a.M) * a.B + b) * a.G + h / R) * R + h % R) * a.M + t % a.M) * a.K;
            memcpy(a.is_grad ? head : flat, a.is_grad ? flat : head, sizeof(value) * (size_t)a.K);
        }
    }
}

/* blocks -> flat[N, H K], or with is_grad flat -> blocks */
void muster_merge_heads(value *flat, value *blocks, i64 B, i64 T, i64 H, i64 G, i64 K, i64 M,
                        i64 is_grad, i64 threads) {
    struct merge a = {flat, blocks, B, T, H, G, K, M, (int)is_grad};
    for_rows(merge_rows, &a, B * T, threads);
}

/* Softmax ------------------------------------------------------------------------------------- */

struct softmax { value *scores; const float *mask; i64 columns, M, begin, rows_per_mask, mask_rows; };

static void softmax_rows(const void *arguments, i64 begin, i64 end) {
    const struct softmax a = *(const struct softmax *)arguments;
    float work[MUSTER_MAX_POSITIONS];
    for (i64 row = begin; row < end; row++) {
        value *scores = a.scores + row * a.columns;
        i64 position = a.begin + row % a.M, count = a.mask ? a.columns : position + 1;
        float total = 0.0f;
        if (a.mask) {
            const float *mask =
                a.mask + ((row / a.rows_per_mask) * a.mask_rows + position) * a.columns;
            for (i64 s = 0; s < count; s++)
                scores[s] = mask[s] < 0.0f ? store(-1e30f) : scores[s];
        }
        float most = row_max(scores, count);
        for (i64 s = 0; s < count; s++) {
            float x = load(scores[s]);
            work[s] = x < -1e29f ? 0.0f : fast_exp(x - most);
            total += work[s];
        }
        float scale = 1.0f / total;
        for (i64 s = 0; s < count; s++) scores[s] = store(work[s] * scale);
        memset(scores + count, 0, sizeof(value) * (size_t)(a.columns - count));
    }
}

/* In place. Row r is position begin + r mod M; without a mask it sees the positions up to its own,
 * else those where mask (0 or -inf; [mask of row / rows_per_mask][mask_rows][columns]) is 0 */
void muster_softmax(value *scores, const float *mask, i64 rows, i64 columns, i64 M, i64 begin,
                    i64 rows_per_mask, i64 mask_rows, i64 threads) {
    struct softmax a = {scores, mask, columns, M, begin, rows_per_mask, mask_rows};
    for_rows(softmax_rows, &a, rows, threads);
}

struct softmax_grad { const value *ratios; value *grad; i64 columns; };

static void softmax_grad_rows(const void *arguments, i64 begin, i64 end) {
    const struct softmax_grad a = *(const struct softmax_grad *)arguments;
    for (i64 row = begin; row < end; row++) {
        const value *p = a.ratios + row * a.columns;
        value *grad = a.grad + row * a.columns;
        float dot = 0.0f;
        for (i64 s = 0; s < a.columns; s++) dot += load(p[s]) * load(grad[s]);
        for (i64 s = 0; s < a.columns; s++) grad[s] = store(load(p[s]) * (load(grad[s]) - dot));
    }
}

/* grad = ratios * (grad - sum(ratios * grad)), row by row */
void muster_softmax_grad(const value *ratios, value *grad, i64 rows, i64 columns, i64 threads) {
    struct softmax_grad a = {ratios, grad, columns};
    for_rows(softmax_grad_rows, &a, rows, threads);
}

/* SwiGLU -------------------------------------------------------------------------------------- */

struct swiglu { value *gate_up, *out; i64 F; };

static void swiglu_rows(const void *arguments, i64 begin, i64 end) {
    const struct swiglu a = *(const struct swiglu *)arguments;
    for (i64 row = begin; row < end; row++) {
        const value *gate = a.gate_up + 2 * row * a.F, *up = gate + a.F;
        value *out = a.out + row * a.F;
        for (i64 f = 0; f < a.F; f++) {
            float g = load(gate[f]);
            out[f] = store(g / (1.0f + fast_exp(-g)) * load(up[f]));
        }
    }
}

/* out[N,F] = silu(gate) * up; gate and up are the halves of a row of gate_up[N,2F] */
void muster_swiglu(value *gate_up, value *out, i64 N, i64 F, i64 threads) {
    struct swiglu a = {gate_up, out, F};
    for_rows(swiglu_rows, &a, N, threads);
}

static void swiglu_grad_rows(const void *arguments, i64 begin, i64 end) {
    const struct swiglu a = *(const struct swiglu *)arguments;
    for (i64 row = begin; row < end; row++) {
        value *gate = a.gate_up + 2 * row * a.F, *up = gate + a.F;
        const value *grad = a.out + row * a.F;
        for (i64 f = 0; f < a.F; f++) {
            float g = load(gate[f]), u = load(up[f]), d = load(grad[f]);
            float ratio = 1.0f / (1.0f + fast_exp(-g));
            gate[f] = store(d * u * ratio * (1.0f + g * (1.0f - ratio)));
            up[f] = store(d * g * ratio);
        }
    }
}

/* gate_up becomes its own gradient, given that of the product */
void muster_swiglu_grad(value *gate_up, value *grad, i64 N, i64 F, i64 threads) {
    struct swiglu a = {gate_up, grad, F};
    for_rows(swiglu_grad_rows, &a, N, threads);
}

/* Cross-entropy ------------------------------------------------------------------------------- */

struct entropy { value *logits; const i64 *labels; const float *weights; double *nats; i64 V; };

static void entropy_rows(const void *arguments, i64 begin, i64 end) {
    const struct entropy a = *(const struct entropy *)arguments;
    for (i64 row = begin; row < end; row++) {
        value *logits = a.logits + row * a.V;
        i64 label = a.labels[row];
        if (label >= a.V) { /* never taken for a number */
            a.nats[row] = NAN;
            continue;
        }
        if (label < 0) {
            memset(logits, 0, sizeof(value) * (size_t)a.V);
            a.nats[row] = 0.0;
            continue;
        }
        float most = row_max(logits, a.V), total = 0.0f, chosen = load(logits[label]);
        for (i64 v = 0; v < a.V; v++) total += fast_exp(load(logits[v]) - most);
        float log_total = most + logf(total), weight = a.weights ? a.weights[row] : 1.0f;
        for (i64 v = 0; v < a.V; v++)
            logits[v] = store(weight * fast_exp(load(logits[v]) - log_total));
        logits[label] = store(weight * (expf(chosen - log_total) - 1.0f));
        a.nats[row] = (double)weight * ((double)log_total - (double)chosen);
    }
}

/* nats[N] of each row's label (0 if negative, NaN from V on), times its weight (or NULL: 1); logits[N,V] become
 * their own gradient */
void muster_cross_entropy(value *logits, const i64 *labels, const float *weights, double *nats,
                          i64 N, i64 V, i64 threads) {
    struct entropy a = {logits, labels, weights, nats, V};
    for_rows(entropy_rows, &a, N, threads);
}

/* Casts and transposes ------------------------------------------------------------------------ */

struct cast { const float *from; value *to; i64 columns; };

static void cast_rows(const void *arguments, i64 begin, i64 end) {
    const struct cast a = *(const struct cast *)arguments;
    for (i64 i = begin * a.columns; i < end * a.columns; i++) a.to[i] = store(a.from[i]);
}

/* to = from, in the products' type */
void muster_cast(const float *from, value *to, i64 rows, i64 columns, i64 threads) {
    struct cast a = {from, to, columns};
    for_rows(cast_rows, &a, rows, threads);
}

#define TILE 16
struct transpose { const value *from; value *to; i64 rows, columns, stride; };

#ifndef MUSTER_FP32
typedef uint16_t lanes __attribute__((vector_size(32), aligned(2)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

static inline void transpose_tile(const value *from, i64 from_stride, value *to, i64 to_stride) {
    lanes x[TILE], y[TILE];
    for (int i = 0; i < TILE; i++) memcpy(&x[i], from + i * from_stride, sizeof(lanes));
    for (int round = 0; round < 4; round++) { /* four perfect shuffles transpose 16 x 16 */
        for (int i = 0; i < TILE / 2; i++) {
            y[2 * i] = SHUFFLE(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] = SHUFFLE(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                   30, 15, 31);
        }
        memcpy(x, y, sizeof(x));
    }
    for (int i = 0; i < TILE; i++) memcpy(to + i * to_stride, &x[i], sizeof(lanes));
}
#else
static inline void transpose_tile(const value *from, i64 from_stride, value *to, i64 to_stride) {
    for (int c = 0; c < TILE; c++)
        for (int r = 0; r < TILE; r++) to[c * to_stride + r] = from[r * from_stride + c];
}
#endif

static void transpose_strips(const void *arguments, i64 begin, i64 end) {
    const struct transpose a = *(const struct transpose *)arguments;
    for (i64 strip = begin; strip < end; strip++) { /* of 2 x 16 columns: whole cache lines */
        i64 c = strip * 2 * TILE, last = c + 2 * TILE < a.columns ? c + 2 * TILE : a.columns;
        i64 tiles = (last - c) / TILE, whole_rows = a.rows / TILE * TILE;
        for (i64 r = 0; r < whole_rows; r += TILE)
            for (i64 k = c; k < c + tiles * TILE; k += TILE)
                transpose_tile(a.from + r * a.columns + k, a.columns, a.to + k * a.stride + r, a.stride);
        for (i64 k = c; k < last; k++)
            for (i64 r = k < c + tiles * TILE ? whole_rows : 0; r < a.rows; r++)
                a.to[k * a.stride + r] = a.from[r * a.columns + k];
        for (i64 k = c; k < last; k++)
            memset(a.to + k * a.stride + a.rows, 0, (size_t)(a.stride - a.rows) * sizeof(value));
    }
}

/* to[columns, rows] = from[rows, columns]; `to` has rows of `stride` values, best not a power of two.
 * What is behind a row is zero, because products on AMX read it where rows end inside a tile: they
 * multiply it by zero, which is NaN if NaN was left there.
 */
void muster_transpose(const value *from, value *to, i64 rows, i64 columns, i64 stride, i64 threads) {
    struct transpose a = {from, to, rows, columns, stride};
    for_rows(transpose_strips, &a, (columns + 2 * TILE - 1) / (2 * TILE), threads);
}

struct gather { const value *from; float *to; i64 rows, columns; int is_sum; };

static void gather_rows(const void *arguments, i64 begin, i64 end) {
    const struct gather a = *(const struct gather *)arguments;
    i64 first = begin * a.columns, last = end * a.columns;
    if (a.is_sum)
        for (i64 i = first; i < last; i++) a.to[i] += load(a.from[i]);
    else
        for (i64 i = first; i < last; i++) a.to[i] = load(a.from[i]);
}

/* to = from, or to += from, in fp32 */
void muster_widen(const value *from, float *to, i64 rows, i64 columns, i64 is_sum, i64 threads) {
    struct gather a = {from, to, rows, columns, (int)is_sum};
    for_rows(gather_rows, &a, rows, threads);
}

static void gather_transposed(const void *arguments, i64 begin, i64 end) {
    const struct gather a = *(const struct gather *)arguments;
    value tile[TILE * TILE];
    for (i64 strip = begin; strip < end; strip++)
        for (i64 r = 0; r < a.rows; r += TILE) {
            i64 c = strip * TILE;
            i64 height = r + TILE < a.rows ? TILE : a.rows - r;
            i64 width = c + TILE < a.columns ? TILE : a.columns - c;
            const value *from = a.from + r * a.columns + c;
            if (height == TILE && width == TILE)
                transpose_tile(from, a.columns, tile, TILE);
            else
                for (i64 k = 0; k < width; k++)
                    for (i64 l = 0; l < height; l++) tile[k * TILE + l] = from[l * a.columns + k];
            for (i64 k = 0; k < width; k++) {
                float *to = a.to + (c + k) * a.rows + r;
                for (i64 l = 0; l < height; l++)
                    to[l] = load(tile[k * TILE + l]) + (a.is_sum ? to[l] : 0.0f);
            }
        }
}

/* to[columns, rows] = from[rows, columns]^T, or to += it, in fp32 */
void muster_widen_transposed(const value *from, float *to, i64 rows, i64 columns, i64 is_sum,
                             i64 threads) {
    struct gather a = {from, to, rows, columns, (int)is_sum};
    for_rows(gather_transposed, &a, (columns + TILE - 1) / TILE, threads);
}

/* Trying out ---------------------------------------------------------------------------------- */

enum { CHECK_T = 48, CHECK_K = 24, CHECK_WIDTH = 96, CHECK_MOST = CHECK_T * CHECK_WIDTH };

/* 0 if every loop runs on this processor and gives numbers; else which one did not */
int muster_check(void) {
    static float x[CHECK_MOST], y[CHECK_MOST], sum[CHECK_MOST], parts[CHECK_MOST], gain[CHECK_WIDTH];
    static float rsqrt[CHECK_T], cos[CHECK_MOST], sin[CHECK_MOST];
    static value a[CHECK_MOST], b[CHECK_MOST], q[CHECK_MOST], k[CHECK_MOST], v[CHECK_MOST];
    static double nats[CHECK_T];
    static i64 labels[CHECK_T];
    const i64 T = CHECK_T, K = CHECK_K, W = CHECK_WIDTH;
    for (i64 i = 0; i < CHECK_MOST; i++) {
        x[i] = (float)(i * 7 % 31) / 31.0f - 0.4f;
        cos[i] = 0.8f;
        sin[i] = 0.6f;
    }
    for (i64 i = 0; i < W; i++) gain[i] = 1.0f;
    for (i64 i = 0; i < T; i++) labels[i] = i % 5 ? i : -100;
    muster_cast(x, a, T, W, 1);
    muster_norm(x, a, gain, sum, b, rsqrt, T, W, 1e-5f, 1);
    muster_norm_grad(b, sum, gain, rsqrt, x, a, parts, T, W, 16, 1);
    muster_split_heads(a, q, k, v, cos, sin, 1, T, 2, 1, K, T, 0.2f, 1);
    muster_split_heads_grad(b, q, k, v, cos, sin, 1, T, 2, 1, K, T, 0.2f, 1);
    muster_merge_heads(a, q, 1, T, 2, 1, K, T, 0, 1);
    muster_cast(x, q, T, W, 1);
    muster_softmax(q, 0, W, T, T, 0, W, T, 1);
    muster_softmax_grad(q, b, W, T, 1);
    muster_cast(x, k, T, W, 1);
    muster_swiglu(k, v, T, W / 2, 1);
    muster_swiglu_grad(k, v, T, W / 2, 1);
    muster_cast(x, v, T, W, 1);
    muster_cross_entropy(v, labels, gain, nats, T, W, 1);
    muster_transpose(v, a, T, W, T, 1);
    muster_widen(a, y, T, W, 0, 1);
    muster_widen_transposed(v, y, T, W, 1, 1);
    for (i64 i = 0; i < CHECK_MOST; i++) {
        const value *checked[] = {a, b, q, k, v};
        for (int j = 0; j < 5; j++)
            if (!(fabsf(load(checked[j][i])) < 1e4f)) return 2;
        if (!(fabsf(y[i] - 2.0f * load(a[i])) < 1e-6f)) return 3;
    }
    for (i64 row = 0; row < W; row++) {
        float total = 0.0f;
        for (i64 s = 0; s < T; s++) total += load(q[row * T + s]);
        if (!(fabsf(total - 1.0f) < 0.02f)) return 4;
    }
    for (i64 i = 0; i < T; i++)
        if (!(i % 5 ? nats[i] > 0.0 && nats[i] < 20.0 : nats[i] == 0.0)) return 5;
    return 0;
}
