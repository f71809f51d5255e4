/* Reference kernel: matrix product. Each element of the result is one sum in a fixed order, whatever the tiles. */
#include "ac_math.h"
#include "ac_ops.h"

/* ---- one factor's columns are contiguous: tiles, k innermost ---- */

#define TILE_ROWS 4
#define TILE_VECS 2

/* y[i, j] = sum over k of a[i, k] b[k, j]. Where they lie: a + i * a_row + k * a_k, b + k * b_row + j,
 * y + i * y_row + j * y_column. */
typedef struct {
    size_t m, n, k, a_row, a_k, b_row, y_row, y_column;
    int add; /* to y, instead of writing it */
} product;

AC_INLINE void put(float *y, float v, int add) { *y = add ? *y + v : v; }

#ifndef AC_SCALAR
AC_INLINE float load_one(const float *p) { return *p; }
AC_INLINE void store_one(float *p, float v) { *p = v; }

/* Defines name(p, rows, vecs, a, b, y): `rows` rows of y, from *a and *y on, and `vecs` times the vector's width of
 * columns, from *b and *y on. The sum runs over k in order, in float. */
#define AC_DEFINE_TILE(name, vector, load, store)                                                  \
    AC_INLINE void name(const product *p, size_t rows, size_t vecs, const float *restrict a,       \
                        const float *restrict b, float *restrict y) {                              \
        const size_t width = sizeof(vector) / sizeof(float);                                       \
        const size_t a_row = p->a_row, a_k = p->a_k, b_row = p->b_row;                             \
        vector sum[TILE_ROWS][TILE_VECS] = {0};                                                    \
        for (size_t k = p->k; k > 0; k--, a += a_k, b += b_row)                                    \
            for (size_t r = 0; r < rows; r++)                                                      \
                for (size_t v = 0; v < vecs; v++)                                                  \
                    sum[r][v] += a[r * a_row] * load(b + v * width);                               \
        for (size_t r = 0; r < rows; r++)                                                          \
            for (size_t v = 0; v < vecs; v++) {                                                    \
                float out[sizeof(vector) / sizeof(float)];                                         \
                store(out, sum[r][v]);                                                             \
                for (size_t l = 0; l < width; l++)                                                 \
                    put(y + r * p->y_row + (v * width + l) * p->y_column, out[l], p->add);         \
            }                                                                                      \
    }

AC_DEFINE_TILE(vector_tile, ac_vec, ac_vec_load, ac_vec_store)
AC_DEFINE_TILE(scalar_tile, float, load_one, store_one)

/* All columns of `rows` rows. */
AC_INLINE void row_of_tiles(const product *p, size_t rows, const float *a, const float *b,
                            float *y) {
    size_t j = 0;
    for (; j + TILE_VECS * AC_WIDTH <= p->n; j += TILE_VECS * AC_WIDTH)
        vector_tile(p, rows, TILE_VECS, a, b + j, y + j * p->y_column);
    for (; j + AC_WIDTH <= p->n; j += AC_WIDTH)
        vector_tile(p, rows, 1, a, b + j, y + j * p->y_column);
    for (; j < p->n; j++)
        scalar_tile(p, rows, 1, a, b + j, y + j * p->y_column);
}

#else
/* Four columns of `rows` rows, at most four, of which the first `skip` are not written. Where neighbouring rows of `a` are neighbouring floats, that is known at the
 * call: one address is enough then. */
AC_INLINE void square(const product *p, size_t rows, int packed, const float *a, const float *b, float *y,
                      size_t skip) {
    ac_square s = AC_SQUARE_ZERO;
    ac_rows w = ac_rows_of(a, p->a_row, rows);
    const size_t a_k = p->a_k, b_row = p->b_row;
    if (packed)
        for (size_t k = p->k; k > 0; k--, a += a_k, b += b_row)
            ac_square_add(&s, a[0], a[1], a[2], a[3], ac_four_load(b));
    else
        for (size_t k = p->k; k > 0; k--, b += b_row, ac_rows_move(&w, a_k))
            ac_square_add(&s, *w.r0, *w.r1, *w.r2, *w.r3, ac_four_load(b));
    const ac_four row[4] = {s.r0, s.r1, s.r2, s.r3};
    for (size_t r = 0; r < rows; r++, y += p->y_row) {
        if (skip < 1)
            put(y, row[r].a, p->add);
        if (skip < 2)
            put(y + p->y_column, row[r].b, p->add);
        if (skip < 3)
            put(y + 2 * p->y_column, row[r].c, p->add);
        put(y + 3 * p->y_column, row[r].d, p->add);
    }
}

static void one_sum(const product *p, const float *a, const float *b, float *y) {
    float s = 0;
    for (size_t k = p->k; k > 0; k--, a += p->a_k, b += p->b_row)
        s += *a * *b;
    put(y, s, p->add);
}

/* All columns of `rows` rows; the last four columns may overlap those before. */
static void row_of_tiles(const product *p, size_t rows, const float *a, const float *b, float *y) {
    if (p->n < 4) {
        for (size_t r = 0; r < rows; r++)
            for (size_t j = 0; j < p->n; j++)
                one_sum(p, a + r * p->a_row, b + j, y + r * p->y_row + j * p->y_column);
        return;
    }
    for (size_t j = 0; j < p->n; j += 4) {
        const size_t at = j + 4 <= p->n ? j : p->n - 4;
        float *to = y + at * p->y_column;
        if (rows == 4 && p->a_row == 1)
            square(p, 4, 1, a, b + at, to, j - at);
        else
            square(p, rows, 0, a, b + at, to, j - at);
    }
}
#endif

static void tiles(const product *p, const float *a, const float *b, float *y) {
    size_t i = 0;
    for (; i + TILE_ROWS <= p->m; i += TILE_ROWS)
        row_of_tiles(p, TILE_ROWS, a + i * p->a_row, b, y + i * p->y_row);
#ifdef AC_SCALAR
    if (i < p->m)
        row_of_tiles(p, p->m - i, a + i * p->a_row, b, y + i * p->y_row);
#else
    for (; i < p->m; i++)
        row_of_tiles(p, 1, a + i * p->a_row, b, y + i * p->y_row);
#endif
}

/* ---- both factors contiguous along k: dot products ---- */

/* y[r, c] = sum over k of a[r, k] b[c, k] for `rows` rows and `columns` columns; both have k elements a row.
 * AC_SUM_LANES sums side by side, k in lane k % AC_SUM_LANES, folded by a fixed tree. */
#ifndef AC_SCALAR
#define DOT_ROWS 2
#define DOT_COLUMNS 4
#define DOT_VECS (AC_SUM_LANES / AC_WIDTH)

AC_INLINE void dots(size_t rows, size_t columns, size_t count, const float *restrict a,
                    const float *restrict b, float *restrict y, size_t n, int add) {
    float lane[DOT_ROWS][DOT_COLUMNS][AC_SUM_LANES];
    ac_vec sum[DOT_ROWS][DOT_COLUMNS][DOT_VECS] = {0};
    size_t k = 0;
    for (; k + AC_SUM_LANES <= count; k += AC_SUM_LANES)
        for (size_t v = 0; v < DOT_VECS; v++)
            for (size_t r = 0; r < rows; r++)
                for (size_t c = 0; c < columns; c++)
                    sum[r][c][v] += ac_vec_load(a + r * count + k + v * AC_WIDTH) *
                                    ac_vec_load(b + c * count + k + v * AC_WIDTH);
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++) {
            for (size_t v = 0; v < DOT_VECS; v++)
                ac_vec_store(lane[r][c] + v * AC_WIDTH, sum[r][c][v]);
            for (size_t l = 0; k + l < count; l++)
                lane[r][c][l] += a[r * count + k + l] * b[c * count + k + l];
            put(y + r * n + c, ac_fold(lane[r][c]), add);
        }
}

AC_INLINE void row_of_dots(size_t rows, size_t n, size_t count, const float *a, const float *b,
                           float *y, int add) {
    size_t j = 0;
    for (; j + DOT_COLUMNS <= n; j += DOT_COLUMNS)
        dots(rows, DOT_COLUMNS, count, a, b + j * count, y + j, n, add);
    for (; j < n; j++)
        dots(rows, 1, count, a, b + j * count, y + j, n, add);
}

static void all_dots(size_t m, size_t n, size_t count, const float *a, const float *b, float *y, int add) {
    size_t i = 0;
    for (; i + DOT_ROWS <= m; i += DOT_ROWS)
        row_of_dots(DOT_ROWS, n, count, a + i * count, b, y + i * n, add);
    for (; i < m; i++)
        row_of_dots(1, n, count, a + i * count, b, y + i * n, add);
}
#else
AC_INLINE void add_dots(ac_square *s, const ac_rows *v, const ac_rows *w, size_t k) {
    const ac_four x = {w->r0[k], w->r1[k], w->r2[k], w->r3[k]};
    ac_square_add(s, v->r0[k], v->r1[k], v->r2[k], v->r3[k], x);
}

/* Up to four by four of them, a lane at a time; four elements of each lane at a time, so that addresses are cheap. */
static void square_of_dots(size_t rows, size_t columns, size_t count, const float *a, const float *b, float *y,
                           size_t n, int add) {
    float lane[4][4][AC_SUM_LANES];
    for (size_t l = 0; l < AC_SUM_LANES; l++) {
        ac_square s = AC_SQUARE_ZERO;
        ac_rows v = ac_rows_of(a + l, count, rows), w = ac_rows_of(b + l, count, columns);
        size_t k = l;
        for (; k + 3 * AC_SUM_LANES < count; k += 4 * AC_SUM_LANES) {
            add_dots(&s, &v, &w, 0);
            add_dots(&s, &v, &w, AC_SUM_LANES);
            add_dots(&s, &v, &w, 2 * AC_SUM_LANES);
            add_dots(&s, &v, &w, 3 * AC_SUM_LANES);
            ac_rows_move(&v, 4 * AC_SUM_LANES);
            ac_rows_move(&w, 4 * AC_SUM_LANES);
        }
        for (; k < count; k += AC_SUM_LANES) {
            add_dots(&s, &v, &w, 0);
            ac_rows_move(&v, AC_SUM_LANES);
            ac_rows_move(&w, AC_SUM_LANES);
        }
        const ac_four row[4] = {s.r0, s.r1, s.r2, s.r3};
        for (size_t r = 0; r < 4; r++) {
            lane[r][0][l] = row[r].a;
            lane[r][1][l] = row[r].b;
            lane[r][2][l] = row[r].c;
            lane[r][3][l] = row[r].d;
        }
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++)
            put(y + r * n + c, ac_fold(lane[r][c]), add);
}

static void all_dots(size_t m, size_t n, size_t count, const float *a, const float *b, float *y, int add) {
    for (size_t i = 0; i < m; i += 4)
        for (size_t j = 0; j < n; j += 4)
            square_of_dots(m - i < 4 ? m - i : 4, n - j < 4 ? n - j : 4, count, a + i * count, b + j * count,
                           y + i * n + j, n, add);
}
#endif

/* y = op(a) op(b), or y += ; y (m, n), the sums have k terms. With ta, a is (k, m), else (m, k); with tb, b is (n, k),
 * else (k, n). */
static void multiply(size_t m, size_t n, size_t k, int ta, int tb, const float *a, const float *b, float *y, int add) {
    const product plain = {m, n, k, ta ? 1 : k, ta ? m : 1, n, n, 1, add};
    const product swapped = {n, m, k, k, 1, m, 1, n, add}; /* the transpose: b a, of which a's columns are contiguous */
    if (ta && tb)
        tiles(&swapped, b, a, y);
    else if (tb)
        all_dots(m, n, k, a, b, y, add);
    else
        tiles(&plain, a, b, y);
}

/* y (m, n) = op(a) op(b) + bias, clamped. One leading dimension may stack such matrices. */
ac_status AC_KERNEL(matmul)(const ac_call *call) {
    const ac_attr_matmul *attr = call->attr;
    const ac_tensor *ta = AC_IN_T(call, 0), *ty = AC_OUT_T(call, 0);
    const float *a = AC_IN(call, 0), *b = AC_IN(call, 1), *bias = AC_IN(call, 2);
    float *y = AC_OUT(call, 0);
    const size_t m = (size_t)ty->dim[ty->rank - 2], n = (size_t)ty->dim[ty->rank - 1];
    const size_t k = (size_t)ta->dim[ta->rank - (attr->ta ? 2 : 1)];
    for (size_t left = ty->size / (m * n); left > 0; left--, a += m * k, b += k * n, y += m * n) {
        multiply(m, n, k, attr->ta, attr->tb, a, b, y, 0);
        for (size_t i = 0; bias && i < m; i++)
            for (size_t j = 0; j < n; j++)
                y[i * n + j] += bias[j];
        ac_clamp(y, attr->low, attr->high, m * n);
    }
    return AC_OK;
}

/* total (m, n) += op(a) op(b) */
ac_status AC_KERNEL(matmul_add)(const ac_call *call) {
    const ac_attr_matmul_add *attr = call->attr;
    const ac_tensor *total = AC_IN_T(call, 0), *a = AC_IN_T(call, 1);
    multiply((size_t)total->dim[0], (size_t)total->dim[1], (size_t)a->dim[attr->ta ? 0 : 1], attr->ta, attr->tb,
             AC_IN(call, 1), AC_IN(call, 2), AC_IN(call, 0), 1);
    return AC_OK;
}
