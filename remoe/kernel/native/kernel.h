/* Gated experts, and plain projections, on weights as they lie in a mapped file. Interface of the library, and the seam
 * between the part compiled once (kernel.c) and the parts compiled per instruction set (variant.c).
 */
#ifndef REMOE_KERNEL_H
#define REMOE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* Counts changes of this interface; remoe/kernel/native_kernel.py refuses a library of another. */
#define REMOE_KERNEL_ABI 3

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum activation { SILU = 0, GELU = 1, GELU_TANH = 2, CLAMPED_SWIGLU = 3 };
enum status { OK = 0, NO_MEMORY = 1 };

/* Row-major numbers of any alignment. */
struct matrix {
    const void *values;
    int64_t dtype;
};

/* down( act(gate(x)) * up(x) ): gate and up are [inner, hidden], down is [hidden, inner]. Each adds
 * its bias, float32 [inner] or [hidden], unless that is NULL. */
struct expert {
    struct matrix gate, up, down;
    const float *gate_bias, *up_bias, *down_bias;
};

/* Rows for some experts: entries offsets[i] to offsets[i + 1] of row_index and gate_weight say
 * which rows go to experts[i], and the weight of its result. Pointers may be unaligned. */
struct call {
    int64_t hidden, inner, activation;
    float alpha, limit; /* of CLAMPED_SWIGLU */
    int64_t experts, rows;
    const struct expert *const *expert; /* [experts] */
    const int64_t *offsets;             /* [experts + 1] */
    const int32_t *row_index;           /* [offsets[experts]], each in 0 .. rows - 1 */
    const float *gate_weight;           /* [offsets[experts]] */
    struct matrix input;                /* [rows, hidden] */
    float *output;                      /* [rows, hidden], added to */
};

/* output = input weights^T + bias, rounded to `dtype` once: weights are [columns, width], bias is
 * float32 [columns] or NULL, output [rows, columns]. */
struct projection {
    struct matrix weights;
    const float *bias;
    int64_t columns;
    void *output;
};

/* Projections of the same rows, done together. */
struct projections {
    int64_t width, rows, count, dtype;
    struct matrix input; /* [rows, width] */
    const struct projection *projection; /* [count] */
};

/* What one instruction set provides. Inputs of a projection are float32 [rows, stride], padded to
 * a multiple of PADDING with zeros, and may also have to be packed: `group_rows` rows at a time,
 * `group_bytes(width)` for each group (0: not needed). */
#define PADDING 32
#define TILE_ROWS 4

static inline size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

static inline size_t padded(size_t width) {
    return (width + PADDING - 1) / PADDING * PADDING;
}

struct input {
    const float *x;
    size_t stride, rows;
    size_t parts; /* how many bfloat16 numbers it takes to write one of x as their sum */
    void *packed; /* [rows / group_rows rounded up][group_bytes] */
};

struct variant {
    const char *name;
    int (*supported)(void);
    size_t group_rows;
    size_t (*group_bytes)(size_t width);
    void (*pack)(struct input input, size_t width, size_t first, size_t count);
    void (*widen)(float *to, struct matrix from, size_t first, size_t count);
    void (*narrow)(void *to, int64_t dtype, const float *from, size_t count); /* to the nearest */
    size_t (*scratch_floats)(size_t width);
    /* out[r][j - first] = sum over k of x[r][k] * weights[j][k], for j in first .. last - 1. The
     * order of a sum depends on k alone: not on which rows and columns are computed together. */
    void (*project)(float *out, size_t out_stride, struct input input, struct matrix weights,
                    size_t width, size_t first, size_t last, float *scratch);
    void (*activate)(float *gate, const float *up, size_t count, const struct call *call);
};

#endif
