/* The first half of an expert: inner = act(gate(x)) * up(x), packed for the projection down. */
#ifndef REMOE_GATED_H
#define REMOE_GATED_H

static void add_bias(float *to, const float *bias, size_t first, size_t count) {
    if (!bias) return;
    for (size_t i = 0; i < count; i++) to[i] += bias[first + i];
}

#if defined(__AMX_BF16__)
/* Sums [16 columns][rows of the group] of `inner`, cut and packed without turning them: two columns
 * that lie one after another are what a pair is made of. */
static void amx_pack_sums(struct group group, size_t column, const float *sums) {
    size_t pair_bytes = group.rows * 4, part_bytes = 16 * pair_bytes;
    char *to = (char *)group.packed + column / STEP * PARTS * part_bytes +
               column % STEP / 2 * pair_bytes;
    for (size_t pair = 0; pair < 8; pair++, to += pair_bytes) {
        vec even = load_float(sums + 2 * pair * group.rows);
        vec odd = load_float(sums + (2 * pair + 1) * group.rows);
        int finite = are_finite(even) && are_finite(odd); /* nearly always, and faster */
        for (size_t p = 0; p < PARTS; p++) {
            bits low = finite ? cut_finite(&even) : cut(&even);
            bits high = finite ? cut_finite(&odd) : cut(&odd);
            put(to + p * part_bytes, (vec)(low >> 16 | high), group.rows);
        }
    }
}

/* Gate and up of the same 16 columns are computed together: the sums stay in tiles' order, with the
 * rows side by side, from the one product to the packing for the next. */
static void amx_gate(struct input inner, struct input input, const struct expert *expert,
                     const struct call *call, size_t first, size_t last, const struct ahead *ahead,
                     char *scratch) {
    size_t width = call->hidden, row_bytes = padded(width) * 2;
    struct sweep sweep = {input, width, {0, 0}};
    float sums[4][256] __attribute__((aligned(64))) = {{0}};
    const struct matrix weights[2] = {expert->gate, expert->up};
    const float *bias[2] = {expert->gate_bias, expert->up_bias};
    for (size_t j = first; j < padded(last); j += 16) {
        size_t columns = j < last ? smaller(last - j, 16) : 0;
        struct strip strip = {{0}, row_bytes}, next = {{0}, row_bytes};
        for (size_t half = 0; half < 2; half++) {
            const char *at = (const char *)weights[half].values + j * width * 2;
            strip.half[half] = amx_half(at, columns, width, scratch + half * 16 * row_bytes);
            next.half[half] = width % STEP    ? NULL
                              : j + 16 < last ? at + 16 * row_bytes
                                              : ahead->weights[half];
        }
        for (size_t r = 0; r < input.rows; r += 2 * GROUP_ROWS) {
            amx_sums(sums, &sweep, r, strip, next);
            for (size_t row = r, t = 0; t < 4 && row < input.rows; t += 2, row += GROUP_ROWS) {
                struct group group = amx_group(inner, row, call->inner);
                for (size_t half = 0; half < 2; half++)
                    for (size_t i = 0; i < columns * group.rows && bias[half]; i++)
                        sums[t + half][i] += bias[half][j + i / group.rows];
                activate(sums[t], sums[t + 1], 16 * group.rows, call);
                amx_pack_sums(group, j, sums[t]);
            }
        }
    }
    _tile_release();
}
#endif

static void gate(struct input inner, struct input input, const struct expert *expert,
                 const struct call *call, size_t first, size_t last, const struct ahead *ahead,
                 float *up, float *scratch) {
    size_t columns = last - first, beyond = padded(columns) - columns;
#if defined(__AMX_BF16__)
    if (expert->gate.dtype == BFLOAT16 && expert->up.dtype == BFLOAT16 &&
        expert->down.dtype == BFLOAT16) {
        amx_gate(inner, input, expert, call, first, last, ahead, (char *)scratch);
        return;
    }
#else
    (void)ahead;
#endif
    float *row = (float *)inner.x + first;
    project(row, inner.stride, input, expert->gate, call->hidden, first, last, NULL, scratch);
    project(up, padded(columns), input, expert->up, call->hidden, first, last, NULL, scratch);
    for (size_t r = 0; r < input.rows; r++, row += inner.stride, up += padded(columns)) {
        add_bias(row, expert->gate_bias, first, columns);
        add_bias(up, expert->up_bias, first, columns);
        memset(up + columns, 0, beyond * sizeof *up);
        activate(row, up, padded(columns), call);
        memset(row + columns, 0, beyond * sizeof *row);
    }
    pack(inner, call->inner, first, padded(columns));
}

#endif
