/* Gradients as block floating point: int16 or int8 mantissas m, one exponent e a channel and sample; m * 2^e.
 *
 * All sums of mantissas are exact or wrap as an int32 does, so the bits are the same everywhere. Floats appear only where
 * a gradient enters and where a weight's or bias's comes out. */
#include "ac_ops.h"
#include "ac_quantized.h"

#include <string.h>

enum { EMPTY = -512, RATIO_BITS = 15, CHUNK = 256 };

typedef struct {
    int n, c, h, w;
    size_t plane;
} shape;

static shape shape_of(const ac_tensor *t) {
    const int h = t->rank == 4 ? t->dim[2] : 1, w = t->rank > 2 ? t->dim[t->rank - 1] : 1;
    return (shape){t->dim[0], t->dim[1], h, w, (size_t)h * (size_t)w};
}

static int smaller(int a, int b) { return a < b ? a : b; }
static int larger(int a, int b) { return a > b ? a : b; }

/* Of the positions at + i * step below `size`, i from 0 to count - 1: the first that is not negative, */
static int first_inside(int at, int step, int count) { return at >= 0 ? 0 : smaller(count, (-at + step - 1) / step); }

/* and one past the last. */
static int end_inside(int at, int step, int size, int count) {
    return larger(first_inside(at, step, count), at >= size ? 0 : smaller(count, (size - 1 - at) / step + 1));
}

/* Exponents as they are used, whatever is in memory. */
static int32_t bounded(int32_t e) { return e < EMPTY ? EMPTY : e > -EMPTY ? -EMPTY : e; }

/* 2^e, 0 or infinity where a float has no such number */
static float power_of_two(int32_t e) {
    if (e < -149) return 0.0f;
    if (e < -126) return ac_float(1u << (e + 149));
    return ac_float((uint32_t)(e > 127 ? 255 : e + 127) << 23);
}

static float scaled_by(float x, int32_t e) { return e < -126 ? x * power_of_two(e + 100) * power_of_two(-100) : x * power_of_two(e); }

/* x * 2^-by, halves upwards */
AC_INLINE int32_t shifted(int32_t x, int32_t by) {
    return by <= 0 ? x : by > 31 ? 0 : (int32_t)(((int64_t)x + ((int64_t)1 << (by - 1))) >> by);
}

AC_INLINE int32_t mantissa(const void *m, int narrow, size_t i) {
    return narrow ? ((const int8_t *)m)[i] : ((const int16_t *)m)[i];
}

AC_INLINE void put_mantissa(void *m, int narrow, size_t i, int32_t v) {
    if (narrow) ((int8_t *)m)[i] = (int8_t)v;
    else ((int16_t *)m)[i] = (int16_t)v;
}

static int is_narrow(const ac_tensor *t) { return t->dtype == AC_I8; }

static uint32_t size_of(int32_t v) { return v < 0 ? 0u - (uint32_t)v : (uint32_t)v; }

/* By how much a block whose largest number is `top` is shifted right to be mantissas. */
static int32_t excess(uint32_t top, int narrow) {
    int32_t length = 0;
    while (length < 32 && top >> length) length++;
    return larger(length - (narrow ? 7 : 15), 0);
}

static int32_t as_mantissa(int32_t v, int32_t by, int narrow) {
    const int32_t top = narrow ? INT8_MAX : INT16_MAX;
    return ac_clamped(shifted(v, by), -top, top);
}

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

/* m, bits -> m where the bit is set, else 0 */
ac_status AC_KERNEL(bf_gate)(const ac_call *call) {
    const uint32_t *bits = AC_IN(call, 1);
    const size_t n = AC_IN_T(call, 0)->size;
    const int narrow = is_narrow(AC_IN_T(call, 0));
    for (size_t i = 0; i < n; i++)
        put_mantissa(AC_OUT(call, 0), narrow, i, bits[i >> 5] >> (i & 31u) & 1u ? mantissa(AC_IN(call, 0), narrow, i) : 0);
    return AC_OK;
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
            for (size_t i = 0, at = (n * channels + o) * each; i < each; i++, at++) {
                const int32_t v = mantissa(AC_IN(call, 0), narrow, at);
                const int32_t g = own == EMPTY ? 0 : shifted(v * ratio[o], by);
                put_mantissa(AC_OUT(call, 0), narrow, at, ac_clamped(g, narrow ? INT8_MIN : INT16_MIN, narrow ? INT8_MAX : INT16_MAX));
            }
        }
    }
    return AC_OK;
}

/* A part of an input plane: rows [row, row + rows), columns [col, col + cols), at most CHUNK elements. */
typedef struct {
    int row, col, rows, cols;
} part;

/* acc (rows, cols) of the part = sum over the output channels of a group and the taps of g * w, wrapping */
static void sum_part(int32_t *acc, const ac_attr_bf_conv_input_grad *a, const shape *out, const shape *kernel, int narrow,
                     const void *g, size_t first, const int8_t *w, size_t w_step, int count, const part *b) {
    memset(acc, 0, (size_t)b->rows * (size_t)b->cols * sizeof *acc);
    for (int o = 0; o < count; o++, first += out->plane, w += w_step)
        for (int i = 0; i < kernel->h; i++)
            for (int j = 0; j < kernel->w; j++) {
                const int32_t weight = w[i * kernel->w + j];
                const int row = i * a->dilation[0] - a->before[0] - b->row, col = j * a->dilation[1] - a->before[1] - b->col;
                const int top = first_inside(row, a->stride[0], out->h), bottom = end_inside(row, a->stride[0], b->rows, out->h),
                          left = first_inside(col, a->stride[1], out->w), right = end_inside(col, a->stride[1], b->cols, out->w);
                for (int p = top; p < bottom; p++) {
                    int32_t *line = acc + (row + p * a->stride[0]) * b->cols + col;
                    const size_t at = first + (size_t)p * (size_t)out->w;
                    for (int q = left; q < right; q++) {
                        int32_t *to = line + q * a->stride[1];
                        *to = ac_wrap_add(*to, mantissa(g, narrow, at + (size_t)q) * weight);
                    }
                }
            }
}

/* g (N, O, P, Q), t (N), w (O, C / groups, kH, kW), part (O, K, kH, kW)?, index (K)? -> m (N, C, H, W), e (N, C) */
ac_status AC_KERNEL(bf_conv_input_grad)(const ac_call *call) {
    const ac_attr_bf_conv_input_grad *a = call->attr;
    const shape in = shape_of(AC_OUT_T(call, 0)), kernel = shape_of(AC_IN_T(call, 2)), out = shape_of(AC_IN_T(call, 0));
    const int32_t *t = AC_IN(call, 1);
    const int parts = AC_IN(call, 3) ? AC_IN_T(call, 3)->dim[1] : 0;
    const ac_weights w = {AC_IN(call, 2), AC_IN(call, 3), AC_IN(call, 4), kernel.c, parts, kernel.plane};
    int32_t *e = AC_OUT(call, 1), acc[CHUNK];
    const int from_narrow = is_narrow(AC_IN_T(call, 0)), narrow = is_narrow(AC_OUT_T(call, 0)), per_group = out.c / a->groups;
    const int cols = smaller(in.w, CHUNK), rows = smaller(in.h, CHUNK / cols);
    const int passes = rows == in.h && cols == in.w ? 1 : 2; /* where a plane is more than a chunk its sums are made twice */
    for (int n = 0; n < in.n; n++)
        for (int c = 0; c < in.c; c++) {
            const int group = c / kernel.c, o = group * per_group;
            int next = 0;
            const int8_t *by = ac_weights_of(&w, o, c % kernel.c, &next);
            const size_t row_size = ac_weights_step(&w, c % kernel.c, next);
            const size_t first = ((size_t)n * (size_t)out.c + (size_t)o) * out.plane,
                         to = ((size_t)n * (size_t)in.c + (size_t)c) * in.plane;
            uint32_t largest = 0;
            for (int pass = 2 - passes; pass < 2; pass++)
                for (int r = 0; r < in.h; r += rows)
                    for (int s = 0; s < in.w; s += cols) {
                        const part b = {r, s, smaller(rows, in.h - r), smaller(cols, in.w - s)};
                        sum_part(acc, a, &out, &kernel, from_narrow, AC_IN(call, 0), first, by, row_size, per_group, &b);
                        const int size = b.rows * b.cols;
                        for (int i = 0; (passes == 1 || pass == 0) && i < size; i++)
                            if (size_of(acc[i]) > largest) largest = size_of(acc[i]);
                        if (pass == 0) continue;
                        const int32_t shift = excess(largest, narrow);
                        for (int i = 0; i < size; i++)
                            put_mantissa(AC_OUT(call, 0), narrow,
                                         to + (size_t)(r + i / b.cols) * (size_t)in.w + (size_t)(s + i % b.cols),
                                         as_mantissa(acc[i], shift, narrow));
                    }
            e[n * in.c + c] = largest ? bounded(bounded(t[n]) + excess(largest, narrow)) : EMPTY;
        }
    return AC_OK;
}

/* Whether channel o of every sample is zero. */
static int is_still(const void *m, int narrow, const shape *s, int o) {
    for (int n = 0; n < s->n; n++)
        for (size_t i = 0, at = ((size_t)n * (size_t)s->c + (size_t)o) * s->plane; i < s->plane; i++)
            if (mantissa(m, narrow, at + i)) return 0;
    return 1;
}

/* What a weight's gradient is made from: x (N, C, H, W), m (N, O, P, Q) and e (N, O). */
typedef struct {
    const int32_t *stride, *before, *dilation;
    int groups, x_zero;
    float x_scale;
    shape in, kernel, out;
    const int8_t *x;
    const void *m;
    const int32_t *e;
    int narrow;
} products;

/* The gradient, number by number, to dw or at once to what learns from it. */
static void weight_grad(const products *a, float *dw, const ac_rule *learns) {
    const int per_group = a->out.c / a->groups;
    const size_t each = (size_t)a->kernel.c * a->kernel.plane;
    size_t at = 0;
    for (int o = 0; o < a->out.c; o++) {
        if (is_still(a->m, a->narrow, &a->out, o)) { /* of most channels, where only the largest gradients are kept */
            const float none = 0.0f;
            for (size_t i = 0; i < each; i++, at++)
                if (learns) AC_KERNEL(learn)(learns, at, &none, 1);
                else dw[at] = none;
            continue;
        }
        for (int c = 0; c < a->kernel.c; c++)
            for (int i = 0; i < a->kernel.h; i++)
                for (int j = 0; j < a->kernel.w; j++, at++) {
                    const int row = i * a->dilation[0] - a->before[0], col = j * a->dilation[1] - a->before[1];
                    const int top = first_inside(row, a->stride[0], a->out.h), bottom = end_inside(row, a->stride[0], a->in.h, a->out.h),
                              left = first_inside(col, a->stride[1], a->out.w), right = end_inside(col, a->stride[1], a->in.w, a->out.w);
                    float total = 0;
                    for (int n = 0; n < a->out.n; n++) {
                        const int8_t *from = a->x + ((size_t)n * (size_t)a->in.c + (size_t)(o / per_group * a->kernel.c + c)) * a->in.plane;
                        const size_t first = ((size_t)n * (size_t)a->out.c + (size_t)o) * a->out.plane;
                        int64_t sum = 0;
                        for (int p = top; p < bottom; p++)
                            for (int q = left; q < right; q++)
                                sum += (int64_t)(from[(size_t)(row + p * a->stride[0]) * (size_t)a->in.w + (size_t)(col + q * a->stride[1])]
                                                 - a->x_zero)
                                       * mantissa(a->m, a->narrow, first + (size_t)p * (size_t)a->out.w + (size_t)q);
                        total += scaled_by((float)sum, bounded(a->e[n * a->out.c + o]));
                    }
                    total *= a->x_scale;
                    if (learns) AC_KERNEL(learn)(learns, at, &total, 1);
                    else dw[at] = total;
                }
    }
}

/* x (N, C, H, W), m (N, O, P, Q), e (N, O) -> dw (O, C / groups, kH, kW) */
ac_status AC_KERNEL(bf_conv_weight_grad)(const ac_call *call) {
    const ac_attr_bf_conv_weight_grad *a = call->attr;
    const products m = {a->stride, a->before, a->dilation, a->groups, a->x_zero, a->x_scale, shape_of(AC_IN_T(call, 0)),
                        shape_of(AC_OUT_T(call, 0)), shape_of(AC_IN_T(call, 1)), AC_IN(call, 0), AC_IN(call, 1),
                        AC_IN(call, 2), is_narrow(AC_IN_T(call, 1))};
    weight_grad(&m, AC_OUT(call, 0), NULL);
    return AC_OK;
}

/* w (O, C / groups, kH, kW), x (N, C, H, W), m (N, O, P, Q), e (N, O), lr (1), scale (1 or O), momentum?, residual?,
 * step (1)? */
ac_status AC_KERNEL(bf_conv_sgd)(const ac_call *call) {
    const ac_attr_bf_conv_sgd *a = call->attr;
    const ac_tensor *t = AC_IN_T(call, 0);
    const products m = {a->stride, a->before, a->dilation, a->groups, a->x_zero, a->x_scale, shape_of(AC_IN_T(call, 1)),
                        shape_of(t), shape_of(AC_IN_T(call, 2)), AC_IN(call, 1), AC_IN(call, 2), AC_IN(call, 3),
                        is_narrow(AC_IN_T(call, 2))};
    const ac_rule r = {a->momentum, a->weight_decay, *(const float *)AC_IN(call, 4), a->nesterov, a->rounding,
                       ac_rounding_key(AC_IN(call, 8), a->salt), 0, AC_IN(call, 0), AC_IN(call, 7), AC_IN(call, 6), AC_IN(call, 5),
                       AC_IN_T(call, 5)->size > 1 ? t->size / (size_t)t->dim[0] : 0};
    weight_grad(&m, NULL, &r);
    return AC_OK;
}

/* m (N, C, ...), e (N, C) -> y (C) */
ac_status AC_KERNEL(bf_sum)(const ac_call *call) {
    const shape in = shape_of(AC_IN_T(call, 0));
    const size_t channels = (size_t)in.c, each = AC_IN_T(call, 0)->size / ((size_t)in.n * channels);
    const int32_t *e = AC_IN(call, 1);
    float *y = AC_OUT(call, 0);
    const int narrow = is_narrow(AC_IN_T(call, 0));
    for (size_t c = 0; c < channels; c++) {
        y[c] = 0;
        for (size_t n = 0; n < (size_t)in.n; n++) {
            int64_t sum = 0;
            for (size_t i = 0; i < each; i++) sum += mantissa(AC_IN(call, 0), narrow, (n * channels + c) * each + i);
            y[c] += scaled_by((float)sum, bounded(e[n * channels + c]));
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

/* a, e_a, b, e_b -> a + b, e */
ac_status AC_KERNEL(bf_add)(const ac_call *call) {
    const shape in = shape_of(AC_IN_T(call, 0));
    const size_t blocks = (size_t)in.n * (size_t)in.c, each = AC_IN_T(call, 0)->size / blocks;
    const int32_t *e = AC_IN(call, 1), *f = AC_IN(call, 3);
    int32_t *out = AC_OUT(call, 1);
    const int narrow = is_narrow(AC_IN_T(call, 0));
    for (size_t k = 0; k < blocks; k++) {
        const int32_t ea = bounded(e[k]), eb = bounded(f[k]), top = larger(ea, eb);
        uint32_t largest = 0;
        for (int pass = 0; pass < 2; pass++)
            for (size_t i = k * each; i < (k + 1) * each; i++) {
                const int32_t sum = shifted(mantissa(AC_IN(call, 0), narrow, i), top - ea)
                                    + shifted(mantissa(AC_IN(call, 2), narrow, i), top - eb);
                if (pass) put_mantissa(AC_OUT(call, 0), narrow, i, as_mantissa(sum, excess(largest, narrow), narrow));
                else if (size_of(sum) > largest) largest = size_of(sum);
            }
        out[k] = largest ? bounded(top + excess(largest, narrow)) : EMPTY;
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
    for (size_t k = 0; k < (size_t)in.n * (size_t)in.c; k++) {
        uint32_t largest = 0;
        for (int pass = 0; pass < 2; pass++)
            for (int r = 0; r < in.h; r++)
                for (int s = 0; s < in.w; s++) {
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
