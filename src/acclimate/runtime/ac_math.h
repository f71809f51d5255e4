/* What the kernels share: elementary functions, the random generator, and sums in a fixed order. No libm.
 *
 * Every function here gives the same bits on every processor and compiler that has IEEE 754 floats, as long as
 * products and sums are not contracted (-ffp-contract=off) and nothing is reordered (no -ffast-math). Only the
 * sign and payload of a NaN are the machine's. The elementary functions have no branches and no tables, so that
 * a compiler can vectorise a loop around them; their errors were measured against double precision.
 */
#ifndef AC_MATH_H
#define AC_MATH_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define AC_INLINE static inline __attribute__((always_inline))
#else
#define AC_INLINE static inline
#endif

/* Before a loop whose iterations do not depend on each other: an output is an input itself, or apart from it. */
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed"
#define AC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define AC_INDEPENDENT _Pragma("GCC ivdep")
#else
#define AC_INDEPENDENT
#endif

/* ---- bits ---- */

typedef union {
    float value;
    uint32_t bits;
} ac_punned;

AC_INLINE uint32_t ac_bits(float x) {
    ac_punned p;
    p.value = x;
    return p.bits;
}

AC_INLINE float ac_float(uint32_t bits) {
    ac_punned p;
    p.bits = bits;
    return p.value;
}

#define AC_INFINITY ac_float(0x7F800000u)
#define AC_NAN ac_float(0x7FC00000u)

AC_INLINE float ac_absf(float x) { return ac_float(ac_bits(x) & 0x7FFFFFFFu); }

/* |x| with the sign of y */
AC_INLINE float ac_copysignf(float x, float y) {
    return ac_float((ac_bits(x) & 0x7FFFFFFFu) | (ac_bits(y) & 0x80000000u));
}

/* A well-mixed 32-bit hash of a counter ("lowbias32", C. Wellons); hash_u32 of ops/random.py. */
AC_INLINE uint32_t ac_hash_u32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
}

/* ---- clamping ---- */

/* NaN compares false: it must come out of the branch that returns v. */
AC_INLINE float ac_at_least(float low, float v) { return v < low ? low : v; }
AC_INLINE float ac_at_most(float high, float v) { return v > high ? high : v; }
AC_INLINE int ac_between(float low, float high, float v) { return (v > low) & (v < high); }

/* y = min(max(y, low), high), n elements */
static inline void ac_clamp(float *y, float low, float high, size_t n) {
    if (low == -AC_INFINITY && high == AC_INFINITY)
        return;
    AC_INDEPENDENT
    for (size_t i = 0; i < n; i++)
        y[i] = ac_at_most(high, ac_at_least(low, y[i]));
}

/* Bit i says whether y[i] is strictly between; n elements. Clamping before does not change it. */
static inline void ac_pack_between(const float *y, uint32_t *bits, float low, float high,
                                   size_t n) {
    for (size_t i = 0; i < n; i += 32) {
        const uint32_t count = n - i < 32 ? (uint32_t)(n - i) : 32;
        uint32_t word = 0;
        for (uint32_t l = 0; l < count; l++)
            word |= (uint32_t)ac_between(low, high, y[i + l]) << l;
        bits[i / 32] = word;
    }
}

/* ---- elementary functions ---- */

/* x = n ln 2 + r with |r| <= ln 2 / 2: returns exp(r) - 1 and sets n (as two's complement).
 * For |x| < 2^21; adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits. */
AC_INLINE float ac_exp_reduced(float x, uint32_t *n) {
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float k = shifted - 12582912.0f;
    const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;
    float p = 0.00138189388f;
    p = p * r + 0.00836870354f;
    p = p * r + 0.0416682884f;
    p = p * r + 0.166665211f;
    p = p * r + 0.49999994f;
    *n = ac_bits(shifted) - 0x4B400000u;
    return r + r * r * p;
}

/* exp(x); 0 below -104, infinity above 88.73. Scaled in two steps, so that subnormal results round once. */
AC_INLINE float ac_expf(float x) {
    uint32_t n;
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    const float y = 1.0f + ac_exp_reduced(x, &n);
    const uint32_t u = n + 256u, half = u >> 1;
    return y * ac_float((half - 1u) << 23) * ac_float((u - half - 1u) << 23);
}

/* exp(x) - 1 for x <= 88, accurate near 0 too */
AC_INLINE float ac_expm1f(float x) {
    uint32_t n;
    x = x > 88.0f ? 88.0f : x;
    x = x < -20.0f ? -20.0f : x;
    const float p = ac_exp_reduced(x, &n);
    const float scale = ac_float((n + 127u) << 23);
    return p * scale + (scale - 1.0f);
}

/* Natural logarithm: -infinity of 0, NaN of negative numbers. x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2). */
AC_INLINE float ac_logf(float x) {
    const int subnormal = x < 1.17549435e-38f;
    const float scaled = x * 8388608.0f;
    const uint32_t u = ac_bits(subnormal ? scaled : x) + (0x3F800000u - 0x3F3504F3u);
    const float k = (float)((int32_t)(u >> 23) - (subnormal ? 150 : 127));
    const float f = ac_float((u & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    float p = -0.0763639957f;
    p = p * f + 0.127621993f;
    p = p * f - 0.131596133f;
    p = p * f + 0.142015815f;
    p = p * f - 0.166234091f;
    p = p * f + 0.200012416f;
    p = p * f - 0.250008196f;
    p = p * f + 0.333333313f;
    const float square = f * f;
    const float y = (f + (square * f * p - 0.5f * square + k * 1.42860677e-6f)) + k * 0.693145752f;
    const float other = x == 0.0f ? -AC_INFINITY : AC_NAN;
    const float positive = x < AC_INFINITY ? y : x;
    return x > 0.0f ? positive : other;
}

/* log(1 + x) for 0 <= x: the logarithm of the rounded sum, corrected by what the rounding lost */
AC_INLINE float ac_log1pf(float x) {
    const float sum = 1.0f + x;
    return ac_logf(sum) + (x - (sum - 1.0f)) / sum;
}

/* x to the power p: the logarithm's error grows with |p log x|. NaN for x < 0 unless p is a whole number. */
AC_INLINE float ac_powf(float x, float p) {
    const float y = ac_expf(p * ac_logf(ac_absf(x)));
    const int exact = ac_absf(p) < 8388608.0f; /* from there on every p is whole and even enough */
    const int32_t n = exact ? (int32_t)p : 0;
    const int whole = !exact | ((float)n == p);
    const float negative = whole ? (n & 1 ? -y : y) : AC_NAN;
    return p == 0.0f ? 1.0f : x < 0.0f ? negative : y;
}

/* sin(x + quarters pi / 2). x = k pi / 2 + r in double, |r| <= pi / 4; exact to float where float still has a phase. */
AC_INLINE float ac_sinf(float x, uint32_t quarters) {
    union {
        double value;
        uint64_t bits;
    } shifted;
    shifted.value = (double)x * 0.63661977236758134 + 6755399441055744.0; /* 1.5 * 2^52 rounds */
    const double k = shifted.value - 6755399441055744.0;
    const float r = (float)((double)x - k * 1.5707963267948966), s = r * r;
    const uint32_t turn = (uint32_t)shifted.bits + quarters;
    float p = -1.9515295891e-4f;
    p = p * s + 8.3321608736e-3f;
    p = p * s - 1.6666654611e-1f;
    float q = 2.443315711809948e-5f;
    q = q * s - 1.388731625493765e-3f;
    q = q * s + 4.166664568298827e-2f;
    const float y = turn & 1u ? 1.0f - 0.5f * s + s * s * q : r + r * s * p;
    const float bounded = ac_absf(y) > 1.0f ? ac_copysignf(1.0f, y) : y;
    return turn & 2u ? -bounded : bounded;
}

/* tanh |x| = e / (e + 2), e = exp(2 |x|) - 1; 1 above 10 */
AC_INLINE float ac_tanhf(float x) {
    const float a = ac_absf(x);
    const float e = ac_expm1f(2.0f * (a > 10.0f ? 10.0f : a));
    return ac_copysignf(e / (e + 2.0f), x);
}

/* Error function: x + x p(x^2) below 0.9375, 1 - exp(-|x| q(|x|)) above, 1 above 4. */
AC_INLINE float ac_erff(float x) {
    const float a = ac_absf(x), t = a > 4.0f ? 4.0f : a, s = t * t;
    float p = -0.000594573445f;
    p = p * s + 0.00498511642f;
    p = p * s - 0.0267618559f;
    p = p * s + 0.112817146f;
    p = p * s - 0.376124889f;
    p = p * s + 0.128379151f;
    float q = -0.000213374835f;
    q = q * t + 0.0032099071f;
    q = q * t - 0.0228737034f;
    q = q * t + 0.105236351f;
    q = q * t + 0.635737777f;
    q = q * t + 1.12850857f;
    const float small = t + t * p;
    const float large = 1.0f - ac_expf(-t * q);
    return ac_copysignf(a < 0.9375f ? small : large, x);
}

AC_INLINE float ac_sigmoidf(float x) { return 1.0f / (1.0f + ac_expf(-x)); }

/* log(1 + exp(x)) */
AC_INLINE float ac_softplusf(float x) {
    const float positive = x < 0.0f ? 0.0f : x;
    return positive + ac_log1pf(ac_expf(-ac_absf(x)));
}

/* Square root, correctly rounded: bit by bit, on integers. */
static inline float ac_sqrtf_soft(float x) {
    if (!(x > 0.0f) || x == AC_INFINITY)
        return x < 0.0f ? AC_NAN : x;
    const int subnormal = x < 1.17549435e-38f;
    const uint32_t u = ac_bits(subnormal ? x * 16777216.0f : x);
    const int32_t e =
        (int32_t)(u >> 23) - (subnormal ? 151 : 127) + 256; /* exponent + 256: not negative */
    uint32_t rest = ((u & 0x007FFFFFu) | 0x00800000u) << (1 + (e & 1));
    uint32_t root = 0, sum = 0;
    for (uint32_t bit = 0x01000000u; bit; bit >>= 1) {
        if (sum + bit <= rest) {
            rest -= sum + bit;
            sum += 2 * bit;
            root += bit;
        }
        rest <<= 1;
    }
    root += rest ? root & 1u : 0u; /* a last bit more than fits, to round by; a tie cannot be */
    return ac_float((root >> 1) + 0x3F000000u + ((uint32_t)(e / 2 - 128) << 23));
}

/* The processor's own instruction is correctly rounded too. With -fno-math-errno the compiler uses nothing else. */
#if defined(__NO_MATH_ERRNO__) && (defined(__SSE2__) || defined(__aarch64__) ||                    \
                                   defined(__riscv_flen) || (defined(__ARM_FP) && (__ARM_FP & 4)))
#define ac_sqrtf(x) __builtin_sqrtf(x)
#else
#define ac_sqrtf(x) ac_sqrtf_soft(x)
#endif

/* ---- vectors ---- */

/* AC_WIDTH floats in one register, with + - * element by element: a compiler extension where the processor has
 * such registers, else a plain float. The width never changes a result: it only says how many of the lanes or
 * columns below, which are independent of each other, go through one instruction. AC_SCALAR: there are no vectors at
 * all (define it to have such a processor's code on another), so registers are filled four by four, see `ac_square`. */
#if defined(__GNUC__) && defined(__AVX__) && !defined(AC_SCALAR)
#define AC_WIDTH 8
#elif defined(__GNUC__) && (defined(__SSE2__) || defined(__aarch64__)) && !defined(AC_SCALAR)
#define AC_WIDTH 4
#else
#define AC_WIDTH 1
#if !defined(AC_SCALAR) && !defined(__ARM_NEON) && !defined(__ARM_FEATURE_MVE)
#define AC_SCALAR 1
#endif
#endif

#if AC_WIDTH > 1
typedef int32_t ac_vec_of_int __attribute__((vector_size(4 * AC_WIDTH)));
typedef float ac_vec __attribute__((vector_size(4 * AC_WIDTH)));
typedef float ac_vec_in_memory __attribute__((vector_size(4 * AC_WIDTH), aligned(4), may_alias));
#else
typedef float ac_vec;
typedef float ac_vec_in_memory;
#endif

AC_INLINE ac_vec ac_vec_load(const float *p) { return *(const ac_vec_in_memory *)(const void *)p; }
AC_INLINE void ac_vec_store(float *p, ac_vec v) { *(ac_vec_in_memory *)(void *)p = v; }

/* 1 in each lane whose bit is set, lane 0 the lowest, 0 elsewhere */
AC_INLINE ac_vec ac_vec_of_bits(uint32_t bits) {
#if AC_WIDTH > 1
#if AC_WIDTH == 8
    const ac_vec_of_int lane = {1, 2, 4, 8, 16, 32, 64, 128};
#else
    const ac_vec_of_int lane = {1, 2, 4, 8};
#endif
    const ac_vec_of_int set = ((lane & (int32_t)bits) != 0) & 0x3F800000; /* 1.0f */
    return (ac_vec)set;
#else
    return bits & 1u ? 1.0f : 0.0f;
#endif
}

/* ---- four by four: what keeps a processor without vectors, but with 32 registers, from loading and storing ---- */

#ifdef AC_SCALAR
typedef struct {
    float a, b, c, d;
} ac_four;

typedef struct {
    ac_four r0, r1, r2, r3;
} ac_square;

/* Where four rows begin. */
typedef struct {
    const float *r0, *r1, *r2, *r3;
} ac_rows;

#define AC_FOUR_ZERO {0.0f, 0.0f, 0.0f, 0.0f}
#define AC_SQUARE_ZERO {AC_FOUR_ZERO, AC_FOUR_ZERO, AC_FOUR_ZERO, AC_FOUR_ZERO}

AC_INLINE ac_four ac_four_load(const float *p) {
    const ac_four v = {p[0], p[1], p[2], p[3]};
    return v;
}

AC_INLINE void ac_four_store(float *p, ac_four v) {
    p[0] = v.a;
    p[1] = v.b;
    p[2] = v.c;
    p[3] = v.d;
}

/* s += w x */
AC_INLINE void ac_four_add(ac_four *s, float w, ac_four x) {
    s->a += w * x.a;
    s->b += w * x.b;
    s->c += w * x.c;
    s->d += w * x.d;
}

/* s[r] += w[r] x */
AC_INLINE void ac_square_add(ac_square *s, float w0, float w1, float w2, float w3, ac_four x) {
    ac_four_add(&s->r0, w0, x);
    ac_four_add(&s->r1, w1, x);
    ac_four_add(&s->r2, w2, x);
    ac_four_add(&s->r3, w3, x);
}

/* Four rows from `first` on, `step` floats apart; from the last of `count` on, that one again. */
AC_INLINE ac_rows ac_rows_of(const float *first, size_t step, size_t count) {
    ac_rows w;
    w.r0 = first;
    w.r1 = count > 1 ? w.r0 + step : w.r0;
    w.r2 = count > 2 ? w.r1 + step : w.r1;
    w.r3 = count > 3 ? w.r2 + step : w.r2;
    return w;
}

AC_INLINE void ac_rows_move(ac_rows *w, size_t by) {
    w->r0 += by;
    w->r1 += by;
    w->r2 += by;
    w->r3 += by;
}
#endif

/* ---- sums ---- */

/* A sum of n terms: AC_SUM_LANES sums side by side, element i in lane i % AC_SUM_LANES, folded by a fixed tree after each
 * AC_SUM_BLOCK elements; the blocks add up in double. So the error does not grow with n as a running sum's does. */
#define AC_SUM_LANES 8
#define AC_SUM_BLOCK 256
#define AC_SUM_CHUNK 64 /* terms that are no + - * are first written to a buffer of so many */

AC_INLINE float ac_fold(const float *lane) {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* Defines name(a, b, s, n, stride): the sum over i < n of `term`, + - * of A = a[i * stride], B = b[i * stride]
 * and s. Where the term has no B, pass a twice. */
#define AC_DEFINE_SUM(name, term)                                                                  \
    static inline double name(const float *a, const float *b, float s, size_t n, size_t stride) {  \
        double total = 0;                                                                          \
        (void)s;                                                                                   \
        for (size_t i = 0; i < n;) {                                                               \
            const size_t end = n - i < AC_SUM_BLOCK ? n : i + AC_SUM_BLOCK;                        \
            float lane[AC_SUM_LANES] = {0};                                                        \
            if (stride == 1 && i + AC_SUM_LANES <= end) {                                          \
                ac_vec sum[AC_SUM_LANES / AC_WIDTH] = {0};                                         \
                for (; i + AC_SUM_LANES <= end; i += AC_SUM_LANES)                                 \
                    for (size_t v = 0; v < AC_SUM_LANES / AC_WIDTH; v++) {                         \
                        const ac_vec A = ac_vec_load(a + i + v * AC_WIDTH);                        \
                        const ac_vec B = ac_vec_load(b + i + v * AC_WIDTH);                        \
                        (void)B;                                                                   \
                        sum[v] += (term);                                                          \
                    }                                                                              \
                for (size_t v = 0; v < AC_SUM_LANES / AC_WIDTH; v++)                               \
                    ac_vec_store(lane + v * AC_WIDTH, sum[v]);                                     \
            }                                                                                      \
            for (size_t l = 0; i < end; i++, l = (l + 1) % AC_SUM_LANES) {                         \
                const float A = a[i * stride], B = b[i * stride];                                  \
                (void)B;                                                                           \
                lane[l] += (term);                                                                 \
            }                                                                                      \
            total += (double)ac_fold(lane);                                                        \
        }                                                                                          \
        return total;                                                                              \
    }

AC_DEFINE_SUM(ac_sum, A)
AC_DEFINE_SUM(ac_sum_centred, (A - s))
AC_DEFINE_SUM(ac_sum_dot, (A * B))
AC_DEFINE_SUM(ac_sum_squares, ((A - s) * (A - s)))
AC_DEFINE_SUM(ac_sum_distance, ((A - B) * (A - B)))
AC_DEFINE_SUM(ac_sum_dot_centred, (A * (B - s)))

/* Columns: adds to total[l], l < width <= AC_SUM_LANES, the sum over r < rows of a[r * stride + l]. Rows are added one
 * after another in float, and to the total in double after each 32. */
static inline void ac_sum_columns(const float *a, size_t rows, size_t stride, size_t width,
                                  double *total) {
    for (size_t r = 0; r < rows;) {
        const size_t end = rows - r < 32 ? rows : r + 32;
        float sum[AC_SUM_LANES] = {0};
        if (width == AC_SUM_LANES) {
            ac_vec acc[AC_SUM_LANES / AC_WIDTH] = {0};
            for (; r < end; r++)
                for (size_t v = 0; v < AC_SUM_LANES / AC_WIDTH; v++)
                    acc[v] += ac_vec_load(a + r * stride + v * AC_WIDTH);
            for (size_t v = 0; v < AC_SUM_LANES / AC_WIDTH; v++)
                ac_vec_store(sum + v * AC_WIDTH, acc[v]);
        }
        for (; r < end; r++)
            for (size_t l = 0; l < width; l++)
                sum[l] += a[r * stride + l];
        for (size_t l = 0; l < width; l++)
            total[l] += (double)sum[l];
    }
}

/* The largest of n elements; a NaN never is. */
static inline float ac_max(const float *x, size_t n) {
    float lane[AC_SUM_LANES];
    for (size_t l = 0; l < AC_SUM_LANES; l++)
        lane[l] = -AC_INFINITY;
    size_t i = 0;
    for (; i + AC_SUM_LANES <= n; i += AC_SUM_LANES)
        for (size_t l = 0; l < AC_SUM_LANES; l++)
            lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    for (size_t l = 0; i + l < n; l++)
        lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    float top = lane[0];
    for (size_t l = 1; l < AC_SUM_LANES; l++)
        top = lane[l] > top ? lane[l] : top;
    return top;
}

/* Sum of exp(x - top) over n elements, a chunk of exponentials at a time. */
static inline double ac_sum_exp(const float *x, float top, size_t n) {
    float terms[AC_SUM_CHUNK];
    double total = 0;
    for (size_t i = 0; i < n; i += AC_SUM_CHUNK) {
        const size_t count = n - i < AC_SUM_CHUNK ? n - i : AC_SUM_CHUNK;
        for (size_t l = 0; l < count; l++)
            terms[l] = ac_expf(x[i + l] - top);
        total += ac_sum(terms, terms, 0.0f, count, 1);
    }
    return total;
}

#endif
