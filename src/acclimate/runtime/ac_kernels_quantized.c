/* Integer layers, their gradients and their update: the plain reference that faster kernels are measured against.
 *
 * Integers are exact, so any order gives the same bits. The float sums of the gradients have one order each: an input's
 * gradient adds output channels in order, and of each the taps row by row; a weight's adds images and in each the
 * pixels row by row. */
#include "ac_ops.h"
#include "ac_quantized.h"

#include <string.h>

/* Batch, channels and the two spatial dimensions of a tensor; (N, C, W) is (N, C, 1, W). */
typedef struct {
    int n, c, h, w;
    size_t plane;
} shape;

static shape shape_of(const ac_tensor *t) {
    const int h = t->rank == 4 ? t->dim[2] : 1, w = t->dim[t->rank - 1];
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

/* ---- elementwise ---- */

/* x -> round(x / scale) + zero, whether it is in range */
ac_status AC_KERNEL(quantize)(const ac_call *call) {
    const ac_attr_quantize *a = call->attr;
    const float *x = AC_IN(call, 0);
    int8_t *y = AC_OUT(call, 0);
    ac_bit_writer bits = {AC_OUT(call, 1), 0, 0};
    const size_t n = AC_IN_T(call, 0)->size;
    for (size_t i = 0; i < n; i++) {
        const float v = x[i] / a->scale;
        const int32_t q = ac_half_away(v < -1e6f ? -1e6f : v > 1e6f ? 1e6f : v) + a->zero;
        y[i] = (int8_t)ac_clamped(q, INT8_MIN, INT8_MAX);
        ac_put_bit(&bits, q >= INT8_MIN && q <= INT8_MAX);
    }
    ac_end_bits(&bits);
    return AC_OK;
}

ac_status AC_KERNEL(dequantize)(const ac_call *call) {
    const ac_attr_dequantize *a = call->attr;
    const int8_t *x = AC_IN(call, 0);
    float *y = AC_OUT(call, 0);
    const size_t n = AC_IN_T(call, 0)->size;
    for (size_t i = 0; i < n; i++) y[i] = (float)(x[i] - a->zero) * a->scale;
    return AC_OK;
}

AC_INLINE int32_t raised(int8_t q, int32_t zero, int32_t m, int32_t shift) {
    return ac_scaled((q - zero) * (1 << 20), m, shift);
}

ac_status AC_KERNEL(q_add)(const ac_call *call) {
    const ac_attr_q_add *a = call->attr;
    const int8_t *x = AC_IN(call, 0), *z = AC_IN(call, 1);
    int8_t *y = AC_OUT(call, 0);
    ac_bit_writer bits = {AC_OUT(call, 1), 0, 0};
    const size_t n = AC_IN_T(call, 0)->size;
    for (size_t i = 0; i < n; i++) {
        const int32_t sum = raised(x[i], a->a_zero, a->a_multiplier, a->a_shift)
                            + raised(z[i], a->b_zero, a->b_multiplier, a->b_shift);
        const int32_t q = ac_wrap_add(ac_scaled(sum, a->y_multiplier, a->y_shift), a->y_zero);
        y[i] = (int8_t)ac_clamped(q, a->low, a->high);
        ac_put_bit(&bits, q >= a->low && q <= a->high);
    }
    ac_end_bits(&bits);
    return AC_OK;
}

ac_status AC_KERNEL(q_rescale)(const ac_call *call) {
    const ac_attr_q_rescale *a = call->attr;
    const int8_t *x = AC_IN(call, 0);
    int8_t *y = AC_OUT(call, 0);
    ac_bit_writer bits = {AC_OUT(call, 1), 0, 0};
    const size_t n = AC_IN_T(call, 0)->size;
    for (size_t i = 0; i < n; i++) {
        const int32_t q = ac_wrap_add(ac_scaled(x[i] - a->x_zero, a->multiplier, a->shift), a->y_zero);
        y[i] = (int8_t)ac_clamped(q, a->low, a->high);
        ac_put_bit(&bits, q >= a->low && q <= a->high);
    }
    ac_end_bits(&bits);
    return AC_OK;
}

ac_status AC_KERNEL(q_table)(const ac_call *call) {
    const int8_t *x = AC_IN(call, 0), *table = AC_IN(call, 1);
    int8_t *y = AC_OUT(call, 0);
    const size_t n = AC_IN_T(call, 0)->size;
    for (size_t i = 0; i < n; i++) y[i] = table[x[i] - INT8_MIN];
    return AC_OK;
}

ac_status AC_KERNEL(q_table_grad)(const ac_call *call) {
    const float *d = AC_IN(call, 0), *slopes = AC_IN(call, 2);
    const int8_t *x = AC_IN(call, 1);
    float *y = AC_OUT(call, 0);
    const size_t n = AC_IN_T(call, 0)->size;
    for (size_t i = 0; i < n; i++) y[i] = d[i] * slopes[x[i] - INT8_MIN];
    return AC_OK;
}

/* ---- convolution ---- */

/* Sum over the taps inside of x, over the channels of the group, of (x - zero) * w, for output pixel (p, q). */
static int32_t sum_of(const ac_attr_q_conv *a, const int8_t *x, const shape *in, const int8_t *w, const shape *kernel,
                      int p, int q) {
    const int row = p * a->stride[0] - a->before[0], col = q * a->stride[1] - a->before[1];
    const int top = first_inside(row, a->dilation[0], kernel->h), bottom = end_inside(row, a->dilation[0], in->h, kernel->h);
    const int left = first_inside(col, a->dilation[1], kernel->w), right = end_inside(col, a->dilation[1], in->w, kernel->w);
    int32_t sum = 0;
    for (int c = 0; c < kernel->c; c++)
        for (int i = top; i < bottom; i++) {
            const int8_t *from = x + (size_t)c * in->plane + (size_t)(row + i * a->dilation[0]) * (size_t)in->w;
            const int8_t *by = w + (size_t)c * kernel->plane + (size_t)i * (size_t)kernel->w;
            for (int j = left; j < right; j++) sum += (from[col + j * a->dilation[1]] - a->x_zero) * by[j];
        }
    return sum;
}

/* x (N, C, H, W), w (O, C / groups, kH, kW), b (O)?, multiplier (O), shift (O) -> y (N, O, P, Q), whether it is in range */
ac_status AC_KERNEL(q_conv)(const ac_call *call) {
    const ac_attr_q_conv *a = call->attr;
    const shape in = shape_of(AC_IN_T(call, 0)), kernel = shape_of(AC_IN_T(call, 1)), out = shape_of(AC_OUT_T(call, 0));
    const int8_t *x = AC_IN(call, 0), *w = AC_IN(call, 1);
    const int32_t *b = AC_IN(call, 2), *m = AC_IN(call, 3), *shift = AC_IN(call, 4);
    int8_t *y = AC_OUT(call, 0);
    ac_bit_writer bits = {AC_OUT(call, 1), 0, 0};
    const int per_group = out.c / a->groups;
    for (int n = 0; n < out.n; n++)
        for (int o = 0; o < out.c; o++) {
            const int8_t *from = x + ((size_t)n * (size_t)in.c + (size_t)(o / per_group * kernel.c)) * in.plane;
            const int8_t *by = w + (size_t)o * (size_t)kernel.c * kernel.plane;
            for (int p = 0; p < out.h; p++)
                for (int q = 0; q < out.w; q++) {
                    const int32_t sum = ac_wrap_add(sum_of(a, from, &in, by, &kernel, p, q), b ? b[o] : 0);
                    const int32_t v = ac_wrap_add(ac_scaled(sum, m[o], shift[o]), a->y_zero);
                    *y++ = (int8_t)ac_clamped(v, a->low, a->high);
                    ac_put_bit(&bits, v >= a->low && v <= a->high);
                }
        }
    ac_end_bits(&bits);
    return AC_OK;
}

static int bit_of(const uint32_t *bits, size_t i) { return !bits || (bits[i >> 5] >> (i & 31u) & 1u); }

/* d (N, O, P, Q), w (O, C / groups, kH, kW), scale (O), bits (N, O, P, Q)? -> dx (N, C, H, W) */
ac_status AC_KERNEL(q_conv_input_grad)(const ac_call *call) {
    const ac_attr_q_conv_input_grad *a = call->attr;
    const shape in = shape_of(AC_OUT_T(call, 0)), kernel = shape_of(AC_IN_T(call, 1)), out = shape_of(AC_IN_T(call, 0));
    const float *d = AC_IN(call, 0), *scale = AC_IN(call, 2);
    const int8_t *w = AC_IN(call, 1);
    const uint32_t *bits = AC_IN(call, 3);
    float *dx = AC_OUT(call, 0);
    const int per_group = out.c / a->groups;
    memset(dx, 0, AC_OUT_T(call, 0)->size * sizeof(float));
    for (int n = 0; n < out.n; n++)
        for (int o = 0; o < out.c; o++)
            for (int c = 0; c < kernel.c; c++) {
                const size_t image = (size_t)n * (size_t)out.c + (size_t)o;
                float *to = dx + ((size_t)n * (size_t)in.c + (size_t)(o / per_group * kernel.c + c)) * in.plane;
                const int8_t *by = w + ((size_t)o * (size_t)kernel.c + (size_t)c) * kernel.plane;
                for (int i = 0; i < kernel.h; i++)
                    for (int j = 0; j < kernel.w; j++) {
                        const float weight = (float)by[i * kernel.w + j] * scale[o];
                        const int row = i * a->dilation[0] - a->before[0], col = j * a->dilation[1] - a->before[1];
                        const int top = first_inside(row, a->stride[0], out.h),
                                  bottom = end_inside(row, a->stride[0], in.h, out.h),
                                  left = first_inside(col, a->stride[1], out.w),
                                  right = end_inside(col, a->stride[1], in.w, out.w);
                        for (int p = top; p < bottom; p++) {
                            const size_t at = image * out.plane + (size_t)p * (size_t)out.w;
                            float *line = to + (size_t)(row + p * a->stride[0]) * (size_t)in.w;
                            for (int q = left; q < right; q++)
                                if (bit_of(bits, at + (size_t)q)) line[col + q * a->stride[1]] += d[at + (size_t)q] * weight;
                        }
                    }
            }
    return AC_OK;
}

/* x (N, C, H, W), d (N, O, P, Q) -> dw (O, C / groups, kH, kW) */
ac_status AC_KERNEL(q_conv_weight_grad)(const ac_call *call) {
    const ac_attr_q_conv_weight_grad *a = call->attr;
    const shape in = shape_of(AC_IN_T(call, 0)), kernel = shape_of(AC_OUT_T(call, 0)), out = shape_of(AC_IN_T(call, 1));
    const int8_t *x = AC_IN(call, 0);
    const float *d = AC_IN(call, 1);
    float *dw = AC_OUT(call, 0);
    const int per_group = out.c / a->groups;
    for (int o = 0; o < out.c; o++)
        for (int c = 0; c < kernel.c; c++)
            for (int i = 0; i < kernel.h; i++)
                for (int j = 0; j < kernel.w; j++) {
                    const int row = i * a->dilation[0] - a->before[0], col = j * a->dilation[1] - a->before[1];
                    const int top = first_inside(row, a->stride[0], out.h),
                              bottom = end_inside(row, a->stride[0], in.h, out.h),
                              left = first_inside(col, a->stride[1], out.w),
                              right = end_inside(col, a->stride[1], in.w, out.w);
                    float sum = 0;
                    for (int n = 0; n < out.n; n++) {
                        const int8_t *from = x + ((size_t)n * (size_t)in.c + (size_t)(o / per_group * kernel.c + c)) * in.plane;
                        const float *by = d + ((size_t)n * (size_t)out.c + (size_t)o) * out.plane;
                        for (int p = top; p < bottom; p++)
                            for (int q = left; q < right; q++)
                                sum += (float)(from[(size_t)(row + p * a->stride[0]) * (size_t)in.w
                                                    + (size_t)(col + q * a->stride[1])] - a->x_zero)
                                       * by[(size_t)p * (size_t)out.w + (size_t)q];
                    }
                    *dw++ = sum * a->x_scale;
                }
    return AC_OK;
}

/* ---- pooling ---- */

/* x (N, C, H, W) -> y (N, C, P, Q): the mean of what of the window lies inside, halves away from zero */
ac_status AC_KERNEL(q_avg_pool)(const ac_call *call) {
    const ac_attr_q_avg_pool *a = call->attr;
    const shape in = shape_of(AC_IN_T(call, 0)), out = shape_of(AC_OUT_T(call, 0));
    const int8_t *x = AC_IN(call, 0);
    int8_t *y = AC_OUT(call, 0);
    for (size_t k = 0; k < (size_t)in.n * (size_t)in.c; k++, x += in.plane)
        for (int p = 0; p < out.h; p++)
            for (int q = 0; q < out.w; q++) {
                const int row = p * a->stride[0] - a->before[0], col = q * a->stride[1] - a->before[1];
                const int top = larger(row, 0), bottom = smaller(row + a->kernel[0], in.h),
                          left = larger(col, 0), right = smaller(col + a->kernel[1], in.w);
                const int32_t count = larger(bottom - top, 0) * larger(right - left, 0);
                int32_t sum = 0;
                for (int i = top; i < bottom; i++)
                    for (int j = left; j < right; j++) sum += x[(size_t)i * (size_t)in.w + (size_t)j];
                const int32_t mean = count == 0 ? 0 : sum < 0 ? (sum - count / 2) / count : (sum + count / 2) / count;
                *y++ = (int8_t)ac_clamped(mean, a->low, a->high);
            }
    return AC_OK;
}

/* max_pool of int8: y (N, C, P, Q), index (N, C, P, Q)? of the first largest element, row by row in its window */
ac_status AC_KERNEL(max_pool_i8)(const ac_call *call) {
    const ac_attr_max_pool *a = call->attr;
    const shape in = shape_of(AC_IN_T(call, 0)), out = shape_of(AC_OUT_T(call, 0));
    const int8_t *x = AC_IN(call, 0);
    int8_t *y = AC_OUT(call, 0);
    uint8_t *small = AC_OUT(call, 1) && AC_OUT_T(call, 1)->dtype == AC_U8 ? AC_OUT(call, 1) : NULL;
    uint16_t *large = AC_OUT(call, 1) && AC_OUT_T(call, 1)->dtype == AC_U16 ? AC_OUT(call, 1) : NULL;
    size_t done = 0;
    for (size_t k = 0; k < (size_t)in.n * (size_t)in.c; k++, x += in.plane)
        for (int p = 0; p < out.h; p++)
            for (int q = 0; q < out.w; q++, done++) {
                const int row = p * a->stride[0] - a->before[0], col = q * a->stride[1] - a->before[1];
                int32_t best = INT16_MIN, at = 0;
                for (int i = first_inside(row, a->dilation[0], a->kernel[0]);
                     i < end_inside(row, a->dilation[0], in.h, a->kernel[0]); i++)
                    for (int j = first_inside(col, a->dilation[1], a->kernel[1]);
                         j < end_inside(col, a->dilation[1], in.w, a->kernel[1]); j++) {
                        const int32_t v = x[(size_t)(row + i * a->dilation[0]) * (size_t)in.w
                                            + (size_t)(col + j * a->dilation[1])];
                        if (v > best) {
                            best = v;
                            at = i * a->kernel[1] + j;
                        }
                    }
                y[done] = (int8_t)larger(best, INT8_MIN);
                if (small) small[done] = (uint8_t)at;
                if (large) large[done] = (uint16_t)at;
            }
    return AC_OK;
}

/* ---- update ---- */

/* What one element of a parameter is updated with. */
typedef struct {
    const ac_attr_q_sgd *a;
    float lr;
    uint32_t key;
    int wide; /* int32 rather than int8 */
} rule;

/* w[i] -= rounded(lr * g[i] / scale) for i < count; of `moment` and `rest` either may be NULL; `at` counts elements */
static void learn_run(const rule *r, void *w, const float *g, float scale, float *moment, int8_t *rest, uint32_t at,
                      size_t count) {
    int32_t *wide = w;
    int8_t *narrow = w;
    for (size_t i = 0; i < count; i++) {
        const int32_t old = r->wide ? wide[i] : narrow[i];
        float d = g[i] + r->a->weight_decay * ((float)old * scale);
        if (moment) {
            moment[i] = r->a->momentum * moment[i] + d;
            d = r->a->nesterov ? d + r->a->momentum * moment[i] : moment[i];
        }
        float by = r->lr * d / scale;
        by = by > 1073741824.0f ? 1073741824.0f : by < -1073741824.0f ? -1073741824.0f : by == by ? by : 0.0f;
        int64_t value;
        if (rest) {
            const float parts = by * 256.0f;
            const int32_t fine = ac_half_away(parts > 1073741824.0f ? 1073741824.0f : parts < -1073741824.0f ? -1073741824.0f : parts);
            int64_t sum = (int64_t)old * 256 + rest[i] - fine;
            sum = sum < INT8_MIN * 256 ? INT8_MIN * 256 : sum > INT8_MAX * 256 + 127 ? INT8_MAX * 256 + 127 : sum;
            value = (sum + 128) >> 8;
            rest[i] = (int8_t)(sum - value * 256);
        } else if (r->a->rounding) {
            const uint32_t bits = ac_hash_u32(ac_hash_u32((at + (uint32_t)i) ^ r->key) + r->key);
            const double sum = (double)by + (double)(bits >> 8) * (1.0 / 16777216.0);
            const int32_t whole = (int32_t)sum;
            value = (int64_t)old - (whole - (sum < (double)whole));
        } else {
            value = (int64_t)old - ac_half_away(by);
        }
        if (r->wide) wide[i] = value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : (int32_t)value;
        else narrow[i] = (int8_t)(value < INT8_MIN ? INT8_MIN : value > INT8_MAX ? INT8_MAX : value);
    }
}

/* w, g, lr (1), scale (1 or w's first dimension), momentum?, residual?, step (1)?, index (P)? */
ac_status AC_KERNEL(q_sgd)(const ac_call *call) {
    const ac_attr_q_sgd *a = call->attr;
    const ac_tensor *t = AC_IN_T(call, 0), *index = AC_IN_T(call, 7);
    const int32_t *step = AC_IN(call, 6), *channel = AC_IN(call, 7);
    const float *g = AC_IN(call, 1), *scale = AC_IN(call, 3);
    float *moment = AC_IN(call, 4);
    int8_t *rest = AC_IN(call, 5);
    const rule r = {a, *(const float *)AC_IN(call, 2),
                    step ? ac_hash_u32((uint32_t)step[0] * 0x9E3779B9u + (uint32_t)a->salt) : 0, t->dtype == AC_I32};
    const size_t rows = t->rank ? (size_t)t->dim[0] : 1, row = t->size / rows, size = r.wide ? 4 : 1;
    const int each = AC_IN_T(call, 3)->size > 1, axis = index ? a->axis : 0;
    size_t blocks = 1, inner = row, parts = rows, done = 0; /* blocks of the first dimensions, parts of each, elements of each */
    if (axis > 0) {
        blocks = rows;
        for (int i = 1; i < axis; i++) blocks *= (size_t)t->dim[i];
        parts = (size_t)t->dim[axis];
        inner = t->size / (blocks * parts);
    }
    for (size_t k = 0; k < blocks; k++)
        for (size_t i = 0; i < (index ? index->size : parts); i++, done += inner) {
            const size_t at = (k * parts + (index ? (size_t)channel[i] : i)) * inner;
            learn_run(&r, (uint8_t *)AC_IN(call, 0) + at * size, g + done, scale[each ? at / row : 0],
                      moment ? moment + done : NULL, rest ? rest + done : NULL, (uint32_t)done, inner);
        }
    return AC_OK;
}
