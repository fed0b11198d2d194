/* Threads that keep processors from halting, and look for an answer, while it is waited for.
 * Without locks: whoever holds one at their priority may not get to let it go. */
#define _GNU_SOURCE /* SCHED_IDLE, syscall() */
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum end { OVER = 0, SEEN = 1, MISSED = 2 };

#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SECOND_NS INT64_C(1000000000)
#define NOBODY (-1)

struct idle_polling {
    int64_t threads;
    pthread_t *thread;        /* [threads] */
    _Atomic int64_t until_ns; /* how long to stay awake */
    _Atomic int sleepers, closing;
    _Atomic int calls;   /* to those that sleep: a futex */
    _Atomic int watched; /* what somebody waits to read from, or NOBODY: a futex */
};

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND_NS + now.tv_nsec;
}

static void sleep_on(_Atomic int *word, int value, const struct timespec *span) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, span, NULL, 0);
}

static void wake_all(_Atomic int *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static int is_readable(int descriptor) {
    struct pollfd wanted = {descriptor, POLLIN, 0};
    return poll(&wanted, 1, 0) != 0;
}

/* Tell who waits for something to read when it is there. */
static void look(struct idle_polling *polling) {
    int descriptor = atomic_load(&polling->watched);
    if (descriptor == NOBODY || !is_readable(descriptor)) return;
    if (atomic_compare_exchange_strong(&polling->watched, &descriptor, NOBODY))
        wake_all(&polling->watched);
}

static void *stay(void *argument) {
    struct idle_polling *polling = argument;
    while (!atomic_load(&polling->closing)) {
        int calls = atomic_load(&polling->calls);
        if (now_ns() < atomic_load(&polling->until_ns)) {
            look(polling);
            sched_yield(); /* to another process's thread of this kind */
            continue;
        }
        atomic_fetch_add(&polling->sleepers, 1); /* before the last look: who calls looks after */
        if (now_ns() >= atomic_load(&polling->until_ns) && !atomic_load(&polling->closing))
            sleep_on(&polling->calls, calls, NULL);
        atomic_fetch_sub(&polling->sleepers, 1);
    }
    return NULL;
}

static void call(struct idle_polling *polling) {
    atomic_fetch_add(&polling->calls, 1);
    wake_all(&polling->calls);
}

/* Stay awake for so long from now. */
EXPORT void remoe_polling_for(struct idle_polling *polling, int64_t span_ns) {
    atomic_store(&polling->until_ns, now_ns() + span_ns);
    if (atomic_load(&polling->sleepers)) call(polling);
}

/* How waiting for something to read ended: SEEN, OVER after at most so long or when the
 * threads no longer stay awake, or MISSED, if only then something was found, because they had no
 * processor. From one thread at a time. */
EXPORT int remoe_polling_wait(struct idle_polling *polling, int descriptor, int64_t span_ns) {
    int64_t until_ns = atomic_load(&polling->until_ns), end_ns = now_ns() + span_ns;
    if (until_ns < end_ns) end_ns = until_ns;
    atomic_store(&polling->watched, descriptor);
    while (atomic_load(&polling->watched) == descriptor) {
        int64_t left_ns = end_ns - now_ns();
        if (left_ns <= 0) break;
        struct timespec left = {left_ns / SECOND_NS, left_ns % SECOND_NS};
        sleep_on(&polling->watched, descriptor, &left);
    }
    if (atomic_exchange(&polling->watched, NOBODY) == NOBODY) return SEEN;
    return is_readable(descriptor) ? MISSED : OVER;
}

EXPORT void remoe_polling_close(struct idle_polling *polling) {
    atomic_store(&polling->closing, 1);
    call(polling);
    for (int64_t i = 0; i < polling->threads; i++) pthread_join(polling->thread[i], NULL);
    free(polling->thread);
    free(polling);
}

/* Threads of the lowest priority, one on each of the first `most` processors that this one may use:
 * who is woken on a processor that only they use gets it at once. NULL if they cannot be had. */
EXPORT struct idle_polling *remoe_polling_open(int64_t most) {
    cpu_set_t allowed;
    struct idle_polling *polling = calloc(1, sizeof *polling);
    if (!polling) return NULL;
    atomic_store(&polling->watched, NOBODY);
    polling->thread = calloc(most, sizeof *polling->thread);
    int status = !polling->thread || sched_getaffinity(0, sizeof allowed, &allowed);
    for (int i = 0; !status && i < CPU_SETSIZE && polling->threads < most; i++) {
        pthread_t *thread = &polling->thread[polling->threads];
        cpu_set_t own;
        if (!CPU_ISSET(i, &allowed)) continue;
        CPU_ZERO(&own);
        CPU_SET(i, &own);
        status = pthread_create(thread, NULL, stay, polling);
        if (status) break;
        polling->threads++;
        status = pthread_setschedparam(*thread, SCHED_IDLE, &(struct sched_param){0}) ||
                 pthread_setaffinity_np(*thread, sizeof own, &own);
    }
    if (!status) return polling;
    remoe_polling_close(polling);
    return NULL;
}

#else

EXPORT void remoe_polling_for(void *polling, int64_t span_ns) { (void)polling, (void)span_ns; }
EXPORT int remoe_polling_wait(void *polling, int descriptor, int64_t span_ns) {
    (void)polling, (void)descriptor, (void)span_ns;
    return OVER;
}
EXPORT void remoe_polling_close(void *polling) { (void)polling; }
EXPORT void *remoe_polling_open(int64_t most) {
    (void)most;
    return NULL;
}

#endif
