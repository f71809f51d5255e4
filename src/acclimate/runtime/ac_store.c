/* Slots of flash. A slot, with `line` the unit of program or 64 bytes, whichever is more:
 *   header (one line) | mark of retirement (one line, erased: in use) | delta (whole lines) | seal (one line)
 * The header counts wear, so it is written at once after the erase; the seal makes the slot valid, so it comes last. */
#include "ac_store.h"

#include <string.h>

#define SLOT_MAGIC 0x54534341u /* "ACST" */
#define SEAL_MAGIC 0x4C534341u /* "ACSL" */

enum {
    HEADER_WORDS = 16,
    HEADER_BYTES = 64,
    SEAL_BYTES = 12,
    DELTA_BYTES = 24,
    CHUNK = 64,
    ERASED = 0xFF
};

/* Words of the header. W_PLACE: slots, index of this one (bits 8 to 15), bytes of a line (from bit 16): with the size
 * of a slot they say how the flash is divided, to a reader that has only its bytes. */
enum {
    W_MAGIC,
    W_FORMAT,
    W_SEQUENCE,
    W_BYTES,
    W_MODEL,
    W_PLACE,
    W_SLOT_BYTES,
    W_ERASES,
    W_CRC = 15
};

static uint32_t line_of(const ac_flash *f) {
    return f->write_bytes > HEADER_BYTES ? f->write_bytes : HEADER_BYTES;
}

/* Bytes of a slot that holds a delta of `bytes`. */
static uint64_t needed(uint32_t bytes, uint32_t line) {
    return (3 + ((uint64_t)bytes + line - 1) / line) * line;
}

static uint32_t address_of(const ac_store *s, uint32_t index) { return index * s->slot_bytes; }

static uint32_t place_of(const ac_store *s, uint32_t index) {
    return s->slots | index << 8 | line_of(s->flash) << 16;
}

ac_status ac_store_open(ac_store *s, const ac_flash *f, uint32_t slots) {
    memset(s, 0, sizeof *s);
    if (slots < 2 || slots > AC_STORE_SLOTS || f->write_bytes == 0 ||
        f->write_bytes > AC_STORE_UNIT || (f->write_bytes & (f->write_bytes - 1)) ||
        f->page_bytes == 0 || f->page_bytes % f->write_bytes ||
        (uint64_t)f->page_bytes * f->pages > INT32_MAX)
        return AC_E_ROOM;
    s->flash = f;
    s->slots = s->current = slots;
    s->slot_bytes = f->pages / slots * f->page_bytes;
    return needed(DELTA_BYTES, line_of(f)) <= s->slot_bytes ? AC_OK : AC_E_ROOM;
}

/* CRC of `bytes` at `address`, going on from *crc. */
static int seal_over(const ac_flash *f, uint32_t address, uint32_t bytes, uint32_t *crc) {
    uint8_t chunk[CHUNK];
    for (uint32_t n; bytes; address += n, bytes -= n) {
        n = bytes < CHUNK ? bytes : CHUNK;
        if (f->read(f->argument, address, chunk, n))
            return 1;
        *crc = ac_crc32(*crc, chunk, n);
    }
    return 0;
}

/* Whether all of `bytes` at `address` are as the erase left them; -1 where they cannot be read. */
static int erased(const ac_flash *f, uint32_t address, uint32_t bytes) {
    uint8_t chunk[CHUNK];
    for (uint32_t n; bytes; address += n, bytes -= n) {
        n = bytes < CHUNK ? bytes : CHUNK;
        if (f->read(f->argument, address, chunk, n))
            return -1;
        for (uint32_t i = 0; i < n; i++)
            if (chunk[i] != ERASED)
                return 0;
    }
    return 1;
}

/* The header of a slot, if it is sound. Everything in it is checked here. */
static ac_status read_header(const ac_store *s, uint32_t index, uint32_t *h) {
    const ac_flash *f = s->flash;
    if (f->read(f->argument, address_of(s, index), h, HEADER_BYTES))
        return AC_E_FLASH;
    if (h[W_MAGIC] != SLOT_MAGIC) {
        int blank = erased(f, address_of(s, index), HEADER_BYTES);
        return blank < 0 ? AC_E_FLASH : blank ? AC_E_EMPTY : AC_E_MAGIC;
    }
    if (h[W_FORMAT] != AC_STORE_FORMAT)
        return AC_E_VERSION;
    if (h[W_CRC] != ac_crc32(0, h, 4 * W_CRC))
        return AC_E_CHECKSUM;
    if (h[W_PLACE] != place_of(s, index) || h[W_SLOT_BYTES] != s->slot_bytes ||
        needed(h[W_BYTES], line_of(f)) > s->slot_bytes)
        return AC_E_OFFSET;
    return AC_OK;
}

ac_status ac_store_slot(const ac_store *s, uint32_t index, ac_slot *slot) {
    const ac_flash *f = s->flash;
    const uint32_t line = line_of(f), at = address_of(s, index);
    uint32_t h[HEADER_WORDS], seal[3], crc = 0;
    memset(slot, 0, sizeof *slot);
    if (index >= s->slots)
        return AC_E_OFFSET;
    ac_status status = read_header(s, index, h);
    if (status != AC_OK)
        return status;
    slot->sequence = h[W_SEQUENCE];
    slot->bytes = h[W_BYTES];
    slot->model = h[W_MODEL];
    slot->address = at + 2 * line;
    memcpy(slot->erases, h + W_ERASES, sizeof slot->erases);
    int in_use = erased(f, at + line, line);
    if (in_use <= 0)
        return in_use < 0 ? AC_E_FLASH : AC_E_RETIRED;
    if (f->read(f->argument, at + (uint32_t)needed(h[W_BYTES], line) - line, seal, SEAL_BYTES))
        return AC_E_FLASH;
    if (seal[0] != SEAL_MAGIC || seal[1] != h[W_SEQUENCE])
        return AC_E_TRUNCATED;
    if (seal_over(f, at, HEADER_BYTES, &crc) || seal_over(f, slot->address, slot->bytes, &crc))
        return AC_E_FLASH;
    return seal[2] == crc ? AC_OK : AC_E_CHECKSUM;
}

/* ---- loading --------------------------------------------------------------------------------------------------- */

static ac_status load_slot(const ac_store *s, const ac_slot *slot, const ac_program *p,
                           const ac_memory *m, void *scratch, size_t room, uint32_t *pending) {
    const ac_flash *f = s->flash;
    const void *bytes = scratch;
    if (f->mapped)
        bytes = (const uint8_t *)f->mapped + slot->address;
    else if (slot->bytes > room)
        return AC_E_ROOM;
    else if (f->read(f->argument, slot->address, scratch, slot->bytes))
        return AC_E_FLASH;
    return ac_delta_load(p, m, bytes, slot->bytes, pending);
}

ac_status ac_store_load(ac_store *s, const ac_program *p, const ac_memory *m, void *scratch,
                        size_t room, uint32_t *pending) {
    uint32_t passed = 0; /* slots that were tried, a bit each */
    ac_status newest = AC_E_EMPTY;
    for (;;) {
        uint32_t best = s->slots;
        ac_slot slot, chosen = {0};
        ac_status why = AC_E_EMPTY;
        for (uint32_t i = 0; i < s->slots; i++) {
            ac_status status = passed >> i & 1 ? AC_E_EMPTY : ac_store_slot(s, i, &slot);
            if (status == AC_E_FLASH)
                return status;
            if (status == AC_E_EMPTY || (best < s->slots && slot.sequence <= chosen.sequence))
                continue;
            best = i;
            chosen = slot;
            why = status;
        }
        if (best == s->slots)
            return newest;
        if (why == AC_OK)
            why = load_slot(s, &chosen, p, m, scratch, room, pending);
        if (why == AC_E_ROOM || why == AC_E_FLASH)
            return why; /* an older one would hide it */
        if (why == AC_OK) {
            s->current = best;
            s->refused = newest == AC_E_EMPTY ? AC_OK : newest;
            return AC_OK;
        }
        if (newest == AC_E_EMPTY && why != AC_E_RETIRED)
            newest = why;
        passed |= 1u << best;
    }
}

/* ---- saving ---------------------------------------------------------------------------------------------------- */

/* Gathers bytes to whole lines. */
typedef struct {
    const ac_flash *flash;
    uint32_t address, filled, line, crc;
    uint8_t buffer[AC_STORE_UNIT];
} writer;

static int flush(writer *w) {
    memset(w->buffer + w->filled, ERASED, w->line - w->filled);
    int failed = w->flash->program(w->flash->argument, w->address, w->buffer, w->line);
    w->address += w->line;
    w->filled = 0;
    return failed;
}

static int take(void *argument, const void *bytes, size_t size) {
    writer *w = argument;
    const uint8_t *from = bytes;
    w->crc = ac_crc32(w->crc, bytes, size);
    while (size) {
        size_t n = w->line - w->filled < size ? w->line - w->filled : size;
        memcpy(w->buffer + w->filled, from, n);
        w->filled += (uint32_t)n;
        from += n;
        size -= n;
        if (w->filled == w->line && flush(w))
            return 1;
    }
    return 0;
}

/* What all slots together say: the next sequence number and the erases of each slot; and which slot to write, one of
 * no use or else the oldest, of several the least worn. */
static ac_status survey(const ac_store *s, uint32_t model, uint32_t *sequence, uint32_t *target,
                        uint32_t *erases) {
    uint32_t age[AC_STORE_SLOTS];
    ac_slot slot;
    memset(erases, 0, AC_STORE_SLOTS * sizeof *erases);
    *sequence = 0;
    for (uint32_t i = 0; i < s->slots; i++) {
        ac_status status = ac_store_slot(s, i, &slot);
        if (status == AC_E_FLASH)
            return status;
        age[i] = status == AC_OK && slot.model == model ? slot.sequence : 0;
        if (slot.sequence > *sequence)
            *sequence = slot.sequence;
        for (uint32_t k = 0; k < s->slots; k++)
            if (slot.erases[k] > erases[k])
                erases[k] = slot.erases[k];
    }
    if (*sequence == UINT32_MAX)
        return AC_E_ROOM;
    ++*sequence;
    *target = s->slots;
    for (uint32_t i = 0; i < s->slots; i++) {
        const uint32_t t = *target;
        if (i == s->current)
            continue;
        if (t == s->slots || age[i] < age[t] || (age[i] == age[t] && erases[i] < erases[t]))
            *target = i;
    }
    return AC_OK;
}

static ac_status write_slot(const ac_store *s, uint32_t target, const uint32_t *header,
                            const ac_program *p, const ac_memory *m, uint32_t pending) {
    const ac_flash *f = s->flash;
    writer w;
    memset(&w, 0, sizeof w);
    w.flash = f;
    w.line = line_of(f);
    w.address = address_of(s, target);
    const uint32_t first = w.address / f->page_bytes;
    const uint64_t bytes = needed(header[W_BYTES], w.line);
    for (uint32_t i = 0; (uint64_t)i * f->page_bytes < bytes; i++)
        if (f->erase(f->argument, first + i))
            return AC_E_FLASH;
    if (take(&w, header, HEADER_BYTES) || (w.filled && flush(&w)))
        return AC_E_FLASH;
    w.address += w.line; /* the mark of retirement stays erased */
    ac_status status = ac_delta_save(p, m, pending, take, &w, NULL);
    if (status != AC_OK)
        return status == AC_E_SINK ? AC_E_FLASH : status;
    if (w.filled && flush(&w))
        return AC_E_FLASH;
    const uint32_t seal[3] = {SEAL_MAGIC, header[W_SEQUENCE], w.crc};
    return take(&w, seal, SEAL_BYTES) || flush(&w) ? AC_E_FLASH : AC_OK;
}

ac_status ac_store_save(ac_store *s, const ac_program *p, const ac_memory *m, uint32_t pending) {
    uint32_t header[HEADER_WORDS] = {0}, target = 0;
    ac_slot slot;
    ac_status status = ac_delta_save(p, m, pending, NULL, NULL, &header[W_BYTES]);
    if (status == AC_OK && needed(header[W_BYTES], line_of(s->flash)) > s->slot_bytes)
        status = AC_E_ROOM;
    if (status == AC_OK)
        status = survey(s, p->model, &header[W_SEQUENCE], &target, header + W_ERASES);
    if (status != AC_OK)
        return status;
    header[W_MAGIC] = SLOT_MAGIC;
    header[W_FORMAT] = AC_STORE_FORMAT;
    header[W_MODEL] = p->model;
    header[W_PLACE] = place_of(s, target);
    header[W_SLOT_BYTES] = s->slot_bytes;
    header[W_ERASES + target]++;
    header[W_CRC] = ac_crc32(0, header, 4 * W_CRC);
    status = write_slot(s, target, header, p, m, pending);
    if (status != AC_OK)
        return status;
    if (ac_store_slot(s, target, &slot) != AC_OK || slot.sequence != header[W_SEQUENCE])
        return AC_E_FLASH;
    s->current = target;
    return AC_OK;
}

ac_status ac_store_rollback(ac_store *s, const ac_program *p, const ac_memory *m, void *scratch,
                            size_t room, uint32_t *pending) {
    const ac_flash *f = s->flash;
    const uint32_t line = line_of(f);
    uint8_t mark[AC_STORE_UNIT] = {0};
    if (s->current < s->slots) {
        if (f->program(f->argument, address_of(s, s->current) + line, mark, line))
            return AC_E_FLASH;
        s->current = s->slots;
    }
    ac_status status = ac_store_load(s, p, m, scratch, room, pending);
    if (status == AC_OK)
        return AC_OK;
    if (pending)
        *pending = 0;
    return ac_reset(p, m) == AC_OK ? status : AC_E_ALIGN;
}

uint32_t ac_store_wear(const ac_store *s) {
    uint32_t most = 0;
    for (uint32_t i = 0; i < s->slots; i++) {
        ac_slot slot;
        (void)ac_store_slot(s, i, &slot);
        for (uint32_t k = 0; k < s->slots; k++)
            if (slot.erases[k] > most)
                most = slot.erases[k];
    }
    return most;
}
