/* Hostile deltas against ac_delta_load; built with the address and undefined-behaviour sanitizers.
 *
 *     delta PAIRS [--count N] [--seconds S] [--seed K] [--only I] [--save FILE]
 *
 * PAIRS: a Program, a delta of it, a Program, ...: records of (uint32 size, bytes). Mutant I depends on K, I and PAIRS
 * alone. Fields are changed as what they are (counts, lengths, names, channels, values), then length and checksum are
 * mended in most. Every block is of exactly its size. A refused mutant must leave the state as it was; what an
 * accepted one leads to must come back from ac_delta_save, and twice the same file. */
#define _POSIX_C_SOURCE 200809L
#include "pairs.h"

enum { HEADER = 24, RECORD = 12 };

/* Where the records start; those of the seed are sound. */
static uint32_t records_of(const uint8_t *raw, size_t size, size_t *at) {
    uint32_t n = 0;
    for (size_t p = HEADER; p + RECORD <= size && n < 1024;) {
        at[n++] = p;
        p += RECORD + (get(raw + p) & 0xFFFF) + 4 * (size_t)get(raw + p + 4) + 4 * (size_t)get(raw + p + 8);
    }
    return n;
}

/* Mutate a delta in `raw` (room MAX_BYTES); its new size. */
static size_t mutate(uint8_t *raw, size_t size) {
    static size_t at[1024];
    int mended = below(12) > 0;
    for (uint32_t times = 1 + below(3); times; times--) {
        uint32_t n = records_of(raw, size, at), kind = below(12);
        if (!n || kind == 0) {
            if (size > HEADER) raw[HEADER + below((uint32_t)(size - HEADER))] = (uint8_t)any();
            continue;
        }
        size_t p = at[below(n)], length = get(raw + p) & 0xFFFF, k = get(raw + p + 4), data = p + RECORD + length + 4 * k;
        size_t end = data + 4 * (size_t)get(raw + p + 8);
        if (end > size) break; /* an earlier change moved the fields */
        switch (kind) {
        case 1: raw[p + 2] = (uint8_t)below(4); break;
        case 2: raw[p + 3] = (uint8_t)(k ? below(below(2) ? 4 : 256) : 255 - below(2)); break;
        case 3: set(raw + p + 4 + 4 * below(2), nudged(get(raw + p + 4 + 4 * below(2)))); break;
        case 4: raw[p + (below(2) ? 0 : 1)] = (uint8_t)any(); break;
        case 5:
            if (length) raw[p + RECORD + below((uint32_t)length)] = (uint8_t)(below(4) ? any() : 0);
            break;
        case 6: /* another channel, or two that are the same, or not in order */
            if (k) set(raw + data - 4 - 4 * below((uint32_t)k), below(2) ? below(8) : nudged(get(raw + data - 4)));
            break;
        case 7:
            if (end > data) set(raw + end - 4, nudged(get(raw + end - 4)));
            break;
        case 8: /* a record twice */
            if (size + (end - p) <= MAX_BYTES) {
                memcpy(raw + size, raw + p, end - p);
                size += end - p;
                if (below(4)) set(raw + 20, get(raw + 20) + 1);
            }
            break;
        case 9: /* a record less */
            memmove(raw + p, raw + end, size - end);
            size -= end - p;
            if (below(4)) set(raw + 20, get(raw + 20) - 1);
            break;
        case 10: size -= below((uint32_t)(size - HEADER) + 1); break;
        default: { /* elements more or fewer, or a channel fewer, with the counts that go with it */
            if (k > 1 && below(2)) {
                size_t row = (end - data) / k;
                memmove(raw + data - 4, raw + data, size - data);
                set(raw + p + 4, (uint32_t)k - 1);
                set(raw + p + 8, (uint32_t)((end - data - row) / 4));
                memmove(raw + end - 4 - row, raw + end - 4, size - end + 4);
                size -= 4 + row;
            } else if (below(2) && end - data > 4) {
                memmove(raw + end - 4, raw + end, size - end);
                set(raw + p + 8, (uint32_t)((end - data) / 4 - 1));
                size -= 4;
            } else {
                size_t more = 4 * (1 + (size_t)below(64));
                if (size + more > MAX_BYTES) break;
                memmove(raw + end + more, raw + end, size - end);
                memset(raw + end, 0, more);
                set(raw + p + 8, (uint32_t)((end - data + more) / 4));
                size += more;
            }
            break;
        }
        }
    }
    if (below(10) == 0) set(raw + 4 * below(6), nudged(get(raw + 4 * below(6))));
    if (mended && size >= HEADER) {
        set(raw + 8, (uint32_t)size);
        set(raw + 12, ac_crc32(0, raw + 16, size - 16));
    }
    return size;
}

typedef struct {
    uint8_t *bytes;
    size_t size;
} file;

static int append(void *argument, const void *bytes, size_t size) {
    file *f = argument;
    uint8_t *more = realloc(f->bytes, f->size + size + 1);
    if (!more) return 1;
    memcpy(more + f->size, bytes, size);
    f->bytes = more;
    f->size += size;
    return 0;
}

static void try_delta(const ac_program *p, const uint8_t *mutant, size_t size, const uint8_t *seed, size_t seed_size,
                      int counts) {
    uint8_t *bytes = malloc(size + 1), *before = malloc(p->state_bytes + 1u);
    ac_memory m = {malloc(p->state_bytes), malloc(4), NULL};
    uint32_t pending = 12345, again = 0, count = 0;
    now.bytes = mutant;
    now.size = size;
    memcpy(bytes + 1, mutant, size); /* not aligned, and not a byte beyond */
    if (ac_reset(p, &m) != AC_OK) fail("reset fails");
    memset(m.state, 0x3C, p->state_bytes);
    memcpy(before, m.state, p->state_bytes);
    ac_status status = ac_delta_load(p, &m, bytes + 1, size, counts ? &pending : NULL);
    total.mutants++;
    if (status != AC_OK) {
        total.refused[status]++;
        if (memcmp(before, m.state, p->state_bytes)) fail("a refused delta changed the state");
    } else {
        total.accepted++;
        total.changed += size != seed_size || memcmp(mutant, seed, size) != 0;
        if (pending == 12345) pending = 0;
        file first = {NULL, 0}, second = {NULL, 0};
        memcpy(before, m.state, p->state_bytes);
        if (ac_delta_save(p, &m, pending, append, &first, NULL) != AC_OK) fail("what was loaded cannot be saved");
        if (ac_delta_save(p, &m, pending, NULL, NULL, &count) != AC_OK || count != first.size) fail("the size is wrong");
        if (ac_delta_load(p, &m, first.bytes, first.size, &again) != AC_OK) fail("what was saved cannot be loaded");
        if (memcmp(before, m.state, p->state_bytes) || again != pending) fail("what was saved comes back otherwise");
        if (ac_delta_save(p, &m, pending, append, &second, NULL) != AC_OK || second.size != first.size
            || memcmp(first.bytes, second.bytes, first.size))
            fail("the same state gives another file");
        free(first.bytes);
        free(second.bytes);
    }
    free(bytes);
    free(before);
    free(m.state);
    free(m.arena);
}

static void try_mutant(const ac_program *p, const seeds *of, uint8_t *scratch) {
    memcpy(scratch, of->delta, of->delta_size);
    size_t size = mutate(scratch, of->delta_size);
    try_delta(p, scratch, size, of->delta, of->delta_size, below(8) > 0);
}

static void try_seed(const ac_program *p, const seeds *of) {
    try_delta(p, of->delta, of->delta_size, of->delta, of->delta_size, 1);
}
