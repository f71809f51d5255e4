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
} product;

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
                    y[r * p->y_row + (v * width + l) * p->y_column] = out[l];                      \
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

static void tiles(const product *p, const float *a, const float *b, float *y) {
    size_t i = 0;
    for (; i + TILE_ROWS <= p->m; i += TILE_ROWS)
        row_of_tiles(p, TILE_ROWS, a + i * p->a_row, b, y + i * p->y_row);
    for (; i < p->m; i++)
        row_of_tiles(p, 1, a + i * p->a_row, b, y + i * p->y_row);
}

/* ---- both factors contiguous along k: dot products ---- */

/* y[r, c] = sum over k of a[r, k] b[c, k] for `rows` rows and `columns` columns; both have k elements a row.
 * AC_SUM_LANES sums side by side, k in lane k % AC_SUM_LANES, folded by a fixed tree. */
#define DOT_ROWS 2
#define DOT_COLUMNS 4
#define DOT_VECS (AC_SUM_LANES / AC_WIDTH)

AC_INLINE void dots(size_t rows, size_t columns, size_t count, const float *restrict a,
                    const float *restrict b, float *restrict y, size_t n) {
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
            y[r * n + c] = ac_fold(lane[r][c]);
        }
}

AC_INLINE void row_of_dots(size_t rows, size_t n, size_t count, const float *a, const float *b,
                           float *y) {
    size_t j = 0;
    for (; j + DOT_COLUMNS <= n; j += DOT_COLUMNS)
        dots(rows, DOT_COLUMNS, count, a, b + j * count, y + j, n);
    for (; j < n; j++)
        dots(rows, 1, count, a, b + j * count, y + j, n);
}

static void all_dots(size_t m, size_t n, size_t count, const float *a, const float *b, float *y) {
    size_t i = 0;
    for (; i + DOT_ROWS <= m; i += DOT_ROWS)
        row_of_dots(DOT_ROWS, n, count, a + i * count, b, y + i * n);
    for (; i < m; i++)
        row_of_dots(1, n, count, a + i * count, b, y + i * n);
}

/* y (m, n) = op(a) op(b) + bias, clamped; with ta, a is (k, m), else (m, k); with tb, b is (n, k), else (k, n). One
 * leading dimension may stack such matrices. */
ac_status AC_KERNEL(matmul)(const ac_call *call) {
    const ac_attr_matmul *attr = call->attr;
    const ac_tensor *ta = AC_IN_T(call, 0), *ty = AC_OUT_T(call, 0);
    const float *a = AC_IN(call, 0), *b = AC_IN(call, 1), *bias = AC_IN(call, 2);
    float *y = AC_OUT(call, 0);
    const size_t m = (size_t)ty->dim[ty->rank - 2], n = (size_t)ty->dim[ty->rank - 1];
    const size_t k = (size_t)ta->dim[ta->rank - (attr->ta ? 2 : 1)];
    const product plain = {m, n, k, attr->ta ? 1 : k, attr->ta ? m : 1, n, n, 1};
    const product swapped = {n, m, k, k, 1,
                             m, 1, n}; /* the transpose: b a, of which a's columns are contiguous */
    for (size_t left = ty->size / (m * n); left > 0; left--, a += m * k, b += k * n, y += m * n) {
        if (attr->ta && attr->tb) {
            tiles(&swapped, b, a, y);
        } else if (attr->tb) {
            all_dots(m, n, k, a, b, y);
        } else {
            tiles(&plain, a, b, y);
        }
        for (size_t i = 0; bias && i < m; i++)
            for (size_t j = 0; j < n; j++)
                y[i * n + j] += bias[j];
        ac_clamp(y, attr->low, attr->high, m * n);
    }
    return AC_OK;
}
