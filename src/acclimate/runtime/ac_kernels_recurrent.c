/* Reference kernels: LSTM, GRU and plain recurrence, forward and back through time. ops/recurrent.py says what the
 * records are and what `segment` does. Samples are worked on one by one, so scratch does not grow with the batch. */
#include <string.h>

#include "ac_math.h"
#include "ac_ops.h"

typedef enum { LSTM, GRU, RNN } cell_kind;

/* A layer of one direction. Sizes: N, T, F inputs, H units, G rows of the weights, R floats of a record. */
typedef struct {
    cell_kind kind;
    size_t n, t, f, h, g, r;
    size_t segment; /* steps of one; 0: all records are saved */
    int reverse, own; /* own: reset_after of a GRU, relu of a plain cell */
    const float *w_ih, *w_hh, *b_ih, *b_hh, *h0, *c0;
} layer;

/* ---- small products ---- */

#define ROWS_AT_ONCE 4

/* y[i] += sum over k of w[i, k] x[k] for `rows` rows; AC_SUM_LANES sums side by side, folded by a fixed tree. */
AC_INLINE void add_dots(size_t rows, size_t n, const float *restrict w, const float *restrict x,
                        float *restrict y) {
    ac_vec sum[ROWS_AT_ONCE][AC_SUM_LANES / AC_WIDTH] = {0};
    float lane[AC_SUM_LANES];
    size_t k = 0;
    for (; k + AC_SUM_LANES <= n; k += AC_SUM_LANES)
        for (size_t v = 0; v < AC_SUM_LANES / AC_WIDTH; v++)
            for (size_t i = 0; i < rows; i++)
                sum[i][v] += ac_vec_load(w + i * n + k + v * AC_WIDTH) *
                             ac_vec_load(x + k + v * AC_WIDTH);
    for (size_t i = 0; i < rows; i++) {
        for (size_t v = 0; v < AC_SUM_LANES / AC_WIDTH; v++)
            ac_vec_store(lane + v * AC_WIDTH, sum[i][v]);
        for (size_t l = 0; k + l < n; l++)
            lane[l] += w[i * n + k + l] * x[k + l];
        y[i] += ac_fold(lane);
    }
}

/* y (rows) += w (rows, n) x (n); nothing where x is NULL */
static void add_product(size_t rows, size_t n, const float *w, const float *x, float *y) {
    size_t i = 0;
    if (!x)
        return;
    for (; i + ROWS_AT_ONCE <= rows; i += ROWS_AT_ONCE)
        add_dots(ROWS_AT_ONCE, n, w + i * n, x, y + i);
    for (; i < rows; i++)
        add_dots(1, n, w + i * n, x, y + i);
}

/* y (n) += w' (n, rows) d (rows) */
static void add_transposed(size_t rows, size_t n, const float *w, const float *d, float *y) {
    for (size_t i = 0; i < rows; i++) {
        const float scale = d[i];
        AC_INDEPENDENT
        for (size_t k = 0; k < n; k++)
            y[k] += scale * w[i * n + k];
    }
}

/* w (rows, n) += d (rows) x (n)'; nothing where x is NULL */
static void add_outer(size_t rows, size_t n, const float *d, const float *x, float *w) {
    for (size_t i = 0; x && i < rows; i++) {
        const float scale = d[i];
        AC_INDEPENDENT
        for (size_t k = 0; k < n; k++)
            w[i * n + k] += scale * x[k];
    }
}

static void add_to(size_t n, const float *x, float *y) {
    AC_INDEPENDENT
    for (size_t i = 0; i < n; i++)
        y[i] += x[i];
}

static void clear(float *x, size_t n) {
    if (x)
        memset(x, 0, n * sizeof *x);
}

/* y = x, or zero where x is NULL */
static void copy_or_clear(float *y, const float *x, size_t n) {
    if (x)
        memcpy(y, x, n * sizeof *x);
    else
        clear(y, n);
}

AC_INLINE float at(const float *x, size_t i) { return x ? x[i] : 0.0f; }

/* ---- one step ---- */

/* From x (F), h and c before (H; NULL: zero): the record (R) and the new h. c may be the record's own c. */
static void step(const layer *l, const float *x, const float *h, const float *c, float *record,
                 float *h_new) {
    const size_t n = l->h;
    const size_t summed = l->kind == GRU ? 2 * n : l->g; /* rows whose two parts are only added */
    for (size_t i = 0; i < l->g; i++)
        record[i] = at(l->b_ih, i) + (i < summed ? at(l->b_hh, i) : 0.0f);
    add_product(l->g, l->f, l->w_ih, x, record);
    add_product(summed, n, l->w_hh, h, record);
    if (l->kind == RNN) {
        for (size_t i = 0; i < n; i++) {
            const float v = record[i];
            record[i] = h_new[i] = l->own ? (v > 0.0f ? v : 0.0f) : ac_tanhf(v);
        }
        return;
    }
    if (l->kind == LSTM) {
        for (size_t i = 0; i < n; i++) {
            const float in = ac_sigmoidf(record[i]), forget = ac_sigmoidf(record[n + i]);
            const float cell = ac_tanhf(record[2 * n + i]), out = ac_sigmoidf(record[3 * n + i]);
            const float now = forget * at(c, i) + in * cell;
            record[i] = in;
            record[n + i] = forget;
            record[2 * n + i] = cell;
            record[3 * n + i] = out;
            record[4 * n + i] = now;
            h_new[i] = out * ac_tanhf(now);
        }
        return;
    }
    float *reset = record, *keep = record + n, *fresh = record + 2 * n, *met = record + 3 * n;
    for (size_t i = 0; i < n; i++) {
        reset[i] = ac_sigmoidf(reset[i]);
        keep[i] = ac_sigmoidf(keep[i]);
        met[i] = l->own ? at(l->b_hh, 2 * n + i) : reset[i] * at(h, i);
    }
    if (l->own) {
        add_product(n, n, l->w_hh + 2 * n * n, h, met);
        for (size_t i = 0; i < n; i++)
            fresh[i] += reset[i] * met[i];
    } else {
        add_product(n, n, l->w_hh + 2 * n * n, met, fresh);
        for (size_t i = 0; i < n; i++)
            fresh[i] += at(l->b_hh, 2 * n + i);
    }
    for (size_t i = 0; i < n; i++) {
        fresh[i] = ac_tanhf(fresh[i]);
        h_new[i] = (1.0f - keep[i]) * fresh[i] + keep[i] * at(h, i);
    }
}

/* Where step s of the recurrence lies in the sequence. */
AC_INLINE size_t place(const layer *l, size_t s) { return l->reverse ? l->t - 1 - s : s; }

AC_INLINE size_t states(const layer *l) { return l->kind == LSTM ? 2 : 1; }

static void forward(const layer *l, const float *x, float *y, float *work, float *c_last,
                    float *saved) {
    const size_t n = l->h, wide = states(l) * n;
    for (size_t sample = 0; sample < l->n; sample++) {
        const float *h = l->h0 ? l->h0 + sample * n : NULL, *c = l->c0 ? l->c0 + sample * n : NULL;
        for (size_t s = 0; s < l->t; s++) {
            const size_t row = sample * l->t + place(l, s);
            float *record = saved && !l->segment ? saved + row * l->r : work;
            if (saved && l->segment && s % l->segment == 0) {
                copy_or_clear(saved, h, n);
                if (wide > n)
                    copy_or_clear(saved + n, c, n);
                saved += wide;
            }
            step(l, x + row * l->f, h, c, record, y + row * n);
            h = y + row * n;
            c = record + l->g;
        }
        if (c_last)
            memcpy(c_last + sample * n, c, n * sizeof *c);
    }
    clear(work, l->r);
}

/* ---- one step back ---- */

/* Where gradients go; NULL: not asked for. dx (N, T, F); the weights' and biases' as those; the states' (N, H). */
typedef struct {
    float *dx, *dw_ih, *dw_hh, *db_ih, *db_hh, *dh0, *dc0;
} gradients;

/* From a record, h and c before it and dh, dc after it: d (G) of the input's part of the gates and hidden (G) of the
 * other part; dh becomes what reaches h without hidden's product, dc what reaches c. */
static void step_back(const layer *l, const float *record, const float *h, const float *c,
                      float *dh, float *dc, float *d, float *hidden) {
    const size_t n = l->h;
    if (l->kind == RNN) {
        for (size_t i = 0; i < n; i++) {
            const float y = record[i];
            d[i] = l->own ? (y > 0.0f ? dh[i] : 0.0f) : dh[i] * (1.0f - y * y);
            dh[i] = 0.0f;
        }
        return;
    }
    if (l->kind == LSTM) {
        for (size_t i = 0; i < n; i++) {
            const float in = record[i], forget = record[n + i];
            const float cell = record[2 * n + i], out = record[3 * n + i];
            const float top = ac_tanhf(record[4 * n + i]);
            const float down = dc[i] + dh[i] * out * (1.0f - top * top);
            d[i] = down * cell * in * (1.0f - in);
            d[n + i] = down * at(c, i) * forget * (1.0f - forget);
            d[2 * n + i] = down * in * (1.0f - cell * cell);
            d[3 * n + i] = dh[i] * top * out * (1.0f - out);
            dc[i] = down * forget;
            dh[i] = 0.0f;
        }
        return;
    }
    const float *reset = record, *keep = record + n, *fresh = record + 2 * n, *met = record + 3 * n;
    for (size_t i = 0; i < n; i++) {
        d[2 * n + i] = dh[i] * (1.0f - keep[i]) * (1.0f - fresh[i] * fresh[i]);
        d[n + i] = dh[i] * (at(h, i) - fresh[i]) * keep[i] * (1.0f - keep[i]);
        dh[i] *= keep[i];
    }
    if (l->own) {
        for (size_t i = 0; i < n; i++) {
            d[i] = d[2 * n + i] * met[i] * reset[i] * (1.0f - reset[i]);
            hidden[2 * n + i] = d[2 * n + i] * reset[i];
        }
    } else {
        float *d_met = hidden + 2 * n;
        clear(d_met, n);
        add_transposed(n, n, l->w_hh + 2 * n * n, d + 2 * n, d_met);
        for (size_t i = 0; i < n; i++) {
            d[i] = d_met[i] * at(h, i) * reset[i] * (1.0f - reset[i]);
            dh[i] += d_met[i] * reset[i];
            d_met[i] = d[2 * n + i];
        }
    }
    memcpy(hidden, d, 2 * n * sizeof *d);
}

/* Add to the gradients what step `row` of the sequences gives, and to dh what reaches h through w_hh. */
static void collect(const layer *l, const gradients *to, const float *x, const float *h,
                    const float *record, const float *d, const float *hidden, float *dh,
                    size_t row) {
    const size_t n = l->h;
    const int before = l->kind == GRU && !l->own; /* n's rows of w_hh met another vector than h */
    const size_t rows = before ? 2 * n : l->g;
    add_transposed(rows, n, l->w_hh, hidden, dh);
    if (to->dw_hh)
        add_outer(rows, n, hidden, h, to->dw_hh);
    if (to->dw_hh && before)
        add_outer(n, n, hidden + 2 * n, record + 3 * n, to->dw_hh + 2 * n * n);
    if (to->db_ih)
        add_to(l->g, d, to->db_ih);
    if (to->db_hh)
        add_to(l->g, hidden, to->db_hh);
    if (to->dw_ih)
        add_outer(l->g, l->f, d, x, to->dw_ih);
    if (to->dx) { /* may lie over x */
        clear(to->dx + row * l->f, l->f);
        add_transposed(l->g, l->f, l->w_ih, d, to->dx + row * l->f);
    }
}

static void backward(const layer *l, const float *d_y, const float *x, const float *y,
                     const float *saved, const float *d_c, const gradients *to, float *work) {
    const size_t n = l->h, k = l->segment ? l->segment : l->t, wide = states(l) * n;
    const size_t segments = (l->t + k - 1) / k;
    float *d = work, *hidden = l->kind == GRU ? d + l->g : d, *dh = work + 2 * l->g, *dc = dh + n;
    float *again = dc + n, *h_again = again + l->segment * l->r;
    clear(to->dw_ih, l->g * l->f);
    clear(to->dw_hh, l->g * n);
    clear(to->db_ih, l->g);
    clear(to->db_hh, l->g);
    for (size_t sample = 0; sample < l->n; sample++) {
        clear(dh, n);
        copy_or_clear(dc, d_c ? d_c + sample * n : NULL, n);
        for (size_t part = segments; part-- > 0;) {
            const size_t first = part * k, end = first + k < l->t ? first + k : l->t;
            const float *h0 = l->h0 ? l->h0 + sample * n : NULL;
            const float *c0 = l->c0 ? l->c0 + sample * n : NULL;
            if (l->segment) {
                h0 = saved + (sample * segments + part) * wide;
                c0 = h0 + n; /* of an LSTM only */
                const float *h = h0, *c = c0;
                for (size_t s = first; s < end; s++) {
                    float *record = again + (s - first) * l->r, *h_new = h_again + (s - first) * n;
                    step(l, x + (sample * l->t + place(l, s)) * l->f, h, c, record, h_new);
                    h = h_new;
                    c = record + l->g;
                }
            }
            for (size_t s = end; s-- > first;) {
                const size_t row = sample * l->t + place(l, s);
                const size_t last = s > first ? sample * l->t + place(l, s - 1) : 0;
                const float *record = l->segment ? again + (s - first) * l->r : saved + row * l->r;
                const float *h = h0, *c = c0;
                if (s > first) {
                    h = l->segment ? h_again + (s - 1 - first) * n : y + last * n;
                    c = (l->segment ? record - l->r : saved + last * l->r) + l->g;
                }
                if (d_y)
                    add_to(n, d_y + row * n, dh);
                step_back(l, record, h, c, dh, dc, d, hidden);
                collect(l, to, x + row * l->f, h, record, d, hidden, dh, row);
            }
        }
        if (to->dh0)
            memcpy(to->dh0 + sample * n, dh, n * sizeof *dh);
        if (to->dc0)
            memcpy(to->dc0 + sample * n, dc, n * sizeof *dc);
    }
    clear(work, 2 * l->g + 2 * n + l->segment * (l->r + n));
}

/* ---- rows ---- */

/* Sizes and weights; x is input `first` of the call. */
static layer layer_of(const ac_call *call, cell_kind kind, uint32_t first, int32_t segment,
                      int32_t reverse, int32_t own) {
    static const size_t record[] = {5, 4, 1};
    const ac_tensor *x = AC_IN_T(call, first), *w = AC_IN_T(call, first + 2);
    layer l = {0};
    l.kind = kind;
    l.n = (size_t)x->dim[0];
    l.t = (size_t)x->dim[1];
    l.f = (size_t)x->dim[2];
    l.g = (size_t)w->dim[0];
    l.h = (size_t)w->dim[1];
    l.r = record[kind] * l.h;
    l.segment = (size_t)segment;
    l.reverse = reverse != 0;
    l.own = own != 0;
    l.w_ih = AC_IN(call, first + 1);
    l.w_hh = AC_IN(call, first + 2);
    l.b_ih = AC_IN(call, first + 3);
    l.b_hh = AC_IN(call, first + 4);
    l.h0 = AC_IN(call, first + 5);
    l.c0 = kind == LSTM ? AC_IN(call, first + 6) : NULL;
    return l;
}

ac_status AC_KERNEL(lstm)(const ac_call *call) {
    const ac_attr_lstm *a = call->attr;
    const layer l = layer_of(call, LSTM, 0, a->segment, a->reverse, 0);
    forward(&l, AC_IN(call, 0), AC_OUT(call, 0), AC_OUT(call, 1), AC_OUT(call, 2), AC_OUT(call, 3));
    return AC_OK;
}

ac_status AC_KERNEL(gru)(const ac_call *call) {
    const ac_attr_gru *a = call->attr;
    const layer l = layer_of(call, GRU, 0, a->segment, a->reverse, a->reset_after);
    forward(&l, AC_IN(call, 0), AC_OUT(call, 0), AC_OUT(call, 1), NULL, AC_OUT(call, 2));
    return AC_OK;
}

ac_status AC_KERNEL(rnn)(const ac_call *call) {
    const ac_attr_rnn *a = call->attr;
    const layer l = layer_of(call, RNN, 0, a->segment, a->reverse, a->relu);
    forward(&l, AC_IN(call, 0), AC_OUT(call, 0), AC_OUT(call, 1), NULL, AC_OUT(call, 2));
    return AC_OK;
}

static ac_status run_back(const ac_call *call, const layer *l) {
    const int lstm = l->kind == LSTM;
    const uint32_t y = lstm ? 8 : 7, work = lstm ? 7 : 6;
    const gradients to = {AC_OUT(call, 0),
                          AC_OUT(call, 1),
                          AC_OUT(call, 2),
                          AC_OUT(call, 3),
                          AC_OUT(call, 4),
                          AC_OUT(call, 5),
                          lstm ? AC_OUT(call, 6) : NULL};
    backward(l, AC_IN(call, 0), AC_IN(call, 1), AC_IN(call, y), AC_IN(call, y + 1),
             lstm ? AC_IN(call, y + 2) : NULL, &to, AC_OUT(call, work));
    return AC_OK;
}

ac_status AC_KERNEL(lstm_grad)(const ac_call *call) {
    const ac_attr_lstm_grad *a = call->attr;
    const layer l = layer_of(call, LSTM, 1, a->segment, a->reverse, 0);
    return run_back(call, &l);
}

ac_status AC_KERNEL(gru_grad)(const ac_call *call) {
    const ac_attr_gru_grad *a = call->attr;
    const layer l = layer_of(call, GRU, 1, a->segment, a->reverse, a->reset_after);
    return run_back(call, &l);
}

ac_status AC_KERNEL(rnn_grad)(const ac_call *call) {
    const ac_attr_rnn_grad *a = call->attr;
    const layer l = layer_of(call, RNN, 1, a->segment, a->reverse, a->relu);
    return run_back(call, &l);
}
