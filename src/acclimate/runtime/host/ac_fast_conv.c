/* Convolution, forward and backward, for machines with vectors: implicit matrix products without packing.
 *
 * What a band of outputs sees of the source is laid out once with zeros around it, columns and rows sorted by their
 * remainder modulo the stride (a canvas; where nothing lies outside and the stride is one, the source itself serves).
 * Then every tap of every output vector is one unaligned load at a fixed offset, whatever stride, padding and dilation,
 * and weights are read where they lie. Shapes that do not fit the scratch are left to the plain kernels.
 */
#include "ac_fast_conv.h"

enum {
    DEPTH = 8192, /* source planes x taps */
    SPOTS = 2048, /* output vectors of a band */
    CHAIN = 72,   /* products summed before they meet the rest of the sum, so that rounding grows with its parts */
    GROUP = 16,   /* output vectors that meet the same weights one after another, while these are in the first cache */
    SIDE = 128,   /* output vectors of a band of a weight gradient, of which rows x terms sums stay in registers */
#if defined(AC_MANY_REGISTERS) && defined(__AVX__)
    DOT_ROWS = 3,
    DOT_TERMS = 8,
#else
    DOT_ROWS = 3,
    DOT_TERMS = 4,
#endif
    CANVAS = (AC_SCRATCH_BYTES - DEPTH * 8 - SPOTS * 16 - DOT_ROWS * (SIDE + 1) * LANES * 4) / 4
};

/* Where a product's source (from the vector's place) and weight (from the row's first) lie. */
typedef struct {
    int32_t source, weight;
} term;

/* An output vector: its place in the canvas, grid row (of the band) and column, and whether its lanes lie side by side
 * in the output. Else only lanes inside of the grid count; a row of lanes wraps after canvas.pitch columns. */
typedef struct {
    int32_t at, row, col, whole;
} spot;

/* A worker's scratch. */
typedef struct {
    term terms[DEPTH];
    spot spots[SPOTS];
    float side[DOT_ROWS * (SIDE + 1) * LANES];
    float canvas[CANVAS];
} room;

typedef struct {
    int direct, flat;        /* the source is the canvas; vectors run on over the end of a grid row */
    int rows;                /* grid rows of a band */
    int first[2];            /* row and column of the source that the first grid point's first tap sees */
    int height, width;       /* of one remainder's part */
    int pitch;               /* floats from one grid row to the next */
    size_t plane;            /* floats from one source plane to the next */
    uint32_t phases;         /* bit a * step[1] + b: rows and columns of these remainders are seen by some tap */
    int32_t offset[TAPS];    /* from a grid point's place to what tap t sees */
} canvas;

/* Of the positions at + i * step, i = 0, 1, ..., count - 1: the first i that is not negative, at most count, */
static int first_inside(int at, int step, int count) {
    return at >= 0 ? 0 : smaller(count, (-at + step - 1) / step);
}

/* and one past the last i that is below size; never below first_inside. */
static int end_inside(int at, int step, int size, int count) {
    int end = at >= size ? 0 : (size - 1 - at) / step + 1;
    return larger(smaller(end, count), first_inside(at, step, count));
}

/* Places from the first grid point of a band of `rows` grid rows to its last. */
static int64_t band_points(const field *f, const canvas *c, int rows) {
    return (rows - 1) * (int64_t)c->pitch + f->grid[1];
}

/* Output vectors of a band of `rows` grid rows, in either order. */
static int64_t count_spots(const field *f, const canvas *c, int rows, int flat) {
    return flat ? (band_points(f, c, rows) + LANES - 1) / LANES
                : rows * (((int64_t)f->grid[1] + LANES - 1) / LANES);
}

/* Lay out the canvas for the field's taps; 0 where it does not fit. `most` bounds the vectors of a band. */
static int plan_canvas(canvas *c, const field *f, int most) {
    int low[2] = {f->row[0], f->col[0]}, high[2] = {f->row[0], f->col[0]};
    if (f->taps < 1 || f->taps > TAPS || (int64_t)f->planes * f->taps > DEPTH) return 0;
    if (f->step[0] * (int64_t)f->step[1] > STEPS) return 0;
    const int phases = f->step[0] * f->step[1];
    for (int t = 1; t < f->taps; t++) {
        low[0] = smaller(low[0], f->row[t]);
        low[1] = smaller(low[1], f->col[t]);
        high[0] = larger(high[0], f->row[t]);
        high[1] = larger(high[1], f->col[t]);
    }
    c->first[0] = low[0];
    c->first[1] = low[1];
    c->direct = phases == 1 && low[0] >= 0 && low[1] >= 0 && f->grid[0] + high[0] <= f->size[0]
                && f->grid[1] + high[1] <= f->size[1]
                && (f->grid[1] >= LANES || (f->grid[0] - 1) * (int64_t)f->size[1] + f->grid[1] >= LANES);
    c->rows = f->grid[0];
    c->width = f->grid[1] + (high[1] - low[1]) / f->step[1];
    c->pitch = c->direct ? f->size[1] : c->width;
    for (;; c->rows = (c->rows + 1) / 2) {
        int64_t height = c->rows + (high[0] - low[0]) / f->step[0];
        int64_t plane = height * c->width * phases;
        c->height = (int)height;
        c->flat = count_spots(f, c, c->rows, 1) < count_spots(f, c, c->rows, 0) || f->grid[1] < LANES;
        int fits = (c->direct || plane * f->planes <= CANVAS - 2 * LANES) && count_spots(f, c, c->rows, c->flat) <= most;
        /* A direct band must hold a whole vector. */
        if (c->direct && band_points(f, c, c->rows) < LANES) return 0;
        c->plane = c->direct ? f->source_plane : (size_t)plane;
        if (fits) break;
        if (c->rows == 1) return 0;
    }
    /* So must the last band: a vector that begins in it cannot reach back into the one before. */
    while (c->direct && f->grid[0] % c->rows && band_points(f, c, f->grid[0] % c->rows) < LANES) c->rows--;
    if (c->direct && band_points(f, c, c->rows) < LANES) return 0;
    c->phases = 0;
    for (int t = 0; t < f->taps; t++) {
        int row = f->row[t] - low[0], col = f->col[t] - low[1];
        int phase = row % f->step[0] * f->step[1] + col % f->step[1];
        c->phases |= 1u << phase;
        c->offset[t] = c->direct ? row * c->pitch + col
                                 : phase * c->height * c->width + row / f->step[0] * c->width + col / f->step[1];
    }
    return 1;
}

/* to[i] = from[i * step]; exactly count elements are read and written. */
AC_INLINE void copy_steps(float *to, const float *from, int step, int count) {
    int i = 0;
    if (step == 1) {
        for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
        if (i < count && count >= LANES) store(to + count - LANES, load(from + count - LANES)), i = count;
    } else if (step == 2) {
        for (; i + 4 <= count; i += 4)
            for (int l = 0; l < 4; l++) to[i + l] = from[2 * (i + l)];
    }
    for (; i < count; i++) to[i] = from[i * (ptrdiff_t)step];
}

/* Rows [0, height) of one remainder of one source plane; row and col: where its first element comes from. */
static void fill_phase(float *to, const field *f, const canvas *c, const float *plane, int row, int col, int height) {
    const int low = first_inside(col, f->step[1], c->width), high = end_inside(col, f->step[1], f->size[1], c->width);
    for (int i = 0; i < height; i++, row += f->step[0], to += c->width) {
        const int end = row < 0 || row >= f->size[0] ? 0 : high;
        for (int j = 0; j < smaller(low, end); j++) to[j] = 0;
        if (low < end)
            copy_steps(to + low, plane + (size_t)row * (size_t)f->size[1] + (size_t)(col + low * f->step[1]), f->step[1],
                       end - low);
        for (int j = larger(0, low < end ? end : 0); j < c->width; j++) to[j] = 0;
    }
}

/* What `rows` grid rows from i0 on see of source planes `source`, and zeros after it. */
static void fill_canvas(float *to, const field *f, const canvas *c, const float *source, int i0, int rows) {
    const int height = c->height - (c->rows - rows);
    float *end = to + (size_t)f->planes * c->plane;
    for (int p = 0; p < f->planes; p++, source += f->source_plane, to += c->plane)
        for (int phase = 0; phase < f->step[0] * f->step[1]; phase++)
            if (c->phases >> phase & 1)
                fill_phase(to + (size_t)phase * (size_t)(c->height * c->width), f, c, source,
                           i0 * f->step[0] + c->first[0] + phase / f->step[1], c->first[1] + phase % f->step[1], height);
    for (int i = 0; i < 2 * LANES; i++) end[i] = 0;
}

/* The output vectors of `rows` grid rows. The last vector of a row (or of the band) may overlap the one before. */
static int make_spots(spot *s, const field *f, const canvas *c, int rows) {
    int n = 0;
    if (!c->flat) {
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < f->grid[1]; j += LANES) {
                int col = smaller(j, f->grid[1] - LANES);
                s[n++] = (spot){i * c->pitch + col, i, col, f->out_col == 1};
            }
        return n;
    }
    const int total = (rows - 1) * c->pitch + f->grid[1];
    const int joined = f->out_col == 1 && c->pitch == f->grid[1] && f->out_row == (size_t)f->grid[1];
    for (int at = 0; at < total; at += LANES) {
        int place = larger(0, smaller(at, total - LANES)), row = place / c->pitch, col = place % c->pitch;
        int whole = total >= LANES && f->out_col == 1 && (joined || col + LANES <= f->grid[1]);
        s[n++] = (spot){place, row, col, whole};
    }
    return n;
}

static int make_terms(term *t, const field *f, const canvas *c) {
    int n = 0;
    for (int p = 0; p < f->planes; p++)
        for (int k = 0; k < f->taps; k++)
            t[n++] = (term){(int32_t)((size_t)p * c->plane) + c->offset[k],
                            (int32_t)((size_t)p * f->w_plane) + f->weight[k]};
    return n;
}

/* ---- products -------------------------------------------------------------------------------------------------- */

/* sum[r * V + v] += sum over terms of w[r * w_row + weight] * x[v][source + lane]. R and V are constants. */
AC_INLINE void add_products(const int R, const int V, vec *sum, const term *t, int count, const float *w, size_t w_row,
                            const float *const *x) {
    vec acc[TILE_ROWS][TILE_VECS];
    const float *from[TILE_VECS];
    AC_UNROLL for (int v = 0; v < V; v++) from[v] = x[v];
    AC_UNROLL for (int r = 0; r < R; r++)
        AC_UNROLL for (int v = 0; v < V; v++) acc[r][v] = (vec){0};
    for (const term *end = t + count; t < end; t++) {
        const ptrdiff_t at = t->source;
        const float *low = w + t->weight, *high = low + 3 * w_row;
        vec b[TILE_VECS];
        AC_UNROLL for (int v = 0; v < V; v++) b[v] = load(from[v] + at);
        AC_UNROLL for (int r = 0; r < R; r++) {
            const vec a = broadcast(r < 3 ? low[(size_t)r * w_row] : high[(size_t)(r - 3) * w_row]);
            AC_UNROLL for (int v = 0; v < V; v++) acc[r][v] += a * b[v];
        }
    }
    AC_UNROLL for (int r = 0; r < R; r++)
        AC_UNROLL for (int v = 0; v < V; v++) sum[r * V + v] += acc[r][v];
}

/* A tile: `rows` output planes x `vecs` output vectors, of which s are the places; x and out: of the band's first. */
typedef struct {
    const field *f;
    const canvas *c;
    const term *terms;
    int depth, band_rows;
} tile;

AC_INLINE void scatter(const tile *t, float *out, const spot *s, vec value) {
    int row = s->row, col = s->col;
    for (int l = 0; l < LANES && row < t->band_rows; l++) {
        if (col < t->f->grid[1]) out[(size_t)row * t->f->out_row + (size_t)col * t->f->out_col] = value[l];
        if (++col == t->c->pitch) {
            col = 0;
            row++;
        }
    }
}

AC_INLINE void run_tile(const int R, const int V, const tile *t, const float *w, const float *bias, const float *x,
                        float *out, const spot *s) {
    vec sum[TILE_ROWS * TILE_VECS];
    const float *at[TILE_VECS];
    AC_UNROLL for (int v = 0; v < V; v++) at[v] = x + s[v].at;
    AC_UNROLL for (int r = 0; r < R; r++)
        AC_UNROLL for (int v = 0; v < V; v++) sum[r * V + v] = broadcast(bias ? bias[r] : 0);
    for (int k = 0; k < t->depth; k += CHAIN)
        add_products(R, V, sum, t->terms + k, smaller(CHAIN, t->depth - k), w, t->f->w_row, at);
    AC_UNROLL for (int r = 0; r < R; r++, out += t->f->out_plane)
        AC_UNROLL for (int v = 0; v < V; v++) {
            const vec y = clamp(sum[r * V + v], &t->f->clamp);
            if (s[v].whole)
                store(out + (size_t)s[v].row * t->f->out_row + (size_t)s[v].col, y);
            else
                scatter(t, out, s + v, y);
        }
}

typedef void (*tile_function)(const tile *t, const float *w, const float *bias, const float *x, float *out,
                              const spot *s);

#define AC_TILE(R, V)                                                                                              \
    static void tile_##R##_##V(const tile *t, const float *w, const float *bias, const float *x, float *out,       \
                               const spot *s) {                                                                    \
        run_tile(R, V, t, w, bias, x, out, s);                                                                     \
    }
#define AC_TILE_ROW(R) AC_TILE(R, 1) AC_TILE(R, 2) AC_TILE_WIDE(R)
#define AC_TILE_NAMES(R) {tile_##R##_1, tile_##R##_2 AC_TILE_NAMES_WIDE(R)}
#if defined(AC_MANY_REGISTERS)
#define AC_TILE_WIDE(R) AC_TILE(R, 3) AC_TILE(R, 4)
#define AC_TILE_NAMES_WIDE(R) , tile_##R##_3, tile_##R##_4
#else
#define AC_TILE_WIDE(R)
#define AC_TILE_NAMES_WIDE(R)
#endif
AC_TILE_ROW(1) AC_TILE_ROW(2) AC_TILE_ROW(3) AC_TILE_ROW(4) AC_TILE_ROW(5) AC_TILE_ROW(6)

static const tile_function tiles[TILE_ROWS][TILE_VECS] = {AC_TILE_NAMES(1), AC_TILE_NAMES(2), AC_TILE_NAMES(3),
                                                          AC_TILE_NAMES(4), AC_TILE_NAMES(5), AC_TILE_NAMES(6)};

/* Rows [begin, end) of a group, all output vectors of a band. */
static void multiply_band(const tile *t, int begin, int end, const float *w, const float *bias, const float *x,
                          float *out, const spot *spots, int count) {
    const field *f = t->f;
    const int blocks = (end - begin + TILE_ROWS - 1) / TILE_ROWS;
    for (int g = 0; g < count; g += GROUP) {
        const int here = smaller(GROUP, count - g), pieces = (here + TILE_VECS - 1) / TILE_VECS;
        for (int b = 0; b < blocks; b++) {
            int low, high, from, to;
            part_of(end - begin, b, blocks, &low, &high);
            for (int p = 0; p < pieces; p++) {
                part_of(here, p, pieces, &from, &to);
                tiles[high - low - 1][to - from - 1](t, w + (size_t)(begin + low) * f->w_row,
                                                     bias ? bias + begin + low : NULL, x,
                                                     out + (size_t)(begin + low) * f->out_plane, spots + g + from);
            }
        }
    }
}

typedef struct {
    const field *f;
    const canvas *c;
    ac_workers *workers;
} job;

/* What one worker does: whole images where there are enough, else some of the rows of each. */
static void correlate_part(void *argument, int index, int count) {
    const job *j = argument;
    const field *f = j->f;
    const canvas *c = j->c;
    room *r = (room *)((char *)j->workers->scratch + (size_t)index * AC_SCRATCH_BYTES);
    const int units = f->batch * f->groups, split = units < count;
    int first = 0, last = units, begin = 0, end = f->rows, made = 0, spots = 0;
    part_of(split ? f->rows : units, index, count, split ? &begin : &first, split ? &end : &last);
    tile t = {f, c, r->terms, make_terms(r->terms, f, c), 0};
    for (int unit = first; unit < last && begin < end; unit++) {
        const int n = unit / f->groups, g = unit % f->groups;
        const float *source = f->source + (size_t)n * f->source_image + (size_t)g * (size_t)f->planes * f->source_plane;
        float *out = f->out + (size_t)n * f->out_image + (size_t)g * (size_t)f->rows * f->out_plane;
        for (int i0 = 0; i0 < f->grid[0]; i0 += c->rows) {
            const int rows = smaller(c->rows, f->grid[0] - i0);
            const float *x = r->canvas;
            if (c->direct)
                x = source + (size_t)(i0 + c->first[0]) * (size_t)c->pitch + c->first[1];
            else
                fill_canvas(r->canvas, f, c, source, i0, rows);
            if (made != rows) spots = make_spots(r->spots, f, c, made = rows);
            t.band_rows = rows;
            multiply_band(&t, begin, end, f->w + (size_t)g * f->w_group, f->bias ? f->bias + g * f->rows : NULL, x,
                          out + (size_t)i0 * f->out_row, r->spots, spots);
        }
    }
}

/* Call `run` for parts of the grid that are as wide as fits; 0 where none fits, or `run` says so. */
static int by_columns(const field *f, int most, int (*run)(const field *f, const canvas *c, void *argument), void *argument) {
    int width = f->grid[1];
    for (int j = 0; j < f->grid[1]; j += width) {
        field part = *f;
        canvas c;
        for (;; width = (width / 2 + LANES - 1) / LANES * LANES) {
            part.grid[1] = smaller(width, f->grid[1] - j);
            for (int t = 0; t < f->taps; t++) part.col[t] = f->col[t] + j * f->step[1];
            if (plan_canvas(&c, &part, most)) break;
            if (j > 0 || width <= 2 * LANES) return 0;
        }
        part.out = f->out + (size_t)j * f->out_col;
        if (!run(&part, &c, argument)) return 0;
    }
    return 1;
}

static int correlate_columns(const field *f, const canvas *c, void *workers) {
    job j = {f, c, workers};
    ac_share(workers, (double)f->batch * f->groups * f->rows * f->planes * f->taps * f->grid[0] * f->grid[1], correlate_part,
             &j);
    return 1;
}

/* 0 where the field does not fit. */
static int correlate(const field *f, ac_workers *workers) {
    return AC_FAST_KERNEL(winograd)(f, workers) || by_columns(f, SPOTS, correlate_columns, workers);
}

/* ---- conv and conv_input_grad ---------------------------------------------------------------------------------- */

/* Batch, channels and the two spatial dimensions of a tensor; elements of a plane and of an image. */
typedef struct {
    int n, c, h, w;
    size_t plane, image;
} shape;

static shape shape_of(const ac_tensor *t) {
    int h = t->rank == 4 ? t->dim[2] : 1, w = t->dim[t->rank - 1];
    size_t plane = (size_t)h * (size_t)w;
    return (shape){t->dim[0], t->dim[1], h, w, plane, plane * (size_t)t->dim[1]};
}

static void make_taps(field *f, const shape *w, const int32_t dilation[2], const int32_t before[2]) {
    for (int t = 0; t < f->taps; t++) {
        f->weight[t] = t;
        f->row[t] = t / w->w * dilation[0] - before[0];
        f->col[t] = t % w->w * dilation[1] - before[1];
    }
}

/* x (N, C, H, W), w (O, C / groups, kH, kW), bias (O)? -> y (N, O, P, Q), clamped */
ac_status AC_FAST_KERNEL(conv)(const ac_call *call) {
    const ac_attr_conv *a = call->attr;
    shape x = shape_of(AC_IN_T(call, 0)), w = shape_of(AC_IN_T(call, 1)), y = shape_of(AC_OUT_T(call, 0));
    if (!call->workers || w.plane > TAPS) return AC_KERNEL(conv)(call);
    field f = {.batch = x.n, .groups = a->groups, .rows = y.c / a->groups, .planes = w.c, .grid = {y.h, y.w},
               .size = {x.h, x.w}, .step = {a->stride[0], a->stride[1]}, .taps = (int)w.plane,
               .source = AC_IN(call, 0), .w = AC_IN(call, 1), .bias = AC_IN(call, 2), .out = AC_OUT(call, 0),
               .source_plane = x.plane, .source_image = x.image, .w_row = w.image, .w_plane = w.plane,
               .w_group = w.image * (size_t)(y.c / a->groups), .out_image = y.image, .out_plane = y.plane,
               .out_row = (size_t)y.w, .out_col = 1, .clamp = bounds_of(a->low, a->high)};
    make_taps(&f, &w, a->dilation, a->before);
    if (AC_FAST_KERNEL(depthwise)(&f, 1, f.out, y.h, y.w, call->workers)) return AC_OK;
    return correlate(&f, call->workers) ? AC_OK : AC_KERNEL(conv)(call);
}

/* The input points up + i * stride, left + j * stride: those that the same taps reach. */
static void make_phase(field *f, const ac_attr_conv_input_grad *a, const shape *w, const shape *x, float *dx, int up,
                       int left) {
    f->out = dx + (size_t)up * (size_t)x->w + left;
    f->grid[0] = (x->h - 1 - up) / a->stride[0] + 1;
    f->grid[1] = (x->w - 1 - left) / a->stride[1] + 1;
    f->taps = 0;
    for (int t = 0; t < (int)w->plane; t++) {
        int row = up + a->before[0] - t / w->w * a->dilation[0], col = left + a->before[1] - t % w->w * a->dilation[1];
        if (row % a->stride[0] || col % a->stride[1]) continue;
        f->weight[f->taps] = t;
        f->row[f->taps] = row / a->stride[0];
        f->col[f->taps++] = col / a->stride[1];
    }
}

static void clear(const field *f) {
    for (int n = 0; n < f->batch; n++)
        for (int c = 0; c < f->groups * f->rows; c++)
            for (int i = 0; i < f->grid[0]; i++)
                for (int j = 0; j < f->grid[1]; j++)
                    f->out[(size_t)n * f->out_image + (size_t)c * f->out_plane + (size_t)i * f->out_row
                           + (size_t)j * f->out_col] = 0;
}

/* d (N, O, P, Q), w (O, C / groups, kH, kW) -> dx (N, C, H, W) */
ac_status AC_FAST_KERNEL(conv_input_grad)(const ac_call *call) {
    const ac_attr_conv_input_grad *a = call->attr;
    shape d = shape_of(AC_IN_T(call, 0)), w = shape_of(AC_IN_T(call, 1)), x = shape_of(AC_OUT_T(call, 0));
    if (!call->workers || w.plane > TAPS || a->stride[0] * (int64_t)a->stride[1] > STEPS)
        return AC_KERNEL(conv_input_grad)(call);
    field phase[STEPS];
    phase[0] = (field){.batch = x.n, .groups = a->groups, .rows = w.c, .planes = d.c / a->groups, .step = {1, 1},
                       .size = {d.h, d.w}, .source = AC_IN(call, 0), .w = AC_IN(call, 1), .source_plane = d.plane,
                       .source_image = d.image, .w_row = w.plane, .w_plane = w.image,
                       .w_group = w.image * (size_t)(d.c / a->groups), .out_image = x.image, .out_plane = x.plane,
                       .out_row = (size_t)x.w * (size_t)a->stride[0], .out_col = (size_t)a->stride[1]};
    int count = 0;
    for (int up = 0; up < smaller(a->stride[0], x.h); up++)
        for (int left = 0; left < smaller(a->stride[1], x.w); left++, count++) {
            phase[count] = phase[0];
            make_phase(phase + count, a, &w, &x, AC_OUT(call, 0), up, left);
        }
    if (AC_FAST_KERNEL(depthwise)(phase, count, AC_OUT(call, 0), x.h, x.w, call->workers)) return AC_OK;
    for (int p = 0; p < count; p++)
        if (phase[p].taps == 0)
            clear(phase + p);
        else if (!correlate(phase + p, call->workers))
            return AC_KERNEL(conv_input_grad)(call);
    return AC_OK;
}

/* ---- conv_weight_grad ------------------------------------------------------------------------------------------ */

/* Floats from one row of `side` to the next: odd in vectors, so that rows do not compete for the same cache lines. */
AC_INLINE size_t side_row(int count) { return (size_t)(count | 1) * LANES; }

/* out[r][v] += sum over output vectors of side[r][vector] * x[its place + term v]. R and V are constants. Terms' weights
 * follow each other. */
AC_INLINE void add_dots(const int R, const int V, float *out, size_t out_row, const term *t, const float *side,
                        const spot *s, int count, const float *x) {
    const size_t down = side_row(count);
    vec acc[DOT_ROWS][DOT_TERMS];
    const float *at[DOT_TERMS];
    AC_UNROLL for (int v = 0; v < V; v++) at[v] = x + t[v].source;
    AC_UNROLL for (int r = 0; r < R; r++)
        AC_UNROLL for (int v = 0; v < V; v++) acc[r][v] = (vec){0};
    for (const spot *end = s + count; s < end; s++, side += LANES) {
        const ptrdiff_t place = s->at;
        vec a[DOT_ROWS];
        AC_UNROLL for (int r = 0; r < R; r++) a[r] = load(side + (size_t)r * down);
        AC_UNROLL for (int v = 0; v < V; v++) {
            const vec b = load(at[v] + place);
            AC_UNROLL for (int r = 0; r < R; r++) acc[r][v] += a[r] * b;
        }
    }
    out += t->weight;
    AC_UNROLL for (int r = 0; r < R; r++, out += out_row) {
        AC_UNROLL for (int v = 0; v + 4 <= V; v += 4)
            *(four_anywhere *)(out + v) += sums_of(acc[r][v], acc[r][v + 1], acc[r][v + 2], acc[r][v + 3]);
        AC_UNROLL for (int v = V / 4 * 4; v < V; v++) out[v] += sum_of(acc[r][v]);
    }
}

typedef void (*dots_function)(float *out, size_t out_row, const term *t, const float *side, const spot *s, int count,
                              const float *x);

#define AC_DOTS(R, V)                                                                                              \
    static void dots_##R##_##V(float *out, size_t out_row, const term *t, const float *side, const spot *s,        \
                               int count, const float *x) {                                                        \
        add_dots(R, V, out, out_row, t, side, s, count, x);                                                        \
    }
#if defined(AC_MANY_REGISTERS) && defined(__AVX__)
#define AC_DOTS_ROW(R) \
    AC_DOTS(R, 1) AC_DOTS(R, 2) AC_DOTS(R, 3) AC_DOTS(R, 4) AC_DOTS(R, 5) AC_DOTS(R, 6) AC_DOTS(R, 7) AC_DOTS(R, 8)
#define AC_DOTS_NAMES(R) \
    {dots_##R##_1, dots_##R##_2, dots_##R##_3, dots_##R##_4, dots_##R##_5, dots_##R##_6, dots_##R##_7, dots_##R##_8}
#else
#define AC_DOTS_ROW(R) AC_DOTS(R, 1) AC_DOTS(R, 2) AC_DOTS(R, 3) AC_DOTS(R, 4)
#define AC_DOTS_NAMES(R) {dots_##R##_1, dots_##R##_2, dots_##R##_3, dots_##R##_4}
#endif
AC_DOTS_ROW(1) AC_DOTS_ROW(2) AC_DOTS_ROW(3)

static const dots_function dots[DOT_ROWS][DOT_TERMS] = {AC_DOTS_NAMES(1), AC_DOTS_NAMES(2), AC_DOTS_NAMES(3)};

/* side[spot][lane] = gradient d of an output plane there; zero where a lane counts for nothing. */
static void fill_side(float *side, const field *f, const canvas *c, const float *d, const spot *s, int count,
                      int band_rows) {
    for (int k = 0, next = 0; k < count; k++, side += LANES) {
        const float *from = d + (size_t)s[k].row * f->out_row + (size_t)s[k].col;
        /* A vector that overlaps the one before has only its last lanes to itself. */
        const int place = c->flat ? s[k].row * c->pitch + s[k].col : s[k].col, fresh = place ? next - place : 0;
        if (s[k].whole && fresh <= 0) {
            store(side, load(from));
        } else {
            int row = s[k].row, col = s[k].col;
            for (int l = 0; l < LANES; l++) {
                side[l] = l >= fresh && row < band_rows && col < f->grid[1]
                              ? d[(size_t)row * f->out_row + (size_t)col] : 0;
                if (++col == c->pitch) {
                    col = 0;
                    row++;
                }
            }
        }
        next = place + LANES;
    }
}

typedef struct {
    const field *f;
    const canvas *c;
    ac_workers *workers;
    float *dw;
    int images; /* of a band */
} grad_job;

/* Rows [begin, end) of one group: adds what `images` images' band gives, one block of rows after the other. */
static void dot_band(const grad_job *j, room *r, const float *d, const float *x, float *dw, int begin, int end,
                     int depth, int count, int images, int band_rows) {
    const field *f = j->f;
    const int blocks = (end - begin + DOT_ROWS - 1) / DOT_ROWS, all = count * images;
    for (int b = 0; b < blocks; b++) {
        int low, high;
        part_of(end - begin, b, blocks, &low, &high);
        const int rows = high - low;
        const float *from = d + (size_t)(begin + low) * f->out_plane;
        for (int n = 0; n < images; n++) /* side[r][image][spot]: a row of each image at a time */
            for (int i = 0; i < rows; i++)
                fill_side(r->side + (size_t)i * side_row(all) + (size_t)n * (size_t)count * LANES, f, j->c,
                          from + (size_t)n * f->out_image + (size_t)i * f->out_plane, r->spots, count, band_rows);
        for (int at = 0; at < depth; at += DOT_TERMS)
            dots[rows - 1][smaller(DOT_TERMS, depth - at) - 1](dw + (size_t)(begin + low) * f->w_row, f->w_row,
                                                               r->terms + at, r->side, r->spots, all, x);
    }
}

static void weight_grad_part(void *argument, int index, int count) {
    const grad_job *j = argument;
    const field *f = j->f;
    const canvas *c = j->c;
    room *r = (room *)((char *)j->workers->scratch + (size_t)index * AC_SCRATCH_BYTES);
    const int split = f->groups < count;
    const size_t image = c->direct ? f->source_image : (size_t)f->planes * c->plane;
    int first = 0, last = f->groups, begin = 0, end = f->rows;
    part_of(split ? f->rows : f->groups, index, count, split ? &begin : &first, split ? &end : &last);
    const int depth = make_terms(r->terms, f, c);
    for (int g = first; g < last && begin < end; g++) {
        float *dw = j->dw + (size_t)g * f->w_group;
        for (int n0 = 0; n0 < f->batch; n0 += j->images)
            for (int i0 = 0; i0 < f->grid[0]; i0 += c->rows) {
                const int rows = smaller(c->rows, f->grid[0] - i0), images = smaller(j->images, f->batch - n0);
                const float *source = f->source + (size_t)n0 * f->source_image
                                      + (size_t)g * (size_t)f->planes * f->source_plane;
                const float *x = r->canvas;
                if (c->direct)
                    x = source + (size_t)(i0 + c->first[0]) * (size_t)c->pitch + c->first[1];
                else
                    for (int n = 0; n < images; n++)
                        fill_canvas(r->canvas + (size_t)n * image, f, c, source + (size_t)n * f->source_image, i0, rows);
                const int spots = make_spots(r->spots, f, c, rows);
                for (int k = spots; k < spots * images; k++) {
                    r->spots[k] = r->spots[k - spots];
                    r->spots[k].at += (int32_t)image;
                }
                const float *d = f->out + (size_t)n0 * f->out_image
                                 + (size_t)g * (size_t)f->rows * f->out_plane + (size_t)i0 * f->out_row;
                dot_band(j, r, d, x, dw, begin, end, depth, spots, images, rows);
            }
    }
}

/* Adds to dw what these columns of the gradient give. */
static int weight_grad_columns(const field *f, const canvas *plan, void *argument) {
    canvas c = *plan;
    grad_job j = *(const grad_job *)argument;
    c.phases = ~0u; /* lanes that count for nothing must be finite too */
    j.f = f;
    j.c = &c;
    j.images = 1;
    if (c.rows == f->grid[0]) {
        const int64_t fit = c.direct ? f->batch : (CANVAS - 2 * LANES) / ((int64_t)f->planes * (int64_t)c.plane);
        j.images = smaller(f->batch, smaller((int)fit, SIDE / (int)count_spots(f, &c, c.rows, c.flat)));
    }
    ac_share(j.workers, (double)f->batch * f->groups * f->rows * f->planes * f->taps * f->grid[0] * f->grid[1],
             weight_grad_part, &j);
    return 1;
}

/* x (N, C, H, W), d (N, O, P, Q) -> dw (O, C / groups, kH, kW) */
ac_status AC_FAST_KERNEL(conv_weight_grad)(const ac_call *call) {
    const ac_attr_conv_weight_grad *a = call->attr;
    shape x = shape_of(AC_IN_T(call, 0)), d = shape_of(AC_IN_T(call, 1)), w = shape_of(AC_OUT_T(call, 0));
    if (!call->workers || w.plane > TAPS) return AC_KERNEL(conv_weight_grad)(call);
    field f = {.batch = x.n, .groups = a->groups, .rows = d.c / a->groups, .planes = w.c, .grid = {d.h, d.w},
               .size = {x.h, x.w}, .step = {a->stride[0], a->stride[1]}, .taps = (int)w.plane,
               .source = AC_IN(call, 0), .out = AC_IN(call, 1), .source_plane = x.plane, .source_image = x.image,
               .w_row = w.image, .w_plane = w.plane, .w_group = w.image * (size_t)(d.c / a->groups),
               .out_image = d.image, .out_plane = d.plane, .out_row = (size_t)d.w, .out_col = 1};
    make_taps(&f, &w, a->dilation, a->before);
    grad_job j = {.workers = call->workers, .dw = AC_OUT(call, 0)};
    if ((double)f.batch * (double)x.image > INT32_MAX) return AC_KERNEL(conv_weight_grad)(call);
    if (AC_FAST_KERNEL(depthwise_weight_grad)(&f, w.w, j.dw, call->workers)) return AC_OK;
    if (AC_FAST_KERNEL(winograd_weight_grad)(&f, j.dw, call->workers)) return AC_OK;
    memset(j.dw, 0, (size_t)d.c * w.image * sizeof(float));
    return by_columns(&f, SIDE, weight_grad_columns, &j) ? AC_OK : AC_KERNEL(conv_weight_grad)(call);
}
