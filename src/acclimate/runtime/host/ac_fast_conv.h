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
} field;

/* Both in ac_fast_depthwise.c; 0 where the field is not depthwise, or does not fit the scratch.
 * phases: parts of an output of height x width that lies at `out`, each with its own taps. */
int AC_FAST_KERNEL(depthwise)(const field *phases, int count, float *out, int height, int width, ac_workers *workers);
int AC_FAST_KERNEL(depthwise_weight_grad)(const field *f, int kernel_width, float *dw, ac_workers *workers);

#endif
