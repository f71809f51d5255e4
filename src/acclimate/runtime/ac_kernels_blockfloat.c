/* Gradients in blocks, element by element; see ac_blockfloat.h. */
#include "ac_blockfloat.h"

/* x -> m, e */
ac_status AC_KERNEL(bf_pack)(const ac_call *call) {
    const shape in = shape_of(AC_IN_T(call, 0));
    const size_t blocks = (size_t)in.n * (size_t)in.c, each = AC_IN_T(call, 0)->size / blocks;
    const float *x = AC_IN(call, 0);
    const int narrow = is_narrow(AC_OUT_T(call, 0)), bits = narrow ? 7 : 15;
    int32_t *e = AC_OUT(call, 1);
    for (size_t k = 0; k < blocks; k++, x += each) {
        uint32_t top = 0; /* of a float's bits without the sign: they order as the numbers do */
        for (size_t i = 0; i < each; i++) {
            const uint32_t size = ac_bits(x[i]) & 0x7FFFFFFFu;
            if (size <= 0x7F800000u && size > top) top = size;
        }
        if (top >= 0x7F61B1E6u) top = 0x7F61B1E6u; /* 3e38 */
        e[k] = top < 0x0D800000u ? EMPTY : (int32_t)(top >> 23) - 126 - bits; /* 2^-100 */
        const float unit = e[k] == EMPTY ? 0.0f : power_of_two(-e[k]);
        for (size_t i = 0; i < each; i++) {
            float v = x[i] == x[i] ? x[i] : 0.0f;
            v = v > 3.0e38f ? 3.0e38f : v < -3.0e38f ? -3.0e38f : v;
            put_mantissa(AC_OUT(call, 0), narrow, k * each + i,
                         ac_clamped(ac_half_away(v * unit), narrow ? -127 : -32767, narrow ? 127 : 32767));
        }
    }
    return AC_OK;
}

/* m, e -> x */
ac_status AC_KERNEL(bf_unpack)(const ac_call *call) {
    const shape in = shape_of(AC_IN_T(call, 0));
    const size_t blocks = (size_t)in.n * (size_t)in.c, each = AC_IN_T(call, 0)->size / blocks;
    const int32_t *e = AC_IN(call, 1);
    float *x = AC_OUT(call, 0);
    const int narrow = is_narrow(AC_IN_T(call, 0));
    for (size_t k = 0; k < blocks; k++)
        for (size_t i = 0; i < each; i++)
            *x++ = scaled_by((float)mantissa(AC_IN(call, 0), narrow, k * each + i), bounded(e[k]));
    return AC_OK;
}

/* Mantissas [0, count), count at most 32, where the low bits of `bits` are set. */
AC_INLINE void gate(void *to, const void *m, int narrow, size_t at, uint32_t bits, size_t count) {
    size_t i = 0;
#if AC_DSP
    static const uint32_t masks[4] = {0, 0xFFFFu, 0xFFFF0000u, 0xFFFFFFFFu};
    for (; !narrow && i + 2 <= count; i += 2, bits >>= 2) {
        const uint32_t pair = ac_load4((const int16_t *)m + at + i) & masks[bits & 3u];
        AC_COPY((int16_t *)to + at + i, &pair, 4);
    }
    bits <<= i & 31u;
#endif
    for (; i < count; i++) put_mantissa(to, narrow, at + i, mantissa(m, narrow, at + i) & -(int32_t)(bits >> i & 1u));
}

/* m, bits -> m where the bit is set, else 0 */
ac_status AC_KERNEL(bf_gate)(const ac_call *call) {
    const uint32_t *bits = AC_IN(call, 1);
    const size_t n = AC_IN_T(call, 0)->size;
    const int narrow = is_narrow(AC_IN_T(call, 0));
    for (size_t i = 0; i < n; i += 32) {
        const size_t count = n - i < 32 ? n - i : 32;
        if (narrow) gate(AC_OUT(call, 0), AC_IN(call, 0), 1, i, bits[i >> 5], count);
        else if (count < 32) gate(AC_OUT(call, 0), AC_IN(call, 0), 0, i, bits[i >> 5], count);
        else gate(AC_OUT(call, 0), AC_IN(call, 0), 0, i, bits[i >> 5], 32);
    }
    return AC_OK;
}

#if AC_DSP
AC_APART void align_fours(int16_t *to, const int16_t *m, size_t fours, int32_t ratio, int32_t by) {
    const int32_t half = 1 << (by - 1);
    for (; fours; fours--, m += 4, to += 4)
        for (int k = 0; k < 4; k += 2) {
            const uint32_t pair = ac_load4(m + k);
            const int32_t low = ac_low_low(pair, (uint32_t)ratio, half), high = ac_high_low(pair, (uint32_t)ratio, half);
            const uint32_t both = ac_low_halves((uint32_t)(low >> by), (uint32_t)(high >> by));
            AC_COPY(to + k, &both, 4);
        }
}
#endif

/* to[i] = m[i] * ratio * 2^-by; by from 15 to 31: no sum is 2^31, and none is more than a mantissa */
AC_INLINE void align(void *to, const void *m, int narrow, size_t at, size_t count, int32_t ratio, int32_t by) {
    const int32_t half = 1 << (by - 1);
    size_t i = at;
#if AC_DSP
    if (!narrow && ratio < 32768) {
        align_fours((int16_t *)to + at, (const int16_t *)m + at, count / 4, ratio, by);
        i += count & ~(size_t)3;
    }
#endif
    for (; i < at + count; i++) put_mantissa(to, narrow, i, (mantissa(m, narrow, i) * ratio + half) >> by);
}

/* m, e, ratio (O), power (O) -> g, t (N): g * 2^t = m * 2^e * ratio * 2^power, but for what is shifted out */
ac_status AC_KERNEL(bf_align)(const ac_call *call) {
    const shape in = shape_of(AC_IN_T(call, 0));
    const size_t channels = (size_t)in.c, each = AC_IN_T(call, 0)->size / ((size_t)in.n * channels);
    const int32_t *e = AC_IN(call, 1), *ratio = AC_IN(call, 2), *power = AC_IN(call, 3);
    int32_t *t = AC_OUT(call, 1);
    const int narrow = is_narrow(AC_IN_T(call, 0)), spare = ((const ac_attr_bf_align *)call->attr)->spare;
    for (size_t n = 0; n < (size_t)in.n; n++) {
        int32_t top = 2 * EMPTY;
        for (size_t o = 0; o < channels; o++) {
            const int32_t own = bounded(e[n * channels + o]);
            if (own != EMPTY && own + power[o] > top) top = own + power[o];
        }
        t[n] = top == 2 * EMPTY ? EMPTY : bounded(top + RATIO_BITS + spare);
        for (size_t o = 0; o < channels; o++) {
            const int32_t own = bounded(e[n * channels + o]), by = RATIO_BITS + spare + top - (own + power[o]);
            const size_t at = (n * channels + o) * each;
            const int none = own == EMPTY || by > 31;
            if (narrow) align(AC_OUT(call, 0), AC_IN(call, 0), 1, at, each, none ? 0 : ratio[o], none ? 31 : by);
            else align(AC_OUT(call, 0), AC_IN(call, 0), 0, at, each, none ? 0 : ratio[o], none ? 31 : by);
        }
    }
    return AC_OK;
}

/* The sum of at most 2^16 mantissas. */
AC_INLINE int32_t sum_of(const void *m, int narrow, size_t at, size_t count) {
    const size_t end = at + count;
    int32_t sum = 0;
#if AC_DSP
    const int16_t *from = (const int16_t *)m + at;
    for (; !narrow && at + 16 <= end; at += 16, from += 16)
        for (int k = 0; k < 16; k += 2) sum = ac_pairs(ac_load4(from + k), 0x00010001u, sum);
#endif
    for (; at < end; at++) sum += mantissa(m, narrow, at);
    return sum;
}

/* m (N, C, ...), e (N, C) -> y (C) */
ac_status AC_KERNEL(bf_sum)(const ac_call *call) {
    enum { MOST = 1 << 16 };
    const shape in = shape_of(AC_IN_T(call, 0));
    const size_t channels = (size_t)in.c, each = AC_IN_T(call, 0)->size / ((size_t)in.n * channels);
    const int32_t *e = AC_IN(call, 1);
    float *y = AC_OUT(call, 0);
    const void *m = AC_IN(call, 0);
    const int narrow = is_narrow(AC_IN_T(call, 0));
    for (size_t c = 0; c < channels; c++) {
        y[c] = 0;
        for (size_t n = 0; n < (size_t)in.n; n++) {
            const size_t at = (n * channels + c) * each;
            float sum;
            if (each <= MOST) {
                sum = (float)(narrow ? sum_of(m, 1, at, each) : sum_of(m, 0, at, each));
            } else {
                int64_t all = 0;
                for (size_t i = 0; i < each; i += MOST) all += sum_of(m, narrow, at + i, each - i < MOST ? each - i : MOST);
                sum = (float)all;
            }
            y[c] += scaled_by(sum, bounded(e[n * channels + c]));
        }
    }
    return AC_OK;
}

/* m, e -> y = m or 0, size (N, C) = sum of |m| * 2^e */
ac_status AC_KERNEL(bf_keep_top)(const ac_call *call) {
    const shape in = shape_of(AC_IN_T(call, 0));
    const size_t channels = (size_t)in.c, each = AC_IN_T(call, 0)->size / ((size_t)in.n * channels),
                 k = AC_KERNEL(count_kept)(((const ac_attr_bf_keep_top *)call->attr)->share, channels);
    const int32_t *e = AC_IN(call, 1);
    float *size = AC_OUT(call, 1);
    const int narrow = is_narrow(AC_IN_T(call, 0));
    for (size_t n = 0; n < (size_t)in.n; n++, size += channels) {
        for (size_t c = 0; c < channels; c++) {
            int64_t sum = 0;
            for (size_t i = 0; i < each; i++) sum += size_of(mantissa(AC_IN(call, 0), narrow, (n * channels + c) * each + i));
            size[c] = scaled_by((float)sum, bounded(e[n * channels + c]));
        }
        const float least = AC_KERNEL(kth_largest)(size, channels, k);
        for (size_t c = 0; c < channels; c++)
            for (size_t i = 0, at = (n * channels + c) * each; i < each; i++, at++)
                put_mantissa(AC_OUT(call, 0), narrow, at, size[c] >= least ? mantissa(AC_IN(call, 0), narrow, at) : 0);
    }
    return AC_OK;
}

/* sum[i] = a[i] * 2^-by_a + b[i] * 2^-by_b */
AC_INLINE void add(int32_t *sum, const void *a, int32_t by_a, const void *b, int32_t by_b, int narrow, size_t at, size_t count) {
    const int32_t half_a = by_a ? 1 << (by_a - 1) : 0, half_b = by_b ? 1 << (by_b - 1) : 0;
    for (size_t i = 0; i < count; i++)
        sum[i] = ((mantissa(a, narrow, at + i) + half_a) >> by_a) + ((mantissa(b, narrow, at + i) + half_b) >> by_b);
}

/* a, e_a, b, e_b -> a + b, e */
ac_status AC_KERNEL(bf_add)(const ac_call *call) {
    enum { SOME = 256, GONE = 17 }; /* shifted by so much no mantissa is left */
    const shape in = shape_of(AC_IN_T(call, 0));
    const size_t blocks = (size_t)in.n * (size_t)in.c, each = AC_IN_T(call, 0)->size / blocks;
    const int32_t *e = AC_IN(call, 1), *f = AC_IN(call, 3);
    int32_t *out = AC_OUT(call, 1), sum[SOME];
    const int narrow = is_narrow(AC_IN_T(call, 0));
    for (size_t k = 0; k < blocks; k++) {
        const int32_t ea = bounded(e[k]), eb = bounded(f[k]), top = larger(ea, eb);
        const int32_t by_a = smaller(top - ea, GONE), by_b = smaller(top - eb, GONE);
        uint32_t length = 0;
        for (int pass = each <= SOME; pass < 2; pass++) /* twice where the sums of a block are too many */
            for (size_t i = 0; i < each; i += SOME) {
                const size_t count = each - i < SOME ? each - i : SOME, at = k * each + i;
                if (narrow) add(sum, AC_IN(call, 0), by_a, AC_IN(call, 2), by_b, 1, at, count);
                else add(sum, AC_IN(call, 0), by_a, AC_IN(call, 2), by_b, 0, at, count);
                if (each <= SOME || !pass) length |= length_of(sum, count);
                if (pass) put_block(AC_OUT(call, 0), narrow, at, sum, count, excess(length, narrow));
            }
        out[k] = length ? bounded(top + excess(length, narrow)) : EMPTY;
    }
    return AC_OK;
}

/* d (N, C, P, Q), e -> dx (N, C, H, W), e */
ac_status AC_KERNEL(bf_avg_pool_grad)(const ac_call *call) {
    const ac_attr_bf_avg_pool_grad *a = call->attr;
    const shape in = shape_of(AC_OUT_T(call, 0)), out = shape_of(AC_IN_T(call, 0));
    const int32_t *e = AC_IN(call, 1);
    int32_t *to = AC_OUT(call, 1);
    const int narrow = is_narrow(AC_IN_T(call, 0));
    const int alike = out.plane == 1 && !a->before[0] && !a->before[1] && a->kernel[0] >= in.h && a->kernel[1] >= in.w;
    const int rows = alike ? 1 : in.h, cols = alike ? 1 : in.w; /* one window that sees all: its pixels get the same */
    for (size_t k = 0; k < (size_t)in.n * (size_t)in.c; k++) {
        uint32_t largest = 0;
        for (int pass = 0; pass < 2; pass++)
            for (int r = 0; r < rows; r++)
                for (int s = 0; s < cols; s++) {
                    int32_t sum = 0;
                    /* the windows that (r, s) lies in */
                    const int top = larger(0, (r + a->before[0] - a->kernel[0]) / a->stride[0]),
                              left = larger(0, (s + a->before[1] - a->kernel[1]) / a->stride[1]);
                    for (int p = top; p < out.h && p * a->stride[0] - a->before[0] <= r; p++)
                        for (int q = left; q < out.w && q * a->stride[1] - a->before[1] <= s; q++) {
                            const int row = p * a->stride[0] - a->before[0], col = q * a->stride[1] - a->before[1];
                            if (r >= row + a->kernel[0] || s >= col + a->kernel[1]) continue;
                            const int32_t count = (smaller(row + a->kernel[0], in.h) - larger(row, 0))
                                                  * (smaller(col + a->kernel[1], in.w) - larger(col, 0));
                            const int32_t share = ((1 << RATIO_BITS) + count / 2) / count;
                            sum = ac_wrap_add(sum, mantissa(AC_IN(call, 0), narrow,
                                                            k * out.plane + (size_t)p * (size_t)out.w + (size_t)q) * share);
                        }
                    if (pass)
                        put_mantissa(AC_OUT(call, 0), narrow, k * in.plane + (size_t)r * (size_t)in.w + (size_t)s,
                                     as_mantissa(sum, excess(largest, narrow), narrow));
                    else if (size_of(sum) > largest) largest = size_of(sum);
                }
        for (size_t i = 1, at = k * in.plane; alike && i < in.plane; i++)
            put_mantissa(AC_OUT(call, 0), narrow, at + i, mantissa(AC_OUT(call, 0), narrow, at));
        to[k] = largest ? bounded(bounded(bounded(e[k]) - RATIO_BITS) + excess(largest, narrow)) : EMPTY;
    }
    return AC_OK;
}

/* m, e -> the same elements with other channels, and their exponents */
ac_status AC_KERNEL(bf_reshape)(const ac_call *call) {
    const shape in = shape_of(AC_IN_T(call, 0)), out = shape_of(AC_OUT_T(call, 0));
    const size_t size = AC_IN_T(call, 0)->size, blocks = (size_t)out.n * (size_t)out.c, each = size / blocks,
                 in_each = size / ((size_t)in.n * (size_t)in.c);
    const int32_t *e = AC_IN(call, 1);
    int32_t *to = AC_OUT(call, 1);
    const int narrow = is_narrow(AC_IN_T(call, 0));
    for (size_t k = 0; k < blocks; k++) {
        int32_t top = EMPTY;
        for (size_t i = k * each; i < (k + 1) * each; i++)
            if (mantissa(AC_IN(call, 0), narrow, i) && bounded(e[i / in_each]) > top) top = bounded(e[i / in_each]);
        for (size_t i = k * each; i < (k + 1) * each; i++) {
            const int32_t m = mantissa(AC_IN(call, 0), narrow, i);
            put_mantissa(AC_OUT(call, 0), narrow, i, m ? shifted(m, top - bounded(e[i / in_each])) : 0);
        }
        to[k] = top;
    }
    return AC_OK;
}
