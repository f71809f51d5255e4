/* Convolution with 3 x 3 kernels by minimal filtering: Winograd's F(2 x 2, 3 x 3), 16 products instead of 36 (Lavin and
 * Gray, "Fast Algorithms for Convolutional Neural Networks", 2016), with its transposes for both gradients.
 *
 * Channels lie side by side in vectors. Tiles of 4 x 4 points of the source (overlapping by two) and the kernels are
 * transformed, multiplied as 16 matrices (tiles x channels) and transformed back to 2 x 2 results. The transforms add and
 * halve only, so that rounding grows little; tests bound it.
 */
#include "ac_fast_conv.h"

enum {
    POINTS = 16,
    SKEW = 16,       /* floats between matrices besides their size, so that they do not compete for the same cache lines */
    KERNELS = 65536, /* floats of transformed kernels */
    ROOM = AC_SCRATCH_BYTES / 4 - KERNELS - 64
};

/* How the work is cut: `columns` planes of the result at a time, bands of `rows` rows of tiles. */
typedef struct {
    const field *f;
    int tall, wide;          /* tiles of an image */
    int low[2];              /* source row and column that the first tile begins at, from 0 */
    int turned;              /* kernel element t is at place 8 - t, not t, of its 3 x 3 */
    int rows, columns;       /* of a band; of a block */
    int inner;               /* source planes, rounded up to vectors */
    size_t x_matrix, y_matrix, u_matrix; /* from one matrix to the next */
    size_t frame;            /* floats of a band's frame */
    float *dw;
    ac_workers *workers;
} job;

static int rounded(int n) { return (n + LANES - 1) / LANES * LANES; }

static size_t matrix(int rows, int columns) { return (size_t)rows * (size_t)columns + SKEW; }

/* 0 where it is another kind of convolution, or does not fit, or does not pay. */
static int plan_job(job *j, const field *f) {
    if (f->taps != 9 || f->step[0] != 1 || f->step[1] != 1 || f->groups != 1 || f->out_col != 1) return 0;
    if (f->planes < LANES || f->rows < LANES || f->out_row != (size_t)f->grid[1]) return 0;
    for (int d = 0; d < 2; d++) {
        const int32_t *at = d ? f->col : f->row;
        j->low[d] = smaller(at[0], at[8]);
        if (j->low[d] > 0 || larger(at[0], at[8]) != j->low[d] + 2) return 0;
    }
    j->turned = f->row[0] > f->row[8];
    for (int t = 0; t < 9; t++) {
        const int place = (f->row[t] - j->low[0]) * 3 + f->col[t] - j->low[1];
        if (f->weight[t] != t || place != (j->turned ? 8 - t : t)) return 0;
    }
    j->f = f;
    j->tall = (f->grid[0] + 1) / 2;
    j->wide = (f->grid[1] + 1) / 2;
    j->inner = rounded(f->planes);
    j->columns = smaller(rounded(f->rows), (KERNELS / POINTS - SKEW) / j->inner / LANES * LANES);
    if (j->columns < 2 * LANES && j->columns < rounded(f->rows)) return 0;
    j->u_matrix = matrix(j->inner, j->columns);
    for (j->rows = j->tall; j->rows > 0; j->rows--) {
        const int tiles = j->rows * j->wide;
        j->frame = (size_t)larger((2 * j->rows + 2) * larger(2 * j->wide + 2, f->size[1] - j->low[1]),
                                  2 * j->rows * f->grid[1]) * LANES;
        j->x_matrix = matrix(tiles, j->inner);
        j->y_matrix = matrix(tiles, j->columns);
        if (j->frame + POINTS * (j->x_matrix + j->y_matrix) <= ROOM) break;
    }
    if (j->rows == 0) return 0;
    /* Vector operations: products against products, transforms of both sides, and of the kernels once. */
    const double tiles = (double)f->batch * j->tall * j->wide, in = j->inner / LANES, out = rounded(f->rows) / LANES;
    const double blocks = (f->rows + j->columns - 1) / j->columns;
    const double direct = 9.0 * f->batch * f->grid[0] * f->grid[1] * f->planes * out;
    const double minimal = POINTS * tiles * f->planes * out + 120 * tiles * (in * blocks + out) + 60 * f->planes * out;
    return minimal < 0.92 * direct;
}

/* v[4 * i + k] in place: rows, then columns, by the 4 x 4 matrix B^T. */
AC_INLINE void transform_source(vec v[POINTS]) {
    AC_UNROLL for (int s = 0; s < 2; s++) {
        const int along = s ? 4 : 1, across = s ? 1 : 4;
        AC_UNROLL for (int i = 0; i < 4; i++) {
            vec *p = v + i * along;
            const vec a = p[0] - p[2 * across], b = p[across] + p[2 * across], c = p[2 * across] - p[across];
            p[3 * across] = p[across] - p[3 * across];
            p[0] = a;
            p[across] = b;
            p[2 * across] = c;
        }
    }
}

/* What a tile of `image` (pitch in vectors) becomes, to x[point * x_matrix]. */
AC_INLINE void put_tile(float *x, size_t x_matrix, const float *image, size_t pitch) {
    vec v[POINTS];
    AC_UNROLL for (int i = 0; i < 4; i++)
        AC_UNROLL for (int k = 0; k < 4; k++) v[4 * i + k] = load(image + ((size_t)i * pitch + (size_t)k) * LANES);
    transform_source(v);
    AC_UNROLL for (int e = 0; e < POINTS; e++) store(x + (size_t)e * x_matrix, v[e]);
}

/* Rows of tiles [i0, i0 + rows) of one image's source planes, to x. */
static void transform_band(const job *j, float *x, float *image, const float *source, int i0, int rows) {
    const field *f = j->f;
    frame in = {2 * rows + 2, larger(2 * j->wide + 2, f->size[1] - j->low[1]), {0, -j->low[1]}};
    int first = 2 * i0 + j->low[0];
    const int last = smaller(first + in.height, f->size[0]);
    in.before[0] = larger(0, -first);
    first = larger(0, first);
    memset(image, 0, (size_t)in.height * (size_t)in.width * LANES * sizeof(float));
    for (int c = 0; c < f->planes; c += LANES) {
        if (first < last)
            gather(image, &in, source + (size_t)c * f->source_plane + (size_t)first * (size_t)f->size[1], f->source_plane,
                   last - first, f->size[1], smaller(LANES, f->planes - c));
        for (int i = 0; i < rows; i++)
            for (int k = 0; k < j->wide; k++)
                put_tile(x + (size_t)(i * j->wide + k) * (size_t)j->inner + (size_t)c, j->x_matrix,
                         image + ((size_t)(2 * i) * (size_t)in.width + (size_t)(2 * k)) * LANES, (size_t)in.width);
    }
}

/* The kernels of LANES rows and one plane, to u[point * u_matrix]: G g G^T. `turned` is a constant. */
AC_INLINE void put_kernels(const int turned, float *u, size_t u_matrix, const float *const *w, size_t plane) {
    vec t[9], h[12], ninth = {0};
    const vec half = broadcast(0.5f);
    AC_UNROLL for (int part = 0; part < 8; part += LANES) {
        AC_UNROLL for (int l = 0; l < LANES; l++) t[part + l] = load(w[l] + plane + part);
        transpose(t + part);
    }
    AC_UNROLL for (int l = 0; l < LANES; l++) ninth[l] = w[l][plane + 8];
    t[8] = ninth;
#define AC_KERNEL_AT(i) t[turned ? 8 - (i) : (i)]
    AC_UNROLL for (int i = 0; i < 3; i++) {
        const vec sum = (AC_KERNEL_AT(i) + AC_KERNEL_AT(6 + i)) * half, middle = AC_KERNEL_AT(3 + i) * half;
        h[i] = AC_KERNEL_AT(i);
        h[3 + i] = sum + middle;
        h[6 + i] = sum - middle;
        h[9 + i] = AC_KERNEL_AT(6 + i);
    }
#undef AC_KERNEL_AT
    AC_UNROLL for (int i = 0; i < 4; i++, u += 4 * u_matrix) {
        const vec sum = (h[3 * i] + h[3 * i + 2]) * half, middle = h[3 * i + 1] * half;
        store(u, h[3 * i]);
        store(u + u_matrix, sum + middle);
        store(u + 2 * u_matrix, sum - middle);
        store(u + 3 * u_matrix, h[3 * i + 2]);
    }
}

/* Kernels of rows [r, r + columns) to u[point][plane][row]. */
static void transform_kernels(const job *j, float *u, int r, int columns) {
    const field *f = j->f;
    for (int k = 0; k < columns; k += LANES) {
        const float *w[LANES];
        for (int l = 0; l < LANES; l++) w[l] = f->w + (size_t)smaller(r + k + l, f->rows - 1) * f->w_row;
        for (int c = 0; c < f->planes; c++) {
            float *to = u + (size_t)c * (size_t)j->columns + (size_t)k;
            if (j->turned)
                put_kernels(1, to, j->u_matrix, w, (size_t)c * f->w_plane);
            else
                put_kernels(0, to, j->u_matrix, w, (size_t)c * f->w_plane);
        }
    }
}

/* The results of a band, from y[point][tile][row], to `rows` rows of the planes r, r + 1, ... */
static void finish_band(const job *j, const float *y, float *image, float *out, int i0, int rows, int r, int columns) {
    const field *f = j->f;
    const int height = smaller(2 * rows, f->grid[0] - 2 * i0), width = f->grid[1];
    for (int k = 0; k < columns; k += LANES) {
        vec start = {0};
        const int channels = smaller(LANES, f->rows - r - k);
        for (int l = 0; f->bias && l < channels; l++) start[l] = f->bias[r + k + l];
        for (int i = 0; i < rows; i++)
            for (int t = 0; t < j->wide; t++) {
                const float *m = y + (size_t)(i * j->wide + t) * (size_t)j->columns + (size_t)k;
                vec s[8];
                AC_UNROLL for (int e = 0; e < 4; e++) {
                    const vec a = load(m + (size_t)e * j->y_matrix), b = load(m + (size_t)(4 + e) * j->y_matrix),
                              c = load(m + (size_t)(8 + e) * j->y_matrix), d = load(m + (size_t)(12 + e) * j->y_matrix);
                    s[e] = a + b + c;
                    s[4 + e] = b - c - d;
                }
                float *to = image + ((size_t)(2 * i) * (size_t)width + (size_t)(2 * t)) * LANES;
                AC_UNROLL for (int a = 0; a < 2; a++) {
                    if (2 * i + a >= height) break;
                    const vec *p = s + 4 * a;
                    store(to + (size_t)(a * width) * LANES, start + p[0] + p[1] + p[2]);
                    if (2 * t + 1 < width) store(to + (size_t)(a * width + 1) * LANES, start + p[1] - p[2] - p[3]);
                }
            }
        spread(out + (size_t)(r + k) * f->out_plane + (size_t)(2 * i0) * f->out_row, image, f->out_plane, height * width,
               channels, &f->clamp);
    }
}

/* Bands of images are shared out. */
static void correlate_part(void *argument, int index, int count) {
    const job *j = argument;
    const field *f = j->f;
    float *u = (float *)((char *)j->workers->scratch + (size_t)index * AC_SCRATCH_BYTES), *image = u + KERNELS;
    float *x = image + j->frame, *y = x + POINTS * j->x_matrix;
    const int bands = (j->tall + j->rows - 1) / j->rows;
    int first, last;
    part_of(f->batch * bands, index, count, &first, &last);
    for (int r = 0; r < f->rows && first < last; r += j->columns) {
        const int columns = smaller(j->columns, rounded(f->rows - r));
        transform_kernels(j, u, r, columns);
        for (int unit = first; unit < last; unit++) {
            const size_t n = (size_t)(unit / bands);
            const int i0 = unit % bands * j->rows, rows = smaller(j->rows, j->tall - i0);
            transform_band(j, x, image, f->source + n * f->source_image, i0, rows);
            const product p = {rows * j->wide, columns, f->planes, 0, 0, (size_t)j->inner, 1, (size_t)j->columns,
                               (size_t)j->columns, 0, {0, 0, 0}};
            for (size_t e = 0; e < POINTS; e++)
                AC_FAST_KERNEL(multiply)(&p, x + e * j->x_matrix, u + e * j->u_matrix, NULL, y + e * j->y_matrix);
            finish_band(j, y, image, f->out + n * f->out_image, i0, rows, r, columns);
        }
    }
}

int AC_FAST_KERNEL(winograd)(const field *f, ac_workers *workers) {
    job j = {.workers = workers};
    if (!plan_job(&j, f)) return 0;
    ac_share(workers, 4.0 * f->batch * f->rows * f->planes * f->grid[0] * f->grid[1], correlate_part, &j);
    return 1;
}

/* ---- gradient of the weights ----------------------------------------------------------------------------------- */

/* Rows of tiles of the gradient's planes r, r + 1, ... to y[point][tile][row]: A d A^T; zero outside of the grid. */
static void transform_gradient(const job *j, float *y, float *image, const float *d, int i0, int rows, int r, int columns) {
    const field *f = j->f;
    const frame plain = {2 * rows, 2 * j->wide, {0, 0}};
    const int height = smaller(2 * rows, f->grid[0] - 2 * i0);
    memset(image, 0, (size_t)plain.height * (size_t)plain.width * LANES * sizeof(float));
    for (int k = 0; k < columns; k += LANES) {
        gather(image, &plain, d + (size_t)(r + k) * f->out_plane + (size_t)(2 * i0) * f->out_row, f->out_plane, height,
               f->grid[1], smaller(LANES, f->rows - r - k));
        for (int i = 0; i < rows; i++)
            for (int t = 0; t < j->wide; t++) {
                const float *at = image + ((size_t)(2 * i) * (size_t)plain.width + (size_t)(2 * t)) * LANES;
                float *to = y + (size_t)(i * j->wide + t) * (size_t)j->columns + (size_t)k;
                vec s[8];
                AC_UNROLL for (int b = 0; b < 2; b++) {
                    const vec p = load(at + b * LANES), q = load(at + ((size_t)plain.width + (size_t)b) * LANES);
                    s[b] = p;
                    s[2 + b] = p + q;
                    s[4 + b] = p - q;
                    s[6 + b] = -q;
                }
                AC_UNROLL for (int a = 0; a < 4; a++) {
                    const vec p = s[2 * a], q = s[2 * a + 1];
                    store(to + (size_t)(4 * a) * j->y_matrix, p);
                    store(to + (size_t)(4 * a + 1) * j->y_matrix, p + q);
                    store(to + (size_t)(4 * a + 2) * j->y_matrix, p - q);
                    store(to + (size_t)(4 * a + 3) * j->y_matrix, -q);
                }
            }
    }
}

/* From u[point][plane][row] to the weights' gradient: G^T u G. */
static void finish_kernels(const job *j, const float *u, int r, int columns) {
    const field *f = j->f;
    for (int c = 0; c < f->planes; c++)
        for (int k = 0; k < columns; k += LANES) {
            vec h[12], g[9];
            const float *m = u + (size_t)c * (size_t)j->columns + (size_t)k;
            const vec half = broadcast(0.5f);
            AC_UNROLL for (int e = 0; e < 4; e++) {
                const vec a = load(m + (size_t)e * j->u_matrix), b = load(m + (size_t)(4 + e) * j->u_matrix),
                          p = load(m + (size_t)(8 + e) * j->u_matrix), d = load(m + (size_t)(12 + e) * j->u_matrix);
                const vec sum = (b + p) * half;
                h[e] = a + sum;
                h[4 + e] = (b - p) * half;
                h[8 + e] = sum + d;
            }
            AC_UNROLL for (int i = 0; i < 3; i++) {
                const vec sum = (h[4 * i + 1] + h[4 * i + 2]) * half;
                g[3 * i] = h[4 * i] + sum;
                g[3 * i + 1] = (h[4 * i + 1] - h[4 * i + 2]) * half;
                g[3 * i + 2] = sum + h[4 * i + 3];
            }
            const int channels = smaller(LANES, f->rows - r - k);
            const vec ninth = g[8];
            float *dw = j->dw + (size_t)(r + k) * f->w_row + (size_t)c * f->w_plane;
            AC_UNROLL for (int part = 0; part < 8; part += LANES) transpose(g + part);
            for (int l = 0; l < channels; l++, dw += f->w_row) {
                AC_UNROLL for (int part = 0; part < 8; part += LANES) store(dw + part, g[part + l]);
                dw[8] = ninth[l];
            }
        }
}

/* Blocks of the result's planes are shared out, so that each sum is one thread's. */
static void weight_grad_part(void *argument, int index, int count) {
    const job *j = argument;
    const field *f = j->f;
    float *u = (float *)((char *)j->workers->scratch + (size_t)index * AC_SCRATCH_BYTES), *image = u + KERNELS;
    float *x = image + j->frame, *y = x + POINTS * j->x_matrix;
    int first, last;
    part_of(rounded(f->rows) / LANES, index, count, &first, &last);
    for (int r = first * LANES; r < last * LANES; r += j->columns) {
        const int columns = smaller(j->columns, last * LANES - r);
        memset(u, 0, POINTS * j->u_matrix * sizeof(float));
        for (size_t n = 0; n < (size_t)f->batch; n++)
            for (int i0 = 0; i0 < j->tall; i0 += j->rows) {
                const int rows = smaller(j->rows, j->tall - i0);
                transform_band(j, x, image, f->source + n * f->source_image, i0, rows);
                transform_gradient(j, y, image, f->out + n * f->out_image, i0, rows, r, columns);
                const product p = {f->planes, columns, rows * j->wide, 0, 0, 1, (size_t)j->inner, (size_t)j->columns,
                                   (size_t)j->columns, (size_t)j->columns, {0, 0, 0}};
                for (size_t e = 0; e < POINTS; e++) {
                    float *sum = u + e * j->u_matrix;
                    AC_FAST_KERNEL(multiply)(&p, x + e * j->x_matrix, y + e * j->y_matrix, sum, sum);
                }
            }
        finish_kernels(j, u, r, columns);
    }
}

int AC_FAST_KERNEL(winograd_weight_grad)(const field *f, float *dw, ac_workers *workers) {
    job j = {.dw = dw, .workers = workers};
    if (!plan_job(&j, f)) return 0;
    ac_share(workers, 4.0 * f->batch * f->rows * f->planes * f->grid[0] * f->grid[1], weight_grad_part, &j);
    return 1;
}
