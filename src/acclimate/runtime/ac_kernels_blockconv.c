/* Gradients of integer convolutions in blocks; see ac_blockfloat.h. Where the processor has Arm's DSP extension, two products
 * an instruction. Sums of an input's gradient wrap as an int32 does; a weight's are exact. */
#include "ac_blockfloat.h"

#include <string.h>

/* Scratch, in words: columns of pairs, rows of pairs against them, sums. */
enum { COLUMN_WORDS = 768, ROW_WORDS = 192, SUMS = 256 };
typedef struct {
    uint32_t columns[COLUMN_WORDS], rows[ROW_WORDS];
    int32_t sum[SUMS + 4];
} scratch;

/* ---- input gradient ---- */

/* One group of channels of one sample. */
typedef struct {
    const ac_attr_bf_conv_input_grad *a;
    shape in, kernel, out;
    int outputs; /* of the group */
    int from_narrow, narrow;
    const void *g;
    ac_weights w;
    void *dx;
    int32_t *e, t;
} view;

/* Channel c's exponent, from what length_of says. */
static void put_exponent(const view *v, int c, uint32_t length) {
    v->e[c] = length ? bounded(bounded(v->t) + excess(length, v->narrow)) : EMPTY;
}

#if AC_DSP
/* Columns of pairs of outputs [o, o + count), of `pixels` pixels from p on: fours of pixels one after another. */
AC_APART void fill_columns(const view *v, uint32_t *to, int o, int count, size_t p, int pixels) {
    const size_t plane = v->out.plane;
    const int16_t *wide = (const int16_t *)v->g + (size_t)o * plane + p;
    const int8_t *narrow = (const int8_t *)v->g + (size_t)o * plane + p;
    for (int left = pixels; left > 0; left -= 4, wide += 4, narrow += 4) {
        int k = 0;
        if (left >= 4 && count > 1) {
            if (v->from_narrow) AC_KERNEL(zip_bytes)(to, narrow, plane, count / 2);
            else AC_KERNEL(zip_halves)(to, wide, plane, count / 2);
            to += count / 2 * 4;
            k = count & ~1;
        }
        for (; k < count; k += 2, to += 4)
            for (int i = 0; i < 4; i++) {
                const size_t at = (size_t)k * plane + (size_t)i;
                const void *g = v->from_narrow ? (const void *)narrow : (const void *)wide;
                const uint32_t low = i < left ? (uint32_t)mantissa(g, v->from_narrow, at) : 0u;
                const uint32_t high = i < left && k + 1 < count ? (uint32_t)mantissa(g, v->from_narrow, at + plane) : 0u;
                to[i] = (low & 0xFFFFu) | high << 16;
            }
    }
}

enum { MOST = ROW_WORDS / 4 * 2 }; /* outputs at once */

/* Rows of pairs of outputs [o, o + count): of the weights of channels [c, c + channels), at most four. */
AC_APART void fill_rows(const view *v, uint32_t *to, int o, int count, int c, int channels) {
    if (!v->w.parts && channels == 4 && count % 2 == 0) {
        AC_KERNEL(zip_bytes)(to, v->w.whole + (size_t)o * (size_t)v->w.channels + c, (size_t)v->w.channels, count / 2);
        return;
    }
    const int pairs = (count + 1) / 2;
    int8_t(*four)[4] = (int8_t(*)[4])(void *)(to + 2 * pairs); /* each read before it is written over */
    int next = 0;
    if (channels < 4 || count % 2) memset(four, 0, (size_t)pairs * 8);
    for (int k = 0; k < channels; k++) {
        const int8_t *from = ac_weights_of(&v->w, o, c + k, &next);
        const size_t step = ac_weights_step(&v->w, c + k, next);
        for (int i = 0; i < count; i++, from += step) four[i][k] = *from;
    }
    AC_KERNEL(zip_bytes)(to, four[0], 4, pairs);
}

/* sum[k * pitch + i] = what channel c + k has at pixel p + i, for k < channels and i < pixels; pitch is a multiple of four,
 * and there is place for a multiple of four channels. */
AC_APART void sum_pointwise(const view *v, scratch *s, int32_t *sum, int pitch, int c, int channels, size_t p, int pixels) {
    const int tile = pixels > 16 ? 32 : 16, room = smaller(MOST, COLUMN_WORDS / tile * 2);
    const int rounds = (v->outputs + room - 1) / room, most = ((v->outputs + rounds - 1) / rounds + 1) & ~1;
    memset(sum, 0, (size_t)((channels + 3) / 4 * 4 * pitch) * sizeof *sum);
    for (int o = 0; o < v->outputs; o += most) {
        const int some = smaller(v->outputs - o, most), pairs = (some + 1) / 2;
        for (int q = 0; q < pixels; q += tile) {
            const int now = smaller(pixels - q, tile), fours = (now + 3) / 4 * 4;
            int32_t *to = sum + q;
            fill_columns(v, s->columns, o, some, p + (size_t)q, now);
            for (int k = 0; k < channels; k += 4, to += 2 * pitch) {
                fill_rows(v, s->rows, o, some, c + k, smaller(channels - k, 4));
                AC_KERNEL(dot_pairs)(to, s->columns, s->rows, pairs, to + fours, pitch);
                to += 2 * pitch;
                if (channels - k > 2) AC_KERNEL(dot_pairs)(to, s->columns, s->rows + 2, pairs, to + fours, pitch);
            }
        }
    }
}
#else
/* sum[i] += the products of the i-th of `count` pixels of some outputs, `step` apart, and weights, `w_step` apart */
AC_INLINE void add_outputs(uint32_t *sum, const int16_t *g, size_t step, const int8_t *w, size_t w_step, int outputs,
                           int count) {
    for (; outputs >= 4; outputs -= 4, g += 4 * step, w += 4 * w_step) {
        const int16_t w0 = w[0], w1 = w[w_step], w2 = w[2 * w_step], w3 = w[3 * w_step];
        const int16_t *g1 = g + step, *g2 = g1 + step, *g3 = g2 + step;
        for (int i = 0; i < count; i++)
            sum[i] += (uint32_t)(g[i] * w0) + (uint32_t)(g1[i] * w1) + (uint32_t)(g2[i] * w2) + (uint32_t)(g3[i] * w3);
    }
    for (; outputs > 0; outputs--, g += step, w += w_step)
        for (int i = 0; i < count; i++) sum[i] += (uint32_t)(g[i] * *w);
}

static void sum_pointwise(const view *v, scratch *s, int32_t *sum, int pitch, int c, int channels, size_t p, int pixels) {
    enum { TILE = 64, MOST = 2 * COLUMN_WORDS / TILE }; /* of int8, which are made int16 first */
    const int tile = v->from_narrow ? smaller(pixels, TILE) : pixels, most = v->from_narrow ? MOST : v->outputs;
    const size_t plane = v->out.plane;
    int16_t *wide = (int16_t *)(void *)s->columns;
    memset(sum, 0, (size_t)(channels * pitch) * sizeof *sum);
    for (int o = 0; o < v->outputs; o += most)
        for (int q = 0; q < pixels; q += tile) {
            const int some = smaller(most, v->outputs - o), count = smaller(tile, pixels - q);
            const size_t at = (size_t)o * plane + p + (size_t)q;
            const int16_t *g = v->from_narrow ? wide : (const int16_t *)v->g + at;
            for (int k = 0; v->from_narrow && k < some; k++)
                ac_widen(wide + k * TILE, (const int8_t *)v->g + at + (size_t)k * plane, count, 0);
            for (int k = 0, next = 0; k < channels; k++) {
                const int8_t *w = ac_weights_of(&v->w, 0, c + k, &next);
                const size_t step = ac_weights_step(&v->w, c + k, next);
                uint32_t *to = (uint32_t *)(void *)(sum + k * pitch + q);
                add_outputs(to, g, v->from_narrow ? TILE : plane, w + (size_t)o * step, step, some, count);
            }
        }
}
#endif

/* A convolution of single pixels. The sums of a channel must all be known before one can be stored: they wait where the
 * channels to come will be, then in scratch, and those that do not fit there either are made twice. */
AC_APART void pointwise(const view *v, scratch *s) {
    const size_t plane = v->in.plane, size = v->narrow ? 1 : 2;
    const int whole = plane <= SUMS / 4, pitch = whole ? (int)(plane + 3) / 4 * 4 : SUMS / 4; /* in scratch */
    for (int c = 0, some; c < v->kernel.c; c += some) {
        uint8_t *to = (uint8_t *)v->dx + (size_t)c * plane * size;
        const int left = v->kernel.c - c, own = SUMS / pitch & ~3;
        const size_t wide = (plane + 3) / 4 * 4, room = (uintptr_t)to % 4 ? 0 : (size_t)left * plane * size / 4 / wide;
        const int there = room > (size_t)own && plane < INT32_MAX / 8;
        int32_t *sum = there ? (int32_t *)(void *)to : s->sum;
        some = there ? (int)room & ~3 : smaller(left, own);
        if (there || whole) {
            const int step = there ? (int)wide : pitch;
            sum_pointwise(v, s, sum, step, c, some, 0, (int)plane);
            for (int k = 0; k < some; k++, sum += step) {
                const uint32_t length = length_of(sum, plane);
                put_exponent(v, c + k, length);
                put_block(v->dx, v->narrow, (size_t)(c + k) * plane, sum, plane, excess(length, v->narrow));
            }
            continue;
        }
        uint32_t length[4] = {0};
        for (int pass = 0; pass < 2; pass++)
            for (size_t p = 0; p < plane; p += (size_t)pitch) {
                const size_t count = plane - p < (size_t)pitch ? plane - p : (size_t)pitch;
                sum_pointwise(v, s, sum, pitch, c, some, p, (int)count);
                for (int k = 0; k < some; k++)
                    if (pass)
                        put_block(v->dx, v->narrow, (size_t)(c + k) * plane + p, sum + k * pitch, count,
                                  excess(length[k], v->narrow));
                    else length[k] |= length_of(sum + k * pitch, count);
            }
        for (int k = 0; k < some; k++) put_exponent(v, c + k, length[k]);
    }
}

/* Words of a row of g with what four windows may see around it. */
static int spread_pitch(const view *v) { return ((v->in.w + 3) / 4 * 4 + v->kernel.w - 1) / 2; }

/* Whether depthwise takes it. */
static int is_spread(const view *v) {
    const int k = v->kernel.w;
    return v->kernel.c == 1 && v->outputs == 1 && v->kernel.h == k && (k == 3 || k == 5 || k == 7) && v->a->dilation[0] == 1
           && v->a->dilation[1] == 1 && v->a->before[0] >= 0 && v->a->before[0] < k && v->a->before[1] >= 0
           && v->a->before[1] < k && v->in.w <= SUMS && k * spread_pitch(v) <= COLUMN_WORDS;
}

/* `rows` rows of `count` elements, `down` elements apart. */
AC_APART void copy_rows(int16_t *to, int down, const int16_t *from, int width, int rows, int count) {
    for (; rows > 0; rows--, to += down, from += width) {
        int q = 0;
        for (; q + 4 <= count; q += 4) {
            AC_COPY(to + q, from + q, 4);
            AC_COPY(to + q + 2, from + q + 2, 4);
        }
        for (; q < count; q++) to[q] = from[q];
    }
}

/* What `rows` rows of windows of dx from `row` on see of g, whose pixels lie `stride` apart, with zeros between and around
 * them. `clean`: the zeros are there already. */
AC_APART void spread(const view *v, uint32_t *to, int rows, int row, int clean) {
    const int down = v->a->stride[0], step = v->a->stride[1], pitch = spread_pitch(v);
    const int left = v->kernel.w - 1 - v->a->before[1], above = v->kernel.h - 1 - v->a->before[0] - row; /* where g starts */
    const int right = end_inside(left, step, 2 * pitch, v->out.w);
    const int top = first_inside(above, down, v->out.h), bottom = end_inside(above, down, rows, v->out.h);
    int16_t *line = (int16_t *)(void *)(to + (above + top * down) * pitch) + left;
    const size_t from = (size_t)top * (size_t)v->out.w;
    if (!clean) memset(to, 0, (size_t)(rows * pitch) * sizeof *to);
    if (step == 1 && !v->from_narrow) {
        copy_rows(line, 2 * pitch * down, (const int16_t *)v->g + from, v->out.w, bottom - top, right);
        return;
    }
    for (int p = 0; p < bottom - top; p++, line += 2 * pitch * down) {
        const size_t at = from + (size_t)p * (size_t)v->out.w;
        if (v->from_narrow)
            for (int q = 0; q < right; q++) line[q * step] = ((const int8_t *)v->g)[at + (size_t)q];
        else
            for (int q = 0; q < right; q++) line[q * step] = ((const int16_t *)v->g)[at + (size_t)q];
    }
}

/* A depthwise convolution: dx correlates the spread g with the weights turned by half a turn. */
AC_APART void depthwise(const view *v, scratch *s, int clean) {
    const int size = v->kernel.w, area = size * size, pitch = spread_pitch(v), height = v->in.h, width = v->in.w;
    const int rows = smaller(COLUMN_WORDS / pitch - size + 1, smaller(height, SUMS / width)), whole = rows == height;
    ac_dot_windows *const dot = AC_KERNEL(dot_windows)[size / 2 - 1][0];
    uint32_t w[7 * 6], length = 0;
    const ac_windows windows = ac_windows_of(0, w, pitch, size, 1);
    int next = 0;
    const int8_t *turned = ac_weights_of(&v->w, 0, 0, &next) + area - 1;
    if (size == 3) ac_put_window_by(w, turned, 3, -1);
    else if (size == 5) ac_put_window_by(w, turned, 5, -1);
    else ac_put_window_by(w, turned, 7, -1);
    for (int pass = whole; pass < 2; pass++)
        for (int row = 0; row < height; row += rows) {
            const int now = smaller(rows, height - row);
            const size_t count = (size_t)(now * width);
            const uint32_t *x = s->columns;
            int32_t *sum = s->sum;
            spread(v, s->columns, now + size - 1, row, clean && whole);
            for (int i = 0; i < now; i++, sum += width, x += pitch) dot(sum, sum + width, x, &windows);
            if (whole || !pass) length |= length_of(s->sum, count) / 2;
            if (pass) /* the sums are doubled */
                put_block(v->dx, v->narrow, (size_t)row * (size_t)width, s->sum, count, excess(length, v->narrow) + 1);
        }
    put_exponent(v, 0, length);
}

/* A part of an input plane: rows [row, row + rows), columns [col, col + cols), at most SUMS elements. */
typedef struct {
    int row, col, rows, cols;
} part;

/* acc (rows, cols) of the part = sum over the output channels of a group and the taps of g * w, wrapping */
static void sum_part(const view *v, int32_t *acc, const int8_t *w, size_t w_step, const part *b) {
    const ac_attr_bf_conv_input_grad *a = v->a;
    size_t first = 0;
    memset(acc, 0, (size_t)b->rows * (size_t)b->cols * sizeof *acc);
    for (int o = 0; o < v->outputs; o++, first += v->out.plane, w += w_step)
        for (int i = 0; i < v->kernel.h; i++)
            for (int j = 0; j < v->kernel.w; j++) {
                const int32_t weight = w[i * v->kernel.w + j];
                const int row = i * a->dilation[0] - a->before[0] - b->row, col = j * a->dilation[1] - a->before[1] - b->col;
                const int top = first_inside(row, a->stride[0], v->out.h),
                          bottom = end_inside(row, a->stride[0], b->rows, v->out.h),
                          left = first_inside(col, a->stride[1], v->out.w),
                          right = end_inside(col, a->stride[1], b->cols, v->out.w);
                for (int p = top; p < bottom; p++) {
                    int32_t *line = acc + (row + p * a->stride[0]) * b->cols + col;
                    const size_t at = first + (size_t)p * (size_t)v->out.w;
                    for (int q = left; q < right; q++) {
                        int32_t *to = line + q * a->stride[1];
                        *to = ac_wrap_add(*to, mantissa(v->g, v->from_narrow, at + (size_t)q) * weight);
                    }
                }
            }
}

/* Any other convolution, channel by channel; where a plane does not fit scratch its sums are made twice. */
AC_APART void input_grad_any(const view *v, scratch *s) {
    const int width = v->in.w, cols = smaller(width, SUMS), rows = smaller(v->in.h, SUMS / cols);
    const int whole = rows == v->in.h && cols == width;
    for (int c = 0, next = 0; c < v->kernel.c; c++) {
        const int8_t *by = ac_weights_of(&v->w, 0, c, &next);
        const size_t step = ac_weights_step(&v->w, c, next);
        uint32_t length = 0;
        for (int pass = whole; pass < 2; pass++)
            for (int r = 0; r < v->in.h; r += rows)
                for (int q = 0; q < width; q += cols) {
                    const part b = {r, q, smaller(rows, v->in.h - r), smaller(cols, width - q)};
                    sum_part(v, s->sum, by, step, &b);
                    if (whole || !pass) length |= length_of(s->sum, (size_t)(b.rows * b.cols));
                    for (int i = 0; pass && i < b.rows; i++)
                        put_block(v->dx, v->narrow, (size_t)c * v->in.plane + (size_t)(r + i) * (size_t)width + (size_t)q,
                                  s->sum + i * b.cols, (size_t)b.cols, excess(length, v->narrow));
                }
        put_exponent(v, c, length);
    }
}

/* g (N, O, P, Q), t (N), w (O, C / groups, kH, kW), part (O, K, kH, kW)?, index (K)? -> m (N, C, H, W), e (N, C) */
ac_status AC_KERNEL(bf_conv_input_grad)(const ac_call *call) {
    const ac_attr_bf_conv_input_grad *a = call->attr;
    const int32_t *t = AC_IN(call, 1);
    const int parts = AC_IN(call, 3) ? AC_IN_T(call, 3)->dim[1] : 0;
    const int8_t *whole = AC_IN(call, 2), *some = AC_IN(call, 3);
    const uint8_t *g = AC_IN(call, 0);
    uint8_t *dx = AC_OUT(call, 0);
    view v = {.a = a, .in = shape_of(AC_OUT_T(call, 0)), .kernel = shape_of(AC_IN_T(call, 2)),
              .out = shape_of(AC_IN_T(call, 0)), .from_narrow = is_narrow(AC_IN_T(call, 0)), .narrow = is_narrow(AC_OUT_T(call, 0)), .e = AC_OUT(call, 1)};
    v.outputs = v.out.c / a->groups;
    v.w = (ac_weights){whole, some, AC_IN(call, 4), v.kernel.c, parts, v.kernel.plane};
    const size_t g_size = (size_t)v.outputs * v.out.plane * (v.from_narrow ? 1 : 2),
                 dx_size = (size_t)v.kernel.c * v.in.plane * (v.narrow ? 1 : 2);
    const int is_pointwise = v.kernel.plane == 1 && a->stride[0] == 1 && a->stride[1] == 1 && !a->before[0] && !a->before[1]
                             && v.in.h == v.out.h && v.in.w == v.out.w;
    scratch s;
    for (int n = 0; n < v.out.n; n++) {
        v.t = t[n];
        for (int k = 0; k < a->groups; k++, g += g_size, dx += dx_size, v.e += v.kernel.c) {
            const size_t o = (size_t)k * (size_t)v.outputs * v.kernel.plane;
            v.g = g;
            v.dx = dx;
            v.w.whole = whole + o * (size_t)v.kernel.c;
            if (parts) v.w.part = some + o * (size_t)parts;
            if (is_pointwise) pointwise(&v, &s);
            else if (is_spread(&v)) depthwise(&v, &s, n || k);
            else input_grad_any(&v, &s);
        }
    }
    return AC_OK;
}

/* ---- weight gradient ---- */

/* What a weight's gradient is made from: x (N, C, H, W), m (N, O, P, Q) and e (N, O); where it goes: to dw, or at once to what
 * learns from it. */
typedef struct {
    const int32_t *stride, *before, *dilation;
    int groups, x_zero;
    float x_scale;
    shape in, kernel, out;
    const int8_t *x;
    const void *m;
    const int32_t *e;
    int narrow;
    float *dw;
    const ac_rule *learns; /* NULL: to dw */
} products;

static void put_gradient(const products *a, size_t at, const float *g, int count) {
    if (a->learns) AC_KERNEL(learn)(a->learns, at, g, count);
    else memcpy(a->dw + at, g, (size_t)count * sizeof *g);
}

/* Whether channel o of every sample is zero. */
static int is_still(const products *a, int o) {
    for (int n = 0; n < a->out.n; n++) {
        const size_t at = ((size_t)n * (size_t)a->out.c + (size_t)o) * a->out.plane;
        for (size_t i = 0; i < a->out.plane; i++)
            if (mantissa(a->m, a->narrow, at + i)) return 0;
    }
    return 1;
}

#if AC_DSP
enum { FOURS = 6, DEEPEST = 256 }; /* fours of channels at once; of an int32, so many products of 255 and 2^15 */

/* to[4 * i] = pairs of x - zero: pair i of `count` elements, the last filled with 0 */
AC_INLINE void put_column(uint32_t *to, const int8_t *x, int count, int zero) {
    const uint32_t minus = ((uint32_t)-zero & 0xFFFFu) * 0x10001u;
    for (; count >= 4; count -= 4, x += 4, to += 8) {
        const uint32_t word = ac_load4(x), even = ac_even_bytes(minus, word), odd = ac_odd_bytes(minus, word);
        to[0] = ac_low_halves(even, odd);
        to[4] = ac_high_halves(even, odd);
    }
    for (; count > 0; count -= 2, x += 2, to += 4)
        *to = ((uint32_t)(x[0] - zero) & 0xFFFFu) | (count > 1 ? (uint32_t)(x[1] - zero) << 16 : 0u);
}

/* to[4 * i] = pairs of mantissas from `at` on; their or. */
AC_INLINE uint32_t put_row(uint32_t *to, const void *m, int narrow, size_t at, int count) {
    uint32_t any = 0;
    for (; !narrow && count >= 2; count -= 2, at += 2, to += 4) any |= *to = ac_load4((const int16_t *)m + at);
    for (; count > 0; count -= 2, at += 2, to += 4)
        any |= *to = ((uint32_t)mantissa(m, narrow, at) & 0xFFFFu)
                     | (count > 1 ? (uint32_t)mantissa(m, narrow, at + 1) << 16 : 0u);
    return any;
}

/* Whether weight_grad_pointwise takes it. */
static int is_outer(const products *a) {
    return a->kernel.plane == 1 && a->stride[0] == 1 && a->stride[1] == 1 && !a->before[0] && !a->before[1]
           && a->in.h == a->out.h && a->in.w == a->out.w && a->in.plane <= DEEPEST && (!a->learns || a->in.n == 1);
}

/* A convolution of single pixels: dw = m x^T, of outputs [first, first + outputs) and the channels of x that they see. Where
 * there are several samples, sums wait in dw for those to come. */
AC_APART void weight_grad_pointwise(const products *a, scratch *s, int first, int outputs) {
    const int plane = (int)a->in.plane, pairs = (plane + 1) / 2, channels = a->kernel.c;
    const int most = ROW_WORDS / 4; /* pairs of rows in scratch */
    const int fours = smaller(FOURS, COLUMN_WORDS / 4 / pairs), pitch = 4 * fours;
    float g[4 * FOURS];
    for (int c = 0; c < channels; c += 4 * fours) {
        const int some = smaller(4 * fours, channels - c), now = (some + 3) / 4;
        for (int n = 0; n < a->in.n; n++) {
            const int8_t *x = a->x + ((size_t)n * (size_t)a->in.c + (size_t)(first / outputs * channels + c)) * a->in.plane;
            if (some % 4) memset(s->columns, 0, (size_t)(4 * now * pairs) * sizeof *s->columns);
            for (int k = 0; k < some; k++, x += plane)
                put_column(s->columns + k / 4 * 4 * pairs + k % 4, x, plane, a->x_zero);
            for (int o = first; o < first + outputs; o += 2) {
                const int two = o + 1 < first + outputs ? 2 : 1;
                const size_t channel = (size_t)n * (size_t)a->out.c + (size_t)o, m = channel * a->out.plane;
                uint32_t any = 0;
                memset(s->sum, 0, (size_t)(2 * pitch) * sizeof *s->sum);
                for (int p = 0; p < pairs; p += most) {
                    const int part = smaller(most, pairs - p), left = smaller(2 * part, plane - 2 * p);
                    any |= put_row(s->rows, a->m, a->narrow, m + (size_t)(2 * p), left);
                    any |= put_row(s->rows + 1, a->m, a->narrow, m + (size_t)(two - 1) * a->out.plane + (size_t)(2 * p), left);
                    if (!any) continue;
                    if (part == pairs) {
                        AC_KERNEL(dot_pairs)(s->sum, s->columns, s->rows, pairs, s->sum + 4 * now, pitch);
                        continue;
                    }
                    for (int k = 0; k < now; k++)
                        AC_KERNEL(dot_pairs)(s->sum + 4 * k, s->columns + 4 * (k * pairs + p), s->rows, part,
                                             s->sum + 4 * k + 4, pitch);
                }
                for (int i = 0; i < two; i++) {
                    const size_t at = (size_t)(o + i) * (size_t)channels + (size_t)c;
                    const int32_t e = bounded(a->e[channel + (size_t)i]), *sum = s->sum + i * pitch;
                    const int plain = e >= -126 && e <= 127; /* a float has this power */
                    const float unit = power_of_two(e);
                    for (int k = 0; k < some; k++) {
                        float v = plain ? (float)sum[k] * unit : scaled_by((float)sum[k], e);
                        if (n) v = a->dw[at + (size_t)k] + v;
                        g[k] = n + 1 == a->in.n ? v * a->x_scale : v;
                    }
                    put_gradient(a, at, g, some);
                }
            }
        }
    }
}
#endif

/* sum of (x - zero) * m over `count` elements, x `step` apart */
AC_INLINE int64_t sum_row(const int8_t *x, int step, int zero, const void *m, int narrow, size_t at, int count) {
    int64_t all = 0;
    for (int done = 0; done < count; done += 256) {
        const int end = smaller(count, done + 256);
        int32_t sum = 0;
        if (step == 1 && !narrow)
            for (int q = done; q < end; q++) sum += (x[q] - zero) * ((const int16_t *)m)[at + (size_t)q];
        else
            for (int q = done; q < end; q++) sum += (x[q * step] - zero) * mantissa(m, narrow, at + (size_t)q);
        all += sum;
    }
    return all;
}

/* Any other: a number of output o's (C / groups, kH, kW) after another. */
AC_APART void weight_grad_any(const products *a, int o) {
    enum { SOME = 32 };
    const int per_group = a->out.c / a->groups, area = (int)a->kernel.plane, each = a->kernel.c * area, still = is_still(a, o);
    const int flat = a->kernel.plane == 1 && a->stride[0] == 1 && a->stride[1] == 1 && !a->before[0] && !a->before[1]
                     && a->in.h == a->out.h && a->in.w == a->out.w; /* a plane is as one row */
    float g[SOME];
    for (int k = 0; k < each; k++) {
        const int c = k / area, i = k % area / a->kernel.w, j = k % a->kernel.w;
        const int row = i * a->dilation[0] - a->before[0], col = j * a->dilation[1] - a->before[1];
        const int top = first_inside(row, a->stride[0], a->out.h),
                  bottom = flat ? 1 : end_inside(row, a->stride[0], a->in.h, a->out.h),
                  left = first_inside(col, a->stride[1], a->out.w),
                  right = flat ? (int)a->out.plane : end_inside(col, a->stride[1], a->in.w, a->out.w);
        float total = 0;
        for (int n = 0; n < a->out.n && !still; n++) { /* most channels are, where only the largest gradients are kept */
            const size_t channel = (size_t)n * (size_t)a->out.c + (size_t)o;
            const int8_t *x = a->x + ((size_t)n * (size_t)a->in.c + (size_t)(o / per_group * a->kernel.c + c)) * a->in.plane;
            int64_t sum = 0;
            for (int p = top; p < bottom && left < right; p++)
                sum += sum_row(x + (size_t)(row + p * a->stride[0]) * (size_t)a->in.w + (size_t)(col + left * a->stride[1]),
                               a->stride[1], a->x_zero, a->m, a->narrow,
                               channel * a->out.plane + (size_t)p * (size_t)a->out.w + (size_t)left, right - left);
            total += scaled_by((float)sum, bounded(a->e[channel]));
        }
        g[k % SOME] = total * a->x_scale;
        if (k % SOME == SOME - 1 || k + 1 == each)
            put_gradient(a, (size_t)o * (size_t)each + (size_t)(k - k % SOME), g, k % SOME + 1);
    }
}

static void weight_grad(const products *a) {
#if AC_DSP
    const int outputs = a->out.c / a->groups;
    if (is_outer(a)) {
        scratch s;
        for (int o = 0; o < a->out.c; o += outputs) weight_grad_pointwise(a, &s, o, outputs);
        return;
    }
#endif
    for (int o = 0; o < a->out.c; o++) weight_grad_any(a, o);
}

/* x (N, C, H, W), m (N, O, P, Q), e (N, O) -> dw (O, C / groups, kH, kW) */
ac_status AC_KERNEL(bf_conv_weight_grad)(const ac_call *call) {
    const ac_attr_bf_conv_weight_grad *a = call->attr;
    const products m = {a->stride, a->before, a->dilation, a->groups, a->x_zero, a->x_scale, shape_of(AC_IN_T(call, 0)),
                        shape_of(AC_OUT_T(call, 0)), shape_of(AC_IN_T(call, 1)), AC_IN(call, 0), AC_IN(call, 1),
                        AC_IN(call, 2), is_narrow(AC_IN_T(call, 1)), AC_OUT(call, 0), NULL};
    weight_grad(&m);
    return AC_OK;
}

/* w (O, C / groups, kH, kW), x (N, C, H, W), m (N, O, P, Q), e (N, O), lr (1), scale (1 or O), momentum?, residual?,
 * step (1)? */
ac_status AC_KERNEL(bf_conv_sgd)(const ac_call *call) {
    const ac_attr_bf_conv_sgd *a = call->attr;
    const ac_tensor *t = AC_IN_T(call, 0);
    const ac_rule r = {a->momentum, a->weight_decay, *(const float *)AC_IN(call, 4), a->nesterov, a->rounding,
                       ac_rounding_key(AC_IN(call, 8), a->salt), 0, AC_IN(call, 0), AC_IN(call, 7), AC_IN(call, 6),
                       AC_IN(call, 5),
                       AC_IN_T(call, 5)->size > 1 ? t->size / (size_t)t->dim[0] : 0};
    const products m = {a->stride, a->before, a->dilation, a->groups, a->x_zero, a->x_scale, shape_of(AC_IN_T(call, 1)),
                        shape_of(t), shape_of(AC_IN_T(call, 2)), AC_IN(call, 1), AC_IN(call, 2), AC_IN(call, 3),
                        is_narrow(AC_IN_T(call, 2)), NULL, &r};
    weight_grad(&m);
    return AC_OK;
}
