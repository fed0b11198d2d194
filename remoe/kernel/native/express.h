/* A call of one row to a function of this machine without leaving the step, part of kernel.c.
 *
 * Nothing is parsed here: the caller has made the request, all but a few fields, and knows the reply
 * byte by byte, all but its numbers. Whatever comes otherwise is the caller's to understand. */
#ifndef REMOE_EXPRESS_H
#define REMOE_EXPRESS_H

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif
#define POLLING_MISSED 2           /* as idle_polling.c */
#define AWAKE_NS INT64_C(4000000) /* as kernel/idle_polling.py */
#define MESSAGEPACK_TRUE ((char)0xc3)
#define MESSAGEPACK_FALSE ((char)0xc2)
#define MESSAGEPACK_DOUBLE ((char)0xcb)

struct idle_polling; /* idle_polling.c */
void remoe_polling_for(struct idle_polling *polling, int64_t span_ns);
int remoe_polling_wait(struct idle_polling *polling, int descriptor, int64_t span_ns);

static int64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* MessagePack's and so the network's order. */
static void put_big_endian_16(char *to, int64_t value) {
    to[0] = (char)(value >> 8);
    to[1] = (char)value;
}

static double get_big_endian_double(const char *from) {
    uint64_t bits = 0;
    double value;
    for (size_t i = 0; i < sizeof bits; i++) bits = bits << 8 | (unsigned char)from[i];
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Whether the layer's call can leave: one row, for as many experts as there are requests for. */
static int can_post(const struct decoding *step) {
    const struct line *line = step->each[step->layer].line;
    return line && step->answers && line->descriptor >= 0 && !step->watched && step->elsewhere.rows == 1 &&
           step->elsewhere.routes <= line->requests;
}

static const struct request *request_of(const struct decoding *step) {
    return step->each[step->layer].line->request + step->elsewhere.routes - 1;
}

/* Whether all of it left at once. */
static int post(const struct decoding *step, int beside) {
    const struct layer *layer = step->each + step->layer;
    const struct request *request = request_of(step);
    const struct elsewhere *given = &step->elsewhere;
    char *to = request->bytes;
    put_big_endian_16(to + request->layer_at, layer->number);
    memcpy(to + request->hidden_at, given->hidden, step->width * (step->dtype == FLOAT32 ? 4 : 2));
    for (int64_t e = 0; e < given->experts; e++)
        put_big_endian_16(to + request->experts_at + 3 * e, given->expert[e]);
    memcpy(to + request->gate_at, given->gate_weight, given->routes * sizeof(float));
    to[request->beside_at] = beside ? MESSAGEPACK_TRUE : MESSAGEPACK_FALSE;
    int descriptor = (int)layer->line->descriptor;
    return send(descriptor, to, request->size, MSG_DONTWAIT | MSG_NOSIGNAL) == request->size;
}

/* What has come by `until_ns`: its length, 0 if the connection ended or broke, -1 for nothing. */
static int64_t receive(struct line *line, int64_t until_ns) {
    for (;;) {
        ssize_t size = recv((int)line->descriptor, line->reply, line->reply_room, MSG_DONTWAIT);
        if (size >= 0) return size;
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return 0;
        int64_t left_ns = until_ns - clock_ns();
        if (left_ns <= 0) return -1;
        if (line->polling && !line->missed) {
            int found = remoe_polling_wait(line->polling, (int)line->descriptor, left_ns);
            line->missed = found == POLLING_MISSED;
            if (found) continue;
        }
        struct pollfd wanted = {(int)line->descriptor, POLLIN, 0};
        left_ns = until_ns - clock_ns();
        if (left_ns > 0) poll(&wanted, 1, (int)(left_ns / 1000000) + 1);
    }
}

/* Whether it is the reply that was expected: its partial sums are then the step's, to be added. */
static int read_reply(struct decoding *step, struct answer *answer) {
    const struct line *line = step->each[step->layer].line;
    const char *partial = line->reply + line->reply_head_size;
    const char *busy = partial + step->width * sizeof(float), *ready = busy + 1 + sizeof(double);
    if (answer->received != ready + 1 + sizeof(double) - line->reply ||
        memcmp(line->reply, line->reply_head, line->reply_head_size) ||
        *busy != MESSAGEPACK_DOUBLE || *ready != MESSAGEPACK_DOUBLE)
        return 0;
    answer->busy_s = get_big_endian_double(busy + 1);
    answer->ready_for_s = get_big_endian_double(ready + 1);
    step->partial = (const float *)(const void *)partial;
    return 1;
}

static int decode_here(struct kernel *kernel, struct decoding *step);

/* Send the layer's call, compute what is here, and take the reply: whether the step can go on.
 * If not, `answer` says how far it came. */
static int call_express(struct kernel *kernel, struct decoding *step, int *status) {
    struct line *line = step->each[step->layer].line;
    struct answer *answer = step->answers + step->layer;
    int64_t began_ns = clock_ns();
    const struct routed *experts = &step->each[step->layer].experts;
    int beside = step->elsewhere.routes < experts->top_k;
    if (line->polling) remoe_polling_for(line->polling, AWAKE_NS);
    answer->routes = step->elsewhere.routes;
    answer->state = post(step, beside) ? POSTED : BROKEN;
    answer->received = 0;
    if (beside && (*status = decode_here(kernel, step)) != OK) return 0;
    if (answer->state == POSTED) {
        answer->received = receive(line, began_ns + line->patience_ns);
        if (!answer->received) answer->state = BROKEN;
        if (answer->received > 0 && read_reply(step, answer)) answer->state = ANSWERED;
    }
    answer->waited_s = (double)(clock_ns() - began_ns) * 1e-9;
    return answer->state == ANSWERED;
}

#endif
