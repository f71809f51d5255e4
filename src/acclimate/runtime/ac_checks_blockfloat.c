/* What the signatures of the block floating point rows cannot say, checked once when a Program is loaded; see ac_checks.c. */
#include "ac_ops.h"

static int same_shape(const ac_tensor *a, const ac_tensor *b) {
    if (a->rank != b->rank) return 0;
    for (int i = 0; i < a->rank; i++)
        if (a->dim[i] != b->dim[i]) return 0;
    return 1;
}

static ac_status fits(int condition) { return condition ? AC_OK : AC_E_SHAPE; }

/* Inputs 0 and outputs 0 of one shape and type. */
static ac_status check_alike(const ac_call *call) {
    return fits(same_shape(AC_IN_T(call, 0), AC_OUT_T(call, 0)) && AC_IN_T(call, 0)->dtype == AC_OUT_T(call, 0)->dtype);
}

ac_status ac_check_bf_pack(const ac_call *call) { return fits(same_shape(AC_IN_T(call, 0), AC_OUT_T(call, 0))); }
ac_status ac_check_bf_unpack(const ac_call *call) { return fits(same_shape(AC_IN_T(call, 0), AC_OUT_T(call, 0))); }
ac_status ac_check_bf_sum(const ac_call *call) { return fits(AC_IN_T(call, 0)->rank >= 2); }

ac_status ac_check_bf_keep_top(const ac_call *call) { return check_alike(call); }

ac_status ac_check_bf_gate(const ac_call *call) {
    const ac_status status = check_alike(call);
    return status != AC_OK ? status : fits(same_shape(AC_IN_T(call, 0), AC_IN_T(call, 1)));
}

ac_status ac_check_bf_align(const ac_call *call) {
    const int32_t *ratio = AC_IN(call, 2), *power = AC_IN(call, 3), spare = ((const ac_attr_bf_align *)call->attr)->spare;
    if (!ratio || !power || spare < 0 || spare > 31) return AC_E_OP;
    for (uint32_t o = 0; o < AC_IN_T(call, 2)->size; o++)
        if (ratio[o] < 0 || ratio[o] > 32768 || power[o] < -512 || power[o] > 512) return AC_E_OP;
    return check_alike(call);
}

ac_status ac_check_bf_conv_input_grad(const ac_call *call) {
    const ac_attr_bf_conv_input_grad *a = call->attr;
    ac_status status = ac_check_window(AC_OUT_T(call, 0), AC_IN_T(call, 2), AC_IN_T(call, 0), a->stride, a->groups);
    if (status == AC_OK) status = ac_check_part(call, 2, 3);
    return status == AC_OK ? fits(ac_same_sides(a->size, AC_OUT_T(call, 0))) : status;
}

ac_status ac_check_bf_conv_weight_grad(const ac_call *call) {
    const ac_attr_bf_conv_weight_grad *a = call->attr;
    if (a->x_zero < INT8_MIN || a->x_zero > INT8_MAX) return AC_E_OP;
    const ac_status status = ac_check_window(AC_IN_T(call, 0), AC_OUT_T(call, 0), AC_IN_T(call, 1), a->stride, a->groups);
    return status == AC_OK ? fits(ac_same_sides(a->kernel, AC_OUT_T(call, 0))) : status;
}

ac_status ac_check_bf_add(const ac_call *call) {
    const ac_status status = check_alike(call);
    return status != AC_OK ? status
                           : fits(same_shape(AC_IN_T(call, 0), AC_IN_T(call, 2))
                                  && AC_IN_T(call, 0)->dtype == AC_IN_T(call, 2)->dtype);
}

ac_status ac_check_bf_avg_pool_grad(const ac_call *call) {
    const ac_attr_bf_avg_pool_grad *a = call->attr;
    if ((int64_t)a->kernel[0] * a->kernel[1] > 1 << 23) return AC_E_OP;
    if (AC_IN_T(call, 0)->dtype != AC_OUT_T(call, 0)->dtype) return AC_E_SHAPE;
    return ac_check_average(AC_OUT_T(call, 0), AC_IN_T(call, 0), a->kernel, a->stride, a->before, a->after, a->extra);
}

ac_status ac_check_bf_reshape(const ac_call *call) {
    const ac_tensor *m = AC_IN_T(call, 0), *e = AC_IN_T(call, 1), *out = AC_OUT_T(call, 0), *f = AC_OUT_T(call, 1);
    return fits(m->rank >= 2 && e->rank == 2 && out->rank >= 2 && f->rank == 2 && m->size == out->size
                && m->dtype == out->dtype && e->dim[0] == m->dim[0] && e->dim[1] == m->dim[1]
                && f->dim[0] == out->dim[0] && f->dim[1] == out->dim[1]);
}
