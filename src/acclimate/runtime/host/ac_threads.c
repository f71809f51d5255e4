/* The pool. Whoever is free takes the next share of a job, the caller too: where a thread is late, because the machine
 * is busy, its share is done without it. Threads spin for a moment after a job, since the next op usually follows at
 * once, then sleep. */
#include "ac_threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

enum { SPINS = 4000, LINE = 64, SHARE_BITS = 16 };

typedef struct pool {
    ac_workers workers;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    uint64_t ticket; /* number of the job << SHARE_BITS | the next share that nobody has taken */
    int sleeping, finished, ending;
    ac_part part; /* these two stay as they are while a share that was taken is not finished */
    void *argument;
    int started;
    pthread_t threads[AC_MAX_THREADS];
} pool;

static uint64_t ticket_of(pool *p) { return __atomic_load_n(&p->ticket, __ATOMIC_SEQ_CST); }

static void pause_a_moment(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Do shares of a job until all are taken. */
static void take_shares(pool *p, uint64_t job) {
    const uint64_t end = job << SHARE_BITS | (uint64_t)p->workers.count;
    for (uint64_t t = ticket_of(p); t >> SHARE_BITS == job && t < end; t = ticket_of(p)) {
        if (!__atomic_compare_exchange_n(&p->ticket, &t, t + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        p->part(p->argument, (int)(t & ((1u << SHARE_BITS) - 1)), p->workers.count);
        __atomic_add_fetch(&p->finished, 1, __ATOMIC_RELEASE);
    }
}

static void *serve(void *argument) {
    pool *p = argument;
    for (uint64_t done = 0;;) {
        for (int i = 0; i < SPINS && ticket_of(p) >> SHARE_BITS == done; i++) pause_a_moment();
        if (ticket_of(p) >> SHARE_BITS == done) {
            pthread_mutex_lock(&p->lock);
            __atomic_add_fetch(&p->sleeping, 1, __ATOMIC_SEQ_CST);
            while (ticket_of(p) >> SHARE_BITS == done) pthread_cond_wait(&p->wake, &p->lock);
            __atomic_sub_fetch(&p->sleeping, 1, __ATOMIC_SEQ_CST);
            pthread_mutex_unlock(&p->lock);
        }
        done = ticket_of(p) >> SHARE_BITS;
        if (__atomic_load_n(&p->ending, __ATOMIC_SEQ_CST)) return NULL;
        take_shares(p, done);
    }
}

/* Give out the next job; returns its number. Who falls asleep at this moment looks at the ticket once more before. */
static uint64_t give_out(pool *p, uint64_t first_share) {
    const uint64_t job = (ticket_of(p) >> SHARE_BITS) + 1;
    __atomic_store_n(&p->ticket, job << SHARE_BITS | first_share, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&p->sleeping, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
    return job;
}

static void run(ac_workers *workers, ac_part part, void *argument) {
    pool *p = workers->pool;
    p->part = part;
    p->argument = argument;
    __atomic_store_n(&p->finished, 0, __ATOMIC_RELAXED);
    take_shares(p, give_out(p, 0));
    for (int i = 1; __atomic_load_n(&p->finished, __ATOMIC_ACQUIRE) < workers->count; i++) {
        pause_a_moment();
        if (i % SPINS == 0) sched_yield(); /* the other thread may wait for this very processor */
    }
}

void ac_workers_close(ac_workers *workers) {
    if (!workers) return;
    pool *p = workers->pool;
    __atomic_store_n(&p->ending, 1, __ATOMIC_SEQ_CST);
    give_out(p, (uint64_t)workers->count);
    for (int i = 0; i < p->started; i++) pthread_join(p->threads[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    free(p->workers.scratch);
    free(p);
}

ac_workers *ac_workers_open(int count) {
    pool *p = count >= 1 && count <= AC_MAX_THREADS ? calloc(1, sizeof *p) : NULL;
    if (!p) return NULL;
    p->workers.count = count;
    p->workers.pool = p;
    p->workers.run = count > 1 ? run : NULL;
    if (posix_memalign(&p->workers.scratch, LINE, (size_t)count * AC_SCRATCH_BYTES) != 0) {
        free(p);
        return NULL;
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    for (; p->started < count - 1; p->started++)
        if (pthread_create(&p->threads[p->started], NULL, serve, p) != 0) {
            ac_workers_close(&p->workers);
            return NULL;
        }
    return &p->workers;
}
