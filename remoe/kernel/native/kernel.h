/* Gated experts, and plain projections, on weights as they lie in a mapped file. Interface of the library, and the seam
 * between the part compiled once (kernel.c) and the parts compiled per instruction set (variant.c).
 */
#ifndef REMOE_KERNEL_H
#define REMOE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* Counts changes of this interface; remoe/kernel/native_kernel.py refuses a library of another. */
#define REMOE_KERNEL_ABI 11

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
    int64_t spared; /* threads of the kernel that leave their processors to others */
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

/* A layer's experts for rows as its router chose: row r goes to the experts index[r][..] with the
 * weights gate[r][..]. Experts that are NULL in the table are left to others. */
struct routed {
    int64_t hidden, inner, activation;
    float alpha, limit; /* of CLAMPED_SWIGLU */
    int64_t experts, rows, top_k, spared;
    const struct expert *const *table; /* [experts] */
    const int64_t *index;              /* [rows, top_k] */
    const float *gate;                 /* [rows, top_k] */
    struct matrix input;               /* [rows, hidden] */
    float *output;                     /* [rows, hidden], added to */
};

/* output = weight * x / sqrt(mean(x^2) + epsilon), row by row, rounded once. */
struct norm {
    int64_t rows, width;
    struct matrix input; /* [rows, width] */
    const float *weight; /* [width] */
    float epsilon;
    void *output;        /* of the input's type */
};

/* Causal attention of new tokens over a paged cache, after their keys and values were put there.
 * All numbers but the indices are of one type. Heads lie side by side in a row. */
struct attention {
    int64_t rows, requests, heads, groups, width; /* groups: heads of keys; width: of one head */
    int64_t rotated;           /* numbers of a head that are rotated, the first ones */
    int64_t dtype;
    float scale;
    const void *query;         /* [rows, heads * width] */
    const void *key, *value;   /* [rows, groups * width] */
    const void *cosine, *sine; /* [rows, rotated] */
    void *keys, *values;       /* the cache, a token every groups * width numbers */
    const int64_t *write;      /* [rows], places of the new tokens */
    const int32_t *row_ends;   /* [requests + 1], from 0: whose rows */
    const int32_t *read_ends;  /* [requests + 1], from 0: whose places to read */
    const int64_t *read;       /* [read_ends[requests]], places of all a request's tokens, in order */
    void *output;              /* [rows, heads * width] */
};

/* Projections of the same rows, done together. */
struct projections {
    int64_t width, rows, count, dtype;
    struct matrix input; /* [rows, width] */
    const struct projection *projection; /* [count] */
};

/* Where rows go: to the experts of the `top_k` largest of softmax(logits), in falling order. Their
 * weights are those numbers, divided by their sum if `normalized`, and rounded to a type. */
struct router {
    int64_t rows, experts, top_k, normalized, gate_dtype;
    struct matrix logits; /* [rows, experts] */
    int64_t *index;       /* [rows, top_k] */
    float *gate;          /* [rows, top_k] */
};

/* A call of one row for some experts: all of it is ready but what lies at these places. Numbers are
 * MessagePack's of 16 bits, so experts are 3 bytes apart; gates are float32. */
struct request {
    char *bytes;
    int64_t size;
    int64_t layer_at, hidden_at, experts_at, gate_at;
    int64_t beside_at; /* whether the caller computes meanwhile */
};

/* How a function of this machine is called within a step: over a connection that nobody else uses
 * meanwhile. A reply has `reply_head`, partial sums, and two MessagePack doubles. */
struct line {
    int64_t descriptor; /* -1: not now */
    int64_t requests;   /* for 1, 2, ... experts */
    const struct request *request;
    const char *reply_head;
    int64_t reply_head_size;
    char *reply; /* [reply_room], more than a reply has */
    int64_t reply_room;
    int64_t patience_ns;
    void *polling;  /* as of remoe_polling_open, or NULL */
    int64_t missed; /* set once its threads had no processor */
};

/* What became of a layer's call: none, not wholly sent or its connection gone, sent, answered.
 * Of one that was sent and not answered `received` bytes lie in the line's `reply`, -1 for none. */
enum { NOT_POSTED = 0, BROKEN = 1, POSTED = 2, ANSWERED = 3 };
struct answer {
    int64_t state, routes, received;
    double waited_s, busy_s, ready_for_s;
};

/* A decoder's layer of Llama's shape, x += attention(norm(x)) and x += experts(norm(x)), as the
 * calls above for one token; norms without a weight are left out. What differs from step to step
 * (rows, who of them attends to what, a router's outputs) is `decoding`'s. */
struct layer {
    struct norm input_norm, query_norm, key_norm, experts_norm;
    struct projections inputs, output, logits; /* of query, key and value; of heads; of the router */
    struct attention attention;
    struct router router;
    struct routed experts;
    struct line *line;       /* to the function of those that are not here, or NULL */
    int64_t number;          /* what that function knows the layer by */
};

/* Routes of a layer whose experts are elsewhere, gathered by expert as in `call`, and the rows that
 * have any: each once, in order. */
struct elsewhere {
    int64_t rows, experts, routes;
    int64_t *token;     /* [rows], which of the step's rows they are */
    void *hidden;       /* [rows, width] */
    int64_t *expert;    /* [experts] */
    int64_t *offsets;   /* [experts + 1] */
    int32_t *row_index; /* [routes], each in 0 .. rows - 1 */
    float *gate_weight; /* [routes] */
};

/* A step through layers, of new tokens `hidden` [rows, width]. Where a chosen expert is not in the
 * table, or everywhere if it is `watched`, it stops at `layer`: the router's choices are made,
 * `normed` [rows, width] is what experts are given, `elsewhere` what others are to compute, and
 * `total` [rows, width] float32 zeros to which all of them add: those that are here when
 * remoe_decode_here is called. If called again it goes on from `total`, after it added `partial`.
 * A layer with a line it calls itself, and stops only if it gets no reply that it knows; what is
 * here has then been added, and `answers` of the layer says how far it came. */
struct decoding {
    int64_t rows, width, dtype, layers, watched;
    int64_t spared;              /* threads that rest while something is computed elsewhere */
    int64_t layer;               /* where to start, and then where it stopped, or `layers` */
    int64_t stopped;             /* whether it stopped within the layer */
    const struct layer *each;    /* [layers] */
    void *hidden, *normed;
    void *added;                 /* [rows, width], room for what is added to `hidden` */
    float *total;
    const float *partial;        /* [elsewhere.rows, width] of any alignment, or NULL */
    int64_t *index;              /* [layers, rows, top_k] */
    float *gate;                 /* [rows, top_k] */
    int64_t requests, rotated;   /* and so on: as in `attention` */
    const void *cosine, *sine;
    const int64_t *write;
    const int32_t *row_ends, *read_ends;
    const int64_t *read;
    struct elsewhere elsewhere;
    struct answer *answers;      /* [layers], states cleared; NULL: stop at each of these layers */
};
struct kernel;

/* Compute a call on a kernel's threads: OK or NO_MEMORY. From any thread. */
int remoe_forward(struct kernel *kernel, const struct call *call);
int remoe_route(struct kernel *kernel, const struct routed *routed);

/* What one instruction set provides. Inputs of a projection are float32 [rows, stride], padded to
 * a multiple of PADDING with zeros, and may also have to be packed: `group_rows` rows at a time,
 * `group_bytes(width)` for each group (0: not needed). */
#define PADDING 32
#define TILE_ROWS 4

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

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

/* What a thread reads next, the rows of weights from there on; NULL if nothing. */
struct ahead {
    const char *weights[2];
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
     * order of a sum depends on k alone: not on which rows and columns are computed together.
     * `next` are weight rows of the same width that the thread reads after these, or NULL. */
    void (*project)(float *out, size_t out_stride, struct input input, struct matrix weights,
                    size_t width, size_t first, size_t last, const void *next, float *scratch);
    void (*normalize)(const struct norm *norm, float *scratch); /* [padded width] */
    void (*choose)(const struct router *router, float *scratch); /* [padded experts] */
    void (*add)(void *to, const void *from, int64_t dtype, size_t count); /* rounded once */
    /* Rotate and store the keys of some rows, and store their values. */
    void (*remember)(const struct attention *attention, size_t first, size_t last, float *scratch);
    /* One request's rows against one group of heads. */
    void (*attend)(const struct attention *attention, size_t request, size_t group,
                   float *scratch);
    size_t (*attend_floats)(const struct attention *attention, size_t most_keys);
    /* Columns first .. last - 1 of act(gate(x)) * up(x), packed; `first` is a multiple of PADDING,
     * and `up` has room for all rows of these columns, padded. `ahead` are gate and up. */
    void (*gate)(struct input inner, struct input input, const struct expert *expert,
                 const struct call *call, size_t first, size_t last, const struct ahead *ahead,
                 float *up, float *scratch);
};

#endif
