/* The arithmetic, compiled once for each instruction set (VARIANT names it; see build.py). */
#define _DEFAULT_SOURCE /* syscall() */
#include <math.h>

#include "vector.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

#define CONCATENATE(a, b) a##b
#define VARIANT_OBJECT(name) CONCATENATE(remoe_, name)
#define TEXT(name) #name
#define VARIANT_NAME(name) TEXT(name)
#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* A tile is up to TILE_ROWS rows by TILE_WIDTH weight rows, each with its own accumulator: enough
 * of them to hide the latency of a multiply-add, few enough to stay in registers. */
#if LANES == 16 || defined(NEON) /* 32 registers */
#define TILE_WIDTH 4
#else
#define TILE_WIDTH 2
#endif
#define ACCUMULATORS (TILE_ROWS * TILE_WIDTH)
/* A processor's own prefetching stops at pages and forgets short rows; asking this far ahead, into
 * the second cache, reads cold weights a third faster. */
#define AHEAD_BYTES 12288
/* A panel fills most of a first-level cache. */
#define PANEL_FLOATS 8192

ALWAYS_INLINE void prefetch(const char *from) { /* an address only: it may lie beyond the weights */
    __builtin_prefetch((const void *)((uintptr_t)from + AHEAD_BYTES), 0, 2);
}

ALWAYS_INLINE vec pairwise(vec a, vec b) { /* a0+a1, a2+a3, ..., b0+b1, b2+b3, ... */
#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
#if defined(__clang__)
    return __builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD);
#else
    return __builtin_shuffle(a, b, (bits){EVEN}) + __builtin_shuffle(a, b, (bits){ODD});
#endif
}

/* out[i] = the sum of the lanes of acc[i], always in the same order. */
ALWAYS_INLINE void sum_lanes(float *out, const vec *acc, size_t count) {
    for (size_t done = 0; done < count; done += LANES) {
        vec stage[LANES];
#pragma GCC unroll 16
        for (size_t i = 0; i < LANES; i++) stage[i] = done + i < count ? acc[done + i] : (vec){0};
#pragma GCC unroll 4
        for (size_t left = LANES; left > 1; left /= 2)
#pragma GCC unroll 8
            for (size_t i = 0; i < left / 2; i++)
                stage[i] = pairwise(stage[2 * i], stage[2 * i + 1]);
        memcpy(out + done, &stage[0], (count - done < LANES ? count - done : LANES) * sizeof *out);
    }
}

/* rows x columns dot products over `width` numbers; all sizes but `width` are constants. */
ALWAYS_INLINE void tile(float *out, size_t out_stride, const float *x, size_t x_stride, size_t rows,
                        const char *weights, size_t stride_bytes, int64_t dtype, size_t width,
                        size_t columns) {
    vec acc[ACCUMULATORS] = {{0}};
    size_t whole = width / LANES * LANES, item = bytes_of(dtype);
    for (size_t k = 0; k < whole; k += LANES) {
        vec xs[TILE_ROWS];
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; r++) xs[r] = load_float(x + r * x_stride + k);
#pragma GCC unroll 16
        for (size_t j = 0; j < columns; j++) {
            const char *from = weights + j * stride_bytes + k * item;
            vec w = load(from, dtype);
            if (dtype != WIDENED) prefetch(from);
#pragma GCC unroll 8
            for (size_t r = 0; r < rows; r++)
                acc[r * columns + j] = fused(xs[r], w, acc[r * columns + j]);
        }
    }
    if (whole < width)
#pragma GCC unroll 16
        for (size_t j = 0; j < columns; j++) {
            const char *end = weights + j * stride_bytes + whole * item;
            vec w = load_partial(end, dtype, width - whole);
#pragma GCC unroll 8
            for (size_t r = 0; r < rows; r++)
                acc[r * columns + j] =
                    fused(load_float(x + r * x_stride + whole), w, acc[r * columns + j]);
        }
    float sums[ACCUMULATORS];
    sum_lanes(sums, acc, rows * columns);
    for (size_t r = 0; r < rows; r++)
        memcpy(out + r * out_stride, sums + r * columns, columns * sizeof *out);
}

/* The same for any number of columns, TILE_WIDTH at a time. */
ALWAYS_INLINE void strip(float *out, size_t out_stride, const float *x, size_t x_stride,
                         size_t rows, const char *weights, size_t stride_bytes, int64_t dtype,
                         size_t width, size_t columns) {
    size_t j = 0;
    for (; j + TILE_WIDTH <= columns; j += TILE_WIDTH)
        tile(out + j, out_stride, x, x_stride, rows, weights + j * stride_bytes, stride_bytes,
             dtype, width, TILE_WIDTH);
    for (; j < columns; j++)
        tile(out + j, out_stride, x, x_stride, rows, weights + j * stride_bytes, stride_bytes,
             dtype, width, 1);
}

/* One copy of the code for each number of rows and type, so that tiles stay in registers. */
#define STRIP(rows, dtype) \
    strip(out, out_stride, x, x_stride, rows, weights, stride_bytes, dtype, width, columns)
#define STRIPS(dtype)                           \
    switch (rows) {                             \
        case 1: STRIP(1, dtype); break;         \
        case 2: STRIP(2, dtype); break;         \
        case 3: STRIP(3, dtype); break;         \
        default: STRIP(TILE_ROWS, dtype);       \
    }

/* Up to TILE_ROWS rows by any columns. */
static void rows_by_columns(float *out, size_t out_stride, const float *x, size_t x_stride,
                            size_t rows, const char *weights, size_t stride_bytes, int64_t dtype,
                            size_t width, size_t columns) {
    switch (dtype) {
        case WIDENED: STRIPS(WIDENED); break;
        case FLOAT32: STRIPS(FLOAT32); break;
        case BFLOAT16: STRIPS(BFLOAT16); break;
        default: STRIPS(FLOAT16);
    }
}

static void widen(float *to, struct matrix from, size_t first, size_t count) {
    size_t item = bytes_of(from.dtype), i = 0;
    const char *values = (const char *)from.values + first * item;
    for (; i + LANES <= count; i += LANES) {
        prefetch(values + i * item);
        store_float(to + i, load(values + i * item, from.dtype));
    }
    if (i < count) {
        vec last = load_partial(values + i * item, from.dtype, count - i);
        memcpy(to + i, &last, (count - i) * sizeof *to);
    }
}

/* To the nearest, ties to even, as torch and the hardware round. */
static void narrow(void *to, int64_t dtype, const float *from, size_t count) {
    if (dtype == FLOAT32) {
        memcpy(to, from, count * sizeof *from);
        return;
    }
    for (size_t i = 0; i < count; i += LANES) {
        vec v = {0};
        size_t here = smaller(count - i, LANES);
        memcpy(&v, from + i, here * sizeof *from);
        half_bits h = dtype == BFLOAT16 ? to_bfloat16(v) : to_half(v);
        memcpy((char *)to + 2 * i, &h, 2 * here);
    }
}

static size_t panel_columns(size_t width) {
    size_t fitting = PANEL_FLOATS / padded(width) / TILE_WIDTH * TILE_WIDTH;
    return fitting > TILE_WIDTH ? fitting : TILE_WIDTH;
}

static size_t scratch_floats(size_t width) {
    size_t panel = panel_columns(width) * padded(width);
#if defined(__AMX_BF16__)
    size_t strip = padded(width) * STRIP_ROWS / 2;
    return panel > strip ? panel : strip;
#else
    return panel;
#endif
}

static size_t group_bytes(size_t width) {
#if defined(__AMX_BF16__)
    return amx_group_bytes(width);
#else
    (void)width;
    return 0;
#endif
}

static void pack(struct input input, size_t width, size_t first, size_t count) {
#if defined(__AMX_BF16__)
    for (size_t r = 0; r < input.rows; r += GROUP_ROWS)
        amx_pack_group((char *)input.packed + r / GROUP_ROWS * amx_group_bytes(width),
                       input.x + r * input.stride, input.stride,
                       smaller(input.rows - r, GROUP_ROWS), input.parts, first, count);
#else
    (void)input, (void)width, (void)first, (void)count;
#endif
}

static void project(float *out, size_t out_stride, struct input input, struct matrix weights,
                    size_t width, size_t first, size_t last, const void *next, float *scratch) {
    const float *x = input.x;
    size_t rows = input.rows, x_stride = input.stride;
#if defined(__AMX_BF16__)
    if (weights.dtype == BFLOAT16) {
        amx_project(out, out_stride, input, weights, width, first, last, next, (char *)scratch);
        return;
    }
#endif
    (void)next; /* reads ahead in the order of the rows */
    size_t row_bytes = width * bytes_of(weights.dtype);
    if (rows <= TILE_ROWS) {
        rows_by_columns(out, out_stride, x, x_stride, rows,
                        (const char *)weights.values + first * row_bytes, row_bytes, weights.dtype,
                        width, last - first);
        return;
    }
    /* Many rows: widen some weight rows once, into a panel that stays in the nearest cache. */
    size_t stride = padded(width), panel = panel_columns(width);
    for (size_t j = first; j < last; j += panel) {
        size_t columns = last - j < panel ? last - j : panel;
        for (size_t c = 0; c < columns; c++) {
            widen(scratch + c * stride, weights, (j + c) * width, width);
            memset(scratch + c * stride + width, 0, (stride - width) * sizeof *scratch);
        }
        for (size_t r = 0; r < rows; r += TILE_ROWS)
            rows_by_columns(out + r * out_stride + (j - first), out_stride, x + r * x_stride,
                            x_stride, rows - r < TILE_ROWS ? rows - r : TILE_ROWS,
                            (const char *)scratch, stride * sizeof *scratch, WIDENED, stride,
                            columns);
    }
}

/* e to the power x, to two units in the last place: 2^n times a polynomial on |r| <= ln(2) / 2
 * (coefficients of Cephes' expf). Overflows to infinity, underflows to denormals, keeps NaN. */
static inline vec exponential(vec x) {
    x = at_least(splat(-104.0f), at_most(splat(89.0f), x));
    const vec round = splat(0x1.8p23f); /* adding it leaves the nearest integer in the low bits */
    vec shifted = fused(x, splat(1.44269504f), round);
    vec n = shifted - round;
    vec r = fused(n, splat(-0.693359375f), x);
    r = fused(n, splat(2.12194440e-4f), r);
    vec p = splat(1.9875691500e-4f);
    p = fused(p, r, splat(1.3981999507e-3f));
    p = fused(p, r, splat(8.3334519073e-3f));
    p = fused(p, r, splat(4.1665795894e-2f));
    p = fused(p, r, splat(1.6666665459e-1f));
    p = fused(p, r, splat(5.0000001201e-1f));
    p = fused(p, r * r, r) + splat(1.0f);
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    /* 2^n in two factors, because n reaches beyond what one exponent holds. */
    bits integer = (bits)shifted - (bits)round + 256;
    bits low = integer >> 1, high = integer - low;
    return p * (vec)((low - 1) << 23) * (vec)((high - 1) << 23);
#endif
}

static inline vec logistic_product(vec x, vec argument) { /* x / (1 + e^-argument) */
    return x / (splat(1.0f) + exponential(-argument));
}

ALWAYS_INLINE vec activated(vec x, int64_t activation) {
    if (activation == SILU) return logistic_product(x, x);
    if (activation == GELU_TANH) { /* 0.5 (1 + tanh(y)) = 1 / (1 + e^-2y) */
        vec cubic = fused(x * x * x, splat(0.044715f), x);
        return logistic_product(x, cubic * splat(1.5957691216f));
    }
    float lanes[LANES];
    store_float(lanes, x);
    for (size_t i = 0; i < LANES; i++)
        lanes[i] *= 0.5f * erfcf(lanes[i] * -0.70710678f);
    return load_float(lanes);
}

ALWAYS_INLINE void activate_as(float *gate, const float *up, size_t count, int64_t activation) {
    for (size_t i = 0; i < count; i += LANES) /* the buffers are padded */
        store_float(gate + i, activated(load_float(gate + i), activation) * load_float(up + i));
}

/* gate * sigmoid(alpha * gate) * (up + 1), with gate cut off above and up on both sides. */
static void activate_clamped(float *gate, const float *up, size_t count, float alpha,
                             float limit) {
    vec high = splat(limit), low = splat(-limit);
    for (size_t i = 0; i < count; i += LANES) {
        vec g = load_float(gate + i), u = load_float(up + i);
        g = at_most(high, g);
        u = at_least(low, at_most(high, u));
        store_float(gate + i, logistic_product(g, g * splat(alpha)) * (u + splat(1.0f)));
    }
}

static void activate(float *gate, const float *up, size_t count, const struct call *call) {
    switch (call->activation) { /* constants, so that each loop holds one activation */
        case SILU: activate_as(gate, up, count, SILU); break;
        case GELU_TANH: activate_as(gate, up, count, GELU_TANH); break;
        case CLAMPED_SWIGLU:
            activate_clamped(gate, up, count, call->alpha, call->limit);
            break;
        default: activate_as(gate, up, count, GELU);
    }
}

#include "gated.h"

static void normalize(const struct norm *norm, float *scratch) {
    size_t width = norm->width, item = bytes_of(norm->input.dtype);
    for (size_t r = 0; r < (size_t)norm->rows; r++) {
        widen(scratch, norm->input, r * width, width);
        vec squares = {0};
        float sum = 0, lanes[LANES];
        size_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            vec x = load_float(scratch + i);
            squares = fused(x, x, squares);
        }
        store_float(lanes, squares);
        for (; i < width; i++) sum += scratch[i] * scratch[i];
        for (size_t lane = 0; lane < LANES; lane++) sum += lanes[lane];
        float factor = 1.0f / sqrtf(sum / (float)width + norm->epsilon);
        for (i = 0; i < width; i++) scratch[i] = norm->weight[i] * (scratch[i] * factor);
        narrow((char *)norm->output + r * width * item, norm->input.dtype, scratch, width);
    }
}

#include "attention.h"

static void choose_experts(const struct router *router, float *scratch) {
    size_t experts = router->experts, top_k = router->top_k;
    for (size_t r = 0; r < (size_t)router->rows; r++) {
        int64_t *index = router->index + r * top_k;
        float *gate = router->gate + r * top_k, sum = 0;
        widen(scratch, router->logits, r * experts, experts);
        float factor = softmax(scratch, experts);
        for (size_t k = 0; k < top_k; k++) {
            size_t best = experts;
            for (size_t e = 0; e < experts; e++) { /* -1: taken. NaN is taken last */
                if (scratch[e] == -1.0f) continue;
                if (best == experts || scratch[e] > scratch[best]) best = e;
            }
            index[k] = (int64_t)best;
            gate[k] = scratch[best] * factor;
            sum += gate[k];
            scratch[best] = -1.0f;
        }
        if (router->normalized)
            for (size_t k = 0; k < top_k; k++) gate[k] /= sum;
        if (router->gate_dtype != FLOAT32)
            for (size_t k = 0; k < top_k; k++) {
                uint16_t rounded;
                narrow(&rounded, router->gate_dtype, gate + k, 1);
                widen(gate + k, (struct matrix){&rounded, router->gate_dtype}, 0, 1);
            }
    }
}

/* to += from. */
static void add(void *to, const void *from, int64_t dtype, size_t count) {
    size_t item = bytes_of(dtype);
    for (size_t i = 0; i < count; i += LANES) {
        size_t here = smaller(count - i, LANES);
        float sum[LANES];
        char *at = (char *)to + i * item;
        store_float(sum, load_partial(at, dtype, here) +
                             load_partial((const char *)from + i * item, dtype, here));
        narrow(at, dtype, sum, here);
    }
}

static int supported(void) {
#if defined(__AMX_BF16__)
    return __builtin_cpu_supports("avx512bw") && amx_supported();
#elif defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#else
    return 1;
#endif
}

const struct variant VARIANT_OBJECT(VARIANT) = {
    .name = VARIANT_NAME(VARIANT),
    .supported = supported,
#if defined(__AMX_BF16__)
    .group_rows = GROUP_ROWS,
#else
    .group_rows = 1,
#endif
    .group_bytes = group_bytes,
    .pack = pack,
    .widen = widen,
    .narrow = narrow,
    .scratch_floats = scratch_floats,
    .project = project,
    .normalize = normalize,
    .choose = choose_experts,
    .add = add,
    .remember = remember,
    .attend = attend,
    .attend_floats = attend_floats,
    .gate = gate,
};
