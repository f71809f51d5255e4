/* Fake quantisation, forward and of its scale; the plain reference. Sums run over the elements in order. */
#include "ac_ops.h"
#include "ac_quantized.h"

#define BOUND 1e6f /* of a rounded number, far above any int8 */

/* round(v) + zero */
static int32_t rounded(float v, int32_t zero) {
    return ac_half_away(v < -BOUND ? -BOUND : v > BOUND ? BOUND : v) + zero;
}

/* Elements after `axis`, over which one scale holds. */
static size_t inner_of(const ac_tensor *t, int32_t axis) {
    size_t n = 1;
    for (int i = axis + 1; i < t->rank; i++)
        n *= (size_t)t->dim[i];
    return n;
}

ac_status AC_KERNEL(fake_quant)(const ac_call *call) {
    const ac_attr_fake_quant *a = call->attr;
    const ac_tensor *t = AC_IN_T(call, 0);
    const float *x = AC_IN(call, 0), *scale = AC_IN(call, 1);
    float *y = AC_OUT(call, 0);
    ac_bit_writer bits = {AC_OUT(call, 1), 0, 0};
    const size_t inner = inner_of(t, a->axis), scales = AC_IN_T(call, 1)->size;
    for (size_t i = 0; i < t->size; i++) {
        const float s = scale[i / inner % scales];
        const int32_t q = rounded(x[i] / s, a->zero), held = ac_clamped(q, a->low, a->high);
        y[i] = (float)(held - a->zero) * s;
        ac_put_bit(&bits, q == held);
    }
    ac_end_bits(&bits);
    return AC_OK;
}

ac_status AC_KERNEL(fake_quant_scale_grad)(const ac_call *call) {
    const ac_attr_fake_quant_scale_grad *a = call->attr;
    const ac_tensor *t = AC_IN_T(call, 1);
    const float *d = AC_IN(call, 0), *x = AC_IN(call, 1), *scale = AC_IN(call, 2);
    float *out = AC_OUT(call, 0);
    const size_t inner = inner_of(t, a->axis), scales = AC_IN_T(call, 2)->size;
    const int32_t most = a->high - a->zero;
    for (size_t c = 0; c < scales; c++)
        out[c] = 0.0f;
    for (size_t i = 0; i < t->size; i++) {
        const size_t c = i / inner % scales;
        const float v = x[i] / scale[c];
        const int32_t q = rounded(v, a->zero), held = ac_clamped(q, a->low, a->high);
        out[c] += d[i] * ((float)(held - a->zero) - (q == held ? v : 0.0f));
    }
    const float gain = 1.0f / ac_sqrtf((float)(t->size / scales) * (float)(most > 1 ? most : 1));
    for (size_t c = 0; c < scales; c++)
        out[c] *= gain;
    return AC_OK;
}
