/* What a kernel sees. Private to the runtime. */
#ifndef AC_KERNEL_H
#define AC_KERNEL_H

#include "acclimate.h"

/* One call of an op: inputs first (absent ones NULL), then outputs. `attr` is the op's ac_attr_<op> of ac_ops.h. */
typedef struct {
    uint32_t n_in, n_out;
    const ac_tensor *tensor[AC_MAX_ARGS];
    void *data[AC_MAX_ARGS]; /* in a check: NULL unless the tensor is constant */
    const void *attr;
    ac_workers *workers; /* NULL: none */
} ac_call;

#define AC_IN(call, i) ((call)->data[i])
#define AC_OUT(call, i) ((call)->data[(call)->n_in + (i)])
#define AC_IN_T(call, i) ((call)->tensor[i])
#define AC_OUT_T(call, i) ((call)->tensor[(call)->n_in + (i)])

typedef ac_status (*ac_kernel)(const ac_call *call);

/* Kernels are compiled once for each instruction set; AC_ISA names it (base, v3, v4). */
#ifndef AC_ISA
#define AC_ISA base
#endif
#define AC_JOIN2(a, b, c) a##b##c
#define AC_JOIN(a, b, c) AC_JOIN2(a, b, c)
#define AC_KERNEL(op) AC_JOIN(ac_##op##_f32, _, AC_ISA)
#define AC_FAST_KERNEL(op) AC_JOIN(ac_##op##_f32_fast, _, AC_ISA)
#ifdef AC_FAST /* the table in which rows with a fast kernel have that one */
#define AC_TABLE AC_JOIN(ac_fast, _, AC_ISA)
#define AC_FAST_OR_PLAIN(op) AC_FAST_KERNEL(op)
#else
#define AC_TABLE AC_JOIN(ac_table, _, AC_ISA)
#define AC_FAST_OR_PLAIN(op) AC_KERNEL(op)
#endif

/* Channels [first, last) of a batch_norm_grad, for kernels that divide it. */
void AC_KERNEL(batch_norm_grad_of)(const ac_call *call, size_t first, size_t last);

/* The k-th largest of numbers that are not negative; how many of some channels a share is. */
float AC_KERNEL(kth_largest)(const float *v, size_t count, size_t k);
size_t AC_KERNEL(count_kept)(float share, size_t channels);

/* max_pool where its input is int8. */
ac_status AC_KERNEL(max_pool_i8)(const ac_call *call);

/* Checks that rows of several files share; what they check stands where they are. */
ac_status ac_check_learned(const ac_call *call, int32_t axis, int first, int moments);
ac_status ac_check_window(const ac_tensor *in, const ac_tensor *w, const ac_tensor *out, const int32_t *stride,
                          int32_t groups);
ac_status ac_check_average(const ac_tensor *in, const ac_tensor *out, const int32_t *kernel, const int32_t *stride,
                           const int32_t *before, const int32_t *after, const int32_t *extra);
ac_status ac_check_part(const ac_call *call, int at, int part);
int ac_same_sides(const int32_t side[2], const ac_tensor *t);

/* Whether `size` bytes are equal. The runtime needs no more of libc than memcpy and memset. */
int ac_same_bytes(const void *a, const void *b, size_t size);

/* A row of the op table as the loader and interpreter use it; generated into ac_table.c. */
typedef struct ac_row {
    const char *name, *signature; /* the language of ops/row.py */
    uint8_t n_in, n_out, attr_words, updates; /* updates: bit mask of inputs that are written */
    ac_kernel kernel;
    ac_kernel check; /* what the signature cannot say, or NULL */
} ac_row;

/* Those that AC_HAVE_<isa> says were built; ac_fast_<isa> too where AC_HAVE_FAST says so. */
extern const ac_row ac_table_base[], ac_table_v3[], ac_table_v4[], ac_fast_base[], ac_fast_v3[], ac_fast_v4[];

/* The rows of an instruction set ("auto": the best that this processor has), NULL where it was not built. All plain
 * tables give the same bits. The caller must know that the processor has what it names. */
const ac_row *ac_table_of(const char *isa, int fast);

/* Bytes of a tensor's elements; bits in words of 32. */
uint64_t ac_tensor_bytes(const ac_tensor *t);

/* ac_load with a given table, for tests that compare instruction sets. */
ac_status ac_load_with(ac_program *program, const void *bytes, size_t size, const ac_row *rows);

#endif
