/* Integer arithmetic that the int8 kernels share: TFLite's reference semantics, without undefined behaviour. */
#ifndef AC_QUANTIZED_H
#define AC_QUANTIZED_H

#include "ac_math.h"

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
