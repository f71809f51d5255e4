/* Reference kernels: activations, arithmetic with broadcasting, sum and mean, dropout. */
#include "ac_math.h"
#include "ac_ops.h"

#include <string.h>

/* ---- one input: y = value of v; n elements of any shape ---- */

#define AC_MAP(op, attributes, value)                                                              \
    ac_status AC_KERNEL(op)(const ac_call *call) {                                                 \
        const float *x = AC_IN(call, 0);                                                           \
        float *y = AC_OUT(call, 0);                                                                \
        const size_t n = AC_IN_T(call, 0)->size;                                                   \
        attributes;                                                                                \
        AC_INDEPENDENT                                                                             \
        for (size_t i = 0; i < n; i++) {                                                           \
            const float v = x[i];                                                                  \
            y[i] = (value);                                                                        \
        }                                                                                          \
        return AC_OK;                                                                              \
    }

/* A gradient: y = value of d and of s, the input or output that was saved. */
#define AC_MAP_GRAD(op, attributes, value)                                                         \
    ac_status AC_KERNEL(op)(const ac_call *call) {                                                 \
        const float *gradient = AC_IN(call, 0);                                                    \
        const float *saved = AC_IN(call, 1);                                                       \
        float *y = AC_OUT(call, 0);                                                                \
        const size_t n = AC_IN_T(call, 0)->size;                                                   \
        attributes;                                                                                \
        AC_INDEPENDENT                                                                             \
        for (size_t i = 0; i < n; i++) {                                                           \
            const float d = gradient[i], s = saved[i];                                             \
            y[i] = (value);                                                                        \
        }                                                                                          \
        return AC_OK;                                                                              \
    }

#define AC_NO_ATTRIBUTES (void)0
#define AC_ATTRIBUTES(op) const ac_attr_##op a = *(const ac_attr_##op *)call->attr

/* ---- piecewise linear ---- */

/* As AC_MAP; and where the second output is asked for, its bit i says whether x[i] is `inside`. */
#define AC_MAP_BITS(op, attributes, value, inside)                                                 \
    ac_status AC_KERNEL(op)(const ac_call *call) {                                                 \
        const float *x = AC_IN(call, 0);                                                           \
        float *y = AC_OUT(call, 0);                                                                \
        uint32_t *bits = AC_OUT(call, 1);                                                          \
        const size_t n = AC_IN_T(call, 0)->size;                                                   \
        attributes;                                                                                \
        for (size_t i = 0; bits && i < n; i += 32) {                                               \
            const uint32_t count = n - i < 32 ? (uint32_t)(n - i) : 32;                            \
            uint32_t word = 0;                                                                     \
            for (uint32_t l = 0; l < count; l++) {                                                 \
                const float v = x[i + l];                                                          \
                word |= (uint32_t)(inside) << l;                                                   \
            }                                                                                      \
            bits[i / 32] = word;                                                                   \
        }                                                                                          \
        AC_INDEPENDENT                                                                             \
        for (size_t i = 0; i < n; i++) {                                                           \
            const float v = x[i];                                                                  \
            y[i] = (value);                                                                        \
        }                                                                                          \
        return AC_OK;                                                                              \
    }

AC_MAP_BITS(relu, AC_NO_ATTRIBUTES, ac_at_least(0.0f, v), v > 0.0f)
AC_MAP_BITS(hard_tanh, AC_ATTRIBUTES(hard_tanh), ac_at_most(a.high, ac_at_least(a.low, v)),
            ac_between(a.low, a.high, v))
AC_MAP_BITS(leaky_relu, AC_ATTRIBUTES(leaky_relu), (v * (v > 0.0f ? 1.0f : a.slope)), v > 0.0f)
AC_MAP_GRAD(gate, AC_ATTRIBUTES(gate), (d * (ac_between(a.low, a.high, s) ? 1.0f : a.slope)))

/* y = d where the bit is set, slope * d elsewhere; n elements */
ac_status AC_KERNEL(gate_bits)(const ac_call *call) {
    const float *d = AC_IN(call, 0);
    const uint32_t *bits = AC_IN(call, 1);
    float *y = AC_OUT(call, 0);
    const size_t n = AC_IN_T(call, 0)->size;
    const float slope = ((const ac_attr_gate_bits *)call->attr)->slope;
    for (size_t i = 0; i < n; i += 32) {
        const uint32_t word = bits[i / 32], count = n - i < 32 ? (uint32_t)(n - i) : 32;
        if (word == 0xFFFFFFFFu && count == 32) {
            if (y != d) memcpy(y + i, d + i, 32 * sizeof *y);
            continue;
        }
        AC_INDEPENDENT
        for (uint32_t l = 0; l < count; l++)
            y[i + l] = d[i + l] * (word >> l & 1u ? 1.0f : slope);
    }
    return AC_OK;
}

/* ---- smooth; the _slope functions are derivatives ---- */

#define ROOT_HALF 0.707106781f        /* sqrt(1 / 2) */
#define ROOT_TWO_OVER_PI 0.797884561f /* sqrt(2 / pi) */
#define DENSITY_AT_ZERO 0.398942280f  /* 1 / sqrt(2 pi) */
#define TWO_OVER_ROOT_PI 1.12837917f  /* 2 / sqrt(pi) */

AC_INLINE float gelu_inner_tanh(float x) {
    return ac_tanhf(ROOT_TWO_OVER_PI * (x + 0.044715f * (x * x * x)));
}

/* of 0.5 x (1 + tanh(u(x))); beyond 50 it is 0 or 1, and x * x may overflow */
AC_INLINE float gelu_tanh_slope(float x) {
    x = ac_at_most(50.0f, ac_at_least(-50.0f, x));
    const float t = gelu_inner_tanh(x);
    const float du = ROOT_TWO_OVER_PI * (1.0f + 3.0f * 0.044715f * (x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
}

/* of x Phi(x): Phi(x) + x phi(x) */
AC_INLINE float gelu_erf_slope(float x) {
    x = ac_at_most(50.0f, ac_at_least(-50.0f, x));
    return 0.5f * (1.0f + ac_erff(x * ROOT_HALF)) +
           x * (ac_expf(-0.5f * (x * x)) * DENSITY_AT_ZERO);
}

AC_INLINE float silu_slope(float x) {
    const float y = ac_sigmoidf(x);
    return y * (1.0f + x * (1.0f - y));
}

AC_INLINE float hard_sigmoid(float x) {
    return ac_at_most(6.0f, ac_at_least(0.0f, x + 3.0f)) * (1.0f / 6.0f);
}

AC_INLINE float hard_swish_slope(float x) {
    const float middle = (2.0f * x + 3.0f) * (1.0f / 6.0f);
    const float right = x >= 3.0f ? 1.0f : middle;
    return x <= -3.0f ? 0.0f : right;
}

AC_INLINE float elu(float x, float alpha) {
    const float left = alpha * ac_expm1f(x > 0.0f ? 0.0f : x);
    return x > 0.0f ? x : left;
}

/* -1, 0 or 1; a NaN stays one */
AC_INLINE float sign(float x) {
    const float not_positive = x < 0.0f ? -1.0f : x;
    return x > 0.0f ? 1.0f : not_positive;
}

/* The next whole number: below, above, nearest (halves to even), towards zero. From 2^23 on all floats are whole. */
AC_INLINE float rounded(float x, int32_t mode) {
    if (!(ac_absf(x) < 8388608.0f))
        return x;
    const float whole = (float)(int32_t)x;
    const float up = (ac_absf(x) + 8388608.0f) - 8388608.0f, nearest = ac_copysignf(up, x);
    const float below = whole > x ? whole - 1.0f : whole, above = whole < x ? whole + 1.0f : whole;
    return ac_copysignf(mode == 0 ? below : mode == 1 ? above : mode == 2 ? nearest : whole, x);
}

AC_MAP(sigmoid, AC_NO_ATTRIBUTES, ac_sigmoidf(v))
AC_MAP_GRAD(sigmoid_grad, AC_NO_ATTRIBUTES, (d * (s * (1.0f - s))))
AC_MAP(tanh, AC_NO_ATTRIBUTES, ac_tanhf(v))
AC_MAP_GRAD(tanh_grad, AC_NO_ATTRIBUTES, (d * (1.0f - s * s)))
AC_MAP(silu, AC_NO_ATTRIBUTES, (v * ac_sigmoidf(v)))
AC_MAP_GRAD(silu_grad, AC_NO_ATTRIBUTES, (d * silu_slope(s)))
AC_MAP(hard_swish, AC_NO_ATTRIBUTES, (v * hard_sigmoid(v)))
AC_MAP_GRAD(hard_swish_grad, AC_NO_ATTRIBUTES, (d * hard_swish_slope(s)))
AC_MAP(hard_sigmoid, AC_NO_ATTRIBUTES, hard_sigmoid(v))
AC_MAP_GRAD(hard_sigmoid_grad, AC_NO_ATTRIBUTES,
            (d * (ac_between(-3.0f, 3.0f, s) ? 1.0f / 6.0f : 0.0f)))
AC_MAP(elu, AC_ATTRIBUTES(elu), elu(v, a.alpha))
AC_MAP_GRAD(elu_grad, AC_ATTRIBUTES(elu_grad), (d * (s > 0.0f ? 1.0f : s + a.alpha)))
AC_MAP(softplus, AC_NO_ATTRIBUTES, ac_softplusf(v))
AC_MAP_GRAD(softplus_grad, AC_NO_ATTRIBUTES, (d * ac_sigmoidf(s)))
AC_MAP(exp, AC_NO_ATTRIBUTES, ac_expf(v))
AC_MAP_GRAD(exp_grad, AC_NO_ATTRIBUTES, (d * s))
AC_MAP(log, AC_NO_ATTRIBUTES, ac_logf(v))
AC_MAP_GRAD(log_grad, AC_NO_ATTRIBUTES, d / s)
AC_MAP(sqrt, AC_NO_ATTRIBUTES, ac_sqrtf(v))
AC_MAP_GRAD(sqrt_grad, AC_NO_ATTRIBUTES, (d * (0.5f / s)))
AC_MAP(square, AC_NO_ATTRIBUTES, (v * v))
AC_MAP_GRAD(square_grad, AC_NO_ATTRIBUTES, (d * (2.0f * s)))
AC_MAP(abs, AC_NO_ATTRIBUTES, ac_absf(v))
AC_MAP_GRAD(abs_grad, AC_NO_ATTRIBUTES, (d * sign(s)))
AC_MAP(reciprocal, AC_NO_ATTRIBUTES, 1.0f / v)
AC_MAP_GRAD(reciprocal_grad, AC_NO_ATTRIBUTES, (d * (-s * s)))
AC_MAP(pow, AC_ATTRIBUTES(pow), ac_powf(v, a.exponent))
AC_MAP_GRAD(pow_grad, AC_ATTRIBUTES(pow_grad), (d * (a.exponent * ac_powf(s, a.exponent - 1.0f))))
AC_MAP(erf, AC_NO_ATTRIBUTES, ac_erff(v))
AC_MAP_GRAD(erf_grad, AC_NO_ATTRIBUTES, (d * (TWO_OVER_ROOT_PI * ac_expf(-s * s))))
AC_MAP(sin, AC_NO_ATTRIBUTES, ac_sinf(v, 0))
AC_MAP_GRAD(sin_grad, AC_NO_ATTRIBUTES, (d * ac_sinf(s, 1)))
AC_MAP(round, AC_ATTRIBUTES(round), rounded(v, a.mode))
AC_MAP(affine, AC_ATTRIBUTES(affine), (v * a.scale + a.shift))

/* y = x Phi(x), or its approximation by tanh */
ac_status AC_KERNEL(gelu)(const ac_call *call) {
    const float *x = AC_IN(call, 0);
    float *y = AC_OUT(call, 0);
    const size_t n = AC_IN_T(call, 0)->size;
    if (((const ac_attr_gelu *)call->attr)->tanh) {
        AC_INDEPENDENT
        for (size_t i = 0; i < n; i++)
            y[i] = 0.5f * x[i] * (1.0f + gelu_inner_tanh(x[i]));
    } else {
        AC_INDEPENDENT
        for (size_t i = 0; i < n; i++)
            y[i] = 0.5f * x[i] * (1.0f + ac_erff(x[i] * ROOT_HALF));
    }
    return AC_OK;
}

ac_status AC_KERNEL(gelu_grad)(const ac_call *call) {
    const float *d = AC_IN(call, 0), *x = AC_IN(call, 1);
    float *y = AC_OUT(call, 0);
    const size_t n = AC_IN_T(call, 0)->size;
    if (((const ac_attr_gelu_grad *)call->attr)->tanh) {
        AC_INDEPENDENT
        for (size_t i = 0; i < n; i++)
            y[i] = d[i] * gelu_tanh_slope(x[i]);
    } else {
        AC_INDEPENDENT
        for (size_t i = 0; i < n; i++)
            y[i] = d[i] * gelu_erf_slope(x[i]);
    }
    return AC_OK;
}

/* ---- two inputs, with broadcasting ---- */

/* One dimension of the common shape: its size, and how far an index in it moves each input (0: stretched). */
typedef struct {
    size_t size, step_a, step_b;
} pair_dim;

/* The common shape, outermost first, without dimensions of one and with neighbours merged where both inputs go on
 * as they would in one dimension. Returns how many dimensions are left, at least one. */
static int pair_dims(const ac_tensor *a, const ac_tensor *b, const ac_tensor *y, pair_dim *dims) {
    size_t next_a = 1, next_b = 1; /* elements of a and b in the dimensions so far */
    pair_dim from_inside[AC_MAX_RANK];
    int count = 0;
    for (int i = 1; i <= y->rank; i++) {
        const size_t size = (size_t)y->dim[y->rank - i];
        const size_t size_a = i <= a->rank ? (size_t)a->dim[a->rank - i] : 1;
        const size_t size_b = i <= b->rank ? (size_t)b->dim[b->rank - i] : 1;
        const size_t step_a = size_a == 1 ? 0 : next_a, step_b = size_b == 1 ? 0 : next_b;
        next_a *= size_a;
        next_b *= size_b;
        if (size == 1)
            continue;
        pair_dim *last = count ? &from_inside[count - 1] : NULL;
        if (last && step_a == last->size * last->step_a && step_b == last->size * last->step_b) {
            last->size *= size;
        } else {
            from_inside[count].size = size;
            from_inside[count].step_a = step_a;
            from_inside[count++].step_b = step_b;
        }
    }
    for (int i = 0; i < count; i++)
        dims[i] = from_inside[count - 1 - i];
    if (count == 0) {
        dims[0].size = dims[0].step_a = dims[0].step_b = 1;
        count = 1;
    }
    return count;
}

/* n elements of the innermost dimension; a step is 0 or 1, not both 0 */
typedef void pair_row(const float *a, size_t step_a, const float *b, size_t step_b, float *y,
                      size_t n);

/* Calls `row` for each index of the outer dimensions, like an odometer. */
static ac_status for_each_row(const ac_call *call, pair_row *row) {
    const float *a = AC_IN(call, 0), *b = AC_IN(call, 1);
    float *y = AC_OUT(call, 0);
    pair_dim dims[AC_MAX_RANK];
    size_t index[AC_MAX_RANK] = {0};
    const int inner = pair_dims(AC_IN_T(call, 0), AC_IN_T(call, 1), AC_OUT_T(call, 0), dims) - 1;
    const pair_dim row_dim = dims[inner];
    for (;;) {
        row(a, row_dim.step_a, b, row_dim.step_b, y, row_dim.size);
        y += row_dim.size;
        int i = inner - 1;
        for (; i >= 0 && ++index[i] == dims[i].size; i--) {
            index[i] = 0;
            a -= (dims[i].size - 1) * dims[i].step_a;
            b -= (dims[i].size - 1) * dims[i].step_b;
        }
        if (i < 0)
            return AC_OK;
        a += dims[i].step_a;
        b += dims[i].step_b;
    }
}

#define AC_PAIR_ROW(op, value)                                                                     \
    static void op##_row(const float *a, size_t step_a, const float *b, size_t step_b, float *y,   \
                         size_t n) {                                                               \
        if (step_a == 0) {                                                                         \
            const float A = *a;                                                                    \
            AC_INDEPENDENT                                                                         \
            for (size_t i = 0; i < n; i++) {                                                       \
                const float B = b[i];                                                              \
                y[i] = (value);                                                                    \
            }                                                                                      \
        } else if (step_b == 0) {                                                                  \
            const float B = *b;                                                                    \
            AC_INDEPENDENT                                                                         \
            for (size_t i = 0; i < n; i++) {                                                       \
                const float A = a[i];                                                              \
                y[i] = (value);                                                                    \
            }                                                                                      \
        } else {                                                                                   \
            AC_INDEPENDENT                                                                         \
            for (size_t i = 0; i < n; i++) {                                                       \
                const float A = a[i], B = b[i];                                                    \
                y[i] = (value);                                                                    \
            }                                                                                      \
        }                                                                                          \
    }

#define AC_PAIR(op, value)                                                                         \
    AC_PAIR_ROW(op, value)                                                                         \
    ac_status AC_KERNEL(op)(const ac_call *call) { return for_each_row(call, op##_row); }

AC_PAIR_ROW(add, A + B)
AC_PAIR(sub, A - B)
AC_PAIR(mul, (A * B))
AC_PAIR(div, A / B)
AC_PAIR(greater, A > B ? 1.0f : 0.0f)
AC_PAIR(keep, B != 0.0f ? A : 0.0f)

/* a + b, clamped; and the bits. Where nothing is stretched, a block at a time, while it is in the first cache. */
ac_status AC_KERNEL(add)(const ac_call *call) {
    enum { BLOCK = 1024 };
    const ac_attr_add *attr = call->attr;
    const float *a = AC_IN(call, 0), *b = AC_IN(call, 1);
    float *y = AC_OUT(call, 0);
    uint32_t *bits = AC_OUT(call, 1);
    const size_t size = AC_OUT_T(call, 0)->size;
    const int stretched = AC_IN_T(call, 0)->size != size || AC_IN_T(call, 1)->size != size;
    if (stretched)
        for_each_row(call, add_row);
    for (size_t i = 0; i < size; i += BLOCK) {
        const size_t n = size - i < BLOCK ? size - i : BLOCK;
        if (!stretched)
            add_row(a + i, 1, b + i, 1, y + i, n);
        ac_clamp(y + i, attr->low, attr->high, n);
        if (bits)
            ac_pack_between(y + i, bits + i / 32, attr->low, attr->high, n);
    }
    return AC_OK;
}

/* ---- sum and mean ---- */

/* The input's dimensions as alternating groups, outermost first; none is of one element. */
typedef struct {
    size_t size, step;
    int reduced;
} axis_group;

static int axis_groups(const ac_tensor *x, uint32_t axes, axis_group *groups) {
    axis_group from_inside[AC_MAX_RANK];
    size_t step = 1;
    int count = 0;
    for (int i = x->rank - 1; i >= 0; i--) {
        const size_t size = (size_t)x->dim[i];
        const int reduced = (int)(axes >> i & 1u);
        if (size > 1 && count && from_inside[count - 1].reduced == reduced) {
            from_inside[count - 1].size *= size;
        } else if (size > 1) {
            from_inside[count].size = size;
            from_inside[count].step = step;
            from_inside[count++].reduced = reduced;
        }
        step *= size;
    }
    for (int i = 0; i < count; i++)
        groups[i] = from_inside[count - 1 - i];
    return count;
}

/* Where the element `index` of the kept (or of the reduced) groups before `end` starts. */
static size_t offset_of(const axis_group *groups, int end, int reduced, size_t index) {
    size_t offset = 0;
    for (int i = end - 1; i >= 0; i--)
        if (groups[i].reduced == reduced) {
            offset += index % groups[i].size * groups[i].step;
            index /= groups[i].size;
        }
    return offset;
}

static size_t size_of(const axis_group *groups, int end, int reduced) {
    size_t size = 1;
    for (int i = 0; i < end; i++)
        size *= groups[i].reduced == reduced ? groups[i].size : 1;
    return size;
}

/* ac_sum of at most AC_SUM_BLOCK neighbours, which needs no double */
static float sum_block(const float *x, size_t n) {
    float lane[AC_SUM_LANES] = {0};
    size_t i = 0;
    for (; i + AC_SUM_LANES <= n; i += AC_SUM_LANES)
        for (size_t l = 0; l < AC_SUM_LANES; l++) lane[l] += x[i + l];
    for (size_t l = 0; i < n; i++, l++) lane[l] += x[i];
    return 0.0f + ac_fold(lane);
}

/* y[r] = scale * sum over the reduced groups, of which the last is contiguous */
static void sum_rows(const float *x, const axis_group *groups, int count, double divisor,
                     float *y) {
    const size_t kept = size_of(groups, count, 0), chunks = size_of(groups, count - 1, 1);
    const size_t n = groups[count - 1].size;
    for (size_t k = 0; k < kept; k++) {
        const float *from = x + offset_of(groups, count, 0, k);
        if (chunks == 1 && n <= AC_SUM_BLOCK && divisor == 1.0) {
            y[k] = sum_block(from, n);
            continue;
        }
        double total = 0;
        for (size_t c = 0; c < chunks; c++) {
            const float *chunk = from + offset_of(groups, count - 1, 1, c);
            total += ac_sum(chunk, chunk, 0.0f, n, 1);
        }
        y[k] = (float)(total / divisor);
    }
}

/* The same where the last group is kept: AC_SUM_LANES columns side by side, the reduced indices one after another;
 * after each 32 of them the float sums are added to double ones. */
static void sum_columns(const float *x, const axis_group *groups, int count, double divisor,
                        float *y) {
    const size_t kept = size_of(groups, count - 1, 0), rows = size_of(groups, count, 1);
    const size_t n = groups[count - 1].size;
    const axis_group last = groups[count - 2]; /* the innermost reduced group */
    for (size_t k = 0; k < kept; k++, y += n)
        for (size_t c = 0; c < n; c += AC_SUM_LANES) {
            const size_t width = n - c < AC_SUM_LANES ? n - c : AC_SUM_LANES;
            const float *from = x + offset_of(groups, count - 1, 0, k) + c;
            double total[AC_SUM_LANES] = {0};
            for (size_t r = 0; r < rows; r += last.size) {
                const float *part = from + offset_of(groups, count, 1, r);
                ac_sum_columns(part, last.size, last.step, width, total);
            }
            for (size_t l = 0; l < width; l++)
                y[c + l] = (float)(total[l] / divisor);
        }
}

static void reduce(const ac_call *call, uint32_t axes, int mean) {
    const ac_tensor *t = AC_IN_T(call, 0);
    const float *x = AC_IN(call, 0);
    float *y = AC_OUT(call, 0);
    axis_group groups[AC_MAX_RANK];
    const int count = axis_groups(t, axes, groups);
    const double divisor = mean ? (double)size_of(groups, count, 1) : 1.0;
    if (count == 0 || (count == 1 && !groups[0].reduced)) {
        for (size_t i = 0; i < t->size; i++)
            y[i] = x[i];
    } else if (groups[count - 1].reduced) {
        sum_rows(x, groups, count, divisor, y);
    } else {
        sum_columns(x, groups, count, divisor, y);
    }
}

ac_status AC_KERNEL(sum)(const ac_call *call) {
    reduce(call, (uint32_t)((const ac_attr_sum *)call->attr)->axes, 0);
    return AC_OK;
}

ac_status AC_KERNEL(mean)(const ac_call *call) {
    reduce(call, (uint32_t)((const ac_attr_mean *)call->attr)->axes, 1);
    return AC_OK;
}

/* ---- dropout ---- */

/* y = x / (1 - p) where the uniform number of (step, salt, i) is at least p, else 0 */
ac_status AC_KERNEL(dropout)(const ac_call *call) {
    const ac_attr_dropout *a = call->attr;
    const float *x = AC_IN(call, 0);
    const int32_t *step = AC_IN(call, 1);
    float *y = AC_OUT(call, 0);
    const uint32_t n = AC_IN_T(call, 0)->size,
                   key = ac_hash_u32((uint32_t)step[0] * 0x9E3779B9u + (uint32_t)a->salt);
    const float p = a->p, scale = (float)(1.0 / (1.0 - (double)p));
    AC_INDEPENDENT
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t bits = ac_hash_u32(ac_hash_u32(i ^ key) + key);
        const float uniform = (float)(int32_t)(bits >> 8) * 5.96046448e-8f; /* 2^-24 */
        const float kept = x[i] * scale;
        y[i] = uniform >= p ? kept : 0.0f;
    }
    return AC_OK;
}
