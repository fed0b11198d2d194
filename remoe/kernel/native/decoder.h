/* A step of new tokens through a decoder's layers, part of kernel.c: no thread sleeps and nobody
 * is asked between two of its matrix products, unless an expert is elsewhere. */
#ifndef REMOE_DECODER_H
#define REMOE_DECODER_H

static int choose(struct kernel *kernel, const struct router *router) {
    if (grow_thread(kernel, router->experts)) return NO_MEMORY;
    kernel->variant->choose(router, kernel->thread);
    return OK;
}

/* A layer's calls are for one token: `rows` of a norm are then its heads. */
static int normalize_rows(struct kernel *kernel, struct norm norm, int64_t rows) {
    norm.rows *= rows;
    return norm.weight ? normalize(kernel, &norm) : OK;
}

static int project_rows(struct kernel *kernel, struct projections projections, int64_t rows) {
    projections.rows = rows;
    return project(kernel, &projections);
}

/* `added` = attention(norm(hidden)). */
static int attend_rows(struct kernel *kernel, const struct layer *layer,
                       const struct decoding *step) {
    struct attention attention = layer->attention;
    attention.rows = step->rows;
    attention.requests = step->requests;
    attention.rotated = step->rotated;
    attention.cosine = step->cosine;
    attention.sine = step->sine;
    attention.write = step->write;
    attention.row_ends = step->row_ends;
    attention.read_ends = step->read_ends;
    attention.read = step->read;
    return normalize_rows(kernel, layer->input_norm, step->rows) ||
           project_rows(kernel, layer->inputs, step->rows) ||
           normalize_rows(kernel, layer->query_norm, step->rows) ||
           normalize_rows(kernel, layer->key_norm, step->rows) || attend(kernel, &attention) ||
           project_rows(kernel, layer->output, step->rows);
}

/* Who is to compute what: the router's choices of norm(hidden). */
static int route_rows(struct kernel *kernel, const struct layer *layer,
                      const struct decoding *step) {
    struct router router = layer->router;
    router.rows = step->rows;
    router.index = step->index + step->layer * step->rows * router.top_k;
    router.gate = step->gate;
    return normalize_rows(kernel, layer->experts_norm, step->rows) ||
           project_rows(kernel, layer->logits, step->rows) || choose(kernel, &router);
}

static int all_here(const struct routed *experts) {
    for (size_t i = 0; i < (size_t)(experts->rows * experts->top_k); i++)
        if (!is_here(experts, i)) return 0;
    return 1;
}

/* Say what others are to compute. */
static int gather_elsewhere(struct kernel *kernel, const struct routed *experts,
                            struct decoding *step) {
    struct elsewhere *to = &step->elsewhere;
    size_t offset_bytes = (experts->experts + 2) * sizeof(int64_t);
    size_t bytes = offset_bytes + (size_t)experts->rows * sizeof(int32_t);
    size_t row_bytes = (size_t)step->width * (step->dtype == FLOAT32 ? 4 : 2);
    if (grow(&kernel->routes, &kernel->route_bytes, bytes, 1, 1)) return NO_MEMORY;
    int64_t *offsets = kernel->routes;
    int32_t *place = (int32_t *)((char *)kernel->routes + offset_bytes); /* of a token's row */
    gather(experts, 0, offsets, to->row_index, to->gate_weight);
    to->rows = to->experts = 0;
    to->routes = offsets[experts->experts];
    memset(place, -1, experts->rows * sizeof *place);
    for (int64_t i = 0; i < to->routes; i++) place[to->row_index[i]] = 0;
    for (int64_t token = 0; token < experts->rows; token++) {
        if (place[token] < 0) continue;
        memcpy((char *)to->hidden + to->rows * row_bytes,
               (const char *)step->normed + token * row_bytes, row_bytes);
        place[token] = (int32_t)to->rows;
        to->token[to->rows++] = token;
    }
    for (int64_t i = 0; i < to->routes; i++) to->row_index[i] = place[to->row_index[i]];
    for (int64_t e = 0; e < experts->experts; e++) {
        if (offsets[e] == offsets[e + 1]) continue;
        to->expert[to->experts] = e;
        to->offsets[to->experts++] = offsets[e];
    }
    to->offsets[to->experts] = to->routes;
    return OK;
}

/* A layer's experts for the rows of a step, as its router chose. */
static struct routed experts_of(const struct decoding *step) {
    struct routed experts = step->each[step->layer].experts;
    experts.rows = step->rows;
    experts.index = step->index + step->layer * step->rows * experts.top_k;
    experts.gate = step->gate;
    return experts;
}

static int decode_here(struct kernel *kernel, struct decoding *step) {
    struct routed experts = experts_of(step);
    experts.spared = step->elsewhere.routes ? step->spared : 0;
    return route(kernel, &experts);
}

static void add_partial(struct decoding *step) {
    const char *from = (const char *)step->partial;
    for (int64_t row = 0; row < step->elsewhere.rows; row++) {
        float *to = step->total + step->elsewhere.token[row] * step->width;
        for (int64_t i = 0; i < step->width; i++, from += sizeof(float)) {
            float value;
            memcpy(&value, from, sizeof value);
            to[i] += value;
        }
    }
}

/* Whether the step can go on past the layer, with what is computed elsewhere. */
static int ask_elsewhere(struct kernel *kernel, struct decoding *step, int *status) {
    struct routed experts = experts_of(step);
    step->stopped = 1;
    if ((*status = gather_elsewhere(kernel, &experts, step)) != OK) return 0;
    if (step->spared && step->elsewhere.routes) atomic_store(&kernel->resting, 1);
    return can_post(step) && call_express(kernel, step, status);
}

static int decode(struct kernel *kernel, struct decoding *step) {
    const struct variant *variant = kernel->variant;
    size_t count = (size_t)(step->rows * step->width);
    for (; step->layer < step->layers; step->layer++) {
        const struct layer *layer = step->each + step->layer;
        if (!step->stopped) {
            struct routed experts = experts_of(step);
            if (attend_rows(kernel, layer, step)) return NO_MEMORY;
            variant->add(step->hidden, step->added, step->dtype, count);
            if (route_rows(kernel, layer, step)) return NO_MEMORY;
            memset(step->total, 0, count * sizeof *step->total);
            if (step->watched || !all_here(&experts)) {
                int status = OK;
                if (!ask_elsewhere(kernel, step, &status)) return status;
            } else if (route(kernel, &experts)) {
                return NO_MEMORY;
            }
        }
        if (step->partial) add_partial(step);
        step->stopped = 0;
        step->partial = NULL;
        variant->narrow(step->added, step->dtype, step->total, count);
        variant->add(step->hidden, step->added, step->dtype, count);
    }
    return OK;
}

#endif
