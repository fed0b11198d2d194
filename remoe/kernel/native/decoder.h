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
                      const struct decoding *step, struct routed *experts) {
    struct router router = layer->router;
    router.rows = experts->rows = step->rows;
    router.index = step->index + step->layer * step->rows * router.top_k;
    router.gate = step->gate;
    experts->index = router.index;
    experts->gate = router.gate;
    return normalize_rows(kernel, layer->experts_norm, step->rows) ||
           project_rows(kernel, layer->logits, step->rows) || choose(kernel, &router);
}

static int all_here(const struct routed *experts) {
    for (size_t i = 0; i < (size_t)(experts->rows * experts->top_k); i++)
        if (!is_here(experts, i)) return 0;
    return 1;
}

static int decode(struct kernel *kernel, struct decoding *step) {
    const struct variant *variant = kernel->variant;
    size_t count = (size_t)(step->rows * step->width);
    for (; step->layer < step->layers; step->layer++) {
        const struct layer *layer = step->each + step->layer;
        const void *outputs = step->given;
        if (!outputs) {
            struct routed experts = layer->experts;
            if (attend_rows(kernel, layer, step)) return NO_MEMORY;
            variant->add(step->hidden, step->added, step->dtype, count);
            if (route_rows(kernel, layer, step, &experts)) return NO_MEMORY;
            if (!all_here(&experts)) return OK;
            memset(step->total, 0, count * sizeof *step->total);
            if (route(kernel, &experts)) return NO_MEMORY;
            variant->narrow(step->added, step->dtype, step->total, count);
            outputs = step->added;
        }
        variant->add(step->hidden, outputs, step->dtype, count);
        step->given = NULL;
    }
    return OK;
}

#endif
