/* Integer convolutions for processors with vectors: products of int16 pairs, summed in int32. Integers are exact, so the
 * results are the plain kernels' to the bit; the float gradients differ by the order of their sums. */
#include "ac_fast.h"
#include "ac_quantized.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* ---- vectors of pairs ---- */

#if defined(__AVX2__)
typedef __m256i pairs;
enum { WIDE = 8 };
AC_INLINE pairs load_pairs(const int16_t *p) { return _mm256_loadu_si256((const void *)p); }
AC_INLINE pairs same_pair(uint32_t w) { return _mm256_set1_epi32((int)w); }
AC_INLINE pairs add_products(pairs sum, pairs a, pairs b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
AC_INLINE pairs no_sum(void) { return _mm256_setzero_si256(); }
AC_INLINE void store_sums(int32_t *to, pairs sum) { _mm256_storeu_si256((void *)to, sum); }
#elif defined(__SSE2__)
typedef __m128i pairs;
enum { WIDE = 4 };
AC_INLINE pairs load_pairs(const int16_t *p) { return _mm_loadu_si128((const void *)p); }
AC_INLINE pairs same_pair(uint32_t w) { return _mm_set1_epi32((int)w); }
AC_INLINE pairs add_products(pairs sum, pairs a, pairs b) { return _mm_add_epi32(sum, _mm_madd_epi16(a, b)); }
AC_INLINE pairs no_sum(void) { return _mm_setzero_si128(); }
AC_INLINE void store_sums(int32_t *to, pairs sum) { _mm_storeu_si128((void *)to, sum); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
typedef int32x4_t pairs;
enum { WIDE = 4 };
AC_INLINE pairs load_pairs(const int16_t *p) { return vreinterpretq_s32_s16(vld1q_s16(p)); }
AC_INLINE pairs same_pair(uint32_t w) { return vdupq_n_s32((int32_t)w); }
AC_INLINE pairs add_products(pairs sum, pairs a, pairs b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}
AC_INLINE pairs no_sum(void) { return vdupq_n_s32(0); }
AC_INLINE void store_sums(int32_t *to, pairs sum) { vst1q_s32(to, sum); }
#else
enum { WIDE = 4 };
typedef struct {
    int32_t at[WIDE];
} pairs;
AC_INLINE pairs load_pairs(const int16_t *p) {
    pairs v;
    memcpy(&v, p, sizeof v);
    return v;
}
AC_INLINE pairs same_pair(uint32_t w) {
    pairs v;
    for (int l = 0; l < WIDE; l++) v.at[l] = (int32_t)w;
    return v;
}
AC_INLINE pairs add_products(pairs sum, pairs a, pairs b) {
    for (int l = 0; l < WIDE; l++)
        sum.at[l] = ac_wrap_add(sum.at[l], (int16_t)(uint32_t)a.at[l] * (int16_t)(uint32_t)b.at[l]
                                               + (a.at[l] >> 16) * (b.at[l] >> 16));
    return sum;
}
AC_INLINE pairs no_sum(void) { return same_pair(0); }
AC_INLINE void store_sums(int32_t *to, pairs sum) { memcpy(to, &sum, sizeof sum); }
#endif

enum { CONV_SCRATCH = 160 * 1024 }; /* of a worker's scratch what a convolution uses */
enum { TILE = 4 * WIDE }; /* output pixels whose sums are made together */

AC_INLINE uint32_t pair_of(int16_t low, int16_t high) { return (uint16_t)low | (uint32_t)(uint16_t)high << 16; }

/* ---- shapes ---- */

typedef struct {
    int n, c, h, w;
    size_t plane;
} shape;

static shape shape_of(const ac_tensor *t) {
    const int h = t->rank == 4 ? t->dim[2] : 1, w = t->dim[t->rank - 1];
    return (shape){t->dim[0], t->dim[1], h, w, (size_t)h * (size_t)w};
}

/* ---- back to int8 ---- */

#if defined(__AVX2__)
/* ac_scaled of eight numbers, for a shift up to zero. Of the wide products 32 bits are kept, so they may be shifted as if
 * they had no sign. */
AC_INLINE __m256i scaled_eight(__m256i x, int32_t m, int right) {
    const __m256i by = _mm256_set1_epi32(m), nudge = _mm256_set1_epi64x(1 << 30);
    const __m256i even = _mm256_srli_epi64(_mm256_add_epi64(_mm256_mul_epi32(x, by), nudge), 31);
    const __m256i odd = _mm256_srli_epi64(_mm256_add_epi64(_mm256_mul_epi32(_mm256_srli_epi64(x, 32), by), nudge), 31);
    const __m256i high = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    const int32_t mask = (int32_t)((1u << right) - 1u), half = (int32_t)((uint32_t)mask >> 1);
    const __m256i rest = _mm256_and_si256(high, _mm256_set1_epi32(mask));
    const __m256i least = _mm256_sub_epi32(_mm256_set1_epi32(half), _mm256_srai_epi32(high, 31));
    return _mm256_sub_epi32(_mm256_sra_epi32(high, _mm_cvtsi32_si128(right)), _mm256_cmpgt_epi32(rest, least));
}

/* Eight numbers clamped become int8 at y; a bit for each that was within. */
AC_INLINE uint32_t put_eight(int8_t *y, __m256i v, int32_t low, int32_t high) {
    const __m256i inside = _mm256_min_epi32(_mm256_max_epi32(v, _mm256_set1_epi32(low)), _mm256_set1_epi32(high));
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(inside), _mm256_extracti128_si256(inside, 1));
    _mm_storel_epi64((void *)y, _mm_packs_epi16(half, half));
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(inside, v)));
}
#endif

/* Where results go: y, and a bit for each where wanted, which lie `at` elements from the start. */
typedef struct {
    const ac_attr_q_conv *a;
    const int32_t *bias, *m, *shift;
    int8_t *y;
    uint32_t *bits; /* all zero so far, or NULL */
} results;

/* `count` sums of output channel o become results at, at + 1, ... */
static void put_results(const results *r, int o, size_t at, const int32_t *sum, int count) {
    const int32_t m = r->m[o], bias = r->bias ? r->bias[o] : 0, zero = r->a->y_zero, low = r->a->low, high = r->a->high;
    int8_t *y = r->y + at;
    int32_t v[TILE];
#if defined(__AVX2__)
    for (; count >= 8 && r->shift[o] <= 0; count -= 8, sum += 8, y += 8, at += 8) {
        const __m256i x = _mm256_add_epi32(_mm256_loadu_si256((const void *)sum), _mm256_set1_epi32(bias));
        const __m256i q = _mm256_add_epi32(scaled_eight(x, m, -r->shift[o]), _mm256_set1_epi32(zero));
        const uint32_t bits = put_eight(y, q, low, high);
        if (!r->bits) continue;
        r->bits[at >> 5] |= bits << (at & 31u);
        if ((at & 31u) > 24) r->bits[(at >> 5) + 1] |= bits >> (32 - (at & 31u));
    }
#endif
    if (r->shift[o] > 0) {
        for (int l = 0; l < count; l++) v[l] = ac_wrap_add(ac_scaled(ac_wrap_add(sum[l], bias), m, r->shift[o]), zero);
    } else {
        const int right = -r->shift[o];
        const int32_t mask = (int32_t)((1u << right) - 1u), half = (int32_t)((uint32_t)mask >> 1);
        for (int l = 0; l < count; l++) { /* ac_scaled; the shift may be logical, since 32 bits of it are kept */
            const int64_t wide = (int64_t)ac_wrap_add(sum[l], bias) * m;
            const int32_t x = (int32_t)(uint32_t)(((uint64_t)wide + (1u << 30)) >> 31);
            v[l] = ac_wrap_add((x >> right) + ((x & mask) > half + (x < 0)), zero);
        }
    }
    for (int l = 0; l < count; l++) y[l] = (int8_t)(v[l] < low ? low : v[l] > high ? high : v[l]);
    if (r->bits)
        for (int l = 0; l < count; l++)
            r->bits[(at + (size_t)l) >> 5] |= (uint32_t)(v[l] >= low && v[l] <= high) << ((at + (size_t)l) & 31u);
}

/* ---- dense convolution ---- */

enum {
#ifdef AC_MANY_REGISTERS
    ROWS = 4, /* output channels whose sums stay in registers */
#else
    ROWS = 2,
#endif
    MOST_TAPS = 1920 /* of an output; its panel and rows of weights fit the scratch */
};

typedef uint16_t two_bytes __attribute__((aligned(1), may_alias));

/* What tap (c, i, j) sees from output pixels [at, at + TILE) of an image: x - zero, or 0 outside. */
static void see(int16_t *to, const ac_attr_q_conv *a, const int8_t *plane, const shape *in, const shape *out, int i, int j,
                size_t at) {
    size_t end = at + TILE < out->plane ? at + TILE : out->plane;
    memset(to, 0, TILE * sizeof *to);
    while (at < end) {
        const int p = (int)(at / (size_t)out->w), q = (int)(at % (size_t)out->w), count = smaller(out->w - q, (int)(end - at));
        const int row = p * a->stride[0] - a->before[0] + i * a->dilation[0], step = a->stride[1],
                  col = q * step - a->before[1] + j * a->dilation[1];
        if (row >= 0 && row < in->h) {
            const int8_t *from = plane + (size_t)row * (size_t)in->w;
            const int first = col >= 0 ? 0 : smaller(count, (-col + step - 1) / step),
                      last = larger(first, col >= in->w ? 0 : smaller(count, (in->w - 1 - col) / step + 1));
            if (step == 1)
                for (int l = first; l < last; l++) to[l] = (int16_t)(from[col + l] - a->x_zero);
            else if (step == 2 && first < last) { /* the low byte of each pair; of the last there may be only one */
                const two_bytes *two = (const void *)(from + col + 2 * first);
                for (int l = first; l < last - 1; l++)
                    to[l] = (int16_t)(((int16_t)(uint16_t)(two[l - first] << 8) >> 8) - a->x_zero);
                to[last - 1] = (int16_t)(from[col + 2 * (last - 1)] - a->x_zero);
            } else
                for (int l = first; l < last; l++) to[l] = (int16_t)(from[col + l * step] - a->x_zero);
        }
        to += count;
        at += (size_t)count;
    }
}

/* Weights of an output channel as int16, an even number of them. */
static void widen(int16_t *to, const int8_t *w, int taps) {
    for (int k = 0; k < taps; k++) to[k] = w[k];
    if (taps & 1) to[taps] = 0;
}

/* Output channel o's weights, with those that lie apart in their places. */
static void weights_of(int16_t *to, const ac_call *call, const shape *kernel, int o) {
    const int plane = (int)kernel->plane, taps = kernel->c * plane;
    widen(to, (const int8_t *)AC_IN(call, 1) + (size_t)o * (size_t)taps, taps);
    if (!AC_IN(call, 5)) return;
    const int count = AC_IN_T(call, 5)->dim[1];
    const int8_t *part = (const int8_t *)AC_IN(call, 5) + (size_t)o * (size_t)(count * plane);
    for (int k = 0; k < count; k++)
        for (int i = 0; i < plane; i++) to[((const int32_t *)AC_IN(call, 6))[k] * plane + i] = part[k * plane + i];
}

/* Two channels of a pointwise convolution, as pairs: to[2l] = a[l] - zero, to[2l + 1] = b[l] - zero for l < count. */
static void interleave(int16_t *to, const int8_t *a, const int8_t *b, int zero, int count) {
    int l = 0;
#if defined(__AVX2__)
    const __m256i away = _mm256_set1_epi16((int16_t)zero);
    for (; l + 16 <= count; l += 16) {
        const __m256i x = _mm256_sub_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(a + l))), away);
        const __m256i y = _mm256_sub_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(b + l))), away);
        const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
        _mm256_storeu_si256((void *)(to + 2 * l), _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((void *)(to + 2 * l + 16), _mm256_permute2x128_si256(low, high, 0x31));
    }
#endif
    for (; l < count; l++) {
        to[2 * l] = (int16_t)(a[l] - zero);
        to[2 * l + 1] = (int16_t)(b[l] - zero);
    }
}

/* The panel of TILE output pixels from `at`: pairs of taps, each a row of TILE pairs. */
static void fill_panel(int16_t *panel, const ac_attr_q_conv *a, const int8_t *x, const shape *in, const shape *kernel,
                       const shape *out, size_t at) {
    const int plane = (int)kernel->plane, taps = kernel->c * plane;
    const int straight = plane == 1 && out->plane == in->plane && a->stride[0] == 1 && a->stride[1] == 1 && !a->before[0]
                         && !a->before[1];
    const int count = smaller(TILE, (int)(out->plane - at));
    for (int k = 0; k < taps; k += 2) {
        int16_t *to = panel + (size_t)k * TILE;
        if (straight && k + 1 < taps) {
            interleave(to, x + (size_t)k * in->plane + at, x + (size_t)(k + 1) * in->plane + at, a->x_zero, count);
            memset(to + 2 * count, 0, (size_t)(TILE - count) * 2 * sizeof *to);
            continue;
        }
        int16_t line[2][TILE];
        for (int i = 0; i < 2; i++) {
            const int c = (k + i) / plane, tap = (k + i) % plane;
            if (k + i < taps) see(line[i], a, x + (size_t)c * in->plane, in, out, tap / kernel->w, tap % kernel->w, at);
            else memset(line[i], 0, sizeof line[i]);
        }
        for (int l = 0; l < TILE; l++) {
            to[2 * l] = line[0][l];
            to[2 * l + 1] = line[1][l];
        }
    }
}

/* The first `vectors` vectors of the sums of `rows` output channels, whose weights lie `even` apart. */
AC_INLINE void sum_panel(int32_t to[][TILE], const int16_t *panel, const int16_t *weight, int even, int rows, int vectors) {
    pairs sum[2 * ROWS][4];
    AC_UNROLL for (int i = 0; i < rows; i++)
        AC_UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = no_sum();
    for (int k = 0; k < even; k += 2) {
        const int16_t *from = panel + (size_t)k * TILE;
        pairs b[4];
        AC_UNROLL for (int v = 0; v < vectors; v++) b[v] = load_pairs(from + 2 * WIDE * v);
        AC_UNROLL for (int i = 0; i < rows; i++) {
            uint32_t w;
            memcpy(&w, weight + (size_t)i * (size_t)even + k, sizeof w);
            const pairs by = same_pair(w);
            AC_UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = add_products(sum[i][v], b[v], by);
        }
    }
    AC_UNROLL for (int i = 0; i < rows; i++)
        AC_UNROLL for (int v = 0; v < vectors; v++) store_sums(to[i] + WIDE * v, sum[i][v]);
}

static void dense(const ac_call *call, const results *r, int16_t *scratch, int n, int first, int last) {
    const ac_attr_q_conv *a = call->attr;
    const shape in = shape_of(AC_IN_T(call, 0)), kernel = shape_of(AC_IN_T(call, 1)), out = shape_of(AC_OUT_T(call, 0));
    const int taps = kernel.c * (int)kernel.plane, even = (taps + 1) / 2 * 2, per_group = out.c / a->groups;
    const int8_t *x = (const int8_t *)AC_IN(call, 0)
                      + ((size_t)n * (size_t)in.c + (size_t)(first / per_group * kernel.c)) * in.plane;
    int16_t *panel = scratch, *weight = panel + (size_t)even * TILE;
    const int once = last - first + 2 * ROWS <= 2 * ROWS * MOST_TAPS / even; /* there is room for all weights as int16 */
    for (int o = first; once && o < last + 2 * ROWS; o++)
        weights_of(weight + (size_t)(o - first) * (size_t)even, call, &kernel, smaller(o, last - 1));
    for (size_t at = 0; at < out.plane; at += TILE) {
        const int count = smaller(TILE, (int)(out.plane - at)), block = count > 2 * WIDE ? ROWS : 2 * ROWS;
        fill_panel(panel, a, x, &in, &kernel, &out, at);
        for (int o = first; o < last; o += block) {
            const int rows = smaller(block, last - o);
            int32_t sum[2 * ROWS][TILE];
            const int16_t *by = weight + (once ? (size_t)(o - first) * (size_t)even : 0);
            for (int i = 0; !once && i < block; i++)
                weights_of(weight + (size_t)i * (size_t)even, call, &kernel, o + smaller(i, rows - 1));
            if (count > 2 * WIDE) sum_panel(sum, panel, by, even, ROWS, 4);
            else sum_panel(sum, panel, by, even, 2 * ROWS, 2);
            for (int i = 0; i < rows; i++)
                put_results(r, o + i, ((size_t)n * (size_t)out.c + (size_t)(o + i)) * out.plane + at, sum[i], count);
        }
    }
}

/* ---- depthwise ---- */

/* to[2i] = from[i], to[2i + 1] = from[i + 1] for i < count; reads up to WIDE more */
static void pair_up(int16_t *to, const int16_t *from, int count) {
    int i = 0;
#if defined(__SSE2__)
    for (; i + 8 <= count; i += 8) {
        const __m128i a = _mm_loadu_si128((const void *)(from + i)), b = _mm_loadu_si128((const void *)(from + i + 1));
        _mm_storeu_si128((void *)(to + 2 * i), _mm_unpacklo_epi16(a, b));
        _mm_storeu_si128((void *)(to + 2 * i + 8), _mm_unpackhi_epi16(a, b));
    }
#endif
    for (; i < count; i++) {
        to[2 * i] = from[i];
        to[2 * i + 1] = from[i + 1];
    }
}

/* A kernel as pairs of taps, `row` of them a row; from one pair to the next `by` int16, from one row of x to the next `line`. */
typedef struct {
    int height, row, by;
    size_t line;
    const uint32_t *taps;
} window;

/* Columns whose sums are made where `columns` are wanted. */
static int padded(int columns) {
    const int whole = (columns + WIDE - 1) / WIDE * WIDE;
    return whole > 2 * WIDE ? whole + WIDE : whole;
}

/* The sums of the windows at `from` and to the right of it, `vectors` times WIDE of them. */
AC_INLINE void slide(int32_t *to, const window *k, const int16_t *from, int vectors) {
    const uint32_t *w = k->taps;
    pairs sum[4];
    for (int v = 0; v < vectors; v++) sum[v] = no_sum();
    for (int i = 0; i < k->height; i++, from += k->line)
        for (int j = 0; j < k->row; j++, w++) {
            const pairs by = same_pair(*w);
            AC_UNROLL for (int v = 0; v < vectors; v++)
                sum[v] = add_products(sum[v], load_pairs(from + j * k->by + 2 * WIDE * v), by);
        }
    for (int v = 0; v < vectors; v++) store_sums(to + WIDE * v, sum[v]);
}

/* Strides 1 and 2: taps of a row are taken in pairs, which lie beside each other where the stride is two. */
static void depthwise(const ac_call *call, const results *r, int16_t *scratch, int n, int o) {
    const ac_attr_q_conv *a = call->attr;
    const shape in = shape_of(AC_IN_T(call, 0)), kernel = shape_of(AC_IN_T(call, 1)), out = shape_of(AC_OUT_T(call, 0));
    const int step = a->stride[1], per_group = out.c / a->groups, width = padded(out.w) * step + kernel.w + 1;
    const size_t line = (size_t)width * (step == 1 ? 2 : 1);
    const int height = (out.h - 1) * a->stride[0] + kernel.h;
    const int8_t *x = (const int8_t *)AC_IN(call, 0) + ((size_t)n * (size_t)in.c + (size_t)(o / per_group)) * in.plane;
    int16_t *wide = scratch, weight[64] = {0};
    uint32_t taps[64];
    int16_t *single = wide + (size_t)height * line; /* one row, where its neighbours are paired */
    const int most = smaller(in.w, width - a->before[1]);
    memset(single, 0, ((size_t)width + WIDE) * sizeof *single);
    weights_of(weight, call, &kernel, o);
    for (int i = 0, at = 0; i < kernel.h; i++)
        for (int j = 0; j < kernel.w; j += 2, at++)
            taps[at] = pair_of(weight[i * kernel.w + j], j + 1 < kernel.w ? weight[i * kernel.w + j + 1] : 0);
    for (int row = 0; row < height; row++) { /* rows of the input with what surrounds them, as int16 or pairs of them */
        int16_t *to = wide + (size_t)row * line;
        const int from = row - a->before[0];
        if (step == 2 || from < 0 || from >= in.h) memset(to, 0, line * sizeof *to);
        if (from < 0 || from >= in.h) continue;
        const int8_t *source = x + (size_t)from * (size_t)in.w;
        int16_t *plain = (step == 2 ? to : single) + a->before[1];
        for (int col = 0; col < most; col++) plain[col] = (int16_t)(source[col] - a->x_zero);
        if (step == 1) pair_up(to, single, width);
    }
    const window k = {kernel.h, (kernel.w + 1) / 2, step == 1 ? 4 : 2, line, taps};
    size_t at = ((size_t)n * (size_t)out.c + (size_t)o) * out.plane;
    int32_t flat[2 * TILE]; /* rows of less than a tile wait for each other */
    int held = 0;
    for (int p = 0; p < out.h; p++)
        for (int q = 0, count; q < out.w; q += count) {
            const int16_t *from = wide + (size_t)(p * a->stride[0]) * line + 2 * (size_t)q;
            if (out.w - q > 2 * WIDE) slide(flat + held, &k, from, 4);
            else if (out.w - q > WIDE) slide(flat + held, &k, from, 2);
            else slide(flat + held, &k, from, 1);
            count = smaller(TILE, out.w - q);
            held += count;
            if (held < TILE && p * out.w + q + count < (int)out.plane) continue;
            const int ready = smaller(held, TILE);
            put_results(r, o, at, flat, ready);
            if (held > ready && p * out.w + q + count == (int)out.plane) {
                put_results(r, o, at + (size_t)ready, flat + ready, held - ready);
                held = ready;
            }
            memmove(flat, flat + ready, (size_t)(held - ready) * sizeof *flat);
            at += (size_t)ready;
            held -= ready;
        }
}

static int is_depthwise(const ac_attr_q_conv *a, const shape *kernel, const shape *out) {
    const int step = a->stride[1];
    const size_t line = (size_t)(padded(out->w) * step + kernel->w + 1) * 2, height = (size_t)(out->h - 1) * (size_t)a->stride[0]
                                                                                     + (size_t)kernel->h;
    return kernel->c == 1 && (a->groups > 1 || out->c == 1) && kernel->plane < 64 && (step == 1 || step == 2) && a->dilation[0] == 1
           && a->dilation[1] == 1 && a->before[1] <= 64 && line * (height + 1) * sizeof(int16_t) + 64 <= CONV_SCRATCH;
}

typedef struct {
    const ac_call *call;
    results r;
    int by_depth;
} work;

/* Whole images or, of one image without bits, output channels in groups. */
static void conv_part(void *argument, int index, int count) {
    const work *k = argument;
    const ac_attr_q_conv *a = k->call->attr;
    const ac_tensor *y = AC_OUT_T(k->call, 0);
    const int channels = y->dim[1], per_group = channels / a->groups;
    int16_t *scratch = (int16_t *)((char *)k->call->workers->scratch + (size_t)index * AC_SCRATCH_BYTES);
    int first, last;
    part_of(y->dim[0] * channels, index, count, &first, &last);
    for (int at = first; at < last;) {
        const int n = at / channels, o = at % channels;
        int end = k->by_depth ? o + 1 : smaller(channels, o + last - at);
        if (!k->by_depth) end = smaller(end, (o / per_group + 1) * per_group);
        if (k->by_depth) depthwise(k->call, &k->r, scratch, n, o);
        else dense(k->call, &k->r, scratch, n, o, end);
        at += end - o;
    }
}

ac_status AC_FAST_KERNEL(q_conv)(const ac_call *call) {
    const shape kernel = shape_of(AC_IN_T(call, 1)), out = shape_of(AC_OUT_T(call, 0));
    work k = {call, {call->attr, AC_IN(call, 2), AC_IN(call, 3), AC_IN(call, 4), AC_OUT(call, 0), AC_OUT(call, 1)}, 0};
    k.by_depth = is_depthwise(call->attr, &kernel, &out);
    if (!call->workers || (!k.by_depth && kernel.c * (int)kernel.plane > MOST_TAPS)) return AC_KERNEL(q_conv)(call);
    if (k.r.bits) memset(k.r.bits, 0, (AC_OUT_T(call, 1)->size + 31) / 32 * 4);
    if (k.r.bits) conv_part(&k, 0, 1); /* threads would meet in a word */
    else ac_share(call->workers, (double)AC_OUT_T(call, 0)->size * kernel.c * (double)kernel.plane, conv_part, &k);
    return AC_OK;
}

ac_status AC_FAST_KERNEL(q_add)(const ac_call *call) {
#if defined(__AVX2__)
    const ac_attr_q_add *a = call->attr;
    const int8_t *x = AC_IN(call, 0), *z = AC_IN(call, 1);
    int8_t *y = AC_OUT(call, 0);
    uint32_t *bits = AC_OUT(call, 1);
    const size_t n = AC_IN_T(call, 0)->size;
    if (n < 32 || a->y_shift > 0) return AC_KERNEL(q_add)(call);
    if (bits) memset(bits, 0, (n + 31) / 32 * 4);
    for (size_t i = 0; i < n; i += 8) {
        int32_t part[2][8];
        const size_t at = i + 8 <= n ? i : n - 8; /* the last eight may be done twice, unless they lie over an input */
        if (at != i && (y == x || y == z)) {
            for (size_t l = i; l < n; l++) {
                const int32_t sum = ac_scaled((x[l] - a->a_zero) * (1 << 20), a->a_multiplier, a->a_shift)
                                    + ac_scaled((z[l] - a->b_zero) * (1 << 20), a->b_multiplier, a->b_shift);
                const int32_t v = ac_wrap_add(ac_scaled(sum, a->y_multiplier, a->y_shift), a->y_zero);
                y[l] = (int8_t)ac_clamped(v, a->low, a->high);
                if (bits) bits[l >> 5] |= (uint32_t)(v >= a->low && v <= a->high) << (l & 31u);
            }
            break;
        }
        for (int l = 0; l < 8; l++) {
            part[0][l] = (x[at + (size_t)l] - a->a_zero) * (1 << 20);
            part[1][l] = (z[at + (size_t)l] - a->b_zero) * (1 << 20);
        }
        const __m256i sum = _mm256_add_epi32(
            scaled_eight(_mm256_loadu_si256((const void *)part[0]), a->a_multiplier, -a->a_shift),
            scaled_eight(_mm256_loadu_si256((const void *)part[1]), a->b_multiplier, -a->b_shift));
        const __m256i v = _mm256_add_epi32(scaled_eight(sum, a->y_multiplier, -a->y_shift), _mm256_set1_epi32(a->y_zero));
        const uint32_t inside = put_eight(y + at, v, a->low, a->high);
        if (!bits) continue;
        bits[at >> 5] |= inside << (at & 31u);
        if ((at & 31u) > 24) bits[(at >> 5) + 1] |= inside >> (32 - (at & 31u));
    }
    return AC_OK;
#else
    return AC_KERNEL(q_add)(call);
#endif
}

/* ---- blocks ---- */

static ac_tensor planes(int dtype, int n, int c, int h, int w) {
    const uint32_t size = (uint32_t)n * (uint32_t)c * (uint32_t)h * (uint32_t)w;
    return (ac_tensor){(uint8_t)dtype, 4, AC_ARENA, 0, 0, size, 0, {n, c, h, w, 1, 1}};
}

/* One convolution after another, with what lies between two of them whole in the scratch: there is room here. Where it
 * does not fit, a few rows at a time, as the plain kernel does it. */
ac_status AC_FAST_KERNEL(q_block)(const ac_call *call) {
    enum { STAGES = sizeof(((ac_attr_q_block *)0)->rows) / sizeof(int32_t), ROOM = AC_SCRATCH_BYTES - CONV_SCRATCH };
    const ac_attr_q_block *a = call->attr;
    const int count = ((int)call->n_in - 1) / 2, skip = STAGES - count;
    ac_tensor image[STAGES + 1], scaling[STAGES];
    image[0] = *AC_IN_T(call, 0);
    const int batch = image[0].dim[0];
    image[0] = planes(AC_I8, 1, image[0].dim[1], image[0].dim[2], image[0].dim[3]);
    uint32_t held = 0;
    for (int i = 0; i < count; i++) {
        const int32_t *g = a->geometry + 6 * (skip + i);
        const ac_tensor *w = AC_IN_T(call, (uint32_t)(1 + 2 * i));
        image[i + 1] = planes(AC_I8, 1, w->dim[0], (image[i].dim[2] + g[2] + g[4] - w->dim[2]) / g[0] + 1,
                              (image[i].dim[3] + g[3] + g[5] - w->dim[3]) / g[1] + 1);
        scaling[i] = (ac_tensor){AC_I32, 1, AC_CONST, 0, 0, (uint32_t)w->dim[0], 0, {w->dim[0], 1, 1, 1, 1, 1}};
        if (i + 1 < count && image[i + 1].size > held) held = image[i + 1].size;
    }
    if (!call->workers || 2 * (uint64_t)held > ROOM) return AC_KERNEL(q_block)(call);
    int8_t *between[2] = {(int8_t *)call->workers->scratch + CONV_SCRATCH, (int8_t *)call->workers->scratch + CONV_SCRATCH + held};
    for (int n = 0; n < batch; n++) {
        const int8_t *x = (const int8_t *)AC_IN(call, 0) + (size_t)n * image[0].size, *from = x;
        int8_t *y = (int8_t *)AC_OUT(call, 0) + (size_t)n * image[count].size;
        for (int i = 0; i < count; i++) {
            const int32_t *g = a->geometry + 6 * (skip + i), *q = a->scaling + 4 * (skip + i);
            const ac_tensor *w = AC_IN_T(call, (uint32_t)(1 + 2 * i));
            int32_t *table = AC_IN(call, (uint32_t)(2 + 2 * i));
            const ac_attr_q_conv attr = {{g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]}, {1, 1}, image[i].dim[1] / w->dim[1],
                                         q[0], q[1], q[2], q[3]};
            int8_t *to = i + 1 < count ? between[i & 1] : y;
            const ac_call one = {7, 2,
                                 {&image[i], w, &scaling[i], &scaling[i], &scaling[i], NULL, NULL, &image[i + 1], NULL},
                                 {(void *)(uintptr_t)from, AC_IN(call, (uint32_t)(1 + 2 * i)), table, table + w->dim[0],
                                  table + 2 * w->dim[0], NULL, NULL, to, NULL},
                                 &attr, call->workers};
            AC_FAST_KERNEL(q_conv)(&one);
            from = to;
        }
        if (!a->adds) continue;
        ac_attr_q_add add;
        memcpy(&add, a->add, sizeof add);
        const ac_call sum = {2, 2, {&image[count], &image[0], &image[count], NULL}, {y, (void *)(uintptr_t)x, y, NULL}, &add,
                             call->workers};
        AC_FAST_KERNEL(q_add)(&sum);
    }
    memset(AC_OUT(call, 1), 0, AC_OUT_T(call, 1)->size);
    return AC_OK;
}

/* ---- gradients ---- */

static int is_pointwise(const int32_t *stride, const int32_t *before, const int32_t *after, int groups, const shape *kernel) {
    return kernel->plane == 1 && groups == 1 && stride[0] == 1 && stride[1] == 1 && !before[0] && !before[1] && !after[0]
           && !after[1];
}

/* The gradient over the input of a depthwise convolution: d, apart by the stride and with zeros around it, meets the
 * kernel turned about. Channel by channel, so dx may be d. */
static void spread_channels(const ac_call *call, const shape *in, const shape *kernel, const shape *out) {
    const ac_attr_q_conv_input_grad *a = call->attr;
    const int8_t *w = AC_IN(call, 1);
    const float *d = AC_IN(call, 0), *scale = AC_IN(call, 2);
    const uint32_t *bits = AC_IN(call, 3);
    const size_t line = (size_t)(in->w + kernel->w - 1 + LANES), lines = (size_t)(in->h + kernel->h - 1);
    float *room = call->workers->scratch, *to = AC_OUT(call, 0);
    memset(room, 0, line * lines * sizeof *room);
    for (size_t k = 0; k < (size_t)out->n * (size_t)out->c; k++, to += in->plane) {
        const int8_t *by = w + k % (size_t)out->c * kernel->plane;
        const float unit = scale[k % (size_t)out->c];
        float weight[64];
        for (int i = 0; i < (int)kernel->plane; i++) weight[i] = (float)by[kernel->plane - 1 - (size_t)i] * unit;
        for (int p = 0; p < out->h; p++) {
            const int row = p * a->stride[0] + kernel->h - 1 - a->before[0];
            if (row < 0 || row >= (int)lines) continue;
            for (int q = 0; q < out->w; q++) {
                const int col = q * a->stride[1] + kernel->w - 1 - a->before[1];
                const size_t at = k * out->plane + (size_t)p * (size_t)out->w + (size_t)q;
                if (col < 0 || col >= in->w + kernel->w - 1) continue;
                room[(size_t)row * line + (size_t)col] = !bits || (bits[at >> 5] >> (at & 31u) & 1u) ? d[at] : 0.0f;
            }
        }
        for (int r = 0; r < in->h; r++)
            for (int c = 0; c < in->w; c += LANES) {
                vec sum = {0};
                for (int i = 0; i < kernel->h; i++)
                    for (int j = 0; j < kernel->w; j++)
                        sum += load(room + (size_t)(r + i) * line + (size_t)(c + j)) * weight[i * kernel->w + j];
                if (c + LANES <= in->w) store(to + r * in->w + c, sum);
                else
                    for (int l = 0; c + l < in->w; l++) to[r * in->w + c + l] = sum[l];
            }
    }
}

static int can_spread(const ac_attr_q_conv_input_grad *a, const shape *in, const shape *kernel, const shape *out) {
    return kernel->c == 1 && a->groups == in->c && out->c == in->c && kernel->plane <= 64 && a->dilation[0] == 1
           && a->dilation[1] == 1
           && ((size_t)in->w + (size_t)kernel->w + LANES) * ((size_t)in->h + (size_t)kernel->h) * sizeof(float) <= AC_SCRATCH_BYTES;
}

/* Of a pointwise convolution: a matrix product with weights as floats. */
ac_status AC_FAST_KERNEL(q_conv_input_grad)(const ac_call *call) {
    const ac_attr_q_conv_input_grad *a = call->attr;
    const shape in = shape_of(AC_OUT_T(call, 0)), kernel = shape_of(AC_IN_T(call, 1)), out = shape_of(AC_IN_T(call, 0));
    if (call->workers && !AC_IN(call, 4) && can_spread(a, &in, &kernel, &out)) {
        spread_channels(call, &in, &kernel, &out);
        return AC_OK;
    }
    const size_t weights = (size_t)out.c * (size_t)in.c, held = AC_IN(call, 3) ? (size_t)out.c * out.plane : 0;
    if (!call->workers || !is_pointwise(a->stride, a->before, a->after, a->groups, &kernel) || out.plane < LANES
        || (weights + held) * sizeof(float) > AC_SCRATCH_BYTES)
        return AC_KERNEL(q_conv_input_grad)(call);
    float *w = call->workers->scratch, *masked = w + weights;
    const int8_t *from = AC_IN(call, 1);
    const float *scale = AC_IN(call, 2), *d = AC_IN(call, 0);
    const uint32_t *bits = AC_IN(call, 3);
    for (int o = 0; o < out.c; o++)
        for (int c = 0; c < in.c; c++) w[o * in.c + c] = (float)from[o * in.c + c] * scale[o];
    if (AC_IN(call, 4)) {
        const int8_t *part = AC_IN(call, 4);
        const int32_t *index = AC_IN(call, 5);
        const int count = AC_IN_T(call, 4)->dim[1];
        for (int o = 0; o < out.c; o++)
            for (int k = 0; k < count; k++) w[o * in.c + index[k]] = (float)part[o * count + k] * scale[o];
    }
    const product p = {in.c, (int)out.plane, out.c, 0, 0, 1, (size_t)in.c, out.plane, out.plane, 0, {0, 0, 0}};
    for (int n = 0; n < out.n; n++) {
        const float *source = d + (size_t)n * (size_t)out.c * out.plane;
        if (bits) {
            for (size_t i = 0, at = (size_t)n * held; i < held; i++, at++)
                masked[i] = bits[at >> 5] >> (at & 31u) & 1u ? source[i] : 0.0f;
            source = masked;
        }
        AC_FAST_KERNEL(multiply)(&p, w, source, NULL, (float *)AC_OUT(call, 0) + (size_t)n * (size_t)in.c * in.plane);
    }
    return AC_OK;
}

/* The same for weights: x becomes floats, pixel by pixel. */
ac_status AC_FAST_KERNEL(q_conv_weight_grad)(const ac_call *call) {
    const ac_attr_q_conv_weight_grad *a = call->attr;
    const shape in = shape_of(AC_IN_T(call, 0)), kernel = shape_of(AC_OUT_T(call, 0)), out = shape_of(AC_IN_T(call, 1));
    const size_t size = (size_t)in.c * in.plane;
    if (!call->workers || !is_pointwise(a->stride, a->before, a->after, a->groups, &kernel) || in.c < LANES
        || size * sizeof(float) > AC_SCRATCH_BYTES)
        return AC_KERNEL(q_conv_weight_grad)(call);
    float *turned = call->workers->scratch, *dw = AC_OUT(call, 0);
    const int8_t *x = AC_IN(call, 0);
    const float *d = AC_IN(call, 1);
    const product p = {out.c, in.c, (int)out.plane, 0, 0, out.plane, 1, (size_t)in.c, (size_t)in.c, (size_t)in.c, {0, 0, 0}};
    for (int n = 0; n < in.n; n++, x += size, d += (size_t)out.c * out.plane) {
        for (int c = 0; c < in.c; c++)
            for (size_t i = 0; i < in.plane; i++)
                turned[i * (size_t)in.c + (size_t)c] = (float)(x[(size_t)c * in.plane + i] - a->x_zero) * a->x_scale;
        AC_FAST_KERNEL(multiply)(&p, d, turned, n ? dw : NULL, dw);
    }
    return AC_OK;
}

/* A weight's gradient in the scratch, by a matrix product, and the update from there. */
ac_status AC_FAST_KERNEL(q_conv_sgd)(const ac_call *call) {
    const ac_attr_q_conv_sgd *a = call->attr;
    const ac_tensor *w = AC_IN_T(call, 0);
    const shape kernel = shape_of(w), in = shape_of(AC_IN_T(call, 1));
    const size_t held = (size_t)in.c * in.plane, size = (held + w->size) * sizeof(float);
    if (!call->workers || kernel.plane != 1 || a->groups != 1 || in.c < LANES || size > AC_SCRATCH_BYTES)
        return AC_KERNEL(q_conv_sgd)(call);
    float *gradient = (float *)call->workers->scratch + held;
    ac_attr_q_conv_weight_grad of = {{0, 0}, {0, 0}, {0, 0}, {0, 0}, 1, {1, 1}, a->x_zero, a->x_scale};
    memcpy(of.stride, a->stride, sizeof of.stride);
    memcpy(of.before, a->before, sizeof of.before);
    memcpy(of.after, a->after, sizeof of.after);
    memcpy(of.dilation, a->dilation, sizeof of.dilation);
    ac_tensor g = *w;
    g.dtype = AC_F32;
    const ac_call product = {2, 1, {AC_IN_T(call, 1), AC_IN_T(call, 2), &g}, {AC_IN(call, 1), AC_IN(call, 2), gradient}, &of,
                             call->workers};
    ac_status status = AC_FAST_KERNEL(q_conv_weight_grad)(&product);
    if (status != AC_OK) return status;
    const ac_attr_q_sgd by = {0, a->momentum, a->nesterov, a->weight_decay, a->rounding, a->salt};
    const ac_call update = {8, 0,
                            {w, &g, AC_IN_T(call, 3), AC_IN_T(call, 4), AC_IN_T(call, 5), AC_IN_T(call, 6), AC_IN_T(call, 7), NULL},
                            {AC_IN(call, 0), gradient, AC_IN(call, 3), AC_IN(call, 4), AC_IN(call, 5), AC_IN(call, 6),
                             AC_IN(call, 7), NULL},
                            &by, NULL};
    return AC_KERNEL(q_sgd)(&update);
}
