/* Integer arithmetic that the int8 kernels share: TFLite's reference semantics, without undefined behaviour. */
#ifndef AC_QUANTIZED_H
#define AC_QUANTIZED_H

#include "ac_math.h"
#include "ac_ops.h"

/* x + y as an int32 holds it */
AC_INLINE int32_t ac_wrap_add(int32_t x, int32_t y) { return (int32_t)((uint32_t)x + (uint32_t)y); }

/* x * m * 2^-31, halves upwards; m >= 0 */
AC_INLINE int32_t ac_high_mul(int32_t x, int32_t m) {
    return (int32_t)(((int64_t)x * m + ((int64_t)1 << 30)) >> 31);
}

/* x * 2^-n, halves away from zero; n from 0 to 31 */
AC_INLINE int32_t ac_shift_right(int32_t x, int n) {
    const int32_t mask = (int32_t)((1u << n) - 1u), rest = x & mask, half = (int32_t)((uint32_t)mask >> 1) + (x < 0);
    return (x >> n) + (rest > half);
}

/* x * m * 2^(shift - 31); m >= 0, shift from -31 to 30 */
AC_INLINE int32_t ac_scaled(int32_t x, int32_t m, int32_t shift) {
    if (shift <= 0) return ac_shift_right(ac_high_mul(x, m), -shift);
    const int64_t wide = (int64_t)x * ((int64_t)1 << shift);
    return ac_high_mul(wide > INT32_MAX ? INT32_MAX : wide < INT32_MIN ? INT32_MIN : (int32_t)wide, m);
}

AC_INLINE int32_t ac_clamped(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

/* Rounded to a whole number, halves away from zero; |x| < 2^31, NaN gives 0 */
AC_INLINE int32_t ac_half_away(float x) {
    if (!(x > -2147483648.0f && x < 2147483648.0f)) return x < 0.0f ? INT32_MIN : x > 0.0f ? INT32_MAX : 0;
    const int32_t whole = (int32_t)x;
    const float rest = x - (float)whole;
    return rest >= 0.5f ? whole + 1 : rest <= -0.5f ? whole - 1 : whole;
}

/* Weights (O, C, ...), of which the channels that `index` lists, ascending, are read from `part` (O, parts, ...). */
typedef struct {
    const int8_t *whole, *part;
    const int32_t *index;
    int channels, parts; /* parts 0: all are in `whole` */
    size_t plane;        /* elements of one channel */
} ac_weights;

/* Those of output o and input channel c. *next is 0 for an output's first channel, and channels must ascend. */
AC_INLINE const int8_t *ac_weights_of(const ac_weights *w, int o, int c, int *next) {
    while (*next < w->parts && w->index[*next] < c) ++*next;
    if (*next < w->parts && w->index[*next] == c) return w->part + ((size_t)o * (size_t)w->parts + (size_t)*next) * w->plane;
    return w->whole + ((size_t)o * (size_t)w->channels + (size_t)c) * w->plane;
}

/* What lies between the weights of an output and those of the next, where `next` is as the call for channel c left it. */
AC_INLINE size_t ac_weights_step(const ac_weights *w, int c, int next) {
    return (size_t)(next < w->parts && w->index[next] == c ? w->parts : w->channels) * w->plane;
}

/* Sum of two integers of different scales, before it is clamped. */
AC_INLINE int32_t ac_q_sum(const ac_attr_q_add *a, int8_t x, int8_t z) {
    const int32_t sum = ac_scaled((x - a->a_zero) * (1 << 20), a->a_multiplier, a->a_shift)
                        + ac_scaled((z - a->b_zero) * (1 << 20), a->b_multiplier, a->b_shift);
    return ac_wrap_add(ac_scaled(sum, a->y_multiplier, a->y_shift), a->y_zero);
}

/* Channels of `h` rows of `w`, whose first elements lie `plane` apart: at least h * w. */
typedef struct {
    int c, h, w;
    size_t plane;
} ac_planes;

/* An integer convolution of one image, or of some of its rows: what lies outside of `in` adds nothing. */
typedef struct {
    const ac_attr_q_conv *a;
    ac_planes in, kernel, out;
    const int8_t *x;
    ac_weights w;
    const int32_t *bias, *multiplier, *shift; /* bias NULL: none */
    int8_t *y;
    uint32_t *bits; /* zeroed; whether y is in range from bit `at` on, y having no gaps; NULL: not wanted */
    size_t at;
} ac_q_image;

void AC_KERNEL(q_conv_image)(const ac_q_image *image);

/* What integer weights learn with, and where they lie; see the op q_sgd. */
typedef struct {
    float momentum, weight_decay, lr;
    int nesterov, rounding;
    uint32_t key; /* of one step's stochastic roundings */
    int wide;     /* int32 rather than int8 */
    int8_t *w, *rest; /* rest and moment NULL: none */
    float *moment;
    const float *scale;
    size_t each; /* elements of one scale, 0: all */
} ac_rule;

/* What one step's roundings of a tensor are drawn with; step may be NULL. */
AC_INLINE uint32_t ac_rounding_key(const int32_t *step, int32_t salt) {
    return step ? ac_hash_u32((uint32_t)step[0] * 0x9E3779B9u + (uint32_t)salt) : 0;
}

/* Elements [at, at + count) of int8 weights, all of one scale, learn from their gradient. */
void AC_KERNEL(learn)(const ac_rule *rule, size_t at, const float *gradient, int count);

/* Bits of a mask, set one after another. */
typedef struct {
    uint32_t *to, word, at; /* to NULL: nothing is kept */
} ac_bit_writer;

AC_INLINE void ac_put_bit(ac_bit_writer *w, int bit) {
    w->word |= (uint32_t)(bit != 0) << (w->at & 31u);
    if ((++w->at & 31u) == 0) {
        if (w->to) w->to[(w->at >> 5) - 1] = w->word;
        w->word = 0;
    }
}

AC_INLINE void ac_end_bits(ac_bit_writer *w) {
    if (w->to && (w->at & 31u)) w->to[w->at >> 5] = w->word;
}

#endif
