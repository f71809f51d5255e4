/* What the fast convolutions share: what is to be computed. */
#ifndef AC_FAST_CONV_H
#define AC_FAST_CONV_H

#include "ac_fast.h"

enum {
    TAPS = 64, /* kernel elements */
    STEPS = 16 /* strides, as a product of both */
};

/* Grid point (n, i, j) of output plane r is bias[r] (or 0) plus the sum over source planes c, over taps t, of
 *   w[r * w_row + c * w_plane + weight[t]] * source[n][c][i * step[0] + row[t]][j * step[1] + col[t]],
 * zero outside of the source, and lies at out[n * out_image + r * out_plane + i * out_row + j * out_col];
 * for `groups` such groups of planes. In a weight gradient `out` is the gradient that comes in, and is read. */
typedef struct {
    int batch, groups, rows, planes, grid[2], step[2], size[2], taps;
    const float *source, *w, *bias;
    float *out;
    size_t source_plane, source_image, w_row, w_plane, w_group, out_image, out_plane, out_row, out_col;
    int32_t weight[TAPS], row[TAPS], col[TAPS];
    bounds clamp; /* of the result */
} field;

/* An image of vectors: `before` rows and columns of zeros, then the planes', then zeros. */
typedef struct {
    int height, width, before[2];
} frame;

/* Planes of height x width into an image; channels past the last repeat it. The border is left as it is. */
static inline void gather(float *to, const frame *f, const float *from, size_t plane, int height, int width, int channels) {
    const int points = height * width;
    const float *source[LANES];
    for (int l = 0; l < LANES; l++) source[l] = from + (size_t)smaller(l, channels - 1) * plane;
    to += ((size_t)f->before[0] * (size_t)f->width + (size_t)f->before[1]) * LANES;
    for (int at = 0, row = 0, col = 0; at < points;) {
        vec v[LANES];
        const int count = smaller(LANES, points - at);
        if (count == LANES) {
            AC_UNROLL for (int l = 0; l < LANES; l++) v[l] = load(source[l] + at);
            transpose(v);
        } else {
            for (int i = 0; i < count; i++)
                for (int l = 0; l < LANES; l++) v[i][l] = source[l][at + i];
        }
        if (count == LANES && col + LANES <= width) {
            float *p = to + ((size_t)row * (size_t)f->width + (size_t)col) * LANES;
            AC_UNROLL for (int i = 0; i < LANES; i++) store(p + i * LANES, v[i]);
            at += LANES;
            col += LANES;
        } else {
            for (int i = 0; i < count; i++, at++) {
                if (col == width) col = 0, row++;
                store(to + ((size_t)row * (size_t)f->width + (size_t)col++) * LANES, v[i]);
            }
        }
        if (col == width) col = 0, row++;
    }
}

/* An image without border into planes of `points` pixels, clamped. */
static inline void spread(float *to, const float *from, size_t plane, int points, int channels, const bounds *limit) {
    for (int at = 0; at < points; at += LANES, from += LANES * LANES) {
        vec v[LANES];
        const int count = smaller(LANES, points - at);
        if (count == LANES) {
            AC_UNROLL for (int i = 0; i < LANES; i++) v[i] = clamp(load(from + i * LANES), limit);
            transpose(v);
            for (int l = 0; l < channels; l++) store(to + (size_t)l * plane + at, v[l]);
        } else {
            for (int i = 0; i < count; i++) {
                v[i] = clamp(load(from + i * LANES), limit);
                for (int l = 0; l < channels; l++) to[(size_t)l * plane + (size_t)(at + i)] = v[i][l];
            }
        }
    }
}

/* Both in ac_fast_depthwise.c; 0 where the field is not depthwise, or does not fit the scratch.
 * phases: parts of an output of height x width that lies at `out`, each with its own taps. */
int AC_FAST_KERNEL(depthwise)(const field *phases, int count, float *out, int height, int width, ac_workers *workers);
int AC_FAST_KERNEL(depthwise_weight_grad)(const field *f, int kernel_width, float *dw, ac_workers *workers);

/* In ac_fast_winograd.c: 3 x 3 kernels that move by one; 0 where they are others, or it would not pay. */
int AC_FAST_KERNEL(winograd)(const field *f, ac_workers *workers);
int AC_FAST_KERNEL(winograd_weight_grad)(const field *f, float *dw, ac_workers *workers);

#endif
