/* The pool: its threads spin for a moment after each job, since the next op usually follows at once, then sleep. */
#include "ac_threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

enum { SPINS = 20000, LINE = 64 };

typedef struct pool pool;

typedef struct {
    pool *owner;
    pthread_t thread;
    int index;
} member;

struct pool {
    ac_workers workers;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    unsigned job;     /* number of the job that was given out last; written under the lock */
    int sleeping, left, ending;
    ac_part part;
    void *argument;
    int started;
    member members[AC_MAX_THREADS];
};

static void pause_a_moment(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void *serve(void *argument) {
    member *m = argument;
    pool *p = m->owner;
    unsigned done = 0;
    for (;;) {
        for (int i = 0; i < SPINS && __atomic_load_n(&p->job, __ATOMIC_ACQUIRE) == done; i++) pause_a_moment();
        if (__atomic_load_n(&p->job, __ATOMIC_ACQUIRE) == done) {
            pthread_mutex_lock(&p->lock);
            p->sleeping++;
            while (p->job == done) pthread_cond_wait(&p->wake, &p->lock);
            p->sleeping--;
            pthread_mutex_unlock(&p->lock);
        }
        done++;
        if (__atomic_load_n(&p->ending, __ATOMIC_ACQUIRE)) return NULL;
        p->part(p->argument, m->index, p->workers.count);
        __atomic_sub_fetch(&p->left, 1, __ATOMIC_RELEASE);
    }
}

static void give_out(pool *p) {
    pthread_mutex_lock(&p->lock);
    __atomic_store_n(&p->job, p->job + 1, __ATOMIC_RELEASE);
    if (p->sleeping) pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static void run(ac_workers *workers, ac_part part, void *argument) {
    pool *p = workers->pool;
    p->part = part;
    p->argument = argument;
    __atomic_store_n(&p->left, p->started, __ATOMIC_RELAXED);
    give_out(p);
    part(argument, 0, workers->count);
    for (int i = 1; __atomic_load_n(&p->left, __ATOMIC_ACQUIRE); i++) {
        pause_a_moment();
        if (i % SPINS == 0) sched_yield(); /* the other thread may wait for this very processor */
    }
}

void ac_workers_close(ac_workers *workers) {
    if (!workers) return;
    pool *p = workers->pool;
    __atomic_store_n(&p->ending, 1, __ATOMIC_RELEASE);
    give_out(p);
    for (int i = 0; i < p->started; i++) pthread_join(p->members[i].thread, NULL);
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
    for (int i = 1; i < count; i++) {
        p->members[i - 1] = (member){.owner = p, .index = i};
        if (pthread_create(&p->members[i - 1].thread, NULL, serve, &p->members[i - 1]) != 0) {
            ac_workers_close(&p->workers);
            return NULL;
        }
        p->started++;
    }
    return &p->workers;
}
