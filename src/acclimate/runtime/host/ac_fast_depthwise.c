/* Depthwise convolution, forward and backward, for machines with vectors: LANES channels side by side.
 *
 * A block of planes is copied so that the channels of a pixel are one vector, with zeros around the image. Then widths,
 * strides and dilations make no difference: each product is a whole vector of weights times a whole vector of pixels.
 */
#include "ac_fast_conv.h"

enum { PIXELS = 8, HELD = 64, ROOM = AC_SCRATCH_BYTES / 4 - 2 * TAPS * LANES - 64 };

/* A worker's scratch: weights or their gradients, then two images of vectors. */
typedef struct {
    float w[TAPS][LANES];
    float image[ROOM];
} room;

static size_t floats_of(const frame *f) { return (size_t)f->height * (size_t)f->width * LANES; }

/* The frame that all taps of all phases stay in. */
static frame frame_of(const field *phases, int count) {
    int low[2] = {0, 0}, high[2] = {phases->size[0], phases->size[1]};
    for (int p = 0; p < count; p++)
        for (int t = 0; t < phases[p].taps; t++)
            for (int d = 0; d < 2; d++) {
                const int first = d ? phases[p].col[t] : phases[p].row[t];
                low[d] = smaller(low[d], first);
                high[d] = larger(high[d], first + (phases[p].grid[d] - 1) * phases[p].step[d] + 1);
            }
    return (frame){high[0] - low[0], high[1] - low[1], {-low[0], -low[1]}};
}

/* out[i * out_step] = start + sum over taps of w[t] * x[i * step + offset[t]], in vectors; `count` is a constant. */
AC_INLINE void add_taps(const int count, float *out, size_t out_step, vec start, const float (*w)[LANES], int taps,
                        const float *x, const int32_t *offset, size_t step) {
    vec acc[PIXELS];
    AC_UNROLL for (int i = 0; i < count; i++) acc[i] = start;
    for (int t = 0; t < taps; t++) {
        const vec v = load(w[t]);
        const float *from = x + offset[t];
        AC_UNROLL for (int i = 0; i < count; i++) acc[i] += v * load(from + (size_t)i * step);
    }
    AC_UNROLL for (int i = 0; i < count; i++) store(out + (size_t)i * out_step, acc[i]);
}

typedef void (*taps_function)(float *out, size_t out_step, vec start, const float (*w)[LANES], int taps, const float *x,
                              const int32_t *offset, size_t step);

#define AC_TAPS(N)                                                                                                 \
    static void taps_##N(float *out, size_t out_step, vec start, const float (*w)[LANES], int taps, const float *x, \
                         const int32_t *offset, size_t step) {                                                     \
        if (step == LANES)                                                                                         \
            add_taps(N, out, out_step, start, w, taps, x, offset, LANES);                                          \
        else if (step == 2 * LANES)                                                                                \
            add_taps(N, out, out_step, start, w, taps, x, offset, 2 * LANES);                                      \
        else                                                                                                       \
            add_taps(N, out, out_step, start, w, taps, x, offset, step);                                           \
    }
AC_TAPS(1) AC_TAPS(2) AC_TAPS(3) AC_TAPS(4) AC_TAPS(5) AC_TAPS(6) AC_TAPS(7) AC_TAPS(8)
static const taps_function taps_of[PIXELS] = {taps_1, taps_2, taps_3, taps_4, taps_5, taps_6, taps_7, taps_8};

typedef struct {
    const field *phases; /* parts of the output, each with its taps; `out` is where its first point lies */
    int count, height, width; /* of the output */
    float *out, *dw;
    frame frame;
    ac_workers *workers;
} job;

/* One phase of one block of channels. Where the phase is all there is, `to` is where its planes lie, and what is done of
 * them leaves `out` for there soon, so that it stays in the first cache; else `to` is NULL. */
static void correlate_phase(const job *j, const field *f, room *r, const float *image, float *out, int channel,
                            int channels, float *to) {
    int32_t offset[TAPS];
    vec start = {0};
    int done = 0, held = 0;
    const frame *in = &j->frame;
    for (int t = 0; t < f->taps; t++) {
        offset[t] = ((f->row[t] + in->before[0]) * in->width + f->col[t] + in->before[1]) * LANES;
        for (int l = 0; l < LANES; l++)
            r->w[t][l] = f->w[(size_t)(channel + smaller(l, channels - 1)) * f->w_group + (size_t)f->weight[t]];
    }
    for (int l = 0; f->bias && l < channels; l++) start[l] = f->bias[channel + l];
    const int pieces = (f->grid[1] + PIXELS - 1) / PIXELS;
    out += (f->out - j->out) * LANES;
    for (int i = 0; i < f->grid[0]; i++) {
        float *row = out + (to ? (size_t)held : (size_t)i * f->out_row) * LANES;
        for (int p = 0; p < pieces; p++) {
            int at, end;
            part_of(f->grid[1], p, pieces, &at, &end);
            taps_of[end - at - 1](row + (size_t)at * f->out_col * LANES, f->out_col * LANES, start,
                                  (const float (*)[LANES])r->w, f->taps,
                                  image + ((size_t)(i * f->step[0]) * (size_t)in->width + (size_t)(at * f->step[1])) * LANES,
                                  offset, (size_t)f->step[1] * LANES);
        }
        held += f->grid[1];
        if (!to || (held < HELD && i + 1 < f->grid[0])) continue;
        const int ready = i + 1 < f->grid[0] ? held / LANES * LANES : held;
        spread(to + done, out, f->out_plane, ready, channels, &f->clamp);
        done += ready;
        held -= ready;
        for (int k = 0; k < held; k++) store(out + k * LANES, load(out + (ready + k) * LANES));
    }
}

static void correlate_part(void *argument, int index, int count) {
    const job *j = argument;
    const field *f = j->phases;
    const int blocks = (f->groups + LANES - 1) / LANES, points = j->height * j->width;
    room *r = (room *)((char *)j->workers->scratch + (size_t)index * AC_SCRATCH_BYTES);
    float *out = r->image + floats_of(&j->frame);
    int first, last;
    part_of(f->batch * blocks, index, count, &first, &last);
    memset(r->image, 0, floats_of(&j->frame) * sizeof(float));
    for (int unit = first; unit < last; unit++) {
        const size_t n = (size_t)(unit / blocks);
        const int channel = unit % blocks * LANES, channels = smaller(LANES, f->groups - channel);
        gather(r->image, &j->frame, f->source + n * f->source_image + (size_t)channel * f->source_plane, f->source_plane,
               f->size[0], f->size[1], channels);
        float *to = j->out + n * f->out_image + (size_t)channel * f->out_plane;
        for (int p = 0; p < j->count; p++)
            correlate_phase(j, f + p, r, r->image, out, channel, channels, j->count == 1 ? to : NULL);
        if (j->count > 1) spread(to, out, f->out_plane, points, channels, &f->clamp);
    }
}

static int worth(const field *f) { return f->rows == 1 && f->planes == 1 && f->groups >= LANES / 2; }

int AC_FAST_KERNEL(depthwise)(const field *phases, int count, float *out, int height, int width, ac_workers *workers) {
    job j = {.phases = phases, .count = count, .height = height, .width = width, .out = out, .workers = workers};
    if (!worth(phases)) return 0;
    j.frame = frame_of(phases, count);
    if ((double)j.frame.height * j.frame.width + (double)height * width > ROOM / LANES) return 0;
    double macs = 0;
    for (int p = 0; p < count; p++) macs += (double)phases[p].taps * phases[p].grid[0] * phases[p].grid[1];
    ac_share(workers, 4 * macs * phases->batch * phases->groups, correlate_part, &j);
    return 1;
}

/* ---- gradient of the weights ----------------------------------------------------------------------------------- */

/* dw[k * width + l] += sum over a row of `count` pixels of d * x, R x C taps at once; R and C are constants. */
AC_INLINE void add_pixels(const int R, const int C, float (*dw)[LANES], int width, const float *d, int count,
                          const float *x, size_t down, size_t right, size_t step) {
    vec acc[3][8];
    AC_UNROLL for (int k = 0; k < R; k++)
        AC_UNROLL for (int l = 0; l < C; l++) acc[k][l] = load(dw[k * width + l]);
    for (int i = 0; i < count; i++, d += LANES, x += step) {
        const vec v = load(d);
        AC_UNROLL for (int k = 0; k < R; k++)
            AC_UNROLL for (int l = 0; l < C; l++) acc[k][l] += v * load(x + (size_t)k * down + (size_t)l * right);
    }
    AC_UNROLL for (int k = 0; k < R; k++)
        AC_UNROLL for (int l = 0; l < C; l++) store(dw[k * width + l], acc[k][l]);
}

/* All rows of kernel elements [k, k + R) x [l, l + C) of a kernel whose rows have `width`. */
#define AC_PIXELS(R, C)                                                                                            \
    static void pixels_##R##_##C(float (*dw)[LANES], int width, const float *d, int rows, int count, const float *x, \
                                 size_t down, size_t right, size_t step, size_t row) {                             \
        for (int i = 0; i < rows; i++, d += (size_t)count * LANES, x += row) {                                     \
            if (right == LANES)                                                                                    \
                add_pixels(R, C, dw, width, d, count, x, down, LANES, step);                                       \
            else                                                                                                   \
                add_pixels(R, C, dw, width, d, count, x, down, right, step);                                       \
        }                                                                                                          \
    }
AC_PIXELS(1, 1) AC_PIXELS(1, 2) AC_PIXELS(1, 3) AC_PIXELS(1, 4) AC_PIXELS(1, 5) AC_PIXELS(1, 6) AC_PIXELS(1, 7)
AC_PIXELS(1, 8) AC_PIXELS(2, 1) AC_PIXELS(2, 2) AC_PIXELS(2, 3) AC_PIXELS(2, 4) AC_PIXELS(2, 5) AC_PIXELS(3, 1)
AC_PIXELS(3, 2) AC_PIXELS(3, 3)

typedef void (*pixels_function)(float (*dw)[LANES], int width, const float *d, int rows, int count, const float *x,
                                size_t down, size_t right, size_t step, size_t row);
static const pixels_function pixels_of[3][8] = {
    {pixels_1_1, pixels_1_2, pixels_1_3, pixels_1_4, pixels_1_5, pixels_1_6, pixels_1_7, pixels_1_8},
    {pixels_2_1, pixels_2_2, pixels_2_3, pixels_2_4, pixels_2_5},
    {pixels_3_1, pixels_3_2, pixels_3_3}};

static void weight_grad_part(void *argument, int index, int count) {
    const job *j = argument;
    const field *f = j->phases;
    const frame *in = &j->frame, plain = {f->grid[0], f->grid[1], {0, 0}};
    const int blocks = (f->groups + LANES - 1) / LANES, kernel_width = j->width, kernel_height = f->taps / kernel_width;
    const size_t down = kernel_height > 1 ? (size_t)(f->row[kernel_width] - f->row[0]) * (size_t)in->width * LANES : 0;
    const size_t right = kernel_width > 1 ? (size_t)(f->col[1] - f->col[0]) * LANES : LANES;
    const int wide = smaller(8, kernel_width), tall = wide <= 3 ? 3 : wide <= 5 ? 2 : 1;
    room *r = (room *)((char *)j->workers->scratch + (size_t)index * AC_SCRATCH_BYTES);
    float *d = r->image + floats_of(in);
    int first, last;
    part_of(blocks, index, count, &first, &last);
    memset(r->image, 0, floats_of(in) * sizeof(float));
    for (int block = first; block < last; block++) {
        const int channel = block * LANES, channels = smaller(LANES, f->groups - channel);
        memset(r->w, 0, sizeof r->w);
        for (size_t n = 0; n < (size_t)f->batch; n++) {
            gather(r->image, in, f->source + n * f->source_image + (size_t)channel * f->source_plane, f->source_plane,
                   f->size[0], f->size[1], channels);
            gather(d, &plain, j->out + n * f->out_image + (size_t)channel * f->out_plane, f->out_plane, f->grid[0],
                   f->grid[1], channels);
            for (int k = 0; k < kernel_height; k += tall)
                for (int l = 0; l < kernel_width; l += wide) {
                    const int t = k * kernel_width + l;
                    pixels_of[smaller(tall, kernel_height - k) - 1][smaller(wide, kernel_width - l) - 1](
                        r->w + t, kernel_width, d, f->grid[0], f->grid[1],
                        r->image + ((size_t)(f->row[t] + in->before[0]) * (size_t)in->width
                                    + (size_t)(f->col[t] + in->before[1])) * LANES,
                        down, right, (size_t)f->step[1] * LANES, (size_t)f->step[0] * (size_t)in->width * LANES);
                }
        }
        for (int l = 0; l < channels; l++)
            for (int t = 0; t < f->taps; t++) j->dw[(size_t)(channel + l) * f->w_group + (size_t)t] = r->w[t][l];
    }
}

int AC_FAST_KERNEL(depthwise_weight_grad)(const field *f, int kernel_width, float *dw, ac_workers *workers) {
    job j = {.phases = f, .count = 1, .width = kernel_width, .out = f->out, .dw = dw, .workers = workers};
    if (!worth(f)) return 0;
    j.frame = frame_of(f, 1);
    if ((double)j.frame.height * j.frame.width + (double)f->grid[0] * f->grid[1] > ROOM / LANES) return 0;
    ac_share(workers, 4.0 * f->taps * f->grid[0] * f->grid[1] * f->batch * f->groups, weight_grad_part, &j);
    return 1;
}
