/* One more thread, which computes a call while its caller feeds another device. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "kernel.h"

#define EXPORT __attribute__((visibility("default")))

typedef int work(struct kernel *, const void *call);

struct aside {
    struct kernel *kernel;
    pthread_t thread;
    pthread_mutex_t lock; /* guards what follows; who spins may look at the atomic */
    pthread_cond_t changed;
    work *work; /* under way: what, on which call */
    const void *call;
    int status, closing;
    size_t spins;
    _Atomic int busy;
    _Atomic uint32_t *told; /* counts the calls that are done; not this thread's memory */
    uint32_t done;
};

static void await(struct aside *aside, int busy) { /* with the lock held, which it lets go */
    if (aside->busy == busy || aside->closing) return;
    pthread_mutex_unlock(&aside->lock);
    for (size_t i = 0; i < aside->spins && aside->busy != busy; i++) relax();
    pthread_mutex_lock(&aside->lock);
    while (aside->busy != busy && !aside->closing) pthread_cond_wait(&aside->changed, &aside->lock);
}

static void set_busy(struct aside *aside, int busy) { /* with the lock held */
    aside->busy = busy;
    pthread_cond_broadcast(&aside->changed);
}

static void *serve(void *argument) {
    struct aside *aside = argument;
    pthread_mutex_lock(&aside->lock);
    for (;;) {
        await(aside, 1);
        if (aside->closing) break;
        work *work = aside->work;
        const void *call = aside->call;
        pthread_mutex_unlock(&aside->lock);
        int status = work(aside->kernel, call);
        aside->done++;
        if (aside->told) atomic_store_explicit(aside->told, aside->done, memory_order_release);
        pthread_mutex_lock(&aside->lock);
        aside->status = status;
        set_busy(aside, 0);
    }
    pthread_mutex_unlock(&aside->lock);
    return NULL;
}

static int forward(struct kernel *kernel, const void *call) {
    return remoe_forward(kernel, call);
}

static int route(struct kernel *kernel, const void *call) {
    return remoe_route(kernel, call);
}

static void start(struct aside *aside, work *work, const void *call) {
    pthread_mutex_lock(&aside->lock);
    aside->work = work;
    aside->call = call;
    set_busy(aside, 1);
    pthread_mutex_unlock(&aside->lock);
}

/* From the next call on, write to `told` how many there have been, as each ends, and whether or not
 * it failed: a GPU may wait for that. Between two calls; NULL ends it. */
EXPORT void remoe_aside_tell(struct aside *aside, _Atomic uint32_t *told) {
    aside->told = told;
    aside->done = 0;
    if (told) atomic_store_explicit(told, 0, memory_order_release);
}

/* Begin a call, which stays as it is until remoe_aside_wait: one at a time. */
EXPORT void remoe_aside_start(struct aside *aside, const struct call *call) {
    start(aside, forward, call);
}

/* The same of rows as a router chose. */
EXPORT void remoe_aside_route(struct aside *aside, const struct routed *routed) {
    start(aside, route, routed);
}

/* Whether the call that was started is under way. */
EXPORT int remoe_aside_busy(struct aside *aside) {
    return aside->busy;
}

/* The status of the call that was started, once it is done. */
EXPORT int remoe_aside_wait(struct aside *aside) {
    pthread_mutex_lock(&aside->lock);
    await(aside, 0);
    int status = aside->status;
    pthread_mutex_unlock(&aside->lock);
    return status;
}

/* Between two calls. */
EXPORT void remoe_aside_close(struct aside *aside) {
    pthread_mutex_lock(&aside->lock);
    aside->closing = 1;
    pthread_cond_broadcast(&aside->changed);
    pthread_mutex_unlock(&aside->lock);
    pthread_join(aside->thread, NULL);
    pthread_cond_destroy(&aside->changed);
    pthread_mutex_destroy(&aside->lock);
    free(aside);
}

/* A thread for `kernel`, which must outlive it; looks for work `spins` times before it sleeps.
 * NULL when there is no room. */
EXPORT struct aside *remoe_aside_open(struct kernel *kernel, int64_t spins) {
    struct aside *aside = calloc(1, sizeof *aside);
    if (!aside) return NULL;
    aside->kernel = kernel;
    aside->spins = spins;
    pthread_mutex_init(&aside->lock, NULL);
    pthread_cond_init(&aside->changed, NULL);
    if (pthread_create(&aside->thread, NULL, serve, aside)) {
        pthread_cond_destroy(&aside->changed);
        pthread_mutex_destroy(&aside->lock);
        free(aside);
        return NULL;
    }
    return aside;
}
