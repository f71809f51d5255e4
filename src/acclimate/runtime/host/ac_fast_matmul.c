/* Matrix product for machines with vectors: tiles of sums in registers, factors read where they lie.
 *
 * Only where both factors are contiguous along the sum, and there are rows enough to pay for it, columns of the second
 * are turned into a panel first.
 */
#include "ac_fast.h"

enum {
    CHAIN = 128,     /* products summed before they meet the rest of the sum */
    PANEL = 4 * LANES, /* columns of a panel */
    DEPTH = AC_SCRATCH_BYTES / 4 / PANEL, /* of the longest sum that a panel holds */
    DOT_ROWS = 3,
    DOT_COLUMNS = 4,
    FEW_ROWS = 8     /* up to here a panel doesn't pay */
};

/* R rows and V vectors of y; both are constants. */
AC_INLINE void run_tile(const int R, const int V, const product *p, const float *a, const float *b, size_t b_row,
                        const float *bias, float *y, size_t last) {
    vec sum[TILE_ROWS][TILE_VECS];
    const size_t a_row = p->a_row, a_k = p->a_k;
    AC_UNROLL for (int r = 0; r < R; r++)
        AC_UNROLL for (int v = 0; v < V; v++)
            sum[r][v] = bias ? load(bias + (size_t)r * p->bias_row + (v == V - 1 ? last : (size_t)(v * LANES))) : (vec){0};
    for (int k0 = 0; k0 < p->k; k0 += CHAIN) {
        vec acc[TILE_ROWS][TILE_VECS];
        AC_UNROLL for (int r = 0; r < R; r++)
            AC_UNROLL for (int v = 0; v < V; v++) acc[r][v] = (vec){0};
        for (int k = smaller(CHAIN, p->k - k0); k > 0; k--, a += a_k, b += b_row) {
            const float *low = a, *high = a + 3 * a_row;
            vec x[TILE_VECS];
            AC_UNROLL for (int v = 0; v < V; v++) x[v] = load(b + (v == V - 1 ? last : (size_t)(v * LANES)));
            AC_UNROLL for (int r = 0; r < R; r++) {
                const vec w = broadcast(r < 3 ? low[(size_t)r * a_row] : high[(size_t)(r - 3) * a_row]);
                AC_UNROLL for (int v = 0; v < V; v++) acc[r][v] += w * x[v];
            }
        }
        AC_UNROLL for (int r = 0; r < R; r++)
            AC_UNROLL for (int v = 0; v < V; v++) sum[r][v] += acc[r][v];
    }
    AC_UNROLL for (int r = 0; r < R; r++, y += p->y_row)
        AC_UNROLL for (int v = 0; v < V; v++) 
            store(y + (v == V - 1 ? last : (size_t)(v * LANES)), clamp(sum[r][v], &p->clamp));
}

/* `last`: where the last vector begins; it may overlap the one before, where columns run out. */
typedef void (*tile_function)(const product *p, const float *a, const float *b, size_t b_row, const float *bias, float *y,
                              size_t last);

#define AC_TILE(R, V)                                                                                              \
    static void tile_##R##_##V(const product *p, const float *a, const float *b, size_t b_row, const float *bias,  \
                               float *y, size_t last) {                                                            \
        run_tile(R, V, p, a, b, b_row, bias, y, last);                                                             \
    }
#if defined(AC_MANY_REGISTERS)
#define AC_TILE_ROW(R) AC_TILE(R, 1) AC_TILE(R, 2) AC_TILE(R, 3) AC_TILE(R, 4)
#define AC_TILE_NAMES(R) {tile_##R##_1, tile_##R##_2, tile_##R##_3, tile_##R##_4}
#else
#define AC_TILE_ROW(R) AC_TILE(R, 1) AC_TILE(R, 2)
#define AC_TILE_NAMES(R) {tile_##R##_1, tile_##R##_2}
#endif
AC_TILE_ROW(1) AC_TILE_ROW(2) AC_TILE_ROW(3) AC_TILE_ROW(4) AC_TILE_ROW(5) AC_TILE_ROW(6)
static const tile_function tiles[TILE_ROWS][TILE_VECS] = {AC_TILE_NAMES(1), AC_TILE_NAMES(2), AC_TILE_NAMES(3),
                                                          AC_TILE_NAMES(4), AC_TILE_NAMES(5), AC_TILE_NAMES(6)};

/* All rows of `columns` columns of y, of which b and bias are the first; columns >= LANES. */
static void run_columns(const product *p, const float *a, const float *b, size_t b_row, const float *bias, float *y,
                        int columns) {
    const int blocks = (p->m + TILE_ROWS - 1) / TILE_ROWS, all = (columns + LANES - 1) / LANES;
    const int pieces = (all + TILE_VECS - 1) / TILE_VECS;
    for (int piece = 0; piece < pieces; piece++) {
        int from, to, low, high;
        part_of(all, piece, pieces, &from, &to);
        const size_t j = (size_t)from * LANES;
        size_t begin = j;
        if (to == all && to - from == 1) begin = (size_t)(columns - LANES); /* alone, it is the one that is moved */
        const size_t last = (size_t)smaller((to - 1) * LANES, columns - LANES) - begin;
        for (int block = 0; block < blocks; block++) {
            part_of(p->m, block, blocks, &low, &high);
            tiles[high - low - 1][to - from - 1](p, a + (size_t)low * p->a_row, b + begin, b_row,
                                                 bias ? bias + (size_t)low * p->bias_row + begin : NULL,
                                                 y + (size_t)low * p->y_row + begin, last);
        }
    }
}

void AC_FAST_KERNEL(multiply)(const product *p, const float *a, const float *b, const float *bias, float *y) {
    run_columns(p, a, b, p->b_row, bias, y, p->n);
}

/* panel[k * PANEL + l] = b[(j + l) * b_row + k]; columns past the last repeat it. */
static void turn(float *panel, const product *p, const float *b, int columns) {
    for (int l = 0; l < columns; l += LANES) {
        const float *row[LANES];
        for (int i = 0; i < LANES; i++) row[i] = b + (size_t)smaller(l + i, columns - 1) * p->b_row;
        int k = 0;
        for (; k + LANES <= p->k; k += LANES) {
            vec v[LANES];
            AC_UNROLL for (int i = 0; i < LANES; i++) v[i] = load(row[i] + k);
            transpose(v);
            AC_UNROLL for (int i = 0; i < LANES; i++) store(panel + (size_t)(k + i) * PANEL + l, v[i]);
        }
        for (; k < p->k; k++)
            for (int i = 0; i < LANES; i++) panel[(size_t)k * PANEL + (size_t)(l + i)] = row[i][k];
    }
}

/* ---- few rows: dot products ------------------------------------------------------------------------------------ */

AC_INLINE void run_dots(const int R, const int C, const product *p, const float *a, const float *b, const float *bias,
                        float *y) {
    vec acc[DOT_ROWS][DOT_COLUMNS];
    int k = 0;
    AC_UNROLL for (int r = 0; r < R; r++)
        AC_UNROLL for (int c = 0; c < C; c++) acc[r][c] = (vec){0};
    for (; k + LANES <= p->k; k += LANES) {
        vec x[DOT_ROWS];
        AC_UNROLL for (int r = 0; r < R; r++) x[r] = load(a + (size_t)r * p->a_row + k);
        AC_UNROLL for (int c = 0; c < C; c++) {
            const vec w = load(b + (size_t)c * p->b_row + k);
            AC_UNROLL for (int r = 0; r < R; r++) acc[r][c] += x[r] * w;
        }
    }
    AC_UNROLL for (int r = 0; r < R; r++) {
        float sum[DOT_COLUMNS];
        if (C == 4)
            *(four_anywhere *)sum = sums_of(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        else
            AC_UNROLL for (int c = 0; c < C; c++) sum[c] = sum_of(acc[r][c]);
        for (int c = 0; c < C; c++) {
            for (int i = k; i < p->k; i++) sum[c] += a[(size_t)r * p->a_row + (size_t)i] * b[(size_t)c * p->b_row + (size_t)i];
            sum[c] += bias ? bias[c] : 0;
            y[(size_t)r * p->y_row + (size_t)c] =
                p->clamp.on ? ac_at_most(p->clamp.high, ac_at_least(p->clamp.low, sum[c])) : sum[c];
        }
    }
}

static void dots(const product *p, const float *a, const float *b, const float *bias, float *y, int columns) {
    for (int i = 0; i < p->m; i += DOT_ROWS, a += DOT_ROWS * p->a_row, y += DOT_ROWS * p->y_row) {
        const int rows = smaller(DOT_ROWS, p->m - i);
        int j = 0;
        for (; j + DOT_COLUMNS <= columns; j += DOT_COLUMNS) {
            const float *w = b + (size_t)j * p->b_row, *start = bias ? bias + j : NULL;
            if (rows == 3)
                run_dots(3, 4, p, a, w, start, y + j);
            else if (rows == 2)
                run_dots(2, 4, p, a, w, start, y + j);
            else
                run_dots(1, 4, p, a, w, start, y + j);
        }
        for (; j < columns; j++)
            for (int r = 0; r < rows; r++)
                run_dots(1, 1, p, a + (size_t)r * p->a_row, b + (size_t)j * p->b_row, bias ? bias + j : NULL,
                         y + (size_t)r * p->y_row + j);
    }
}

/* ---- one matrix after another ---------------------------------------------------------------------------------- */

typedef struct {
    product p;
    const float *a, *b, *bias;
    float *y;
    int stack;
    size_t a_size, b_size, y_size; /* of one of the stacked matrices */
    ac_workers *workers;
} job;

static void multiply(const product *p, const float *a, const float *b, const float *bias, float *y, float *panel) {
    if (!p->turned) {
        run_columns(p, a, b, p->b_row, bias, y, p->n);
        return;
    }
    if (p->few) {
        dots(p, a, b, bias, y, p->n);
        return;
    }
    for (int j = 0; j < p->n; j += PANEL) {
        int columns = smaller(PANEL, p->n - j);
        if (columns < LANES) { /* too few for a vector: begin earlier */
            j = p->n - LANES;
            columns = LANES;
        }
        turn(panel, p, b + (size_t)j * p->b_row, columns);
        run_columns(p, a, panel, PANEL, bias ? bias + j : NULL, y + j, columns);
    }
}

/* Whole matrices where there are enough, else rows or columns of each. */
static void multiply_part(void *argument, int index, int count) {
    const job *j = argument;
    product p = j->p;
    int first = 0, last = j->stack, begin = 0, end = p.m, left = 0, right = p.n;
    if (j->stack >= count)
        part_of(j->stack, index, count, &first, &last);
    else if (p.m >= count * TILE_ROWS)
        part_of(p.m, index, count, &begin, &end);
    else if (p.n >= count * LANES)
        part_of(p.n, index, count, &left, &right);
    else if (index > 0)
        return;
    p.m = end - begin;
    p.n = right - left;
    for (size_t i = (size_t)first; i < (size_t)last; i++)
        multiply(&p, j->a + i * j->a_size + (size_t)begin * p.a_row,
                 j->b + i * j->b_size + (size_t)left * (p.turned ? p.b_row : 1), j->bias ? j->bias + left : NULL,
                 j->y + i * j->y_size + (size_t)begin * p.y_row + (size_t)left,
                 (float *)((char *)j->workers->scratch + (size_t)index * AC_SCRATCH_BYTES));
}

/* y (m, n) = op(a) op(b) + bias, clamped; with ta, a is (k, m), else (m, k); with tb, b is (n, k), else (k, n). Leading dimensions
 * stack such matrices. */
ac_status AC_FAST_KERNEL(matmul)(const ac_call *call) {
    const ac_attr_matmul *attr = call->attr;
    const ac_tensor *ta = AC_IN_T(call, 0), *ty = AC_OUT_T(call, 0);
    const int m = ty->dim[ty->rank - 2], n = ty->dim[ty->rank - 1], k = ta->dim[ta->rank - (attr->ta ? 2 : 1)];
    const size_t M = (size_t)m, N = (size_t)n, K = (size_t)k;
    const int few = attr->tb && !attr->ta && (m <= FEW_ROWS || n < LANES || k > DEPTH);
    if (!call->workers || (!few && (n < LANES || (attr->tb && k > DEPTH)))) return AC_KERNEL(matmul)(call);
    job j = {.p = {m, n, k, attr->tb, few, attr->ta ? 1 : K, attr->ta ? M : 1, attr->tb ? K : N, N, 0,
                   bounds_of(attr->low, attr->high)},
             .a = AC_IN(call, 0), .b = AC_IN(call, 1), .bias = AC_IN(call, 2), .y = AC_OUT(call, 0),
             .stack = (int)(ty->size / (M * N)), .a_size = M * K, .b_size = K * N, .y_size = M * N,
             .workers = call->workers};
    ac_share(call->workers, (double)j.stack * m * n * k, multiply_part, &j);
    return AC_OK;
}
