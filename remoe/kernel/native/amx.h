/* Matrix tiles of bfloat16 (Intel AMX), for bfloat16 weights where they lie.
 *
 * The inputs are float32. Each is cut into three bfloat16 parts whose sum it is exactly, and each
 * part is multiplied with the weights in turn, so nothing is rounded that plain float32 would keep,
 * but for denormals, which the tiles take as zero. Weight rows are the left matrix: tiles are read
 * in place. Inputs are the right one, which wants pairs of consecutive numbers side by side; a
 * group of up to 16 rows is kept as [width / 32][part][16 pairs][rows][2]. Inputs that come as
 * 16-bit numbers need fewer parts: the others would be zero, and zeros change no sum.
 */
#ifndef REMOE_AMX_H
#define REMOE_AMX_H

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vector.h"

#define GROUP_ROWS 16
#define PARTS 3
#define STEP 32 /* numbers of one weight row in a tile */
#define TILE_BYTES 1024
#define STRIP_ROWS 32 /* weight rows computed together: two tiles */

static inline int amx_supported(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    const long request_permission = 0x1023, tile_data = 18; /* arch_prctl(2) */
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

/* What is there was stored before what follows: to GCC, an instruction that loads tiles reads no
 * memory. */
static inline void written(const void *memory) {
    __asm__ volatile("" : : "r"(memory) : "memory");
}

/* Tiles 0, 1 and 6 have a column for each row of the first group, 2, 3 and 7 of the second. */
static inline void amx_shape(size_t first_rows, size_t second_rows) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) shape = {.palette = 1};
    for (size_t i = 0; i < 8; i++) {
        int weights = i == 4 || i == 5, second = i == 2 || i == 3 || i == 7;
        shape.row_bytes[i] = 4 * (weights ? 16 : second ? second_rows : first_rows);
        shape.rows[i] = 16;
    }
    written(&shape);
    _tile_loadconfig(&shape);
}

/* A perfect shuffle, four times, turns rows into columns. */
static inline __attribute__((always_inline)) void transpose(vec v[16]) {
    const bits low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const bits high = low + 8;
#pragma GCC unroll 4
    for (size_t stage = 0; stage < 4; stage++) {
        vec w[16];
#pragma GCC unroll 8
        for (size_t i = 0; i < 8; i++) {
            w[2 * i] = (vec)_mm512_permutex2var_ps((__m512)v[i], (__m512i)low, (__m512)v[i + 8]);
            w[2 * i + 1] =
                (vec)_mm512_permutex2var_ps((__m512)v[i], (__m512i)high, (__m512)v[i + 8]);
        }
#pragma GCC unroll 16
        for (size_t i = 0; i < 16; i++) v[i] = w[i];
    }
}

static inline void put(void *to, vec v, size_t count) { /* the first `count` of its numbers */
    if (count == LANES)
        store_float(to, v);
    else
        _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)v);
}

/* The upper half of each number's bits, and what is left of it. */
static inline bits cut(vec *x) {
    bits finite = (bits)(*x - *x == splat(0.0f)), nan = (bits)(*x != *x);
    bits upper = ((bits)*x & 0xffff0000u) | (nan & 0x00400000u);
    *x = (vec)((bits)(*x - (vec)upper) & finite);
    return upper;
}

static inline bits cut_finite(vec *x) {
    bits upper = (bits)*x & 0xffff0000u;
    *x -= (vec)upper;
    return upper;
}

static inline int are_finite(vec v) {
    return _mm512_cmp_ps_mask((__m512)(v - v), _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff;
}

/* Columns `first` .. `first + count - 1` (multiples of STEP) of up to GROUP_ROWS rows. */
static void amx_pack_group(char *group, const float *x, size_t x_stride, size_t rows, size_t parts,
                           size_t first, size_t count) {
    for (size_t k = first; k < first + count; k += STEP) {
        vec part[PARTS][GROUP_ROWS] = {{{0}}};
        for (size_t r = 0; r < rows; r++) {
            vec left = load_float(x + r * x_stride + k);
            vec right = load_float(x + r * x_stride + k + 16);
            const bits even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
            for (size_t p = 0; p < parts; p++) {
                __m512i a = (__m512i)cut(&left), b = (__m512i)cut(&right);
                bits evens = (bits)_mm512_permutex2var_epi32(a, (__m512i)even, b);
                bits odds = (bits)_mm512_permutex2var_epi32(a, (__m512i)(even + 1), b);
                part[p][r] = (vec)(evens >> 16 | odds);
            }
        }
        char *to = group + k / STEP * parts * GROUP_ROWS * rows * 4;
        for (size_t p = 0; p < parts; p++) {
            transpose(part[p]);
            for (size_t pair = 0; pair < 16; pair++, to += rows * 4)
                put(to, part[p][pair], rows);
        }
    }
}

struct group {
    const char *packed;
    size_t rows;
};

static inline size_t amx_group_bytes(size_t width) {
    return (width + STEP - 1) / STEP * PARTS * TILE_BYTES;
}

/* Rows `row` and on of an input, which may have no such rows. */
static inline struct group amx_group(struct input input, size_t row, size_t width) {
    row = smaller(row, input.rows);
    return (struct group){(char *)input.packed + row / GROUP_ROWS * amx_group_bytes(width),
                          smaller(input.rows - row, GROUP_ROWS)};
}

/* Two times 16 weight rows, each half row after row. */
struct strip {
    const char *half[2];
    size_t row_bytes;
};

/* Weight rows `at` and on, `columns` of which exist, as tiles read them: whole steps of 16 rows. In
 * place if they are that, or else copied to `scratch`. */
static const char *amx_half(const char *at, size_t columns, size_t width, char *scratch) {
    size_t padded_bytes = padded(width) * 2;
    if (columns == 16 && width % STEP == 0) return at;
    memset(scratch, 0, 16 * padded_bytes);
    for (size_t c = 0; c < columns; c++)
        memcpy(scratch + c * padded_bytes, at + c * width * 2, width * 2);
    written(scratch);
    return scratch;
}

/* Tiles 0 and 1 become the sums of the first group, 2 and 3 of the second if it has rows: 0 and 2
 * with the strip's first half. With each step, `lines` more lines of each half of `next`, which
 * this thread reads later, are asked for. If the weights are used `once`, nothing has brought them
 * into the first cache; else they stay there, because packed rows pass it by: tiles that came from
 * the second cache wait for one another. */
static inline __attribute__((always_inline)) void amx_strip(struct strip weights, int once,
                                                           struct strip next, size_t lines,
                                                           struct group first,
                                                           struct group second, size_t parts,
                                                           size_t steps) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t s = 0; s < steps; s++) {
        _tile_loadd(4, weights.half[0] + s * 2 * STEP, weights.row_bytes);
        _tile_stream_loadd(6, first.packed, first.rows * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, weights.half[1] + s * 2 * STEP, weights.row_bytes);
        if (once) /* what two groups of rows take of the weights in a step, two steps ahead */
            for (size_t row = 0; row < 2 * 16; row++)
                __builtin_prefetch(weights.half[row / 16] + row % 16 * weights.row_bytes +
                                       (s + 2) * 2 * STEP,
                                   0, 3);
        for (size_t line = s * lines; line < (s + 1) * lines; line++) {
            __builtin_prefetch(next.half[0] + line * 64, 0, 2);
            __builtin_prefetch(next.half[1] + line * 64, 0, 2);
        }
        for (size_t p = 0; p < parts; p++) {
            if (p) {
                _tile_stream_loadd(6, first.packed, first.rows * 4);
                _tile_dpbf16ps(0, 4, 6);
            }
            first.packed += 16 * first.rows * 4;
            _tile_dpbf16ps(1, 5, 6);
            if (second.rows) {
                _tile_stream_loadd(7, second.packed, second.rows * 4);
                second.packed += 16 * second.rows * 4;
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
}

/* Strips with all rows of an input. */
struct sweep {
    struct input input;
    size_t width, shaped[2];
};

/* The products of a strip with two groups of rows, `row` and on: sums[2 * group + half][16][rows].
 * The next strip is read from memory while this one is computed, a share with each two groups: all
 * of it with the first would wait for itself. Halves of `next` are NULL where there is none. */
static void amx_sums(float sums[4][256], struct sweep *sweep, size_t row, struct strip strip,
                     struct strip next) {
    struct input input = sweep->input;
    size_t steps = padded(sweep->width) / STEP;
    size_t pairs = (input.rows + 2 * GROUP_ROWS - 1) / (2 * GROUP_ROWS);
    size_t lines = next.half[0] ? (16 + pairs - 1) / pairs : 0;
    size_t share = row / (2 * GROUP_ROWS) * lines * steps * 64;
    struct group first = amx_group(input, row, sweep->width);
    struct group second = amx_group(input, row + GROUP_ROWS, sweep->width);
    if (sweep->shaped[0] != first.rows || sweep->shaped[1] != second.rows) {
        amx_shape(first.rows, second.rows ? second.rows : 1);
        sweep->shaped[0] = first.rows;
        sweep->shaped[1] = second.rows;
    }
    for (size_t half = 0; half < 2 && lines; half++) next.half[half] += share;
    amx_strip(strip, pairs == 1, next, lines, first, second, input.parts, steps);
    _tile_stored(0, sums[0], first.rows * 4);
    _tile_stored(1, sums[1], first.rows * 4);
    if (!second.rows) return;
    _tile_stored(2, sums[2], second.rows * 4);
    _tile_stored(3, sums[3], second.rows * 4);
}

/* out[r][j] = sums[j][r] for the rows and columns that exist. */
static void amx_put(float *out, size_t out_stride, const float *sums, size_t rows, size_t columns) {
    vec v[16];
#pragma GCC unroll 16
    for (size_t j = 0; j < 16; j++) v[j] = load_float(sums + j * rows);
    transpose(v);
    for (size_t r = 0; r < rows; r++)
        put(out + r * out_stride, v[r], columns);
}

static void amx_project(float *out, size_t out_stride, struct input input, struct matrix weights,
                        size_t width, size_t first, size_t last, const char *next,
                        char *scratch) {
    struct sweep sweep = {input, width, {0, 0}};
    size_t row_bytes = padded(width) * 2, half_bytes = 16 * row_bytes;
    float sums[4][256] __attribute__((aligned(64)));
    for (size_t j = first; j < last; j += STRIP_ROWS) {
        size_t columns[2] = {smaller(last - j, 16), last - j > 16 ? smaller(last - j - 16, 16) : 0};
        const char *at = (const char *)weights.values + j * width * 2;
        const char *after = j + STRIP_ROWS < last ? at + 2 * half_bytes : next;
        if (width % STEP) after = NULL;
        struct strip strip = {{0}, row_bytes};
        struct strip ahead = {{after, after ? after + half_bytes : NULL}, row_bytes};
        for (size_t half = 0; half < 2; half++)
            strip.half[half] = amx_half(at + half * 16 * width * 2, columns[half], width,
                                        scratch + half * half_bytes);
        for (size_t r = 0; r < input.rows; r += 2 * GROUP_ROWS) {
            amx_sums(sums, &sweep, r, strip, ahead);
            for (size_t t = 0; t < 4; t++) {
                size_t row = r + t / 2 * GROUP_ROWS, column = j - first + t % 2 * 16;
                if (row < input.rows && columns[t % 2])
                    amx_put(out + row * out_stride + column, out_stride, sums[t],
                            smaller(input.rows - row, GROUP_ROWS), columns[t % 2]);
            }
        }
    }
    _tile_release();
}

#endif
