/* What the signatures of the integer rows cannot say, checked once when a Program is loaded; see ac_checks.c. */
#include "ac_dot.h"
#include "ac_ops.h"

#include <string.h>

static int is_int8(int32_t v) { return v >= INT8_MIN && v <= INT8_MAX; }

static int is_scaling(int32_t m, int32_t shift) { return m >= 0 && shift >= -31 && shift <= 30; }

static int is_clamp(int32_t low, int32_t high) { return is_int8(low) && is_int8(high) && low <= high; }

static int few_taps(const ac_tensor *w) { return w->size / (uint32_t)w->dim[0] <= AC_MAX_TAPS; }

static int is_scale(float v) { return v > 0.0f && v < 3.0e38f; }

ac_status ac_check_quantize(const ac_call *call) {
    const ac_attr_quantize *a = call->attr;
    return is_scale(a->scale) && is_int8(a->zero) ? AC_OK : AC_E_OP;
}

ac_status ac_check_dequantize(const ac_call *call) {
    return is_int8(((const ac_attr_dequantize *)call->attr)->zero) ? AC_OK : AC_E_OP;
}

ac_status ac_check_q_add(const ac_call *call) {
    const ac_attr_q_add *a = call->attr;
    /* shifts up to zero: an input that was raised by 20 bits has no room for more, and two sum to an int32 */
    return is_int8(a->a_zero) && is_int8(a->b_zero) && is_int8(a->y_zero) && is_clamp(a->low, a->high)
                   && is_scaling(a->a_multiplier, a->a_shift) && is_scaling(a->b_multiplier, a->b_shift)
                   && is_scaling(a->y_multiplier, a->y_shift) && a->a_shift <= 0 && a->b_shift <= 0
               ? AC_OK
               : AC_E_OP;
}

ac_status ac_check_q_rescale(const ac_call *call) {
    const ac_attr_q_rescale *a = call->attr;
    return is_int8(a->x_zero) && is_int8(a->y_zero) && is_clamp(a->low, a->high) && is_scaling(a->multiplier, a->shift)
               ? AC_OK
               : AC_E_OP;
}

/* A block's stages follow from x: each must fit the next, and the rows that are held into the work buffer. */
ac_status ac_check_q_block(const ac_call *call) {
    const ac_attr_q_block *a = call->attr;
    const int most = sizeof a->rows / sizeof a->rows[0], count = ((int)call->n_in - 1) / 2, skip = most - count;
    if (count < 1 || count > most || (int)call->n_in != 1 + 2 * count) return AC_E_OP;
    ac_tensor in = *AC_IN_T(call, 0), out = in;
    uint64_t held = 0;
    for (int i = 0; i < count; i++) {
        const int32_t *g = a->geometry + 6 * (skip + i), *q = a->scaling + 4 * (skip + i);
        const int32_t window[8] = {g[0], g[1], g[2], g[3], g[4], g[5], 1, 1};
        const ac_tensor *w = AC_IN_T(call, (uint32_t)(1 + 2 * i)), *t = AC_IN_T(call, (uint32_t)(2 + 2 * i));
        const int32_t *table = AC_IN(call, (uint32_t)(2 + 2 * i)), rows = a->rows[skip + i];
        if (w->dtype != AC_I8 || w->rank != 4 || t->dtype != AC_I32 || t->rank != 2 || t->dim[0] != 3 || t->dim[1] != w->dim[0])
            return AC_E_SHAPE;
        if (!is_int8(q[0]) || !is_int8(q[1]) || !is_clamp(q[2], q[3]) || !table || rows < 1) return AC_E_OP;
        for (int o = 0; o < w->dim[0]; o++)
            if (!is_scaling(table[w->dim[0] + o], table[2 * w->dim[0] + o])) return AC_E_OP;
        if (in.dim[1] % w->dim[1] || !few_taps(w)) return AC_E_SHAPE;
        out.dim[1] = w->dim[0];
        for (int d = 0; d < 2; d++) {
            if (g[d] < 1) return AC_E_OP;
            const int64_t size = ((int64_t)in.dim[2 + d] + g[2 + d] + g[4 + d] - w->dim[2 + d]) / g[d] + 1;
            if (size < 1 || size > INT32_MAX) return AC_E_SHAPE;
            out.dim[2 + d] = (int32_t)size;
        }
        const ac_status status = ac_check_window(&in, w, &out, window, in.dim[1] / w->dim[1]);
        if (status != AC_OK) return status;
        if (rows > out.dim[2]) return AC_E_OP;
        uint64_t size = 1; /* of what this stage makes, where it is held whole */
        for (int d = 0; d < 4; d++) {
            size *= (uint64_t)out.dim[d];
            if (size > INT32_MAX) return AC_E_SHAPE;
        }
        if (i) { /* rows of this stage's input that are held */
            const int64_t room = ((int64_t)rows - 1) * g[0] + w->dim[2];
            held += (uint64_t)in.dim[1] * (uint64_t)in.dim[3] * (uint64_t)(room < in.dim[2] ? room : in.dim[2]);
            if (held > AC_OUT_T(call, 1)->size) return AC_E_SHAPE;
        }
        in = out;
    }
    if (AC_OUT_T(call, 1)->size != (held ? held : 1)) return AC_E_SHAPE;
    for (int d = 0; d < 4; d++)
        if (out.dim[d] != AC_OUT_T(call, 0)->dim[d] || (a->adds && out.dim[d] != AC_IN_T(call, 0)->dim[d])) return AC_E_SHAPE;
    if (!a->adds) return AC_OK;
    ac_attr_q_add add;
    memcpy(&add, a->add, sizeof add);
    const ac_call sum = {.attr = &add};
    return ac_check_q_add(&sum);
}

static ac_status check_fake(const ac_tensor *x, const ac_tensor *scale, int32_t axis, int32_t low, int32_t high,
                            int32_t zero) {
    if (axis < 0 || axis >= x->rank || (scale->size != 1 && scale->size != (uint32_t)x->dim[axis])) return AC_E_SHAPE;
    return is_clamp(low, high) && low <= zero && zero <= high ? AC_OK : AC_E_OP;
}

ac_status ac_check_fake_quant(const ac_call *call) {
    const ac_attr_fake_quant *a = call->attr;
    return check_fake(AC_IN_T(call, 0), AC_IN_T(call, 1), a->axis, a->low, a->high, a->zero);
}

ac_status ac_check_fake_quant_scale_grad(const ac_call *call) {
    const ac_attr_fake_quant_scale_grad *a = call->attr;
    return check_fake(AC_IN_T(call, 1), AC_IN_T(call, 2), a->axis, a->low, a->high, a->zero);
}

static ac_status check_table(const ac_tensor *table) { return table->size == 256 ? AC_OK : AC_E_SHAPE; }

ac_status ac_check_q_table(const ac_call *call) { return check_table(AC_IN_T(call, 1)); }
ac_status ac_check_q_table_grad(const ac_call *call) { return check_table(AC_IN_T(call, 2)); }

static ac_status check_bits(const ac_tensor *bits, const ac_tensor *like) {
    for (int i = 0; bits && i < AC_MAX_RANK; i++)
        if (bits->rank != like->rank || bits->dim[i] != like->dim[i]) return AC_E_SHAPE;
    return AC_OK;
}

/* Channels of the weights, input `at`, that lie apart in `part`; the input after that has which: they exist, and ascend. */
ac_status ac_check_part(const ac_call *call, int at, int part) {
    const ac_tensor *w = AC_IN_T(call, at), *t = AC_IN_T(call, part), *index = AC_IN_T(call, part + 1);
    const int32_t *channel = AC_IN(call, part + 1);
    if (!t && !index) return AC_OK;
    if (!t || !index || !channel) return AC_E_OP;
    for (int i = 2; i < AC_MAX_RANK; i++)
        if (t->rank != w->rank || t->dim[i] != w->dim[i]) return AC_E_SHAPE;
    for (uint32_t i = 0; i < index->size; i++)
        if (channel[i] < (i ? channel[i - 1] + 1 : 0) || channel[i] >= w->dim[1]) return AC_E_OP;
    return AC_OK;
}

ac_status ac_check_q_conv(const ac_call *call) {
    const ac_attr_q_conv *a = call->attr;
    const int32_t *m = AC_IN(call, 3), *shift = AC_IN(call, 4);
    if (!m || !shift || !is_int8(a->x_zero) || !is_int8(a->y_zero) || !is_clamp(a->low, a->high)) return AC_E_OP;
    for (uint32_t o = 0; o < AC_IN_T(call, 3)->size; o++)
        if (!is_scaling(m[o], shift[o])) return AC_E_OP;
    ac_status status = ac_check_window(AC_IN_T(call, 0), AC_IN_T(call, 1), AC_OUT_T(call, 0), a->stride, a->groups);
    if (status == AC_OK) status = ac_check_part(call, 1, 5);
    if (status != AC_OK) return status;
    return few_taps(AC_IN_T(call, 1)) ? check_bits(AC_OUT_T(call, 1), AC_OUT_T(call, 0)) : AC_E_SHAPE;
}

ac_status ac_check_q_conv_input_grad(const ac_call *call) {
    const ac_attr_q_conv_input_grad *a = call->attr;
    ac_status status = ac_check_window(AC_OUT_T(call, 0), AC_IN_T(call, 1), AC_IN_T(call, 0), a->stride, a->groups);
    if (status == AC_OK) status = ac_check_part(call, 1, 4);
    if (status != AC_OK) return status;
    return ac_same_sides(a->size, AC_OUT_T(call, 0)) ? check_bits(AC_IN_T(call, 3), AC_IN_T(call, 0)) : AC_E_SHAPE;
}

ac_status ac_check_q_conv_weight_grad(const ac_call *call) {
    const ac_attr_q_conv_weight_grad *a = call->attr;
    if (!is_int8(a->x_zero)) return AC_E_OP;
    const ac_status status = ac_check_window(AC_IN_T(call, 0), AC_OUT_T(call, 0), AC_IN_T(call, 1), a->stride, a->groups);
    return status == AC_OK && !ac_same_sides(a->kernel, AC_OUT_T(call, 0)) ? AC_E_SHAPE : status;
}

ac_status ac_check_q_avg_pool(const ac_call *call) {
    const ac_attr_q_avg_pool *a = call->attr;
    if (!is_clamp(a->low, a->high) || (int64_t)a->kernel[0] * a->kernel[1] > 1 << 23) return AC_E_OP;
    return ac_check_average(AC_IN_T(call, 0), AC_OUT_T(call, 0), a->kernel, a->stride, a->before, a->after, a->extra);
}

ac_status ac_check_q_sgd(const ac_call *call) {
    const ac_attr_q_sgd *a = call->attr;
    const ac_tensor *w = AC_IN_T(call, 0), *scale = AC_IN_T(call, 3);
    if (a->rounding && !AC_IN_T(call, 6)) return AC_E_OP;
    if (AC_IN_T(call, 5) && w->dtype != AC_I8) return AC_E_SHAPE;
    if (scale->size != 1 && (!w->rank || scale->size != (uint32_t)w->dim[0])) return AC_E_SHAPE;
    return ac_check_learned(call, a->axis, 4, 2);
}

/* w is input 0; lr, scale, momentum, residual and step follow each other from `lr` on. */
static ac_status check_joint(const ac_call *call, uint32_t lr, int32_t x_zero, int32_t rounding) {
    const ac_tensor *w = AC_IN_T(call, 0), *scale = AC_IN_T(call, lr + 1);
    if (!is_int8(x_zero) || (rounding && !AC_IN_T(call, lr + 4))) return AC_E_OP;
    if (scale->size != 1 && scale->size != (uint32_t)w->dim[0]) return AC_E_SHAPE;
    for (uint32_t i = lr + 2; i < lr + 4; i++)
        for (int d = 0; AC_IN_T(call, i) && d < AC_MAX_RANK; d++)
            if (AC_IN_T(call, i)->rank != w->rank || AC_IN_T(call, i)->dim[d] != w->dim[d]) return AC_E_SHAPE;
    return AC_OK;
}

ac_status ac_check_q_conv_sgd(const ac_call *call) {
    const ac_attr_q_conv_sgd *a = call->attr;
    const ac_status status = check_joint(call, 3, a->x_zero, a->rounding);
    return status != AC_OK ? status : ac_check_window(AC_IN_T(call, 1), AC_IN_T(call, 0), AC_IN_T(call, 2), a->stride, a->groups);
}

ac_status ac_check_bf_conv_sgd(const ac_call *call) {
    const ac_attr_bf_conv_sgd *a = call->attr;
    const ac_status status = check_joint(call, 4, a->x_zero, a->rounding);
    return status != AC_OK ? status : ac_check_window(AC_IN_T(call, 1), AC_IN_T(call, 0), AC_IN_T(call, 2), a->stride, a->groups);
}
