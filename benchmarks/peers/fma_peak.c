/* Prints the most float32 GFLOP/s that fused multiply-adds reach on `threads` threads (argument 1).
 * Each thread runs enough independent sums to hide the latency of the unit; compile with -O3 -march=native. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if defined(__AVX512F__)
#define WIDTH 64
#define SUMS 24
#elif defined(__AVX__)
#define WIDTH 32
#define SUMS 12
#else
#define WIDTH 16
#define SUMS 12
#endif
#define LOOPS 400000L /* some milliseconds, so that a try fits between others' turns on a busy machine */
#define TRIES 150
#define MOST 64 /* threads */

typedef float vec __attribute__((vector_size(WIDTH)));

static volatile float sink;
static pthread_barrier_t barrier;

static void spin(long loops) {
    vec sum[SUMS], a, b;
    for (int j = 0; j < WIDTH / 4; j++) a[j] = 0.9999f, b[j] = 1e-4f;
    for (int i = 0; i < SUMS; i++) sum[i] = b * (float)i;
    for (long k = 0; k < loops; k++) {
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; i++) sum[i] = sum[i] * a + b;
    }
    for (int i = 0; i < SUMS; i++) sink = sum[i][0];
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* times: where this thread writes when it began and ended each try. */
static void *work(void *times) {
    double *t = times;
    spin(10 * LOOPS);
    for (int i = 0; i < TRIES; i++) {
        pthread_barrier_wait(&barrier);
        t[2 * i] = now();
        spin(LOOPS);
        t[2 * i + 1] = now();
    }
    return NULL;
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    static double times[MOST][2 * TRIES];
    pthread_t id[MOST];
    double best = 1e30;
    if (threads < 1 || threads > MOST) return 2;
    pthread_barrier_init(&barrier, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++)
        if (pthread_create(&id[i], NULL, work, times[i])) return 1;
    for (int i = 0; i < threads; i++) pthread_join(id[i], NULL);
    for (int t = 0; t < TRIES; t++) { /* from the first thread's beginning to the last one's end */
        double start = times[0][2 * t], end = times[0][2 * t + 1];
        for (int i = 1; i < threads; i++) {
            if (times[i][2 * t] < start) start = times[i][2 * t];
            if (times[i][2 * t + 1] > end) end = times[i][2 * t + 1];
        }
        if (end - start < best) best = end - start;
    }
    printf("%.2f\n", 2.0 * threads * LOOPS * SUMS * (WIDTH / 4) / best / 1e9);
    return 0;
}
