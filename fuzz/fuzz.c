/* Hostile Programs against ac_load and the kernels; built with the address and undefined-behaviour sanitizers.
 *
 *     fuzz SEEDS [--count N] [--seconds S] [--seed K]    mutants of the seeds; a summary in JSON on stdout
 *     fuzz SEEDS --replay OUT                            the Programs as they are; one status byte each to OUT
 *     fuzz SEEDS --only I [--seed K] [--save FILE]       mutant I again, also written to FILE
 *
 * SEEDS is a file of (uint32 size, bytes) records, each size a multiple of four. Mutant I depends on K, I and SEEDS
 * alone. Whatever the loader accepts is run twice: each op alone with every argument in a block of exactly its size,
 * so that no access can go astray unseen; then as the runtime does it, in state and arena blocks of exactly the size
 * that the Program asks for. Besides what the sanitizers see it is an error when an op writes an input that its row
 * does not list, leaves part of an output unwritten, writes to the Program, or needs more than HANG_SECONDS.
 */
#define _POSIX_C_SOURCE 200809L
#include "ac_ops.h"
#include "draw.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    HEADER_WORDS = 16, ENTRY_WORDS = 6, BINDING_WORDS = 3,
    ABSENT = 0xFFFF,
    MAX_SEEDS = 4096,
    MAX_BYTES = 1 << 20,        /* of a mutant */
    MAX_MEMORY = 1 << 24,       /* of state and arena, to be run */
    MAX_WORK = 1 << 24,         /* estimated operations, to be run */
    MAX_OPS = 4096,
    HANG_SECONDS = 20
};

enum { H_TOTAL = 2, H_CRC = 3, H_TABLE = 4, H_TENSORS = 5, H_OP_WORDS, H_ENTRIES, H_BINDINGS, H_NAMES, H_CONSTANTS,
       H_INITIAL, H_STATE, H_ARENA };

/* ---- what a crash report needs --------------------------------------------------------------------------------- */

static struct {
    uint64_t seed, index;
    const char *save, *op;
    const void *bytes;
    size_t size;
    int saved;
} now = {0, 0, NULL, "none", NULL, 0, 0};

/* Both sanitizers end in SIGABRT, where the mutant is named. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "abort_on_error=1:detect_leaks=1"; }
const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void) { return "abort_on_error=1:print_stacktrace=1"; }

static void write_mutant(void) {
    FILE *f = now.save ? fopen(now.save, "wb") : NULL;
    if (!f) return;
    fwrite(now.bytes, 1, now.size, f);
    fclose(f);
}

static void report_death(void) {
    if (now.saved++) return;
    fprintf(stderr, "FINDING: mutant %" PRIu64 " (--seed %" PRIu64 "), in op %s; to see it again: --only %" PRIu64 "\n",
            now.index, now.seed, now.op, now.index);
    write_mutant();
}

static void fail(const char *what, uint64_t detail) {
    fprintf(stderr, "op %s %s (%" PRIu64 ")\n", now.op, what, detail);
    report_death();
    exit(1);
}

static void on_signal(int number) {
    if (number == SIGALRM) fputs("a run does not end\n", stderr);
    report_death();
    _exit(1);
}

/* ---- random numbers -------------------------------------------------------------------------------------------- */

static void restart(uint64_t seed, uint64_t index) {
    random_state = (seed + 1) * 0x9E3779B97F4A7C15ull ^ (index + 1) * 0xD1B54A32D192ED03ull;
    for (int i = 0; i < 4; i++) any();
}

static uint32_t interesting(void) {
    static const uint32_t words[] = {
        0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 32, 33, 127, 128, 255, 256, 257, 1000, 32767, 32768, 46340, 46341, 65535,
        65536, 1000000, 0x10000000, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFE, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFC,
        0xFFFFFFFE, 0xFFFFFFFF,
        0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x00000001, 0x80000000, 0x5F000000};
    return words[below(sizeof words / sizeof *words)];
}

static uint32_t nudged(uint32_t word) {
    switch (below(6)) {
    case 0: return word + 1;
    case 1: return word - 1;
    case 2: return word * 2;
    case 3: return word ^ 1u << below(32);
    case 4: return below(12);
    default: return interesting();
    }
}

/* ---- the parts of a Program, to be changed ---------------------------------------------------------------------- */

typedef struct {
    uint32_t *h, *ops, *entries, *bindings, *constants;
    ac_tensor *tensors;
    uint32_t n_tensors, op_words, n_entries, n_bindings, n_ops;
    uint32_t at[MAX_OPS]; /* where each op starts, in words */
} parts;

static parts take_apart(uint32_t *h) {
    parts p;
    memset(&p, 0, sizeof p);
    p.h = h;
    p.n_tensors = h[H_TENSORS];
    p.op_words = h[H_OP_WORDS];
    p.n_entries = h[H_ENTRIES];
    p.n_bindings = h[H_BINDINGS];
    p.tensors = (ac_tensor *)(void *)(h + HEADER_WORDS);
    p.ops = (uint32_t *)(void *)(p.tensors + p.n_tensors);
    p.entries = p.ops + p.op_words;
    p.bindings = p.entries + ENTRY_WORDS * p.n_entries;
    p.constants = p.bindings + BINDING_WORDS * p.n_bindings + h[H_NAMES] / 4;
    for (uint32_t at = 0; at < p.op_words && p.n_ops < MAX_OPS; p.n_ops++) {
        uint32_t word = p.ops[at], n = (word >> 16 & 0xFF) + (word >> 24);
        p.at[p.n_ops] = at;
        at += 1 + (n + 1) / 2 + ac_table_base[word & 0xFFFF].attr_words;
    }
    return p;
}

static uint64_t bytes_of(const ac_tensor *t) {
    switch (t->dtype) {
    case AC_U8:
    case AC_I8: return t->size;
    case AC_U16:
    case AC_I16: return 2 * (uint64_t)t->size;
    case AC_BIT: return ((uint64_t)t->size + 31) / 32 * 4;
    default: return 4 * (uint64_t)t->size;
    }
}

static uint64_t room_of(const ac_tensor *t) { return (bytes_of(t) + 3) / 4 * 4; }

static void fix_size(ac_tensor *t) {
    uint64_t size = 1;
    for (int i = 0; i < AC_MAX_RANK; i++) size = size * (uint32_t)t->dim[i] & 0xFFFFFFFFFFull;
    t->size = (uint32_t)size;
}

/* Give every tensor of arena and state a place of its own, without a byte to spare. */
static void lay_out(parts *p) {
    uint64_t arena = 0, state = 0;
    for (uint32_t i = 0; i < p->n_tensors; i++) {
        ac_tensor *t = &p->tensors[i];
        uint64_t *at = t->area == AC_ARENA ? &arena : t->area == AC_STATE ? &state : NULL;
        if (at && room_of(t) <= MAX_MEMORY && *at <= MAX_MEMORY) {
            t->offset = (uint32_t)*at;
            *at += room_of(t);
        } else if (t->area == AC_CONST && t->offset + room_of(t) > p->h[H_CONSTANTS]) {
            t->offset = 0;
            if (below(2)) t->area = AC_ARENA;
        }
    }
    p->h[H_ARENA] = (uint32_t)arena;
    p->h[H_STATE] = (uint32_t)state > p->h[H_INITIAL] ? (uint32_t)state : p->h[H_INITIAL];
}

/* The smallest arena that holds all tensors where they are. */
static void tighten(parts *p) {
    uint64_t end = 0;
    for (uint32_t i = 0; i < p->n_tensors; i++)
        if (p->tensors[i].area == AC_ARENA && p->tensors[i].offset + room_of(&p->tensors[i]) > end)
            end = p->tensors[i].offset + room_of(&p->tensors[i]);
    p->h[H_ARENA] = (uint32_t)end;
}

/* ---- mutations -------------------------------------------------------------------------------------------------- */

static ac_tensor *any_tensor(parts *p) { return &p->tensors[below(p->n_tensors)]; }

static void change_field(parts *p) {
    ac_tensor *t = any_tensor(p);
    switch (below(8)) {
    case 0: t->dtype = (uint8_t)below(8); break;
    case 1: t->rank = (uint8_t)below(8); break;
    case 2: t->area = (uint8_t)below(4); break;
    case 3: t->offset = below(2) ? nudged(t->offset) : t->offset + 4 * below(9) - 16; break;
    case 4: t->size = nudged(t->size); break;
    case 5: t->reserved2 = below(2); break;
    default: t->dim[below(AC_MAX_RANK)] = (int32_t)nudged((uint32_t)t->dim[0]); break;
    }
    if (below(4)) fix_size(t);
}

/* One more, one less, twice or none of a dimension, in every tensor that has it. */
static void change_dimension(parts *p) {
    const ac_tensor *t = any_tensor(p);
    int32_t old = t->dim[below(t->rank < AC_MAX_RANK ? t->rank + 1u : 1)], fresh;
    switch (below(5)) {
    case 0: fresh = (int32_t)((uint32_t)old + 1); break;
    case 1: fresh = (int32_t)((uint32_t)old - 1); break;
    case 2: fresh = (int32_t)(2 * (uint32_t)old); break;
    case 3: fresh = 1; break;
    default: fresh = 1 + (int32_t)below(20); break;
    }
    int everywhere = below(3) > 0;
    for (uint32_t i = 0; i < p->n_tensors; i++) {
        ac_tensor *u = &p->tensors[i];
        for (int d = 0; d < u->rank && d < AC_MAX_RANK; d++)
            if (u->dim[d] == old && (everywhere || u == t || !below(3))) u->dim[d] = fresh;
        fix_size(u);
    }
}

static void change_rank(parts *p) {
    ac_tensor *t = any_tensor(p);
    int at = (int)below(AC_MAX_RANK);
    if (below(2)) {
        memmove(t->dim + at + 1, t->dim + at, sizeof *t->dim * (size_t)(AC_MAX_RANK - 1 - at));
        t->dim[at] = below(2) ? 1 : (int32_t)below(4);
        t->rank++;
    } else {
        memmove(t->dim + at, t->dim + at + 1, sizeof *t->dim * (size_t)(AC_MAX_RANK - 1 - at));
        t->dim[AC_MAX_RANK - 1] = 1;
        t->rank--;
    }
    fix_size(t);
}

/* Two tensors over each other, wholly or in part: what an output writes then is what another argument reads. */
static void overlap(parts *p) {
    ac_tensor *t = any_tensor(p);
    t->offset = any_tensor(p)->offset + (below(2) ? 0 : 4 * below(9) - 16);
}

static uint16_t *any_argument(parts *p, uint32_t op) {
    uint32_t word = p->ops[p->at[op]], n = (word >> 16 & 0xFF) + (word >> 24);
    return n ? (uint16_t *)(void *)(p->ops + p->at[op] + 1) + below(n) : NULL;
}

static void change_op(parts *p) {
    if (!p->n_ops) return;
    uint32_t op = below(p->n_ops), *word = &p->ops[p->at[op]];
    uint32_t end = op + 1 < p->n_ops ? p->at[op + 1] : p->op_words;
    uint32_t attrs = (*word & 0xFFFF) < AC_OP_COUNT ? ac_table_base[*word & 0xFFFF].attr_words : 0;
    if (attrs > end - p->at[op] - 1) attrs = end - p->at[op] - 1; /* the op's number may have been changed before */
    uint16_t *a = any_argument(p, op), *b = any_argument(p, op), kept;
    switch (below(9)) {
    case 0: *word = (*word & 0xFFFF0000u) | below(AC_OP_COUNT + 2); break;
    case 1: *word ^= 1u << (16 + below(16)); break;
    case 2:
        if (a) *a = (uint16_t)below(p->n_tensors + 1);
        break;
    case 3:
        if (a) *a = ABSENT;
        break;
    case 4:
        if (!a) break;
        kept = *a;
        *a = *b;
        *b = kept;
        break;
    case 5: { /* another op in this one's place, where it fits */
        uint32_t other = below(p->n_ops), other_end = other + 1 < p->n_ops ? p->at[other + 1] : p->op_words;
        if (other_end - p->at[other] == end - p->at[op])
            memmove(word, p->ops + p->at[other], 4 * (size_t)(end - p->at[op]));
        break;
    }
    default:
        if (attrs) {
            uint32_t *attr = p->ops + end - 1 - below(attrs);
            *attr = nudged(*attr);
        }
        break;
    }
}

static void change_words(uint32_t *words, uint32_t count, uint32_t times) {
    for (uint32_t i = 0; count && i < times; i++) {
        uint32_t *w = &words[below(count)];
        *w = nudged(*w);
    }
}

/* Mutate the Program in `h`, of at most MAX_BYTES; returns its new size in bytes. */
static size_t mutate(uint32_t *h) {
    parts p = take_apart(h);
    size_t size = h[H_TOTAL];
    uint32_t times = 1 + below(4);
    int whole = below(10) > 0; /* with length and checksum as they must be */
    int shapes = 0;
    for (uint32_t i = 0; i < times; i++) {
        uint32_t kind = below(20);
        if (kind < 4 && p.n_tensors) change_field(&p);
        else if (kind < 8 && p.n_tensors) change_dimension(&p), shapes = 1;
        else if (kind == 8 && p.n_tensors) change_rank(&p), shapes = 1;
        else if (kind == 9 && p.n_tensors) overlap(&p);
        else if (kind == 10 && p.n_tensors) {
            ac_tensor *a = any_tensor(&p), *b = any_tensor(&p), kept = *a;
            *a = *b;
            *b = kept;
        } else if (kind < 17) change_op(&p);
        else if (kind == 17) change_words(p.entries, ENTRY_WORDS * p.n_entries + BINDING_WORDS * p.n_bindings, 1);
        else if (kind == 18) change_words(p.constants, h[H_CONSTANTS] / 4, 1 + below(3));
        else change_words(h + HEADER_WORDS, (uint32_t)(size / 4 - HEADER_WORDS), 1 + below(3));
    }
    if (shapes || below(3) == 0) {
        if (below(4)) lay_out(&p);
        else tighten(&p);
    }
    if (below(12) == 0) change_words(h, HEADER_WORDS, 1);
    if (below(12) == 0) {
        size_t words = 1 + below(8);
        if (below(2) && size > 4 * (HEADER_WORDS + words)) size -= 4 * words;
        else if (size + 4 * words <= MAX_BYTES) {
            change_words(h + size / 4, (uint32_t)words, (uint32_t)words);
            size += 4 * words;
        }
        if (below(4) == 0) size -= 1 + below(3);
    }
    if (whole) {
        h[H_TOTAL] = (uint32_t)size;
        if (size > 4 * H_TABLE) h[H_CRC] = ac_crc32(0, h + H_TABLE, size - 4 * H_TABLE);
    }
    return size;
}

/* ---- running ---------------------------------------------------------------------------------------------------- */

static struct {
    uint64_t mutants, accepted, changed, run, refused[AC_E_SINK + 1], op[AC_OP_COUNT];
} total;

typedef struct {
    ac_call call;
    uint32_t op;
} step;

/* The op at `at`; the loader has checked it. Returns where the next one starts. */
static uint32_t read_step(const ac_program *p, uint32_t at, step *s) {
    uint32_t word = p->ops[at], n;
    s->op = word & 0xFFFF;
    s->call.n_in = word >> 16 & 0xFF;
    s->call.n_out = word >> 24;
    n = s->call.n_in + s->call.n_out;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t index = p->ops[at + 1 + i / 2] >> (i % 2 * 16) & 0xFFFF;
        s->call.tensor[i] = index == ABSENT ? NULL : p->tensors + index;
    }
    s->call.attr = p->ops + at + 1 + (n + 1) / 2;
    return at + 1 + (n + 1) / 2 + p->rows[s->op].attr_words;
}

/* More than any kernel does: all elements, and the two largest arguments against each other. */
static uint64_t work_of(const step *s) {
    uint64_t sum = 0, first = 0, second = 0;
    for (uint32_t i = 0; i < s->call.n_in + s->call.n_out; i++) {
        uint64_t size = s->call.tensor[i] ? s->call.tensor[i]->size : 0;
        sum += size;
        if (size > first) {
            second = first;
            first = size;
        } else if (size > second) {
            second = size;
        }
    }
    return sum + first * second;
}

static uint64_t work_of_all(const ac_program *p) {
    uint64_t work = 0;
    for (uint32_t i = 0; i < p->n_entries; i++) {
        ac_entry e;
        step s;
        if (ac_entry_at(p, i, &e) != AC_OK) fail("entry is not there", i);
        for (uint32_t at = e.first_word; at < e.end_word; work += work_of(&s)) at = read_step(p, at, &s);
    }
    return work;
}

static void fill(void *memory, size_t bytes) {
    uint32_t *w = memory, kind = below(5);
    for (size_t i = 0; i < bytes / 4; i++) {
        float value = (float)(int32_t)(any() >> 8) * 2.4e-7f - 2.0f;
        switch (kind) {
        case 0: w[i] = 0; break;
        case 1: w[i] = any(); break;
        case 2: w[i] = interesting(); break;
        default: memcpy(&w[i], &value, 4); break;
        }
    }
}

/* Labels and the like: small whole numbers, mostly. */
static void fill_inputs(const ac_program *p, const ac_memory *m) {
    for (uint32_t i = 0; i < p->n_bindings; i++) {
        ac_binding b;
        if (ac_binding_at(p, i, &b) != AC_OK) fail("binding is not there", i);
        if (b.is_output || b.tensor->dtype == AC_F32 || b.tensor->area != AC_ARENA || !below(16)) continue;
        uint8_t *to = ac_address(p, m, b.tensor);
        uint32_t high = 1 + below(4), value;
        for (uint32_t k = 0; k < b.tensor->size; k++) {
            value = below(high);
            if (b.tensor->dtype == AC_I32) memcpy(to + 4 * (size_t)k, &value, 4);
            else if (b.tensor->dtype == AC_U8) to[k] = (uint8_t)value;
        }
    }
}

/* One op with each argument in a block of its own; outputs and updated inputs are then copied to where they belong. */
static ac_status run_alone(const ac_program *p, const ac_memory *m, step *s) {
    ac_call *c = &s->call;
    const ac_row *row = &p->rows[s->op];
    uint32_t n = c->n_in + c->n_out;
    uint8_t *before[AC_MAX_ARGS], *after[2][AC_MAX_ARGS];
    ac_status status[2];
    now.op = row->name;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < n; i++) {
            before[i] = after[pass][i] = NULL;
            if (!c->tensor[i]) continue;
            size_t bytes = (size_t)bytes_of(c->tensor[i]);
            before[i] = ac_address(p, m, c->tensor[i]);
            after[pass][i] = malloc(bytes);
            if (i < c->n_in) memcpy(after[pass][i], before[i], bytes);
            else memset(after[pass][i], pass ? 0x5A : 0xA5, bytes);
        }
        for (uint32_t i = 0; i < n; i++) c->data[i] = after[pass][i];
        status[pass] = row->kernel(c);
        if (status[pass] != AC_OK && status[pass] != AC_E_LABEL) fail("fails after it was accepted", status[pass]);
    }
    if (status[0] != status[1]) fail("does not always give the same status", status[1]);
    for (uint32_t i = 0; i < n; i++) {
        if (!c->tensor[i]) continue;
        size_t bytes = (size_t)bytes_of(c->tensor[i]);
        int updated = i < 8 && i < c->n_in && (row->updates >> i & 1);
        if (i < c->n_in && !updated && memcmp(after[0][i], before[i], bytes)) fail("writes an input", i);
        if (status[0] == AC_OK && memcmp(after[0][i], after[1][i], bytes))
            fail("leaves an output unwritten, or depends on what was there; argument", i);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (!c->tensor[i]) continue;
        if (status[0] == AC_OK && c->tensor[i]->area != AC_CONST)
            if (i >= c->n_in || (i < 8 && (row->updates >> i & 1))) memcpy(before[i], after[0][i], (size_t)bytes_of(c->tensor[i]));
        free(after[0][i]);
        free(after[1][i]);
    }
    if (status[0] == AC_OK && total.op[s->op] < UINT64_MAX) total.op[s->op]++;
    return status[0];
}

/* Every name that the file holds can be read and found. */
static void read_names(const ac_program *p) {
    size_t length = 0;
    for (uint32_t i = 0; i < p->n_entries; i++) {
        ac_entry e, found;
        if (ac_entry_at(p, i, &e) != AC_OK || ac_find_entry(p, e.name, &found) != AC_OK) fail("entry is not there", i);
        length += strlen(e.name);
        for (uint32_t k = e.first_binding; k < e.end_binding; k++) {
            ac_binding b, again;
            if (ac_binding_at(p, k, &b) != AC_OK || ac_find_binding(p, &e, b.name, &again) != AC_OK)
                fail("binding is not there", k);
            length += strlen(b.name);
        }
    }
    if (length > (size_t)MAX_BYTES * MAX_BYTES) fail("names are too long", length);
}

/* Load bytes; where they are accepted and not too large, run every entry both ways. `count`: into the totals. */
static ac_status try_program(const uint32_t *words, size_t size, int count) {
    ac_program p;
    uint8_t *bytes = malloc(size ? size : 1), *copy;
    uint64_t ops_before[AC_OP_COUNT];
    memcpy(bytes, words, size);
    memcpy(ops_before, total.op, sizeof ops_before);
    now.bytes = words;
    now.size = size;
    now.op = "none";
    ac_status status = ac_load(&p, bytes, size);
    if (status != AC_OK || p.state_bytes > MAX_MEMORY || p.arena_bytes > MAX_MEMORY) {
        free(bytes);
        return status;
    }
    read_names(&p);
    if (work_of_all(&p) <= MAX_WORK) {
        copy = malloc(size);
        memcpy(copy, bytes, size);
        ac_memory m = {malloc(p.state_bytes), malloc(p.arena_bytes), NULL};
        if (ac_reset(&p, &m) != AC_OK) fail("reset fails", 0);
        if (!below(4)) fill(m.state, p.state_bytes);
        fill(m.arena, p.arena_bytes);
        for (uint32_t i = 0; i < p.n_entries; i++) {
            ac_entry e;
            step s;
            ac_entry_at(&p, i, &e);
            fill_inputs(&p, &m);
            for (uint32_t at = e.first_word; at < e.end_word;) {
                at = read_step(&p, at, &s);
                if (run_alone(&p, &m, &s) != AC_OK) break;
            }
            now.op = "any, as the runtime runs it";
            fill_inputs(&p, &m);
            status = ac_run(&p, &m, &e);
            if (status != AC_OK && status != AC_E_LABEL) fail("a run fails after it was accepted", status);
        }
        status = AC_OK;
        if (memcmp(copy, bytes, size)) fail("the Program itself was written to", 0);
        free(m.state);
        free(m.arena);
        free(copy);
        total.run++;
    }
    if (!count) memcpy(total.op, ops_before, sizeof ops_before);
    free(bytes);
    return AC_OK;
}

/* ---- the command ------------------------------------------------------------------------------------------------ */

static struct {
    uint32_t *words, count;
    const uint32_t *seed[MAX_SEEDS];
} corpus;

static int read_corpus(const char *path) {
    FILE *f = fopen(path, "rb");
    long bytes = 0;
    if (f && !fseek(f, 0, SEEK_END)) bytes = ftell(f);
    if (!f || bytes <= 0) return 0;
    rewind(f);
    corpus.words = malloc((size_t)bytes);
    size_t words = fread(corpus.words, 4, (size_t)bytes / 4, f);
    fclose(f);
    return words == (size_t)bytes / 4 ? (int)words : 0;
}

/* Replay: each record, in order; its status to `out`. */
static int replay(int words, const char *out) {
    FILE *f = fopen(out, "wb");
    if (!f) return 1;
    for (int at = 0; at < words; now.index++) {
        size_t size = corpus.words[at];
        restart(now.seed, now.index);
        alarm(HANG_SECONDS);
        int status = (int)try_program(corpus.words + at + 1, size, 1);
        fputc(status, f);
        total.mutants++;
        total.accepted += status == AC_OK;
        at += 1 + (int)((size + 3) / 4);
    }
    return fclose(f);
}

/* Whether the mutant differs from its seed in what is checked: tensors, ops, entries, sizes. */
static int differs(const uint32_t *mutant, const uint32_t *seed) {
    parts p = take_apart((uint32_t *)(uintptr_t)seed);
    return memcmp(mutant + H_TENSORS, seed + H_TENSORS, (size_t)((uint8_t *)p.bindings - (uint8_t *)(p.h + H_TENSORS)))
           != 0;
}

static void one_mutant(uint64_t index, uint32_t *scratch) {
    now.index = index;
    restart(now.seed, index);
    const uint32_t *seed = corpus.seed[below(corpus.count)];
    memset(scratch, 0, MAX_BYTES);
    memcpy(scratch, seed, seed[H_TOTAL]);
    size_t size = mutate(scratch);
    alarm(HANG_SECONDS);
    ac_status status = try_program(scratch, size, differs(scratch, seed));
    total.mutants++;
    if (status != AC_OK) total.refused[status]++;
    else if (++total.accepted && differs(scratch, seed)) total.changed++;
}

static void summary(double seconds) {
    printf("{\"mutants\": %" PRIu64 ", \"accepted\": %" PRIu64 ", \"accepted_changed\": %" PRIu64 ", \"run\": %" PRIu64
           ", \"seconds\": %.1f, \"refused\": {",
           total.mutants, total.accepted, total.changed, total.run, seconds);
    for (int i = 1; i <= AC_E_SINK; i++)
        printf("%s\"%s\": %" PRIu64, i > 1 ? ", " : "", ac_status_text((ac_status)i), total.refused[i]);
    printf("}, \"ops\": {");
    for (int i = 0; i < AC_OP_COUNT; i++)
        printf("%s\"%s\": %" PRIu64, i ? ", " : "", ac_table_base[i].name, total.op[i]);
    printf("}}\n");
}

int main(int argc, char **argv) {
    uint64_t count = UINT64_MAX;
    double seconds = 1e9;
    const char *replay_to = NULL;
    int64_t only = -1;
    struct timespec start, at;
    for (int i = 2; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--count")) count = strtoull(argv[i + 1], NULL, 10);
        if (!strcmp(argv[i], "--seconds")) seconds = strtod(argv[i + 1], NULL);
        if (!strcmp(argv[i], "--seed")) now.seed = strtoull(argv[i + 1], NULL, 10);
        if (!strcmp(argv[i], "--replay")) replay_to = argv[i + 1];
        if (!strcmp(argv[i], "--only")) only = strtoll(argv[i + 1], NULL, 10);
        if (!strcmp(argv[i], "--save")) now.save = argv[i + 1];
    }
    int words = argc > 1 ? read_corpus(argv[1]) : 0;
    if (words <= 0) {
        fprintf(stderr, "usage: fuzz SEEDS [--count N] [--seconds S] [--seed K] [--replay OUT] [--only I] [--save FILE]\n");
        return 2;
    }
    signal(SIGALRM, on_signal);
    signal(SIGABRT, on_signal);
    clock_gettime(CLOCK_MONOTONIC, &start);
    if (replay_to && replay(words, replay_to)) return 2;
    for (int i = 0; !replay_to && i < words && corpus.count < MAX_SEEDS; i += 1 + (int)(corpus.words[i] + 3) / 4)
        if (corpus.words[i] <= MAX_BYTES / 2) corpus.seed[corpus.count++] = corpus.words + i + 1;
    uint32_t *scratch = malloc(MAX_BYTES + 64);
    double passed = 0;
    for (uint64_t i = 0; !replay_to && only < 0 && i < count && passed < seconds; i++) {
        one_mutant(i, scratch);
        clock_gettime(CLOCK_MONOTONIC, &at);
        passed = (double)(at.tv_sec - start.tv_sec) + 1e-9 * (double)(at.tv_nsec - start.tv_nsec);
    }
    if (only >= 0) {
        one_mutant((uint64_t)only, scratch);
        write_mutant();
    }
    summary(passed);
    free(scratch);
    free(corpus.words);
    return 0;
}
