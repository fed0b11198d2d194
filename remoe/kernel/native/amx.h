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

/* Tiles 0 and 1 become the sums of the first group, 2 and 3 of the second if it has rows. With
 * each step, `lines` more lines of `next`, which this thread reads later, are asked for. If the
 * weights are used `once`, nothing has brought them into the first cache. */
static inline __attribute__((always_inline)) void amx_strip(const char *weights, size_t row_bytes,
                                                           int once, const char *next, size_t lines,
                                                           struct group first,
                                                           struct group second, size_t parts,
                                                           size_t steps) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t s = 0; s < steps; s++) {
        _tile_loadd(4, weights + s * 2 * STEP, row_bytes);
        _tile_loadd(5, weights + s * 2 * STEP + 16 * row_bytes, row_bytes);
        if (once) /* what two groups of rows take of the weights in a step, two steps ahead */
            for (size_t row = 0; row < STRIP_ROWS; row++)
                __builtin_prefetch(weights + row * row_bytes + (s + 2) * 2 * STEP, 0, 3);
        for (size_t line = 0; line < lines; line++, next += 64) __builtin_prefetch(next, 0, 2);
        for (size_t p = 0; p < parts; p++) {
            _tile_loadd(6, first.packed, first.rows * 4);
            first.packed += 16 * first.rows * 4;
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (second.rows) {
                _tile_loadd(7, second.packed, second.rows * 4);
                second.packed += 16 * second.rows * 4;
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
}

/* out[r][j] = tile[j][r] for the rows and columns that exist. */
static void amx_put(float *out, size_t out_stride, const float *tile, size_t rows, size_t columns) {
    vec v[16];
    memcpy(v, tile, sizeof v);
    transpose(v);
    for (size_t r = 0; r < rows; r++)
        put(out + r * out_stride, v[r], columns);
}

static size_t amx_group_bytes(size_t width) {
    return (width + STEP - 1) / STEP * PARTS * TILE_BYTES;
}

static void amx_project(float *out, size_t out_stride, struct input input, struct matrix weights,
                        size_t width, size_t first, size_t last, const char *next,
                        void *scratch) {
    size_t steps = (width + STEP - 1) / STEP, group_bytes = amx_group_bytes(width);
    size_t shaped[2] = {0, 0};
    /* The next strip is read from memory while this one is computed, a share with each two groups:
     * all of it with the first would wait for itself. */
    size_t pairs = (input.rows + 2 * GROUP_ROWS - 1) / (2 * GROUP_ROWS);
    size_t lines = (STRIP_ROWS + pairs - 1) / pairs;
    float tile[16 * 16] __attribute__((aligned(64)));
    for (size_t j = first; j < last; j += STRIP_ROWS) {
        size_t columns = smaller(last - j, STRIP_ROWS), row_bytes = width * 2;
        const char *strip = (const char *)weights.values + j * row_bytes;
        int in_place = columns == STRIP_ROWS && width % STEP == 0;
        const char *after = j + STRIP_ROWS < last ? strip + STRIP_ROWS * row_bytes : next;
        if (!in_place) { /* tiles read whole steps of whole strips */
            row_bytes = steps * STEP * 2;
            memset(scratch, 0, STRIP_ROWS * row_bytes);
            for (size_t c = 0; c < columns; c++)
                memcpy((char *)scratch + c * row_bytes, strip + c * width * 2, width * 2);
            strip = scratch;
        }
        for (size_t r = 0; r < input.rows; r += 2 * GROUP_ROWS) {
            struct group group[2];
            for (size_t g = 0; g < 2; g++) {
                size_t row = smaller(r + g * GROUP_ROWS, input.rows);
                group[g].packed = (char *)input.packed + row / GROUP_ROWS * group_bytes;
                group[g].rows = smaller(input.rows - row, GROUP_ROWS);
            }
            if (shaped[0] != group[0].rows || shaped[1] != group[1].rows) {
                amx_shape(group[0].rows, group[1].rows ? group[1].rows : 1);
                shaped[0] = group[0].rows;
                shaped[1] = group[1].rows;
            }
            size_t share = r / (2 * GROUP_ROWS);
            amx_strip(strip, row_bytes, pairs == 1,
                      after ? after + share * steps * lines * 64 : NULL,
                      after && in_place ? lines : 0, group[0], group[1], input.parts, steps);
            for (size_t t = 0; t < 4; t++) {
                size_t rows = group[t / 2].rows, column = t % 2 * 16;
                if (rows == 0 || column >= columns) continue;
                switch (t) {
                    case 0: _tile_stored(0, tile, 64); break;
                    case 1: _tile_stored(1, tile, 64); break;
                    case 2: _tile_stored(2, tile, 64); break;
                    default: _tile_stored(3, tile, 64);
                }
                amx_put(out + (r + t / 2 * GROUP_ROWS) * out_stride + (j - first) + column,
                        out_stride, tile, rows, smaller(columns - column, 16));
            }
        }
    }
    _tile_release();
}

#endif
