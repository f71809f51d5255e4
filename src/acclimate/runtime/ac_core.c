/* Loading (all checks), finding names, and the interpreter. The op table comes in from ac_table.c. */
#include "ac_kernel.h"
#include "ac_ops.h"

#include <string.h>

#define AC_MAGIC 0x50434341u /* "ACCP" */
#define AC_ABSENT 0xFFFFu

enum { H_MAGIC, H_FORMAT, H_TOTAL, H_CRC, H_TABLE, H_TENSORS, H_OP_WORDS, H_ENTRIES, H_BINDINGS, H_NAMES, H_CONSTANTS,
       H_INITIAL, H_STATE, H_ARENA, H_MODEL, H_RESERVED, HEADER_WORDS };
enum { ENTRY_WORDS = 6, BINDING_WORDS = 3 };

int ac_same_bytes(const void *a, const void *b, size_t size) {
    const uint8_t *p = a, *q = b;
    size_t i = 0;
    while (i < size && p[i] == q[i]) i++;
    return i == size;
}

static int equal(const char *a, const char *b) {
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return *a == *b;
}

/* ---- op table -------------------------------------------------------------------------------------------------- */

#if defined(AC_HAVE_FAST)
#define AC_CHOOSE(isa) (fast ? ac_fast_##isa : ac_table_##isa)
#else
#define AC_CHOOSE(isa) ac_table_##isa
#endif

const ac_row *ac_table_of(const char *isa, int fast) {
    const int best = equal(isa, "auto");
    (void)fast;
#if defined(AC_HAVE_V4)
    if (equal(isa, "v4") || (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                             && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
        return AC_CHOOSE(v4);
#endif
#if defined(AC_HAVE_V3)
    if (equal(isa, "v3") || (best && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                             && __builtin_cpu_supports("bmi2")))
        return AC_CHOOSE(v3);
#endif
    return best || equal(isa, "base") ? AC_CHOOSE(base) : NULL;
}

/* ---- checksum -------------------------------------------------------------------------------------------------- */

/* Four bits at a time: 64 bytes of table, fast enough for flash-sized files. */
uint32_t ac_crc32(uint32_t crc, const void *bytes, size_t size) {
    static const uint32_t table[16] = {0x00000000u, 0x1DB71064u, 0x3B6E20C8u, 0x26D930ACu, 0x76DC4190u, 0x6B6B51F4u,
                                       0x4DB26158u, 0x5005713Cu, 0xEDB88320u, 0xF00F9344u, 0xD6D6A3E8u, 0xCB61B38Cu,
                                       0x9B64C2B0u, 0x86D3D2D4u, 0xA00AE278u, 0xBDBDF21Cu};
    const uint8_t *p = bytes;
    crc = ~crc;
    for (size_t i = 0; i < size; i++) {
        crc = table[(crc ^ p[i]) & 15] ^ (crc >> 4);
        crc = table[(crc ^ (p[i] >> 4)) & 15] ^ (crc >> 4);
    }
    return ~crc;
}

/* ---- checks ---------------------------------------------------------------------------------------------------- */

uint64_t ac_tensor_bytes(const ac_tensor *t) {
    switch (t->dtype) {
    case AC_U8:
    case AC_I8: return t->size;
    case AC_U16:
    case AC_I16: return 2 * (uint64_t)t->size;
    case AC_BIT: return ((uint64_t)t->size + 31) / 32 * 4;
    default: return 4 * (uint64_t)t->size;
    }
}

static ac_status check_tensor(const ac_program *p, const ac_tensor *t) {
    if (t->dtype > AC_I16 || t->rank > AC_MAX_RANK || t->area > AC_ARENA || t->reserved || t->reserved2)
        return AC_E_TENSOR;
    uint64_t size = 1;
    for (int i = 0; i < AC_MAX_RANK; i++) {
        if (t->dim[i] < 1 || (i >= t->rank && t->dim[i] != 1)) return AC_E_TENSOR;
        size *= (uint64_t)t->dim[i];
        if (size > INT32_MAX) return AC_E_TENSOR;
    }
    if (size != t->size) return AC_E_TENSOR;
    uint64_t room = t->area == AC_CONST ? p->constant_bytes : t->area == AC_STATE ? p->state_bytes : p->arena_bytes;
    if (t->offset % 4 || t->offset + (ac_tensor_bytes(t) + 3) / 4 * 4 > room) return AC_E_OFFSET;
    return AC_OK;
}

/* Dimensions bound so far by the letters of a signature. */
typedef struct {
    int32_t letter[128];  /* 0: not bound */
    const ac_tensor *whole; /* the shape of '*' */
    const ac_tensor *shared; /* the type of ':t' */
} ac_binds;

static int same_shape(const ac_tensor *a, const ac_tensor *b) {
    return a->rank == b->rank && ac_same_bytes(a->dim, b->dim, sizeof a->dim);
}

static int bind(ac_binds *b, char letter, int32_t size) {
    if (letter == '1') return size == 1;
    int32_t *slot = &b->letter[letter & 127];
    if (*slot == 0) *slot = size;
    return *slot == size;
}

/* Whether a tensor has the type that stands at `s`. */
static int is_dtype(ac_binds *b, const char *s, const ac_tensor *t) {
    if (*s != 't')
        return t->dtype == (s[0] == 'b' ? AC_BIT : s[0] == 'f' ? AC_F32
                            : s[0] == 'i' ? (s[1] == '8' ? AC_I8 : s[1] == '1' ? AC_I16 : AC_I32)
                            : s[1] == '8' ? AC_U8 : AC_U16);
    if (b->shared == NULL) b->shared = t;
    return (t->dtype == AC_F32 || t->dtype == AC_I8) && t->dtype == b->shared->dtype;
}

/* Match one tensor with one pattern of a signature: dims, '~', '*', ':dtype[/dtype]'. `end` is past the pattern. */
static int match(ac_binds *b, const char *s, const char *end, const ac_tensor *t) {
    const char *dims = s, *colon = s, *tilde = NULL;
    while (colon < end && *colon != ':' && *colon != '?' && *colon != '+') colon++;
    int typed = 0, fits = 0;
    for (const char *d = colon; d < end; d++)
        if (*d == ':' || *d == '/') {
            typed = 1;
            fits |= is_dtype(b, d + 1, t);
        }
    if (typed ? !fits : t->dtype != AC_F32) return 0;
    if (*dims == '*') {
        if (b->whole == NULL) b->whole = t;
        return same_shape(b->whole, t);
    }
    for (const char *d = dims; d < colon; d++)
        if (*d == '~') tilde = d;
    int head = (int)((tilde ? tilde : colon) - dims), tail = tilde ? (int)(colon - tilde - 1) : 0;
    if (t->rank < head + tail || (!tilde && t->rank != head)) return 0;
    for (int i = 0; i < head; i++)
        if (!bind(b, dims[i], t->dim[i])) return 0;
    for (int i = 0; i < tail; i++)
        if (!bind(b, tilde[1 + i], t->dim[t->rank - tail + i])) return 0;
    return 1;
}

/* Walk a signature beside the arguments of a call. A '+' pattern repeats for all remaining inputs. */
static ac_status check_signature(const char *s, const ac_call *call) {
    ac_binds b;
    memset(&b, 0, sizeof b);
    uint32_t arg = 0, inputs = 1;
    while (*s) {
        while (*s == ' ' || *s == ',') s++;
        if (s[0] == '-' && s[1] == '>') {
            if (arg != call->n_in) return AC_E_OP;
            inputs = 0;
            s += 2;
            continue;
        }
        if (!*s) break;
        const char *end = s;
        int optional = 0, repeated = 0;
        for (; *end && *end != ',' && *end != ' '; end++) {
            optional |= *end == '?';
            repeated |= *end == '+';
        }
        uint32_t count = repeated ? call->n_in - arg : 1;
        for (uint32_t i = 0; i < count; i++, arg++) {
            if (arg >= (inputs ? call->n_in : call->n_in + call->n_out)) return AC_E_OP;
            const ac_tensor *t = call->tensor[arg];
            if (t == NULL) {
                if (!optional) return AC_E_OP;
            } else if (!match(&b, s, end, t)) {
                return AC_E_SHAPE;
            }
        }
        s = end;
    }
    return arg == call->n_in + call->n_out ? AC_OK : AC_E_OP;
}

/* Read the op at word `at` of the stream into `call`; returns its length in words, 0 where it is cut off. */
static uint32_t read_op(const ac_program *p, uint32_t at, uint32_t end, uint32_t *op, ac_call *call) {
    if (at >= end) return 0;
    uint32_t word = p->ops[at];
    *op = word & 0xFFFFu;
    call->n_in = word >> 16 & 0xFFu;
    call->n_out = word >> 24;
    uint32_t n = call->n_in + call->n_out, arg_words = (n + 1) / 2;
    if (*op >= AC_OP_COUNT || n > AC_MAX_ARGS) return 0;
    uint32_t length = 1 + arg_words + p->rows[*op].attr_words;
    if (length > end - at) return 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t index = p->ops[at + 1 + i / 2] >> (i % 2 * 16) & 0xFFFFu;
        call->tensor[i] = index == AC_ABSENT ? NULL : p->tensors + index;
        if (index != AC_ABSENT && index >= p->n_tensors) return 0;
    }
    call->attr = p->ops + at + 1 + arg_words;
    return length;
}

/* Whether two tensors share bytes otherwise than by being the same: where one is written, kernels rely on it not. */
static int entangled(const ac_tensor *a, const ac_tensor *b) {
    uint64_t a_end = a->offset + ac_tensor_bytes(a), b_end = b->offset + ac_tensor_bytes(b);
    if (a->area != b->area || a->offset >= b_end || b->offset >= a_end) return 0;
    return a->offset != b->offset || a_end != b_end || a->dtype != b->dtype;
}

static ac_status check_op(const ac_program *p, uint32_t op, ac_call *call) {
    const ac_row *row = &p->rows[op];
    uint32_t n = call->n_in + call->n_out;
    if (row->kernel == NULL || call->n_out != row->n_out) return AC_E_OP;
    for (uint32_t i = 0; i < n; i++) {
        const ac_tensor *t = call->tensor[i];
        call->data[i] = NULL;
        if (t == NULL) continue;
        if (t->area == AC_CONST) call->data[i] = (void *)(uintptr_t)(p->constants + t->offset);
        int output = i >= call->n_in, updated = !output && i < 8 && (row->updates >> i & 1);
        if ((output && t->area != AC_ARENA) || (updated && t->area != AC_STATE)) return AC_E_OP;
        for (uint32_t k = 0; (output || updated) && k < n; k++)
            if (call->tensor[k] && entangled(t, call->tensor[k])) return AC_E_OP;
    }
    ac_status status = check_signature(row->signature, call);
    return status != AC_OK || row->check == NULL ? status : row->check(call);
}

/* `first` is where the entry before it ended: entries share no ops, so that all of them are checked in one pass. */
static ac_status check_entry(const ac_program *p, const uint32_t *e, uint32_t first) {
    if (e[0] >= p->name_bytes || e[1] < first || e[1] > e[2] || e[2] > p->op_words) return AC_E_OFFSET;
    if (e[4] > e[5] || e[5] > p->n_bindings) return AC_E_OFFSET;
    uint32_t at = e[1], count = 0, op;
    ac_call call;
    while (at < e[2]) {
        uint32_t length = read_op(p, at, e[2], &op, &call);
        if (length == 0) return AC_E_OP;
        ac_status status = check_op(p, op, &call);
        if (status != AC_OK) return status;
        at += length;
        count++;
    }
    return count == e[3] ? AC_OK : AC_E_OP;
}

ac_status ac_load(ac_program *program, const void *bytes, size_t size) {
    return ac_load_with(program, bytes, size, ac_table_of("auto", 1));
}

ac_status ac_load_with(ac_program *p, const void *bytes, size_t size, const ac_row *rows) {
    const uint32_t *h = bytes;
    if ((uintptr_t)bytes % 4) return AC_E_ALIGN;
    if (size < 4 * HEADER_WORDS) return AC_E_TRUNCATED;
    if (h[H_MAGIC] != AC_MAGIC) return AC_E_MAGIC;
    if (h[H_FORMAT] != AC_FORMAT) return AC_E_VERSION;
    if (h[H_TOTAL] != size) return AC_E_TRUNCATED;
    if (h[H_TABLE] != AC_TABLE_HASH) return AC_E_TABLE;
    if (h[H_NAMES] % 4 || h[H_CONSTANTS] % 4 || h[H_INITIAL] % 4 || h[H_STATE] % 4 || h[H_ARENA] % 4) return AC_E_OFFSET;
    if (h[H_RESERVED]) return AC_E_OFFSET;
    if (h[H_INITIAL] > h[H_STATE] || h[H_STATE] > INT32_MAX || h[H_ARENA] > INT32_MAX) return AC_E_OFFSET;
    uint64_t total = 4ull * HEADER_WORDS + sizeof(ac_tensor) * (uint64_t)h[H_TENSORS] + 4ull * h[H_OP_WORDS]
                     + 4ull * ENTRY_WORDS * h[H_ENTRIES] + 4ull * BINDING_WORDS * h[H_BINDINGS] + h[H_NAMES]
                     + (uint64_t)h[H_CONSTANTS] + h[H_INITIAL];
    if (total != size) return AC_E_OFFSET;
    if (ac_crc32(0, h + H_TABLE, size - 4 * H_TABLE) != h[H_CRC]) return AC_E_CHECKSUM;
    p->bytes = bytes;
    p->rows = rows;
    p->tensors = (const ac_tensor *)(h + HEADER_WORDS);
    p->ops = (const uint32_t *)(p->tensors + h[H_TENSORS]);
    p->entries = p->ops + h[H_OP_WORDS];
    p->bindings = p->entries + ENTRY_WORDS * h[H_ENTRIES];
    p->names = (const uint8_t *)(p->bindings + BINDING_WORDS * h[H_BINDINGS]);
    p->constants = p->names + h[H_NAMES];
    p->initial = p->constants + h[H_CONSTANTS];
    p->n_tensors = h[H_TENSORS];
    p->op_words = h[H_OP_WORDS];
    p->n_entries = h[H_ENTRIES];
    p->n_bindings = h[H_BINDINGS];
    p->name_bytes = h[H_NAMES];
    p->initial_bytes = h[H_INITIAL];
    p->model = h[H_MODEL];
    p->constant_bytes = h[H_CONSTANTS];
    p->state_bytes = h[H_STATE];
    p->arena_bytes = h[H_ARENA];
    if (p->name_bytes && p->names[p->name_bytes - 1] != 0) return AC_E_OFFSET;
    for (uint32_t i = 0; i < p->n_tensors; i++) {
        ac_status status = check_tensor(p, p->tensors + i);
        if (status != AC_OK) return status;
    }
    for (uint32_t i = 0; i < p->n_bindings; i++) {
        const uint32_t *b = p->bindings + BINDING_WORDS * i;
        if (b[0] >= p->name_bytes || b[1] >= p->n_tensors || b[2] > 1) return AC_E_OFFSET;
        if (!b[2] && p->tensors[b[1]].area == AC_CONST) return AC_E_OFFSET; /* the caller writes to inputs */
    }
    for (uint32_t i = 0, end = 0; i < p->n_entries; i++) {
        const uint32_t *e = p->entries + ENTRY_WORDS * i;
        ac_status status = check_entry(p, e, end);
        if (status != AC_OK) return status;
        end = e[2];
    }
    return AC_OK;
}

/* ---- names and memory ------------------------------------------------------------------------------------------ */

ac_status ac_reset(const ac_program *p, const ac_memory *m) {
    if ((uintptr_t)m->state % 4 || (uintptr_t)m->arena % 4) return AC_E_ALIGN;
    uint32_t n = p->initial_bytes;
    if (n) memcpy(m->state, p->initial, n);
    if (p->state_bytes > n) memset((uint8_t *)m->state + n, 0, p->state_bytes - n);
    return AC_OK;
}

ac_status ac_entry_at(const ac_program *p, uint32_t index, ac_entry *entry) {
    if (index >= p->n_entries) return AC_E_NAME;
    const uint32_t *e = p->entries + ENTRY_WORDS * index;
    entry->name = (const char *)p->names + e[0];
    entry->first_word = e[1];
    entry->end_word = e[2];
    entry->n_ops = e[3];
    entry->first_binding = e[4];
    entry->end_binding = e[5];
    return AC_OK;
}

ac_status ac_find_entry(const ac_program *p, const char *name, ac_entry *entry) {
    for (uint32_t i = 0; ac_entry_at(p, i, entry) == AC_OK; i++)
        if (equal(entry->name, name)) return AC_OK;
    return AC_E_NAME;
}

ac_status ac_binding_at(const ac_program *p, uint32_t index, ac_binding *binding) {
    if (index >= p->n_bindings) return AC_E_NAME;
    const uint32_t *b = p->bindings + BINDING_WORDS * index;
    binding->name = (const char *)p->names + b[0];
    binding->tensor = p->tensors + b[1];
    binding->is_output = b[2];
    return AC_OK;
}

ac_status ac_find_binding(const ac_program *p, const ac_entry *entry, const char *name, ac_binding *binding) {
    for (uint32_t i = entry->first_binding; i < entry->end_binding; i++)
        if (ac_binding_at(p, i, binding) == AC_OK && equal(binding->name, name)) return AC_OK;
    return AC_E_NAME;
}

void *ac_address(const ac_program *p, const ac_memory *m, const ac_tensor *t) {
    const uint8_t *base = t->area == AC_CONST ? p->constants : t->area == AC_STATE ? m->state : m->arena;
    return (void *)(uintptr_t)(base + t->offset);
}

/* ---- running --------------------------------------------------------------------------------------------------- */

ac_status ac_run_range(const ac_program *p, const ac_memory *m, const ac_entry *entry, uint32_t first, uint32_t end) {
    uint32_t at = entry->first_word, op;
    ac_call call;
    call.workers = m->workers;
    for (uint32_t i = 0; i < end && at < entry->end_word; i++) {
        at += read_op(p, at, entry->end_word, &op, &call);
        if (i < first) continue;
        for (uint32_t k = 0; k < call.n_in + call.n_out; k++)
            call.data[k] = call.tensor[k] ? ac_address(p, m, call.tensor[k]) : NULL;
        ac_status status = p->rows[op].kernel(&call);
        if (status != AC_OK) return status;
    }
    return AC_OK;
}

ac_status ac_run(const ac_program *p, const ac_memory *m, const ac_entry *entry) {
    return ac_run_range(p, m, entry, 0, entry->n_ops);
}

const char *ac_status_text(ac_status status) {
    static const char *const text[] = {
        "done",
        "the file is cut off or has bytes too many",
        "the file is not a Program, or not a delta where one is read",
        "the file has a format version that this runtime does not read",
        "the file was made for another op table (another version of acclimate)",
        "the checksum does not match: bytes were changed",
        "an offset or size points outside its area",
        "a tensor's rank, dimension or type is not allowed",
        "an op's number, arguments or attributes are not allowed",
        "the shapes of an op's arguments do not fit together",
        "no entry or binding has this name",
        "a label is outside the classes of the model, or an index outside its table",
        "a block of memory is not 4-byte aligned",
        "the delta was learned from another model",
        "a record of the delta does not fit: its name, type, shape or channels are not the Program's",
        "there is NaN or infinity among what was learned",
        "the bytes could not be written",
        "nothing was kept here yet",
        "what was kept here was given up by a rollback",
        "it does not fit into the room that there is",
        "flash could not be read, erased or written, or reads back otherwise"};
    return (unsigned)status < sizeof text / sizeof *text ? text[status] : "unknown status";
}
