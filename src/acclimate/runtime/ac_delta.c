/* Deltas: what was learned, as the file that Python's Learner.save writes and Learner.restore reads.
 * docs/format.md has the bytes. Records are not aligned, so words are copied out of them. */
#include "ac_kernel.h"

#include <string.h>

#define DELTA_MAGIC 0x50554341u /* "ACUP" */
#define PENDING "optimizer.pending"

enum { DELTA_FORMAT = 1, HEADER_BYTES = 24, SEALED_FROM = 16, RECORD_BYTES = 12, WHOLE = 255, LONGEST_NAME = 0xFFFF };

static uint32_t word_at(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return word;
}

/* How files number element types: f32, i32, i8, i16. NO_CODE: they do not hold it. */
static const uint8_t type_of[] = {AC_F32, AC_I32, AC_I8, AC_I16};
enum { TYPES = sizeof type_of, NO_CODE = 255 };

static uint32_t code_of(const ac_tensor *t) {
    for (uint32_t code = 0; code < TYPES; code++)
        if (type_of[code] == t->dtype) return code;
    return NO_CODE;
}

/* Bytes of an element of a type by its code. */
static uint32_t element(uint32_t code) { return code == 2 ? 1 : code == 3 ? 2 : 4; }

/* Of a tensor of which the state holds but some channels, along axis 1: which, and all of it as it was trained. */
typedef struct {
    const ac_tensor *whole; /* NULL: the state holds all of it */
    const uint8_t *fixed;   /* what `whole` holds */
    const int32_t *index;   /* ascending */
    uint32_t count;
} parts;

static ac_status find_constant(const ac_program *p, const char *entry_name, const char *name, const ac_tensor **t) {
    ac_entry entry;
    ac_binding b;
    *t = NULL;
    if (ac_find_entry(p, entry_name, &entry) != AC_OK || ac_find_binding(p, &entry, name, &b) != AC_OK) return AC_OK;
    if (b.tensor->area != AC_CONST) return AC_E_TENSOR;
    *t = b.tensor;
    return AC_OK;
}

/* `t`: the tensor in the state. The entries' content is checked here: no op has to use it. */
static ac_status find_parts(const ac_program *p, const ac_binding *b, parts *found) {
    const ac_tensor *t = b->tensor, *index;
    memset(found, 0, sizeof *found);
    ac_status status = find_constant(p, "fixed", b->name, &found->whole);
    if (status == AC_OK) status = find_constant(p, "channels", b->name, &index);
    if (status != AC_OK || (!found->whole && !index)) return status;
    if (!found->whole || !index || index->dtype != AC_I32 || index->rank != 1 || t->rank < 2) return AC_E_TENSOR;
    if (found->whole->dtype != t->dtype || found->whole->rank != t->rank || index->dim[0] != t->dim[1]) return AC_E_TENSOR;
    for (int i = 0; i < AC_MAX_RANK; i++)
        if (i != 1 && found->whole->dim[i] != t->dim[i]) return AC_E_TENSOR;
    found->fixed = p->constants + found->whole->offset;
    found->index = (const int32_t *)(const void *)(p->constants + index->offset);
    found->count = index->size;
    for (uint32_t i = 0; i < found->count; i++)
        if (found->index[i] < (i ? found->index[i - 1] + 1 : 0) || found->index[i] >= found->whole->dim[1]) return AC_E_TENSOR;
    return AC_OK;
}

static int finite_words(const uint8_t *p, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        if ((word_at(p + 4 * (size_t)i) & 0x7F800000u) == 0x7F800000u) return 0;
    return 1;
}

/* LONGEST_NAME + 1 for one that is longer. */
static uint32_t length_of(const char *name) {
    uint32_t length = 0;
    while (length <= LONGEST_NAME && name[length]) length++;
    return length;
}

/* ---- saving ---------------------------------------------------------------------------------------------------- */

typedef struct {
    ac_sink sink; /* NULL: only count and seal */
    void *argument;
    uint64_t bytes;
    uint32_t crc, records;
    int stopped;
} writer;

static void put(writer *w, const void *bytes, size_t size) {
    w->bytes += size;
    if (w->sink == NULL) w->crc = ac_crc32(w->crc, bytes, size);
    else if (!w->stopped) w->stopped = w->sink(w->argument, bytes, size) != 0;
}

static void put_word(writer *w, uint32_t word) { put(w, &word, 4); }

/* Whether bytes [from, from + size) of the state block differ from what it started as. */
static int differs(const ac_program *p, const uint8_t *state, uint32_t from, uint32_t size) {
    uint32_t known = from >= p->initial_bytes ? 0 : p->initial_bytes - from < size ? p->initial_bytes - from : size;
    if (known && !ac_same_bytes(state + from, p->initial + from, known)) return 1;
    for (uint32_t i = known; i < size; i++)
        if (state[from + i]) return 1;
    return 0;
}

static void put_record(writer *w, const char *name, uint32_t dtype, uint32_t axis, uint32_t channels, uint32_t size) {
    const uint32_t length = length_of(name);
    put_word(w, length | dtype << 16 | axis << 24);
    put_word(w, channels);
    put_word(w, size);
    put(w, name, length);
    w->records++;
}

/* One tensor, if it changed: whole, along its first axis where that takes fewer bytes, or what the state holds of it. */
static ac_status put_tensor(writer *w, const ac_program *p, const uint8_t *state, const ac_binding *b) {
    const ac_tensor *t = b->tensor;
    if (t->area != AC_STATE || !differs(p, state, t->offset, (uint32_t)ac_tensor_bytes(t))) return AC_OK;
    const uint32_t code = code_of(t);
    if (code == NO_CODE || length_of(b->name) > LONGEST_NAME) return AC_E_RECORD;
    if (t->dtype == AC_F32 && !finite_words(state + t->offset, t->size)) return AC_E_VALUE;
    const uint32_t rows = (uint32_t)t->dim[0], size = element(code), row = t->size / rows * size;
    uint32_t changed = 0;
    parts part;
    const ac_status status = find_parts(p, b, &part);
    if (status != AC_OK) return status;
    if (part.whole) {
        put_record(w, b->name, code, 1, part.count, t->size);
        put(w, part.index, 4 * (size_t)part.count);
        put(w, state + t->offset, size * (size_t)t->size);
        return AC_OK;
    }
    for (uint32_t i = 0; i < rows; i++) changed += (uint32_t)differs(p, state, t->offset + i * row, row);
    if (t->rank == 0 || (uint64_t)changed * (row + 4) >= size * (uint64_t)t->size) {
        put_record(w, b->name, code, WHOLE, 0, t->size);
        put(w, state + t->offset, size * (size_t)t->size);
        return AC_OK;
    }
    put_record(w, b->name, code, 0, changed, changed * (row / size));
    for (uint32_t i = 0; i < rows; i++)
        if (differs(p, state, t->offset + i * row, row)) put_word(w, i);
    for (uint32_t i = 0; i < rows; i++)
        if (differs(p, state, t->offset + i * row, row)) put(w, state + t->offset + (size_t)i * row, row);
    return AC_OK;
}

static ac_status put_records(writer *w, const ac_program *p, const ac_memory *m, uint32_t pending) {
    ac_entry entry = {0};
    ac_status status = ac_find_entry(p, "state", &entry);
    for (uint32_t i = entry.first_binding; status == AC_OK && i < entry.end_binding; i++) {
        ac_binding b;
        status = ac_binding_at(p, i, &b);
        if (status == AC_OK) status = put_tensor(w, p, m->state, &b);
        if (w->stopped) return AC_E_SINK;
    }
    if (status == AC_OK && pending) {
        put_record(w, PENDING, 1, WHOLE, 0, 1);
        put_word(w, pending);
    }
    return status;
}

ac_status ac_delta_save(const ac_program *p, const ac_memory *m, uint32_t pending, ac_sink sink, void *argument,
                        uint32_t *size) {
    writer count = {NULL, NULL, 0, 0, 0, 0}, seal = count, out = {sink, argument, 0, 0, 0, 0};
    if (p->model == 0) return AC_E_MODEL;
    if (pending > INT32_MAX) return AC_E_RECORD;
    ac_status status = put_records(&count, p, m, pending);
    if (status != AC_OK) return status;
    if (count.bytes + HEADER_BYTES > UINT32_MAX) return AC_E_OFFSET;
    if (size) *size = (uint32_t)count.bytes + HEADER_BYTES;
    if (sink == NULL) return AC_OK;
    put_word(&seal, p->model);
    put_word(&seal, count.records);
    status = put_records(&seal, p, m, pending);
    put_word(&out, DELTA_MAGIC);
    put_word(&out, DELTA_FORMAT);
    put_word(&out, (uint32_t)count.bytes + HEADER_BYTES);
    put_word(&out, seal.crc);
    put_word(&out, p->model);
    put_word(&out, count.records);
    if (status == AC_OK) status = put_records(&out, p, m, pending);
    return out.stopped ? AC_E_SINK : status;
}

/* ---- loading --------------------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *name, *index, *data;
    uint32_t name_bytes, dtype, axis, channels, size;
    const ac_tensor *tensor; /* in the state; NULL: the count of pending micro-batches */
    parts part;
} record;

/* Read the record at `at`; returns where the next one starts, NULL where it is cut off or not valid. */
static const uint8_t *read_record(record *r, const uint8_t *at, const uint8_t *end) {
    if (end - at < RECORD_BYTES) return NULL;
    r->name_bytes = word_at(at) & 0xFFFF;
    r->dtype = at[2];
    r->axis = at[3];
    r->channels = word_at(at + 4);
    r->size = word_at(at + 8);
    if (r->dtype >= TYPES || (r->axis == WHOLE) != (r->channels == 0)) return NULL;
    uint64_t bytes = r->name_bytes + 4 * (uint64_t)r->channels + element(r->dtype) * (uint64_t)r->size;
    if (bytes > (uint64_t)(end - at - RECORD_BYTES)) return NULL;
    r->name = at + RECORD_BYTES;
    r->index = r->name + r->name_bytes;
    r->data = r->index + 4 * (size_t)r->channels;
    return r->data + element(r->dtype) * (size_t)r->size;
}

static int named(const record *r, const char *name) {
    for (uint32_t i = 0; i < r->name_bytes; i++)
        if (name[i] == 0 || (uint8_t)name[i] != r->name[i]) return 0;
    return name[r->name_bytes] == 0;
}

/* In range, and each once. Those that ascend, as savers write them, take one pass. */
static int valid_channels(const record *r, uint32_t count) {
    int ascending = 1;
    for (uint32_t i = 0; i < r->channels; i++) {
        uint32_t index = word_at(r->index + 4 * (size_t)i);
        if (index >= count) return 0;
        if (i && index <= word_at(r->index + 4 * (size_t)(i - 1))) ascending = 0;
        for (uint32_t k = 0; !ascending && k < i; k++)
            if (word_at(r->index + 4 * (size_t)k) == index) return 0;
    }
    return 1;
}

/* Where byte `at` of a tensor as the model has it lies in the state, from the tensor's start; SIZE_MAX: nowhere. */
static size_t spot(const record *r, size_t at, size_t piece) {
    if (!r->part.whole) return at;
    const size_t row = at / piece, channel = row % (size_t)r->part.whole->dim[1];
    uint32_t k = 0;
    while (k < r->part.count && (size_t)r->part.index[k] < channel) k++;
    if (k == r->part.count || (size_t)r->part.index[k] != channel) return SIZE_MAX;
    return (row / (size_t)r->part.whole->dim[1] * r->part.count + k) * piece + at % piece;
}

/* Write a record to the state; with `state` NULL only look whether it changes what the state does not hold. */
static ac_status apply(const record *r, uint8_t *state) {
    const ac_tensor *t = r->part.whole ? r->part.whole : r->tensor;
    size_t inner = element(r->dtype), outer = 1, dim = 1, count = 1, piece = inner;
    for (uint32_t d = 0; d < t->rank; d++) {
        if (r->channels && d < r->axis) outer *= (size_t)t->dim[d];
        if (!r->channels || d > r->axis) inner *= (size_t)t->dim[d];
        if (d > 1) piece *= (size_t)t->dim[d]; /* of one channel of axis 1, whose bytes lie together */
    }
    if (r->channels) dim = (size_t)t->dim[r->axis], count = r->channels;
    const size_t unit = r->part.whole && piece < inner ? piece : inner;
    for (size_t o = 0; o < outer; o++)
        for (size_t c = 0; c < count; c++)
            for (size_t done = 0; done < inner; done += unit) {
                const size_t at = (o * dim + (r->channels ? word_at(r->index + 4 * c) : 0)) * inner + done;
                const size_t to = spot(r, at, piece);
                const uint8_t *from = r->data + (o * count + c) * inner + done;
                if (to == SIZE_MAX && !ac_same_bytes(r->part.fixed + at, from, unit)) return AC_E_RECORD;
                if (to != SIZE_MAX && state) memcpy(state + r->tensor->offset + to, from, unit);
            }
    return AC_OK;
}

/* Find the record's tensor and check that it fits. */
static ac_status place(const ac_program *p, const ac_entry *state, record *r) {
    ac_entry accumulate;
    ac_binding b;
    r->tensor = NULL;
    for (uint32_t i = state->first_binding; i < state->end_binding && !r->tensor; i++)
        if (ac_binding_at(p, i, &b) == AC_OK && b.tensor->area == AC_STATE && named(r, b.name)) {
            r->tensor = b.tensor;
            const ac_status status = find_parts(p, &b, &r->part);
            if (status != AC_OK) return status;
        }
    if (!r->tensor) {
        if (!named(r, PENDING) || ac_find_entry(p, "accumulate", &accumulate) != AC_OK) return AC_E_RECORD;
        return r->dtype == 1 && r->size == 1 && !r->channels && word_at(r->data) <= INT32_MAX ? AC_OK : AC_E_RECORD;
    }
    const ac_tensor *t = r->part.whole ? r->part.whole : r->tensor;
    uint32_t want = t->size;
    if (code_of(t) != r->dtype) return AC_E_RECORD;
    if (r->channels) {
        if (r->axis >= t->rank || r->channels > (uint32_t)t->dim[r->axis]) return AC_E_RECORD;
        if (!valid_channels(r, (uint32_t)t->dim[r->axis])) return AC_E_RECORD;
        want = want / (uint32_t)t->dim[r->axis] * r->channels;
    }
    if (r->size != want) return AC_E_RECORD;
    if (t->dtype == AC_F32 && !finite_words(r->data, r->size)) return AC_E_VALUE;
    return apply(r, NULL);
}

/* Whether a record before `at` has the same name. Names are known ones, so there are few. */
static int stands_twice(const record *r, const uint8_t *first, const uint8_t *at, const uint8_t *end) {
    record other;
    for (const uint8_t *before = first; before && before < at;) {
        before = read_record(&other, before, end);
        if (before && other.name_bytes == r->name_bytes && ac_same_bytes(other.name, r->name, r->name_bytes)) return 1;
    }
    return 0;
}

ac_status ac_delta_load(const ac_program *p, const ac_memory *m, const void *bytes, size_t size, uint32_t *pending) {
    const uint8_t *raw = bytes, *first = raw + HEADER_BYTES, *end = raw + size, *at = first;
    uint32_t waiting = 0;
    record r;
    ac_entry state;
    if (size < HEADER_BYTES) return AC_E_TRUNCATED;
    if (word_at(raw) != DELTA_MAGIC) return AC_E_MAGIC;
    if (word_at(raw + 4) != DELTA_FORMAT) return AC_E_VERSION;
    if (word_at(raw + 8) != size) return AC_E_TRUNCATED;
    if (word_at(raw + 12) != ac_crc32(0, raw + SEALED_FROM, size - SEALED_FROM)) return AC_E_CHECKSUM;
    if (p->model == 0 || word_at(raw + 16) != p->model) return AC_E_MODEL;
    if (ac_find_entry(p, "state", &state) != AC_OK) return AC_E_NAME;
    const uint32_t records = word_at(raw + 20);
    for (uint32_t i = 0; i < records; i++) {
        const uint8_t *next = read_record(&r, at, end);
        if (next == NULL) return AC_E_OFFSET;
        ac_status status = place(p, &state, &r);
        if (status != AC_OK) return status;
        if (stands_twice(&r, first, at, end)) return AC_E_RECORD;
        if (!r.tensor && !pending) return AC_E_RECORD;
        at = next;
    }
    if (at != end) return AC_E_OFFSET;
    ac_status status = ac_reset(p, m);
    if (status != AC_OK) return status;
    for (at = first; at && at < end;) {
        at = read_record(&r, at, end);
        if (place(p, &state, &r) == AC_OK && r.tensor) (void)apply(&r, m->state);
        else waiting = word_at(r.data);
    }
    if (pending) *pending = waiting;
    return AC_OK;
}
