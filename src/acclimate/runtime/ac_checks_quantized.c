/* What the signatures of the integer rows cannot say, checked once when a Program is loaded; see ac_checks.c. */
#include "ac_ops.h"

#define MAX_TAPS 65535 /* products that an int32 sums without overflow */

static int is_int8(int32_t v) { return v >= INT8_MIN && v <= INT8_MAX; }

static int is_scaling(int32_t m, int32_t shift) { return m >= 0 && shift >= -31 && shift <= 30; }

static int is_clamp(int32_t low, int32_t high) { return is_int8(low) && is_int8(high) && low <= high; }

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

static int few_taps(const ac_tensor *w) { return w->size / (uint32_t)w->dim[0] <= MAX_TAPS; }

static ac_status check_bits(const ac_tensor *bits, const ac_tensor *like) {
    for (int i = 0; bits && i < AC_MAX_RANK; i++)
        if (bits->rank != like->rank || bits->dim[i] != like->dim[i]) return AC_E_SHAPE;
    return AC_OK;
}

ac_status ac_check_q_conv(const ac_call *call) {
    const ac_attr_q_conv *a = call->attr;
    const int32_t *m = AC_IN(call, 3), *shift = AC_IN(call, 4);
    if (!m || !shift || !is_int8(a->x_zero) || !is_int8(a->y_zero) || !is_clamp(a->low, a->high)) return AC_E_OP;
    for (uint32_t o = 0; o < AC_IN_T(call, 3)->size; o++)
        if (!is_scaling(m[o], shift[o])) return AC_E_OP;
    const ac_status status = ac_check_window(AC_IN_T(call, 0), AC_IN_T(call, 1), AC_OUT_T(call, 0), a->stride, a->groups);
    if (status != AC_OK) return status;
    return few_taps(AC_IN_T(call, 1)) ? check_bits(AC_OUT_T(call, 1), AC_OUT_T(call, 0)) : AC_E_SHAPE;
}

ac_status ac_check_q_conv_input_grad(const ac_call *call) {
    const ac_attr_q_conv_input_grad *a = call->attr;
    const ac_status status = ac_check_window(AC_OUT_T(call, 0), AC_IN_T(call, 1), AC_IN_T(call, 0), a->stride, a->groups);
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
