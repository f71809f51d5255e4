/* Ops that memory limits, on several threads: each runs the plain kernel on a part of the elements or of the images (or
 * rows). So the bits are the plain kernel's, whatever the number of threads. */
#include "ac_fast.h"

enum { TOUCH = 8 }; /* multiply-adds that an element of such an op costs as much as */

typedef struct {
    const ac_call *call;
    ac_kernel kernel;
    uint32_t split;     /* bit i: argument i is divided, the others are given whole */
    int flat;           /* by elements; else along the first dimension */
    size_t count, step; /* elements or indices; how many of them stay together, so that a word of bits is one part's */
} shared;

static size_t bytes_of(const ac_tensor *t, size_t elements) {
    switch (t->dtype) {
    case AC_BIT: return elements / 8;
    case AC_U8:
    case AC_I8: return elements;
    case AC_U16: return 2 * elements;
    default: return 4 * elements;
    }
}

static void run_part(void *argument, int index, int parts) {
    const shared *s = argument;
    const int steps = (int)((s->count + s->step - 1) / s->step);
    int first, last;
    part_of(steps, index, parts, &first, &last);
    const size_t begin = (size_t)first * s->step;
    const size_t end = last == steps ? s->count : (size_t)last * s->step;
    if (begin >= end) return;
    ac_call call = *s->call;
    ac_tensor tensor[AC_MAX_ARGS];
    call.workers = NULL;
    for (uint32_t i = 0; i < call.n_in + call.n_out; i++) {
        if (!call.tensor[i] || !(s->split >> i & 1u)) continue;
        ac_tensor *t = tensor + i;
        *t = *call.tensor[i];
        const size_t each = t->size / s->count;
        t->size = (uint32_t)(each * (end - begin));
        if (s->flat) {
            t->rank = 1;
            for (int k = 1; k < AC_MAX_RANK; k++) t->dim[k] = 1;
        }
        t->dim[0] = (int32_t)(end - begin);
        call.data[i] = (char *)call.data[i] + bytes_of(t, each * begin);
        call.tensor[i] = t;
    }
    s->kernel(&call);
}

/* ins, outs: bit masks of the arguments that are divided. */
static ac_status share(const ac_call *call, ac_kernel kernel, int flat, uint32_t ins, uint32_t outs) {
    const ac_tensor *x = AC_IN_T(call, 0);
    shared s = {call, kernel, ins | outs << call->n_in, flat, flat ? x->size : (size_t)x->dim[0], flat ? 32 : 1};
    if (!call->workers || call->workers->count == 1 || (!flat && x->rank < 2)) return kernel(call);
    for (uint32_t i = 0; i < call->n_in + call->n_out; i++) {
        const ac_tensor *t = call->tensor[i];
        if (!t || !(s.split >> i & 1u)) continue;
        if (flat && t->size != x->size) return kernel(call); /* stretched */
        while (t->dtype == AC_BIT && t->size / s.count * s.step % 32) s.step *= 2;
    }
    ac_share(call->workers, (double)TOUCH * x->size, run_part, &s);
    return AC_OK;
}

#define AC_SHARE(op, flat, ins, outs)                                                                              \
    ac_status AC_FAST_KERNEL(op)(const ac_call *call) { return share(call, AC_KERNEL(op), flat, ins, outs); }

AC_SHARE(relu, 1, 1, 3)
AC_SHARE(hard_tanh, 1, 1, 3)
AC_SHARE(gelu, 1, 1, 1)
AC_SHARE(gelu_grad, 1, 3, 1)
AC_SHARE(add, 1, 3, 3)
AC_SHARE(batch_norm, 0, 1, 3)
AC_SHARE(layer_norm, 0, 1, 7)
AC_SHARE(softmax, 0, 1, 1)
AC_SHARE(softmax_grad, 0, 3, 1)
AC_SHARE(max_pool, 0, 1, 3)
AC_SHARE(avg_pool, 0, 1, 1)
AC_SHARE(avg_pool_grad, 0, 1, 1)

/* ---- sums over all images: channels are divided ---- */

static void grad_part(void *argument, int index, int parts) {
    const ac_call *call = argument;
    int first, last;
    part_of(AC_IN_T(call, 0)->dim[1], index, parts, &first, &last);
    AC_KERNEL(batch_norm_grad_of)(call, (size_t)first, (size_t)last);
}

ac_status AC_FAST_KERNEL(batch_norm_grad)(const ac_call *call) {
    ac_call own = *call;
    if (!call->workers) return AC_KERNEL(batch_norm_grad)(call);
    ac_share(call->workers, (double)TOUCH * AC_IN_T(call, 0)->size, grad_part, &own);
    return AC_OK;
}
