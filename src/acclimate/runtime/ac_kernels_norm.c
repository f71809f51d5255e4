/* Reference kernels: batch norm, layer norm, softmax and their gradients. */
#include "ac_math.h"
#include "ac_ops.h"

/* ---- batch norm ---- */

/* (N, C, ...) as N blocks of C channels of `inner` contiguous elements */
typedef struct {
    size_t n, channels, inner;
} channel_shape;

static channel_shape channels_of(const ac_tensor *x) {
    const channel_shape s = {(size_t)x->dim[0], (size_t)x->dim[1],
                             x->size / ((size_t)x->dim[0] * (size_t)x->dim[1])};
    return s;
}

typedef double sum_function(const float *a, const float *b, float s, size_t n, size_t stride);

/* One of the sums of ac_math.h over everything of channel c. */
AC_INLINE double channel_sum(sum_function *sum, const float *a, const float *b, float s,
                             channel_shape shape, size_t c) {
    if (shape.inner == 1)
        return sum(a + c, b + c, s, shape.n, shape.channels);
    double total = 0;
    for (size_t i = 0; i < shape.n; i++) {
        const size_t at = (i * shape.channels + c) * shape.inner;
        total += sum(a + at, b + at, s, shape.inner, 1);
    }
    return total;
}

AC_INLINE float reciprocal_root(float variance, float eps) {
    return 1.0f / ac_sqrtf(variance + eps);
}

/* y = x * scale + shift for all of channel c */
static void scale_channel(const float *x, float *y, float scale, float shift, channel_shape s,
                          size_t c) {
    for (size_t i = 0; i < s.n; i++) {
        const size_t at = (i * s.channels + c) * s.inner;
        AC_INDEPENDENT
        for (size_t l = at; l < at + s.inner; l++)
            y[l] = x[l] * scale + shift;
    }
}

/* y = x s + (beta - mean s), s = gamma / sqrt(var + eps); x, y (N, C, ...), the others (C) */
ac_status AC_KERNEL(batch_norm)(const ac_call *call) {
    const float *x = AC_IN(call, 0), *gamma = AC_IN(call, 1), *beta = AC_IN(call, 2);
    const float *mean = AC_IN(call, 3), *var = AC_IN(call, 4);
    float *y = AC_OUT(call, 0);
    const float eps = ((const ac_attr_batch_norm *)call->attr)->eps;
    const channel_shape shape = channels_of(AC_IN_T(call, 0));
    for (size_t c = 0; c < shape.channels; c++) {
        const float scale = gamma[c] * reciprocal_root(var[c], eps);
        scale_channel(x, y, scale, beta[c] - mean[c] * scale, shape, c);
    }
    return AC_OK;
}

/* dx = d gamma / sqrt(var + eps); d, dx (N, C, ...), the others (C) */
ac_status AC_KERNEL(batch_norm_input_grad)(const ac_call *call) {
    const float *d = AC_IN(call, 0), *gamma = AC_IN(call, 1), *var = AC_IN(call, 2);
    float *dx = AC_OUT(call, 0);
    const float eps = ((const ac_attr_batch_norm_input_grad *)call->attr)->eps;
    const channel_shape shape = channels_of(AC_IN_T(call, 0));
    for (size_t c = 0; c < shape.channels; c++)
        scale_channel(d, dx, gamma[c] * reciprocal_root(var[c], eps), 0.0f, shape, c);
    return AC_OK;
}

/* d_gamma = sum of d (x - mean) / sqrt(var + eps) over each channel; d, x (N, C, ...), the others (C) */
ac_status AC_KERNEL(batch_norm_gamma_grad)(const ac_call *call) {
    const float *d = AC_IN(call, 0), *x = AC_IN(call, 1), *mean = AC_IN(call, 2),
                *var = AC_IN(call, 3);
    float *d_gamma = AC_OUT(call, 0);
    const float eps = ((const ac_attr_batch_norm_gamma_grad *)call->attr)->eps;
    const channel_shape shape = channels_of(AC_IN_T(call, 0));
    for (size_t c = 0; c < shape.channels; c++)
        d_gamma[c] = (float)channel_sum(ac_sum_dot_centred, d, x, mean[c], shape, c) *
                     reciprocal_root(var[c], eps);
    return AC_OK;
}

/* y = (x - mean) gamma / sqrt(var + eps) + beta with the mean and variance of x (N, C, ...), which are outputs (C) */
ac_status AC_KERNEL(batch_norm_train)(const ac_call *call) {
    const float *x = AC_IN(call, 0), *gamma = AC_IN(call, 1), *beta = AC_IN(call, 2);
    float *y = AC_OUT(call, 0), *mean = AC_OUT(call, 1), *var = AC_OUT(call, 2);
    const float eps = ((const ac_attr_batch_norm_train *)call->attr)->eps;
    const channel_shape shape = channels_of(AC_IN_T(call, 0));
    const double count = (double)(shape.n * shape.inner);
    for (size_t c = 0; c < shape.channels; c++) {
        mean[c] = (float)(channel_sum(ac_sum, x, x, 0.0f, shape, c) / count);
        var[c] = (float)(channel_sum(ac_sum_squares, x, x, mean[c], shape, c) / count);
        const float centre = mean[c], scale = gamma[c] * reciprocal_root(var[c], eps),
                    shift = beta[c];
        for (size_t i = 0; i < shape.n; i++) {
            const size_t at = (i * shape.channels + c) * shape.inner;
            AC_INDEPENDENT
            for (size_t l = at; l < at + shape.inner; l++)
                y[l] = (x[l] - centre) * scale + shift;
        }
    }
    return AC_OK;
}

/* With x^ = (x - mean) / sqrt(var + eps): d_beta = sum d, d_gamma = sum d x^,
 * dx = gamma / sqrt(var + eps) (d - d_beta / m - x^ d_gamma / m), m elements a channel. dx may be absent. */
ac_status AC_KERNEL(batch_norm_train_grad)(const ac_call *call) {
    const float *d = AC_IN(call, 0), *x = AC_IN(call, 1), *gamma = AC_IN(call, 2);
    const float *mean = AC_IN(call, 3), *var = AC_IN(call, 4);
    float *dx = AC_OUT(call, 0), *d_gamma = AC_OUT(call, 1), *d_beta = AC_OUT(call, 2);
    const float eps = ((const ac_attr_batch_norm_train_grad *)call->attr)->eps;
    const channel_shape shape = channels_of(AC_IN_T(call, 0));
    const float share = (float)(1.0 / (double)(shape.n * shape.inner));
    for (size_t c = 0; c < shape.channels; c++) {
        const float centre = mean[c], rstd = reciprocal_root(var[c], eps), scale = gamma[c] * rstd;
        d_beta[c] = (float)channel_sum(ac_sum, d, d, 0.0f, shape, c);
        d_gamma[c] = (float)channel_sum(ac_sum_dot_centred, d, x, centre, shape, c) * rstd;
        const float from_mean = d_beta[c] * share, from_var = d_gamma[c] * share * rstd;
        for (size_t i = 0; dx && i < shape.n; i++) {
            const size_t at = (i * shape.channels + c) * shape.inner;
            AC_INDEPENDENT
            for (size_t l = at; l < at + shape.inner; l++)
                dx[l] = (d[l] - from_mean - (x[l] - centre) * from_var) * scale;
        }
    }
    return AC_OK;
}

/* ---- layer norm ---- */

/* y = (x - mean) rstd gamma + beta along the last dimension D; x, y (R, D), gamma, beta (D) may be absent; outputs
 * mean and rstd = 1 / sqrt(var + eps), (R), may be absent */
ac_status AC_KERNEL(layer_norm)(const ac_call *call) {
    const ac_tensor *t = AC_IN_T(call, 0);
    const size_t width = (size_t)t->dim[t->rank - 1], rows = t->size / width;
    const float *x = AC_IN(call, 0), *gamma = AC_IN(call, 1), *beta = AC_IN(call, 2);
    float *y = AC_OUT(call, 0), *mean = AC_OUT(call, 1), *rstd = AC_OUT(call, 2);
    const float eps = ((const ac_attr_layer_norm *)call->attr)->eps;
    for (size_t r = 0; r < rows; r++, x += width, y += width) {
        const float centre = (float)(ac_sum(x, x, 0.0f, width, 1) / (double)width);
        const float var = (float)(ac_sum_squares(x, x, centre, width, 1) / (double)width);
        const float scale = reciprocal_root(var, eps);
        if (mean)
            mean[r] = centre;
        if (rstd)
            rstd[r] = scale;
        AC_INDEPENDENT
        for (size_t i = 0; i < width; i++)
            y[i] = (x[i] - centre) * scale;
        for (size_t i = 0; gamma && i < width; i++)
            y[i] *= gamma[i];
        for (size_t i = 0; beta && i < width; i++)
            y[i] += beta[i];
    }
    return AC_OK;
}

/* Column sums of d and of d x^ over the rows, x^ = (x - mean) rstd; see ac_sum_columns for the order. */
static void layer_norm_parameter_grads(const float *d, const float *x, const float *mean,
                                       const float *rstd, size_t rows, size_t width, float *d_gamma,
                                       float *d_beta) {
    enum { COLUMNS = 16 };
    for (size_t c = 0; c < width; c += COLUMNS) {
        const size_t n = width - c < COLUMNS ? width - c : COLUMNS;
        double total_gamma[COLUMNS] = {0}, total_beta[COLUMNS] = {0};
        for (size_t r = 0; r < rows;) {
            const size_t end = rows - r < 32 ? rows : r + 32;
            float sum_gamma[COLUMNS] = {0}, sum_beta[COLUMNS] = {0};
            for (; r < end; r++)
                for (size_t l = 0; l < n; l++) {
                    const size_t at = r * width + c + l;
                    sum_gamma[l] += d[at] * ((x[at] - mean[r]) * rstd[r]);
                    sum_beta[l] += d[at];
                }
            for (size_t l = 0; l < n; l++) {
                total_gamma[l] += (double)sum_gamma[l];
                total_beta[l] += (double)sum_beta[l];
            }
        }
        for (size_t l = 0; d_gamma && l < n; l++)
            d_gamma[c + l] = (float)total_gamma[l];
        for (size_t l = 0; d_beta && l < n; l++)
            d_beta[c + l] = (float)total_beta[l];
    }
}

/* One row of the input's gradient: dx = rstd (g - mean(g) - x^ mean(g x^)), g = d gamma. A chunk of g at a time,
 * for there is no room for a row of it. dx may be d. */
static void layer_norm_row_grad(const float *d, const float *x, const float *gamma, float mean,
                                float rstd, size_t width, float *dx) {
    float g[AC_SUM_CHUNK];
    double sum = 0, dot = 0;
    for (size_t c = 0; c < width; c += AC_SUM_CHUNK) {
        const size_t n = width - c < AC_SUM_CHUNK ? width - c : AC_SUM_CHUNK;
        for (size_t i = 0; i < n; i++)
            g[i] = d[c + i] * (gamma ? gamma[c + i] : 1.0f);
        sum += ac_sum(g, g, 0.0f, n, 1);
        dot += ac_sum_dot_centred(g, x + c, mean, n, 1);
    }
    const float from_mean = (float)(sum / (double)width);
    const float from_var = (float)(dot / (double)width) * rstd * rstd;
    AC_INDEPENDENT
    for (size_t i = 0; i < width; i++) {
        const float weight = gamma ? gamma[i] : 1.0f;
        dx[i] = (d[i] * weight - from_mean - (x[i] - mean) * from_var) * rstd;
    }
}

/* d, x, dx (R, D); mean, rstd (R); gamma, d_gamma, d_beta (D). gamma and each output may be absent. */
ac_status AC_KERNEL(layer_norm_grad)(const ac_call *call) {
    const ac_tensor *t = AC_IN_T(call, 0);
    const size_t width = (size_t)t->dim[t->rank - 1], rows = t->size / width;
    const float *d = AC_IN(call, 0), *x = AC_IN(call, 1), *mean = AC_IN(call, 2),
                *rstd = AC_IN(call, 3);
    const float *gamma = AC_IN(call, 4);
    float *dx = AC_OUT(call, 0), *d_gamma = AC_OUT(call, 1), *d_beta = AC_OUT(call, 2);
    if (d_gamma || d_beta)
        layer_norm_parameter_grads(d, x, mean, rstd, rows, width, d_gamma, d_beta);
    for (size_t r = 0; dx && r < rows; r++)
        layer_norm_row_grad(d + r * width, x + r * width, gamma, mean[r], rstd[r], width,
                            dx + r * width);
    return AC_OK;
}

/* ---- softmax: rows of the last dimension D ---- */

/* y = exp(x) / sum exp(x); x is first lowered by its largest element */
ac_status AC_KERNEL(softmax)(const ac_call *call) {
    const ac_tensor *t = AC_IN_T(call, 0);
    const size_t width = (size_t)t->dim[t->rank - 1], rows = t->size / width;
    const float *x = AC_IN(call, 0);
    float *y = AC_OUT(call, 0);
    for (size_t r = 0; r < rows; r++, x += width, y += width) {
        const float top = ac_max(x, width);
        AC_INDEPENDENT
        for (size_t i = 0; i < width; i++)
            y[i] = ac_expf(x[i] - top);
        const float scale = (float)(1.0 / ac_sum(y, y, 0.0f, width, 1));
        for (size_t i = 0; i < width; i++)
            y[i] *= scale;
    }
    return AC_OK;
}

/* dx = y (d - sum(d y)) */
ac_status AC_KERNEL(softmax_grad)(const ac_call *call) {
    const ac_tensor *t = AC_IN_T(call, 0);
    const size_t width = (size_t)t->dim[t->rank - 1], rows = t->size / width;
    const float *d = AC_IN(call, 0), *y = AC_IN(call, 1);
    float *dx = AC_OUT(call, 0);
    for (size_t r = 0; r < rows; r++, d += width, y += width, dx += width) {
        const float dot = (float)ac_sum_dot(d, y, 0.0f, width, 1);
        AC_INDEPENDENT
        for (size_t i = 0; i < width; i++)
            dx[i] = y[i] * (d[i] - dot);
    }
    return AC_OK;
}

/* y = x - top - log(sum exp(x - top)), top the largest element */
ac_status AC_KERNEL(log_softmax)(const ac_call *call) {
    const ac_tensor *t = AC_IN_T(call, 0);
    const size_t width = (size_t)t->dim[t->rank - 1], rows = t->size / width;
    const float *x = AC_IN(call, 0);
    float *y = AC_OUT(call, 0);
    for (size_t r = 0; r < rows; r++, x += width, y += width) {
        const float top = ac_max(x, width), log_sum = ac_logf((float)ac_sum_exp(x, top, width));
        AC_INDEPENDENT
        for (size_t i = 0; i < width; i++)
            y[i] = (x[i] - top) - log_sum;
    }
    return AC_OK;
}

/* dx = d - exp(y) sum(d) */
ac_status AC_KERNEL(log_softmax_grad)(const ac_call *call) {
    const ac_tensor *t = AC_IN_T(call, 0);
    const size_t width = (size_t)t->dim[t->rank - 1], rows = t->size / width;
    const float *d = AC_IN(call, 0), *y = AC_IN(call, 1);
    float *dx = AC_OUT(call, 0);
    for (size_t r = 0; r < rows; r++, d += width, y += width, dx += width) {
        const float sum = (float)ac_sum(d, d, 0.0f, width, 1);
        AC_INDEPENDENT
        for (size_t i = 0; i < width; i++)
            dx[i] = d[i] - ac_expf(y[i]) * sum;
    }
    return AC_OK;
}
