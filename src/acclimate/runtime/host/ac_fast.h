/* What the fast kernels share: short vectors, and the division of work among threads. Private to the runtime.
 *
 * A fast kernel computes what its plain reference computes, but for the order of sums and for fused multiply-adds.
 * It depends on the shapes alone, never on the number of threads: each output is one thread's work.
 */
#ifndef AC_FAST_H
#define AC_FAST_H

#include "ac_ops.h"

#include "ac_math.h"

#include <string.h>

/* Eight floats on x86-64 with AVX, four elsewhere. With AVX-512 it is the 32 registers that pay, not their width:
 * Zen 4 does one 512-bit or two 256-bit multiply-adds a cycle. */
#if defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

/* Rows and vectors of a tile that stays in registers, with one to spare for what it is multiplied by. */
#if defined(__AVX512VL__) || defined(__ARM_NEON)
#define AC_MANY_REGISTERS 1 /* 32, not 16 */
enum { TILE_ROWS = 6, TILE_VECS = 4 };
#else
enum { TILE_ROWS = 6, TILE_VECS = 2 };
#endif

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef float vec_anywhere __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

#define AC_UNROLL _Pragma("GCC unroll 16")

AC_INLINE vec load(const float *p) { return *(const vec_anywhere *)p; }
AC_INLINE void store(float *p, vec v) { *(vec_anywhere *)p = v; }
AC_INLINE vec broadcast(float x) { return x - (vec){0}; }
AC_INLINE int smaller(int a, int b) { return a < b ? a : b; }
AC_INLINE int larger(int a, int b) { return a > b ? a : b; }

/* The sum of a vector's lanes. */
AC_INLINE float sum_of(vec v) {
    typedef float four __attribute__((vector_size(16)));
    four low;
    memcpy(&low, &v, sizeof low);
    if (LANES == 8) {
        four high;
        memcpy(&high, (const char *)&v + sizeof low, sizeof high);
        low += high;
    }
    return (low[0] + low[2]) + (low[1] + low[3]);
}

/* Part `index` of `count` even parts of [0, size): from *begin to *end. */
AC_INLINE void part_of(int size, int index, int count, int *begin, int *end) {
    *begin = (int)((int64_t)size * index / count);
    *end = (int)((int64_t)size * (index + 1) / count);
}

enum { SHARED_WORK = 200000 }; /* multiply-adds below which waking a thread costs more than it saves */

/* Run part(argument, i, count) for i in 0..count-1, side by side; count is 1 where `work` is small. */
AC_INLINE void ac_share(ac_workers *workers, double work, ac_part part, void *argument) {
    if (workers->run && workers->count > 1 && work > SHARED_WORK)
        workers->run(workers, part, argument);
    else
        part(argument, 0, 1);
}

#endif
