/* Integer sums of products, two products an instruction where the processor has Arm's DSP extension, plain C elsewhere,
 * and their way back to int8. Integers are exact: both forms give the same bits.
 *
 * Sums are kept doubled: the rounding multiplication of TFLite doubles, and what doubles once for many sums is free. So
 * one factor of every product is doubled beforehand, and |2 * sum| must fit an int32: at most AC_MAX_TAPS products. */
#ifndef AC_DOT_H
#define AC_DOT_H

#include "ac_kernel.h"
#include "ac_quantized.h"

#include <string.h>

#if defined(__GNUC__) && defined(__ARM_FEATURE_DSP) && __ARM_FEATURE_DSP && defined(__thumb2__)
#define AC_DSP 1
#define AC_ASM __asm__
#else
#define AC_DSP 0
#endif

#define AC_MAX_TAPS 32767 /* 2 * 32767 * 255 * 128 < 2^31 */

/* Functions that keep their registers to themselves: merged with what surrounds them, their loops would run out of them. */
#if defined(__GNUC__)
#define AC_APART static __attribute__((noinline))
#else
#define AC_APART static
#endif

/* Few bytes: without a library's headers (-ffreestanding) a compiler calls memcpy for them. */
#if defined(__GNUC__)
#define AC_COPY __builtin_memcpy
#else
#define AC_COPY memcpy
#endif

/* Four bytes from anywhere. */
AC_INLINE uint32_t ac_load4(const void *from) {
    uint32_t word;
    AC_COPY(&word, from, 4);
    return word;
}

#if AC_DSP
/* Pairs of int16 in a word, the first in its low half. */

/* add + (byte 0, byte 2) */
AC_INLINE uint32_t ac_even_bytes(uint32_t add, uint32_t bytes) {
    uint32_t y;
    AC_ASM("sxtab16 %0, %1, %2" : "=r"(y) : "r"(add), "r"(bytes));
    return y;
}

/* add + (byte 1, byte 3) */
AC_INLINE uint32_t ac_odd_bytes(uint32_t add, uint32_t bytes) {
    uint32_t y;
    AC_ASM("sxtab16 %0, %1, %2, ror #8" : "=r"(y) : "r"(add), "r"(bytes));
    return y;
}

/* (low of a, low of b) */
AC_INLINE uint32_t ac_low_halves(uint32_t a, uint32_t b) {
    uint32_t y;
    AC_ASM("pkhbt %0, %1, %2, lsl #16" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

/* (high of a, high of b) */
AC_INLINE uint32_t ac_high_halves(uint32_t a, uint32_t b) {
    uint32_t y;
    AC_ASM("pkhtb %0, %1, %2, asr #16" : "=r"(y) : "r"(b), "r"(a));
    return y;
}

/* both halves doubled */
AC_INLINE uint32_t ac_doubled(uint32_t a) {
    uint32_t y;
    AC_ASM("sadd16 %0, %1, %1" : "=r"(y) : "r"(a));
    return y;
}

/* to[p] = 2 * (byte p of x + minus, byte p of z + minus) */
AC_INLINE void ac_put_pairs(uint32_t *to, uint32_t x, uint32_t z, uint32_t minus) {
    const uint32_t x02 = ac_doubled(ac_even_bytes(minus, x)),
                   x13 = ac_doubled(ac_odd_bytes(minus, x)),
                   z02 = ac_doubled(ac_even_bytes(minus, z)),
                   z13 = ac_doubled(ac_odd_bytes(minus, z));
    to[0] = ac_low_halves(x02, z02);
    to[1] = ac_low_halves(x13, z13);
    to[2] = ac_high_halves(x02, z02);
    to[3] = ac_high_halves(x13, z13);
}

#define AC_MULTIPLY(name, instruction)                                                             \
    AC_INLINE int32_t name(uint32_t x, uint32_t w, int32_t sum) {                                  \
        int32_t y;                                                                                 \
        AC_ASM(instruction " %0, %1, %2, %3" : "=r"(y) : "r"(x), "r"(w), "r"(sum));                \
        return y;                                                                                  \
    }
AC_MULTIPLY(ac_pairs, "smlad")     /* sum + x.low * w.low + x.high * w.high */
AC_MULTIPLY(ac_low_low, "smlabb")  /* sum + x.low * w.low */
AC_MULTIPLY(ac_low_high, "smlabt") /* sum + x.low * w.high */
AC_MULTIPLY(ac_high_low, "smlatb") /* sum + x.high * w.low */
#undef AC_MULTIPLY
#endif

/* a + x * m * 2^-32, halves upwards */
AC_INLINE int32_t ac_add_high(int32_t a, int32_t x, int32_t m) {
#if AC_DSP
    int32_t y;
    AC_ASM("smmlar %0, %1, %2, %3" : "=r"(y) : "r"(x), "r"(m), "r"(a));
    return y;
#else
    return a + (int32_t)(((int64_t)x * m + ((int64_t)1 << 31)) >> 32);
#endif
}

/* A doubled sum at its place in low..high, counted from low, as a byte: v where it is 0..255, else the nearer end. */
AC_INLINE int32_t ac_to_byte(int32_t v) {
#if AC_DSP
    int32_t y;
    AC_ASM("usat %0, #8, %1" : "=r"(y) : "r"(v));
    return y;
#else
    return v < 0 ? 0 : v > 255 ? 255 : v;
#endif
}

/* bits = bits >> 1, with whether 0 <= v <= range on top */
AC_INLINE uint32_t ac_shift_in(uint32_t bits, int32_t v, int32_t range) {
#if AC_DSP
    AC_ASM("cmp %2, %1\n\trrx %0, %0" : "+r"(bits) : "r"(v), "r"(range) : "cc");
    return bits;
#else
    return bits >> 1 | (uint32_t)((uint32_t)v <= (uint32_t)range) << 31;
#endif
}

/* Four bytes plus four bytes, each modulo 256. */
AC_INLINE uint32_t ac_add_bytes(uint32_t a, uint32_t b) {
#if AC_DSP
    uint32_t y;
    AC_ASM("uadd8 %0, %1, %2" : "=r"(y) : "r"(a), "r"(b));
    return y;
#else
    return ((a & 0x7F7F7F7Fu) + (b & 0x7F7F7F7Fu)) ^ ((a ^ b) & 0x80808080u);
#endif
}

/* ---- columns: what four output pixels see ---- */

/* 2 * (x - zero) as int16, taps in groups of four, the last filled with zeros: of the even places of a group the four
 * pixels, then of the odd ones, in pairs as sxtb16 leaves weights. */
#define AC_GROUPS(taps) (((taps) + 3) / 4)
#define AC_COLUMN_WORDS(taps) (AC_GROUPS(taps) * 8)

/* Where of a group's 16 numbers tap i of pixel p stands. */
AC_INLINE int ac_in_group(int i, int p) { return (i & 1) * 8 + p * 2 + (i >> 1); }

/* The columns of `pixels` pixels (1 to 4) that follow each other in `count` planes. */
AC_INLINE void ac_columns_of_planes(uint32_t *to, const int8_t *x, size_t plane, int count,
                                    int pixels, int zero) {
    int c = 0;
#if AC_DSP
    if (pixels == 4) {
        const uint32_t minus = ((uint32_t)-zero & 0xFFFFu) * 0x10001u;
        for (; c + 4 <= count; c += 4, x += 4 * plane, to += 8) {
            ac_put_pairs(to, ac_load4(x), ac_load4(x + 2 * plane), minus);
            ac_put_pairs(to + 4, ac_load4(x + plane), ac_load4(x + 3 * plane), minus);
        }
    }
#endif
    for (; c < count; c += 4, to += 8) {
        int16_t group[16] = {0};
        for (int i = 0; i < 4 && c + i < count; i++, x += plane)
            for (int p = 0; p < pixels; p++)
                group[ac_in_group(i, p)] = (int16_t)(2 * (x[p] - zero));
        AC_COPY(to, group, sizeof group);
    }
}

/* sum[4 * k + p] = start + the products of column p of the k-th four pixels and w, up to `end`, at least one four. w has
 * 4 * groups elements. */
void AC_KERNEL(dot_columns)(int32_t *sum, const int32_t *end, const uint32_t *columns,
                            const int8_t *w, int groups, int32_t start);

/* ---- pairs of int16: what gradients in blocks are multiplied by ---- */

#if AC_DSP
/* sum[4 * k + p] += the products of column p of the k-th four columns and the first of two rows, sum[next + 4 * k + p] +=
 * those of the second, up to `end`, at least one four; sums wrap. Of both, columns and rows, the pairs of four lie side by
 * side; at least one pair. */
void AC_KERNEL(dot_pairs)(int32_t *sum, const uint32_t *columns, const uint32_t *rows, int pairs, const int32_t *end, int next);

/* to[4 * k + p] = (byte p at x + 2 * k * step, byte p one step on) for p < 4 and k < pairs, at least one */
void AC_KERNEL(zip_bytes)(uint32_t *to, const int8_t *x, size_t step, int pairs);

/* The same of int16. */
void AC_KERNEL(zip_halves)(uint32_t *to, const int16_t *x, size_t step, int pairs);

/* The or of the magnitudes of 4 * fours numbers, at least four. */
uint32_t AC_KERNEL(or_of_fours)(const int32_t *sum, int fours);

/* to[i] = sum[i] * 2^-by, halves upwards, or the nearer of -32767 and 32767, of 4 * fours numbers, at least four; `to` may lie
 * where the sums do, and start there or before; by from 0 to 31. */
void AC_KERNEL(put_fours)(int16_t *to, const int32_t *sum, int fours, int32_t by);
#endif

/* ---- rows: what the outputs of a depthwise convolution see ---- */

/* x - zero as int16, wherever `to` points. */
AC_INLINE void ac_widen(int16_t *to, const int8_t *x, int count, int zero) {
    int rest = count;
#if AC_DSP
    int fours = count >> 2;
    if (fours) {
        uint32_t word, even, low;
        AC_ASM("1:\n\t"
               "ldr %[word], [%[x]], #4\n\t"
               "sxtab16 %[even], %[minus], %[word]\n\t"
               "sxtab16 %[word], %[minus], %[word], ror #8\n\t"
               "pkhbt %[low], %[even], %[word], lsl #16\n\t"
               "pkhtb %[word], %[word], %[even], asr #16\n\t"
               "str %[low], [%[to]], #4\n\t"
               "str %[word], [%[to]], #4\n\t"
               "subs %[fours], %[fours], #1\n\t"
               "bne 1b" : [to] "+r"(to),
               [x] "+r"(x), [fours] "+r"(fours), [word] "=&r"(word), [even] "=&r"(even),
               [low] "=&r"(low) : [minus] "r"(((uint32_t)-zero & 0xFFFFu) * 0x10001u) : "cc",
               "memory");
    }
    rest &= 3;
#endif
    for (int i = 0; i < rest; i++)
        to[i] = (int16_t)(x[i] - zero);
}

/* Doubled weights of a window: each row's pairs of neighbours; step 1, or -1 from the last weight back. */
AC_INLINE void ac_put_window_by(uint32_t *to, const int8_t *w, int width, int step) {
    for (int i = 0; i < width; i++, w += step, to += width - 1) {
        uint32_t left = (uint32_t)(2 * w[0]);
        for (int j = 0; j + 1 < width; j++) {
            w += step;
            const uint32_t right = (uint32_t)(2 * w[0]);
            to[j] = (left & 0xFFFFu) | right << 16;
            left = right;
        }
    }
}

AC_INLINE void ac_put_window(uint32_t *to, const int8_t *w, int width) { ac_put_window_by(to, w, width, 1); }

/* Windows on rows of a channel. */
typedef struct {
    int32_t start[4];    /* what each sum begins with, four times */
    const uint32_t *w;   /* as ac_put_window left them */
    int32_t pitch, back; /* bytes of a row; `width` rows less what four windows advance */
} ac_windows;

AC_INLINE ac_windows ac_windows_of(int32_t start, const uint32_t *w, int pitch_words, int width,
                                   int step) {
    return (ac_windows){
        {start, start, start, start}, w, pitch_words * 4, width * pitch_words * 4 - 8 * step};
}

/* sum[k] = start + the products of window k, up to `end` in steps of four, at least four; it starts at row 0, column
 * k * step of x, which lies at a whole word. */
typedef void ac_dot_windows(int32_t *sum, const int32_t *end, const uint32_t *x,
                            const ac_windows *v);

/* For windows of 3, 5 and 7 columns (and rows), with steps of 1 and 2: [width / 2 - 1][step - 1]. */
extern ac_dot_windows *const AC_KERNEL(dot_windows)[3][2];

/* ---- back to int8 ---- */

/* How the sums of one output channel become int8: y = clamp(zero + round(round(sum * m) * 2^shift)). */
typedef struct {
    int32_t start;             /* what the doubled sums must begin with */
    int32_t multiplier, shift; /* as TFLite has them */
    int32_t bias, zero, low, high;
    int32_t offset; /* where quick: half a unit and the zero point, before the last shift */
    int quick; /* the bias is in the sums, and one multiplication, one addition and one shift do the rest */
} ac_scaling;

/* most: the largest |sum|, not doubled */
AC_INLINE ac_scaling ac_scaling_of(int32_t bias, int32_t m, int32_t shift, int32_t zero,
                                   int32_t low, int32_t high, int32_t most) {
    const int32_t rest = (1 << 30) - most; /* |sum| + |bias| < 2^30 */
    ac_scaling s = {0,    m,    shift,
                    bias, zero, low,
                    high, 0,    shift < 0 && shift >= -21 && bias < rest && bias > -rest};
    if (s.quick) {
        s.start = 2 * bias;
        s.offset = (zero - low) * (1 << -shift) + (1 << (-shift - 1));
    }
    return s;
}

/* Set bits [at, at + count) of zeroed bits to the low ones of `word`, whose others are 0; count up to 32. */
AC_INLINE void ac_add_bits(uint32_t *bits, size_t at, uint32_t word, int count) {
    const unsigned from = at & 31u;
    bits[at >> 5] |= word << from;
    if (from + (unsigned)count > 32u)
        bits[(at >> 5) + 1] |= word >> (32u - from);
}

/* y[i] = what sum[i], doubled and from s->start on, stands for, i < count; bits at, at + 1, ... (NULL: none; zero before):
 * whether it was within low..high. */
void AC_KERNEL(requantize)(int8_t *y, const int32_t *sum, int count, const ac_scaling *s,
                           uint32_t *bits, size_t at);

#endif
