/* Which variant runs, on which threads, over which pieces of a call. */
#define _GNU_SOURCE /* clock_gettime() */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"

#define EXPORT __attribute__((visibility("default")))
#define ALIGNMENT 64
/* Rows computed together: their inputs and intermediates stay in the second cache, and weights
 * are read once for all of them. */
#define BLOCK_ROWS 128
/* A float32 is the sum of three bfloat16 numbers, a float16 of two. */
#define FLOAT32_PARTS 3
/* Weight rows of one task: small enough to share out evenly, large enough to be worth taking. */
#define TASK_BYTES (96 * 1024)
/* Tasks of the second projection that each thread has at least, if there are rows enough: each goes
 * through all experts, and what is left of a task when all the others are done, one thread reads. */
#define LEAST_TASKS 4

/* build.py lists those that it compiled, the fastest first: VARIANTS is "X(avx512) X(avx2) ...". */
#define X(name) extern const struct variant remoe_##name;
VARIANTS
#undef X
#define X(name) &remoe_##name,
static const struct variant *const variants[] = {VARIANTS NULL};
#undef X

/* Rows of one expert that are computed together: entries first .. last - 1 of the call's, which
 * lie from `place` on in the buffers, and from `source` on before the first projection. */
struct segment {
    const struct expert *expert;
    size_t first, last, place, source;
};

struct kernel;
typedef void task_function(struct kernel *, size_t task, size_t thread);

/* The tasks of a round as one number: which round, how many, and the next to be taken. */
#define TASK_BITS 20
#define TASK_MASK ((UINT64_C(1) << TASK_BITS) - 1)

/* Threads that take tasks from a counter. A result does not depend on who computes it, so neither
 * does it on the number of threads. A thread without work looks for more `spins` times before it
 * sleeps: waking it costs as much as a small projection. The lock is for sleeping alone. */
struct kernel {
    const struct variant *variant;
    size_t threads, spins;
    pthread_mutex_t call_lock; /* one call at a time */

    _Atomic size_t spared; /* helpers, the last ones, that leave the call to the others */
    _Atomic int resting;   /* whether more work is not to be waited for awake */
    task_function *function; /* of the round */
    _Atomic uint64_t tasks;
    _Atomic size_t left;              /* tasks not yet done */
    _Atomic int sleepers, waits, closing; /* helpers asleep; whether the caller is */
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    pthread_t *helpers; /* [threads - 1] */

    /* The call at hand, of one kind or the other, and buffers that grow to the largest seen. */
    const struct call *call;
    const struct projections *projections;
    size_t first_row, rows; /* of the projections' rows, those in the buffers */
    const struct attention *attention;
    void *routes; /* [route_bytes] */
    size_t route_bytes;
    struct segment segment[BLOCK_ROWS];
    size_t segments, block_rows;
    float *input;  /* [BLOCK_ROWS, padded hidden] */
    float *inner;  /* [BLOCK_ROWS, padded inner] */
    float *thread; /* [threads, thread_floats] */
    size_t input_stride, inner_stride, thread_floats;
    char *packed_input, *packed_inner; /* [BLOCK_ROWS / group_rows, group bytes] */
    size_t packed_input_bytes, packed_inner_bytes;
    size_t inner_step, hidden_step, input_parts;
};

/* Do what is left of the round, and return its number. A task is taken only if the round is still
 * the one that was looked at, and a round ends only when all its tasks are done. */
static uint64_t take_tasks(struct kernel *kernel, size_t thread) {
    uint64_t now = atomic_load(&kernel->tasks);
    if (thread && thread + atomic_load(&kernel->spared) >= kernel->threads)
        return now >> 2 * TASK_BITS;
    while ((now & TASK_MASK) < (now >> TASK_BITS & TASK_MASK)) {
        if (!atomic_compare_exchange_weak(&kernel->tasks, &now, now + 1)) continue;
        kernel->function(kernel, now & TASK_MASK, thread);
        if (atomic_fetch_sub(&kernel->left, 1) == 1 && atomic_load(&kernel->waits)) {
            pthread_mutex_lock(&kernel->lock);
            pthread_cond_signal(&kernel->finished);
            pthread_mutex_unlock(&kernel->lock);
        }
        now = atomic_load(&kernel->tasks);
    }
    return now >> 2 * TASK_BITS;
}

struct helper_argument {
    struct kernel *kernel;
    size_t thread;
};

static int has_news(struct kernel *kernel, uint64_t seen) {
    return atomic_load(&kernel->tasks) >> 2 * TASK_BITS != seen || atomic_load(&kernel->closing);
}

static void *help(void *argument) {
    struct helper_argument given = *(struct helper_argument *)argument;
    struct kernel *kernel = given.kernel;
    free(argument);
    while (!atomic_load(&kernel->closing)) {
        uint64_t seen = take_tasks(kernel, given.thread);
        for (size_t i = 0; i < kernel->spins && !has_news(kernel, seen); i++) {
            if (atomic_load(&kernel->resting)) break;
            relax();
        }
        if (has_news(kernel, seen)) continue;
        pthread_mutex_lock(&kernel->lock);
        atomic_fetch_add(&kernel->sleepers, 1); /* before the last look: run() looks after news */
        while (!has_news(kernel, seen)) pthread_cond_wait(&kernel->work, &kernel->lock);
        atomic_fetch_sub(&kernel->sleepers, 1);
        pthread_mutex_unlock(&kernel->lock);
    }
    return NULL;
}

static void run(struct kernel *kernel, task_function *function, size_t tasks) {
    if (kernel->threads <= 1 + atomic_load(&kernel->spared) || tasks <= 1) {
        for (size_t task = 0; task < tasks; task++) function(kernel, task, 0);
        return;
    }
    uint64_t round = (atomic_load(&kernel->tasks) >> 2 * TASK_BITS) + 1;
    kernel->function = function;
    atomic_store(&kernel->resting, 0);
    atomic_store(&kernel->left, tasks);
    atomic_store(&kernel->tasks, round << 2 * TASK_BITS | (uint64_t)tasks << TASK_BITS);
    if (atomic_load(&kernel->sleepers)) {
        pthread_mutex_lock(&kernel->lock);
        pthread_cond_broadcast(&kernel->work);
        pthread_mutex_unlock(&kernel->lock);
    }
    take_tasks(kernel, 0);
    for (size_t i = 0; i < kernel->spins && atomic_load(&kernel->left); i++) relax();
    if (!atomic_load(&kernel->left)) return;
    pthread_mutex_lock(&kernel->lock);
    atomic_store(&kernel->waits, 1);
    while (atomic_load(&kernel->left)) pthread_cond_wait(&kernel->finished, &kernel->lock);
    atomic_store(&kernel->waits, 0);
    pthread_mutex_unlock(&kernel->lock);
}

/* Numbers of weight rows in one task: a multiple of PADDING, so that tasks share no vector. */
static size_t step_for(size_t width) {
    size_t rows = TASK_BYTES / (2 * width) / PADDING * PADDING;
    return rows > PADDING ? rows : PADDING;
}

/* The same of `count` of them, as long as that leaves each thread its tasks. */
static size_t shared_step(const struct kernel *kernel, size_t count, size_t width) {
    size_t most = count / (LEAST_TASKS * kernel->threads) / PADDING * PADDING;
    return smaller(step_for(width), most > PADDING ? most : PADDING);
}

static size_t steps(size_t count, size_t step) {
    return (count + step - 1) / step;
}

static struct input input_of(const struct kernel *kernel, const struct segment *segment) {
    size_t rows = segment->last - segment->first;
    size_t group = segment->source / kernel->variant->group_rows;
    return (struct input){kernel->input + segment->source * kernel->input_stride,
                          kernel->input_stride, rows, kernel->input_parts,
                          kernel->packed_input + group * kernel->packed_input_bytes};
}

static struct input inner_of(const struct kernel *kernel, const struct segment *segment) {
    size_t rows = segment->last - segment->first;
    size_t group = segment->place / kernel->variant->group_rows;
    return (struct input){kernel->inner + segment->place * kernel->inner_stride,
                          kernel->inner_stride, rows, FLOAT32_PARTS,
                          kernel->packed_inner + group * kernel->packed_inner_bytes};
}

/* Where a row of weights lies. */
static const void *row_of(struct matrix weights, size_t width, size_t row) {
    return (const char *)weights.values + row * width * (weights.dtype == FLOAT32 ? 4 : 2);
}

static void add_bias(float *to, const float *bias, size_t first, size_t count) {
    if (!bias) return;
    for (size_t i = 0; i < count; i++) to[i] += bias[first + i];
}

/* The task that this thread takes after one; beyond all tasks if nobody knows. */
static size_t task_after(const struct kernel *kernel, size_t task) {
    return kernel->threads <= 1 + atomic_load(&kernel->spared) ? task + 1 : TASK_MASK;
}

/* inner = act(gate(x)) * up(x), for one segment and some of its columns. */
static void inner_task(struct kernel *kernel, size_t task, size_t thread) {
    const struct call *call = kernel->call;
    size_t step = kernel->inner_step, per_segment = steps(call->inner, step);
    const struct segment *segment = &kernel->segment[task / per_segment];
    size_t first = task % per_segment * step, last = smaller(first + step, call->inner);
    float *up = kernel->thread + thread * kernel->thread_floats;
    struct ahead ahead = {{NULL, NULL}};
    size_t after = task_after(kernel, task);
    if (after < kernel->segments * per_segment) {
        const struct expert *expert = kernel->segment[after / per_segment].expert;
        size_t row = after % per_segment * step;
        ahead = (struct ahead){{row_of(expert->gate, call->hidden, row),
                                row_of(expert->up, call->hidden, row)}};
    }
    kernel->variant->gate(inner_of(kernel, segment), input_of(kernel, segment), segment->expert,
                          call, first, last, &ahead, up, up + BLOCK_ROWS * step);
}

/* output += gate_weight * down(inner), for some columns and all segments, in their order. */
static void output_task(struct kernel *kernel, size_t task, size_t thread) {
    const struct call *call = kernel->call;
    size_t first = task * kernel->hidden_step;
    size_t last = smaller(first + kernel->hidden_step, call->hidden);
    float *down = kernel->thread + thread * kernel->thread_floats;
    float *scratch = down + BLOCK_ROWS * kernel->hidden_step;

    for (size_t s = 0; s < kernel->segments; s++) {
        const struct segment *segment = &kernel->segment[s];
        size_t after = s + 1 == kernel->segments ? task_after(kernel, task) : task;
        size_t row = after * kernel->hidden_step;
        const struct segment *read = &kernel->segment[(s + 1) % kernel->segments];
        const void *next = row < (size_t)call->hidden
                               ? row_of(read->expert->down, call->inner, row)
                               : NULL;
        kernel->variant->project(down, kernel->hidden_step, inner_of(kernel, segment),
                                 segment->expert->down, call->inner, first, last, next, scratch);
        for (size_t entry = segment->first; entry < segment->last; entry++) {
            float *from = down + (entry - segment->first) * kernel->hidden_step;
            add_bias(from, segment->expert->down_bias, first, last - first);
            float weight;
            int32_t row;
            memcpy(&weight, (const char *)call->gate_weight + entry * sizeof weight, sizeof weight);
            memcpy(&row, (const char *)call->row_index + entry * sizeof row, sizeof row);
            float *to = call->output + (size_t)row * call->hidden + first;
            for (size_t i = 0; i < last - first; i++) to[i] += weight * from[i];
        }
    }
}

/* Compute the segments gathered so far. */
static void flush(struct kernel *kernel) {
    const struct call *call = kernel->call;
    for (size_t s = 0; s < kernel->segments; s++) {
        const struct segment *segment = &kernel->segment[s];
        if (segment->source != segment->place) continue; /* is there already */
        float *to = kernel->input + segment->place * kernel->input_stride;
        for (size_t entry = segment->first; entry < segment->last; entry++) {
            int32_t row;
            memcpy(&row, (const char *)call->row_index + entry * sizeof row, sizeof row);
            kernel->variant->widen(to, call->input, (size_t)row * call->hidden, call->hidden);
            memset(to + call->hidden, 0, (kernel->input_stride - call->hidden) * sizeof *to);
            to += kernel->input_stride;
        }
        kernel->variant->pack(input_of(kernel, segment), call->hidden, 0, padded(call->hidden));
    }
    run(kernel, inner_task, kernel->segments * steps(call->inner, kernel->inner_step));
    run(kernel, output_task, steps(call->hidden, kernel->hidden_step));
    kernel->block_rows = kernel->segments = 0;
}

/* Rows `first_row` and on of some columns of one projection: tasks go through one after another. */
static void projection_task(struct kernel *kernel, size_t task, size_t thread) {
    const struct projections *all = kernel->projections;
    const struct projection *to = all->projection;
    size_t width = all->width, step = kernel->inner_step;
    while (task >= steps(to->columns, step)) task -= steps((to++)->columns, step);
    size_t first = task * step, last = smaller(first + step, to->columns), columns = last - first;
    float *out = kernel->thread + thread * kernel->thread_floats;
    float *scratch = out + BLOCK_ROWS * step;
    struct input input = {kernel->input, kernel->input_stride, kernel->rows, kernel->input_parts,
                          kernel->packed_input};

    kernel->variant->project(out, step, input, to->weights, width, first, last, NULL, scratch);
    size_t item = all->dtype == FLOAT32 ? 4 : 2;
    for (size_t r = 0; r < kernel->rows; r++) {
        size_t place = (kernel->first_row + r) * to->columns + first;
        add_bias(out + r * step, to->bias, first, columns);
        kernel->variant->narrow((char *)to->output + place * item, all->dtype, out + r * step,
                                columns);
    }
}

/* Make room for `count` items of `needed` bytes or numbers each, `size` bytes a number. */
static int grow(void *buffer, size_t *held, size_t needed, size_t count, size_t size) {
    void **pointer = buffer;
    if (needed <= *held) return OK;
    free(*pointer);
    *pointer = aligned_alloc(ALIGNMENT, (count * needed * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    *held = *pointer ? needed : 0;
    return *pointer ? OK : NO_MEMORY;
}

/* For rows of `hidden` numbers of a type, projected to `inner` numbers and those back again. */
static int prepare(struct kernel *kernel, int64_t dtype, size_t hidden, size_t inner) {
    const struct variant *variant = kernel->variant;
    kernel->input_parts = dtype == FLOAT32 ? FLOAT32_PARTS : dtype == BFLOAT16 ? 1 : 2;
    kernel->inner_step = smaller(step_for(hidden), padded(inner));
    /* Weights are asked for ahead of time within a task, so with many rows longer ones wait less, as
     * long as there are three for each thread. */
    size_t step = shared_step(kernel, hidden, inner);
    size_t longer = hidden / (3 * kernel->threads) / PADDING * PADDING;
    kernel->hidden_step = smaller(longer > step ? smaller(longer, 3 * step) : step, padded(hidden));
    size_t inner_floats =
        BLOCK_ROWS * kernel->inner_step + padded(variant->scratch_floats(hidden));
    size_t output_floats =
        BLOCK_ROWS * kernel->hidden_step + padded(variant->scratch_floats(inner));
    size_t thread_floats = inner_floats > output_floats ? inner_floats : output_floats;
    size_t groups = BLOCK_ROWS / variant->group_rows;
    if (grow(&kernel->input, &kernel->input_stride, padded(hidden), BLOCK_ROWS, sizeof(float)) ||
        grow(&kernel->inner, &kernel->inner_stride, padded(inner), BLOCK_ROWS, sizeof(float)) ||
        grow(&kernel->thread, &kernel->thread_floats, thread_floats, kernel->threads,
             sizeof(float)) ||
        grow(&kernel->packed_input, &kernel->packed_input_bytes, variant->group_bytes(hidden),
             groups, 1) ||
        grow(&kernel->packed_inner, &kernel->packed_inner_bytes, variant->group_bytes(inner),
             groups, 1))
        return NO_MEMORY;
    return OK;
}

static int forward(struct kernel *kernel, const struct call *call) {
    int status = prepare(kernel, call->input.dtype, call->hidden, call->inner);
    if (status != OK) return status;
    if (call->rows <= TILE_ROWS) /* reading is all there is to do: share it out evenly */
        kernel->hidden_step =
            smaller(shared_step(kernel, call->hidden, call->inner), padded(call->hidden));
    kernel->call = call;
    atomic_store(&kernel->spared, (size_t)call->spared);
    kernel->segments = kernel->block_rows = 0;
    size_t group = kernel->variant->group_rows;
    for (int64_t e = 0; e < call->experts; e++) {
        size_t first = call->offsets[e], end = call->offsets[e + 1];
        while (first < end) {
            if (kernel->block_rows == BLOCK_ROWS) flush(kernel);
            size_t last = smaller(end, first + BLOCK_ROWS - kernel->block_rows);
            /* One row that goes to many experts is taken in once. */
            size_t source = call->rows == 1 && last - first == 1 ? 0 : kernel->block_rows;
            kernel->segment[kernel->segments++] =
                (struct segment){call->expert[e], first, last, kernel->block_rows, source};
            kernel->block_rows += steps(last - first, group) * group;
            first = last;
        }
    }
    flush(kernel);
    atomic_store(&kernel->spared, 0);
    return OK;
}

static inline int is_here(const struct routed *routed, size_t route) {
    int64_t expert = routed->index[route];
    return expert >= 0 && expert < routed->experts && routed->table && routed->table[expert];
}

/* The routes whose experts are here, or elsewhere, gathered by expert: each expert's in the order
 * of the rows. Of `offsets` there are two more than experts. */
static void gather(const struct routed *routed, int here, int64_t *offsets, int32_t *row_index,
                   float *gate_weight) {
    size_t routes = routed->rows * routed->top_k;
    memset(offsets, 0, (routed->experts + 2) * sizeof *offsets);
    int64_t *next = offsets + 1; /* next[e] runs from the start of e's routes to their end */
    for (size_t i = 0; i < routes; i++)
        if (is_here(routed, i) == here) offsets[routed->index[i] + 2]++;
    for (int64_t e = 0; e < routed->experts; e++) offsets[e + 2] += offsets[e + 1];
    for (size_t i = 0; i < routes; i++) {
        if (is_here(routed, i) != here) continue;
        int64_t place = next[routed->index[i]]++;
        row_index[place] = (int32_t)(i / routed->top_k);
        gate_weight[place] = routed->gate[i];
    }
}

static int route(struct kernel *kernel, const struct routed *routed) {
    size_t offset_bytes = (routed->experts + 2) * sizeof(int64_t);
    size_t bytes = offset_bytes + (size_t)routed->rows * routed->top_k * 8;
    if (grow(&kernel->routes, &kernel->route_bytes, bytes, 1, 1)) return NO_MEMORY;
    int64_t *offsets = kernel->routes;
    int32_t *row_index = (int32_t *)((char *)kernel->routes + offset_bytes);
    float *gate_weight = (float *)(row_index + routed->rows * routed->top_k);
    gather(routed, 1, offsets, row_index, gate_weight);
    struct call call = {
        .hidden = routed->hidden, .inner = routed->inner, .activation = routed->activation,
        .alpha = routed->alpha, .limit = routed->limit, .experts = routed->experts,
        .rows = routed->rows, .spared = routed->spared, .expert = routed->table, .offsets = offsets,
        .row_index = row_index, .gate_weight = gate_weight, .input = routed->input,
        .output = routed->output};
    return offsets[routed->experts] > 0 ? forward(kernel, &call) : OK;
}

/* Room for `floats` numbers of each thread's own. */
static int grow_thread(struct kernel *kernel, size_t floats) {
    return grow(&kernel->thread, &kernel->thread_floats, padded(floats), kernel->threads,
                sizeof(float));
}

static int normalize(struct kernel *kernel, const struct norm *norm) {
    if (grow_thread(kernel, norm->width)) return NO_MEMORY;
    kernel->variant->normalize(norm, kernel->thread);
    return OK;
}

static void attention_task(struct kernel *kernel, size_t task, size_t thread) {
    const struct attention *attention = kernel->attention;
    kernel->variant->attend(attention, task / attention->groups, task % attention->groups,
                            kernel->thread + thread * kernel->thread_floats);
}

static int attend(struct kernel *kernel, const struct attention *attention) {
    size_t most = 0;
    for (int64_t i = 0; i < attention->requests; i++) {
        size_t tokens = attention->read_ends[i + 1] - attention->read_ends[i];
        if (tokens > most) most = tokens;
    }
    if (grow_thread(kernel, kernel->variant->attend_floats(attention, most))) return NO_MEMORY;
    kernel->attention = attention;
    kernel->variant->remember(attention, 0, attention->rows, kernel->thread);
    run(kernel, attention_task, attention->requests * attention->groups);
    return OK;
}

static int project(struct kernel *kernel, const struct projections *all) {
    size_t most = 0, tasks = 0;
    for (int64_t p = 0; p < all->count; p++)
        if ((size_t)all->projection[p].columns > most) most = all->projection[p].columns;
    if (prepare(kernel, all->input.dtype, all->width, smaller(most, step_for(all->width))))
        return NO_MEMORY;
    struct input input = {kernel->input, kernel->input_stride, 0, kernel->input_parts,
                          kernel->packed_input};
    kernel->projections = all;
    for (int64_t p = 0; p < all->count; p++)
        tasks += steps(all->projection[p].columns, kernel->inner_step);
    for (size_t first = 0; first < (size_t)all->rows; first += BLOCK_ROWS) {
        kernel->first_row = first;
        kernel->rows = input.rows = smaller(all->rows - first, BLOCK_ROWS);
        for (size_t r = 0; r < kernel->rows; r++) {
            float *to = kernel->input + r * kernel->input_stride;
            kernel->variant->widen(to, all->input, (first + r) * all->width, all->width);
            memset(to + all->width, 0, (kernel->input_stride - all->width) * sizeof *to);
        }
        kernel->variant->pack(input, all->width, 0, padded(all->width));
        run(kernel, projection_task, tasks);
    }
    return OK;
}

#include "express.h"
#include "decoder.h"

/* One call at a time; the others wait for it. */
#define ONE_AT_A_TIME(name, type)                                                              \
    EXPORT int remoe_##name(struct kernel *kernel, type *call) {                               \
        pthread_mutex_lock(&kernel->call_lock);                                                \
        int status = name(kernel, call);                                                       \
        pthread_mutex_unlock(&kernel->call_lock);                                              \
        return status;                                                                         \
    }

ONE_AT_A_TIME(forward, const struct call)
ONE_AT_A_TIME(route, const struct routed)
ONE_AT_A_TIME(project, const struct projections)
ONE_AT_A_TIME(normalize, const struct norm)
ONE_AT_A_TIME(attend, const struct attention)
ONE_AT_A_TIME(choose, const struct router)
ONE_AT_A_TIME(decode, struct decoding)
ONE_AT_A_TIME(decode_here, struct decoding)

EXPORT int64_t remoe_kernel_abi(void) {
    return REMOE_KERNEL_ABI;
}

/* The name of the i-th variant that this machine runs, the fastest first; NULL after the last. */
EXPORT const char *remoe_variant(int64_t i) {
    for (const struct variant *const *variant = variants; *variant; variant++)
        if ((*variant)->supported() && i-- == 0) return (*variant)->name;
    return NULL;
}

EXPORT void remoe_close(struct kernel *kernel) {
    pthread_mutex_lock(&kernel->lock);
    atomic_store(&kernel->closing, 1);
    pthread_cond_broadcast(&kernel->work);
    pthread_mutex_unlock(&kernel->lock);
    for (size_t i = 0; i + 1 < kernel->threads; i++) pthread_join(kernel->helpers[i], NULL);
    pthread_cond_destroy(&kernel->work);
    pthread_cond_destroy(&kernel->finished);
    pthread_mutex_destroy(&kernel->lock);
    pthread_mutex_destroy(&kernel->call_lock);
    free(kernel->helpers);
    free(kernel->input);
    free(kernel->inner);
    free(kernel->thread);
    free(kernel->routes);
    free(kernel->packed_input);
    free(kernel->packed_inner);
    free(kernel);
}

/* A kernel that computes on the caller and `threads - 1` more, which look for work `spins` times
 * before they sleep; the best variant if `name` is NULL. NULL when the machine has no such variant or no room for a thread. */
EXPORT struct kernel *remoe_open(int64_t threads, int64_t spins, const char *name) {
    const struct variant *variant = NULL;
    for (size_t i = 0; !variant && variants[i]; i++)
        if (variants[i]->supported() && (!name || !strcmp(name, variants[i]->name)))
            variant = variants[i];
    struct kernel *kernel = variant ? calloc(1, sizeof *kernel) : NULL;
    if (!kernel) return NULL;
    kernel->variant = variant;
    kernel->threads = 1;
    kernel->spins = spins;
    pthread_mutex_init(&kernel->call_lock, NULL);
    pthread_mutex_init(&kernel->lock, NULL);
    pthread_cond_init(&kernel->work, NULL);
    pthread_cond_init(&kernel->finished, NULL);
    kernel->helpers = calloc(threads, sizeof *kernel->helpers);
    for (int64_t i = 1; i < threads; i++) {
        struct helper_argument *argument = malloc(sizeof *argument);
        if (argument) *argument = (struct helper_argument){kernel, i};
        if (!argument || !kernel->helpers ||
            pthread_create(&kernel->helpers[i - 1], NULL, help, argument)) {
            free(argument);
            remoe_close(kernel);
            return NULL;
        }
        kernel->threads++;
    }
    return kernel;
}
