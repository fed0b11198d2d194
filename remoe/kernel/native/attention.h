/* Attention of new tokens over a paged cache, part of variant.c. Scores, softmax and sums are
 * float32; a row's result depends on its own request alone. */
#ifndef REMOE_ATTENTION_H
#define REMOE_ATTENTION_H

/* Heads that share keys are taken TILE_ROWS at a time; their outputs VALUE_VECTORS at a time. */
#define VALUE_VECTORS 4

/* x of one head, widened; its first `rotated` numbers turned by the angles of its position, which
 * pair each number of the first half with one of the second. */
static void rotate(float *to, const struct attention *a, const void *from, size_t row,
                   size_t head, size_t heads) {
    size_t width = a->width, half = a->rotated / 2;
    widen(to, (struct matrix){from, a->dtype}, (row * heads + head) * width, width);
    if (!half) return;
    float cosine[2 * half], sine[2 * half];
    widen(cosine, (struct matrix){a->cosine, a->dtype}, row * 2 * half, 2 * half);
    widen(sine, (struct matrix){a->sine, a->dtype}, row * 2 * half, 2 * half);
    for (size_t i = 0; i < half; i++) {
        float x = to[i], y = to[i + half];
        to[i] = x * cosine[i] - y * sine[i];
        to[i + half] = y * cosine[i + half] + x * sine[i + half];
    }
}

static void remember(const struct attention *a, size_t first, size_t last, float *scratch) {
    size_t item = bytes_of(a->dtype), token_bytes = a->groups * a->width * item;
    for (size_t row = first; row < last; row++) {
        char *keys = (char *)a->keys + (size_t)a->write[row] * token_bytes;
        for (size_t g = 0; g < (size_t)a->groups; g++) {
            rotate(scratch, a, a->key, row, g, a->groups);
            narrow(keys + g * a->width * item, a->dtype, scratch, a->width);
        }
        memcpy((char *)a->values + (size_t)a->write[row] * token_bytes,
               (const char *)a->value + row * token_bytes, token_bytes);
    }
}

/* How many of the places from `at` on lie one after another. */
static inline size_t run_length(const int64_t *places, size_t count) {
    size_t n = 1;
    while (n < count && places[n] == places[0] + (int64_t)n) n++;
    return n;
}

/* Scores become weights: e^(score - the largest), and returns one over their sum. */
static float softmax(float *scores, size_t count) {
    vec most = splat(-INFINITY), sum = {0};
    for (size_t i = count; i < padded(count); i++) scores[i] = -INFINITY;
    for (size_t i = 0; i < padded(count); i += LANES) {
        vec s = load_float(scores + i);
        most = choose((bits)(s > most), s, most);
    }
    float lanes[LANES], largest = -INFINITY, total = 0;
    store_float(lanes, most);
    for (size_t i = 0; i < LANES; i++)
        if (lanes[i] > largest) largest = lanes[i];
    for (size_t i = 0; i < padded(count); i += LANES) {
        vec e = exponential(load_float(scores + i) - splat(largest));
        store_float(scores + i, e);
        sum += e;
    }
    store_float(lanes, sum);
    for (size_t i = 0; i < LANES; i++) total += lanes[i];
    return 1.0f / total;
}

/* out[h] += sum over tokens of weight[h][token] * value[token], for some vectors of the width. */
ALWAYS_INLINE void mix(float *out, size_t out_stride, const float *weights, size_t weight_stride,
                       size_t heads, const char *values, size_t token_bytes, int64_t dtype,
                       size_t tokens, size_t vectors) {
    vec acc[TILE_ROWS][VALUE_VECTORS];
#pragma GCC unroll 4
    for (size_t h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; v++) acc[h][v] = load_float(out + h * out_stride + v * LANES);
    for (size_t t = 0; t < tokens; t++, values += token_bytes) {
        vec value[VALUE_VECTORS];
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; v++)
            value[v] = load(values + v * LANES * bytes_of(dtype), dtype);
#pragma GCC unroll 4
        for (size_t h = 0; h < heads; h++) {
            vec weight = splat(weights[h * weight_stride + t]);
#pragma GCC unroll 4
            for (size_t v = 0; v < vectors; v++) acc[h][v] = fused(weight, value[v], acc[h][v]);
        }
    }
#pragma GCC unroll 4
    for (size_t h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; v++) store_float(out + h * out_stride + v * LANES, acc[h][v]);
}

/* The same for what is left of a width that is no multiple of the vectors above. */
static void mix_rest(float *out, size_t out_stride, const float *weights, size_t weight_stride,
                     size_t heads, const char *values, size_t token_bytes, int64_t dtype,
                     size_t tokens, size_t count) {
    for (size_t t = 0; t < tokens; t++, values += token_bytes) {
        float value[LANES];
        store_float(value, load_partial(values, dtype, count));
        for (size_t h = 0; h < heads; h++)
            for (size_t i = 0; i < count; i++)
                out[h * out_stride + i] += weights[h * weight_stride + t] * value[i];
    }
}

#define MIX(heads, vectors, dtype)                                                             \
    mix(out + d, out_stride, weights, weight_stride, heads, values + d * bytes_of(dtype),      \
        token_bytes, dtype, tokens, vectors)
#define MIXES(dtype)                                                                           \
    for (; d + VALUE_VECTORS * LANES <= width; d += VALUE_VECTORS * LANES) switch (heads) {    \
            case 1: MIX(1, VALUE_VECTORS, dtype); break;                                       \
            case 2: MIX(2, VALUE_VECTORS, dtype); break;                                       \
            case 3: MIX(3, VALUE_VECTORS, dtype); break;                                       \
            default: MIX(TILE_ROWS, VALUE_VECTORS, dtype);                                     \
        }                                                                                      \
    for (; d + LANES <= width; d += LANES) switch (heads) {                                    \
            case 1: MIX(1, 1, dtype); break;                                                   \
            case 2: MIX(2, 1, dtype); break;                                                   \
            case 3: MIX(3, 1, dtype); break;                                                   \
            default: MIX(TILE_ROWS, 1, dtype);                                                 \
        }

static void mix_values(float *out, size_t out_stride, const float *weights, size_t weight_stride,
                       size_t heads, const char *values, size_t token_bytes, int64_t dtype,
                       size_t tokens, size_t width) {
    size_t d = 0;
    switch (dtype) {
        case FLOAT32: MIXES(FLOAT32); break;
        case BFLOAT16: MIXES(BFLOAT16); break;
        default: MIXES(FLOAT16);
    }
    if (d < width)
        mix_rest(out + d, out_stride, weights, weight_stride, heads, values + d * bytes_of(dtype),
                 token_bytes, dtype, tokens, width - d);
}

static size_t attend_floats(const struct attention *a, size_t most_keys) {
    return TILE_ROWS * (2 * padded(a->width) + padded(most_keys));
}

static void attend(const struct attention *a, size_t request, size_t group, float *scratch) {
    size_t item = bytes_of(a->dtype), width = a->width, sharing = a->heads / a->groups;
    size_t token_bytes = a->groups * width * item, head_stride = padded(width);
    size_t rows = a->row_ends[request + 1] - a->row_ends[request];
    size_t tokens = a->read_ends[request + 1] - a->read_ends[request];
    const int64_t *places = a->read + a->read_ends[request];
    const char *keys = (const char *)a->keys + group * width * item;
    const char *values = (const char *)a->values + group * width * item;
    float *query = scratch, *out = query + TILE_ROWS * head_stride;
    float *scores = out + TILE_ROWS * head_stride;

    memset(query, 0, TILE_ROWS * head_stride * sizeof *query); /* a tile reads whole vectors */
    for (size_t r = 0; r < rows; r++) {
        size_t row = a->row_ends[request] + r, seen = tokens - rows + r + 1;
        size_t score_stride = padded(seen);
        for (size_t first = 0; first < sharing; first += TILE_ROWS) {
            size_t heads = smaller(sharing - first, TILE_ROWS);
            for (size_t h = 0; h < heads; h++) {
                float *q = query + h * head_stride;
                rotate(q, a, a->query, row, group * sharing + first + h, a->heads);
                for (size_t i = 0; i < width; i++) q[i] *= a->scale;
            }
            for (size_t t = 0, n; t < seen; t += n) {
                n = run_length(places + t, seen - t);
                rows_by_columns(scores + t, score_stride, query, head_stride, heads,
                                keys + (size_t)places[t] * token_bytes, token_bytes, a->dtype,
                                width, n);
            }
            float factor[TILE_ROWS];
            for (size_t h = 0; h < heads; h++) factor[h] = softmax(scores + h * score_stride, seen);
            memset(out, 0, heads * head_stride * sizeof *out);
            for (size_t t = 0, n; t < seen; t += n) {
                n = run_length(places + t, seen - t);
                mix_values(out, head_stride, scores + t, score_stride, heads,
                           values + (size_t)places[t] * token_bytes, token_bytes, a->dtype, n,
                           width);
            }
            for (size_t h = 0; h < heads; h++) {
                float *o = out + h * head_stride;
                for (size_t i = 0; i < width; i++) o[i] *= factor[h];
                size_t head = group * sharing + first + h;
                narrow((char *)a->output + (row * a->heads + head) * width * item, a->dtype, o,
                       width);
            }
        }
    }
}

#endif
