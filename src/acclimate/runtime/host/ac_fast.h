/* What the fast kernels share: short vectors, and the division of work among threads. Private to the runtime.
 *
 * A fast kernel computes what its plain reference computes, but for the order of sums and for fused multiply-adds.
 * It depends on the shapes alone, never on the number of threads: each output is one thread's work.
 */
#ifndef AC_FAST_H
#define AC_FAST_H

#include "ac_math.h"
#include "ac_ops.h"

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

/* What a row with attributes low and high does to its result at the end; NaN stays what it is. */
typedef struct {
    float low, high;
    int on;
} bounds;

typedef int32_t vec_mask __attribute__((vector_size(LANES * sizeof(float))));
AC_INLINE vec choose(vec_mask m, vec a, vec b) { return (vec)((m & (vec_mask)a) | (~m & (vec_mask)b)); }
AC_INLINE vec clamp(vec v, const bounds *b) {
    if (!b->on) return v;
    const vec low = broadcast(b->low), high = broadcast(b->high);
    v = choose(v < low, low, v);
    return choose(v > high, high, v);
}
AC_INLINE bounds bounds_of(float low, float high) {
    return (bounds){low, high, low > -AC_INFINITY || high < AC_INFINITY};
}

/* Lanes of a, then of b, in the order given. */
#if defined(__clang__) || __GNUC__ >= 12
#define AC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t vec_order __attribute__((vector_size(LANES * sizeof(float))));
#define AC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_order){__VA_ARGS__})
#endif
#if defined(__AVX__)
#define AC_MIX_LOW(a, b) AC_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define AC_MIX_HIGH(a, b) AC_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define AC_PAIR_LOW(a, b) AC_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define AC_PAIR_HIGH(a, b) AC_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define AC_HALF_LOW(a, b) AC_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define AC_HALF_HIGH(a, b) AC_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define AC_MIX_LOW(a, b) AC_SHUFFLE(a, b, 0, 4, 1, 5)
#define AC_MIX_HIGH(a, b) AC_SHUFFLE(a, b, 2, 6, 3, 7)
#define AC_PAIR_LOW(a, b) AC_SHUFFLE(a, b, 0, 1, 4, 5)
#define AC_PAIR_HIGH(a, b) AC_SHUFFLE(a, b, 2, 3, 6, 7)
#endif

/* Swap rows and lanes of LANES vectors. */
AC_INLINE void transpose(vec v[LANES]) {
    vec t[LANES];
    AC_UNROLL for (int i = 0; i < LANES; i += 2) {
        t[i] = AC_MIX_LOW(v[i], v[i + 1]);
        t[i + 1] = AC_MIX_HIGH(v[i], v[i + 1]);
    }
    AC_UNROLL for (int i = 0; i < LANES; i += 4) {
        v[i] = AC_PAIR_LOW(t[i], t[i + 2]);
        v[i + 1] = AC_PAIR_HIGH(t[i], t[i + 2]);
        v[i + 2] = AC_PAIR_LOW(t[i + 1], t[i + 3]);
        v[i + 3] = AC_PAIR_HIGH(t[i + 1], t[i + 3]);
    }
#if defined(__AVX__)
    AC_UNROLL for (int i = 0; i < 4; i++) {
        t[i] = AC_HALF_LOW(v[i], v[i + 4]);
        t[i + 4] = AC_HALF_HIGH(v[i], v[i + 4]);
    }
    AC_UNROLL for (int i = 0; i < LANES; i++) v[i] = t[i];
#endif
}

typedef float four __attribute__((vector_size(16)));
typedef float four_anywhere __attribute__((vector_size(16), aligned(4), may_alias));

/* The sums of the lanes of four vectors. */
AC_INLINE four sums_of(vec a, vec b, vec c, vec d) {
    const vec ab = AC_MIX_LOW(a, b) + AC_MIX_HIGH(a, b), cd = AC_MIX_LOW(c, d) + AC_MIX_HIGH(c, d);
    const vec sum = AC_PAIR_LOW(ab, cd) + AC_PAIR_HIGH(ab, cd);
    four low;
    memcpy(&low, &sum, sizeof low);
#if defined(__AVX__)
    four high;
    memcpy(&high, (const char *)&sum + sizeof low, sizeof high);
    low += high;
#endif
    return low;
}

AC_INLINE float sum_of(vec v) { return sums_of(v, v, v, v)[0]; }

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

/* y[i, j] = bias[i * bias_row + j] (or 0) + sum over k of a[i * a_row + k * a_k] * b[k * b_row + j], at y + i * y_row + j;
 * with `turned`, b[j * b_row + k]. `few`: by dot products, whatever part of the rows a thread has. */
typedef struct {
    int m, n, k, turned, few;
    size_t a_row, a_k, b_row, y_row, bias_row;
    bounds clamp; /* of the result */
} product;

/* One that is not turned and at least LANES wide. With y as its own bias, it adds to what is there. */
void AC_FAST_KERNEL(multiply)(const product *p, const float *a, const float *b, const float *bias, float *y);

#endif
