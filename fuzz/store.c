/* Hostile flash against the store; built with the address and undefined-behaviour sanitizers.
 *
 *     store PAIRS [--count N] [--seconds S] [--seed K] [--only I] [--save FILE]
 *
 * PAIRS as for delta.c. A mutant is an image of flash of drawn sizes: what saves and rollbacks left in it, then words and
 * bytes of its headers, marks, deltas and seals changed, with checksums made right again in most. A load that is
 * refused must leave the state as it was; one that is not must leave what the delta in that slot says; saves and
 * rollbacks must then work as on any other flash. Every block is of exactly its size. */
#define _POSIX_C_SOURCE 200809L
#include "ac_store.h"
#include "pairs.h"

enum { SLOT_HEADER = 64, SEAL = 12 };

static uint8_t *image;
static uint32_t image_bytes;

static int read_flash(void *argument, uint32_t address, void *to, uint32_t bytes) {
    (void)argument;
    if (address > image_bytes || bytes > image_bytes - address) fail("a read beyond the flash");
    memcpy(to, image + address, bytes);
    return 0;
}

static int erase_flash(void *argument, uint32_t page) {
    const ac_flash *f = argument;
    if (page >= f->pages) fail("an erase beyond the flash");
    memset(image + (size_t)page * f->page_bytes, 0xFF, f->page_bytes);
    return 0;
}

static int program_flash(void *argument, uint32_t address, const void *from, uint32_t bytes) {
    const ac_flash *f = argument;
    if (address > image_bytes || bytes > image_bytes - address) fail("a write beyond the flash");
    if (address % f->write_bytes || bytes % f->write_bytes) fail("a write of part of a unit");
    for (uint32_t i = 0; i < bytes; i++) {
        if (image[address + i] != 0xFF) fail("a unit is written twice");
        image[address + i] = ((const uint8_t *)from)[i];
    }
    return 0;
}

/* Make the checksums of a slot right again, as far as it says where they are. */
static void seal_again(const ac_store *s, uint32_t slot) {
    uint8_t *at = image + (size_t)slot * s->slot_bytes;
    uint32_t line = get(at + 20) >> 16, bytes = get(at + 12);
    set(at + 60, ac_crc32(0, at, 60));
    uint64_t seal = line ? 2 * (uint64_t)line + ((uint64_t)bytes + line - 1) / line * line : UINT32_MAX;
    if (seal + SEAL > s->slot_bytes) return;
    if (below(8)) {
        memcpy(at + seal, "ACSL", 4);
        set(at + seal + 4, get(at + 8));
    }
    if (bytes >= 24 && below(2)) { /* the delta's own */
        set(at + 2 * line + 8, bytes);
        set(at + 2 * line + 12, ac_crc32(0, at + 2 * line + 16, bytes - 16));
    }
    set(at + seal + 8, ac_crc32(ac_crc32(0, at, SLOT_HEADER), at + 2 * line, bytes));
}

static void change(const ac_store *s) {
    const uint32_t slot = below(s->slots);
    uint8_t *at = image + (size_t)slot * s->slot_bytes;
    const uint32_t bytes = get(at + 12), line = get(at + 20) >> 16;
    switch (below(6)) {
    case 0: set(at + 4 * below(16), nudged(get(at + 4 * below(16)))); break;
    case 1: {
        uint32_t word = below(16);
        set(at + 4 * word, nudged(get(at + 4 * word)));
        break;
    }
    case 2:
        if (bytes < s->slot_bytes && bytes >= 4 && 2 * (uint64_t)line + bytes <= s->slot_bytes) {
            uint32_t word = 2 * line + below(bytes / 4) * 4;
            set(at + word, nudged(get(at + word)));
        }
        break;
    case 3: at[below(s->slot_bytes)] = (uint8_t)any(); break;
    case 4: memset(at + below(s->slot_bytes), below(2) ? 0xFF : 0, 1); break;
    default: /* the other slot's bytes */
        memcpy(at, image + (size_t)below(s->slots) * s->slot_bytes, below(2) ? SLOT_HEADER : s->slot_bytes);
        break;
    }
    if (below(10)) seal_again(s, slot);
}

static void expect(const ac_program *p, const ac_memory *m, const void *state, const char *otherwise) {
    if (memcmp(m->state, state, p->state_bytes)) fail(otherwise);
}

static void try_image(const ac_program *p, const seeds *of, uint32_t changes) {
    static const uint32_t units[] = {1, 2, 4, 8, 16, 32, 64, 128, 256};
    ac_flash f = {NULL, read_flash, erase_flash, program_flash, NULL, 0, 0, 0};
    ac_store s;
    f.write_bytes = units[below(9)];
    f.page_bytes = (f.write_bytes > 64 ? f.write_bytes : 64) << below(4);
    const uint32_t slots = 2 + below(2), most = (uint32_t)of->delta_size + 4096;
    f.pages = slots * (most / f.page_bytes + 1);
    f.argument = &f;
    image_bytes = f.pages * f.page_bytes;
    image = malloc(image_bytes);
    now.bytes = image;
    now.size = image_bytes;
    if (below(2)) f.mapped = image;
    memset(image, 0xFF, image_bytes);
    ac_memory m = {malloc(p->state_bytes), malloc(4), NULL};
    uint8_t *before = malloc(p->state_bytes + 1u), *scratch = malloc(most);
    uint32_t pending = 0;
    if (ac_store_open(&s, &f, slots) != AC_OK || ac_delta_load(p, &m, of->delta, of->delta_size, &pending) != AC_OK)
        fail("a seed is refused");
    for (uint32_t i = below(4) ? slots : 1; i; i--)
        if (ac_store_save(&s, p, &m, pending) != AC_OK) fail("a save is refused");
    for (uint32_t i = 0; i < changes; i++) change(&s);
    ac_store_open(&s, &f, slots);
    memset(m.state, 0x3C, p->state_bytes);
    memcpy(before, m.state, p->state_bytes);
    ac_status status = ac_store_load(&s, p, &m, scratch, most, &pending);
    total.mutants++;
    if (status != AC_OK) {
        total.refused[status]++;
        expect(p, &m, before, "a refused load changed the state");
        if (s.current != slots) fail("a refused load chose a slot");
        if (ac_reset(p, &m) != AC_OK) fail("reset fails");
    } else {
        ac_slot slot;
        total.accepted++;
        total.changed += s.refused != AC_OK || changes;
        memcpy(before, m.state, p->state_bytes);
        if (s.refused) total.refused[s.refused]++;
        if (ac_store_slot(&s, s.current, &slot) != AC_OK) fail("a bad slot was loaded");
        if (ac_delta_load(p, &m, image + slot.address, slot.bytes, &pending) != AC_OK) fail("a bad delta was loaded");
        expect(p, &m, before, "a load gives what its delta does not hold");
    }
    memcpy(before, m.state, p->state_bytes);
    status = ac_store_save(&s, p, &m, pending);
    if (status == AC_E_ROOM) { /* a sequence number at its end */
        total.refused[status]++;
        expect(p, &m, before, "a refused save changed the state");
    } else if (status != AC_OK) fail("a save after hostile bytes is refused");
    else {
        memset(m.state, 0x3C, p->state_bytes);
        if (ac_store_load(&s, p, &m, scratch, most, &pending) != AC_OK) fail("what was saved cannot be loaded");
        expect(p, &m, before, "what was saved comes back otherwise");
        for (uint32_t i = 0; i <= slots; i++) {
            status = ac_store_rollback(&s, p, &m, scratch, most, &pending);
            if (status == AC_E_RETIRED) fail("a rollback finds what was rolled back");
        }
        if (status == AC_OK) fail("rollbacks do not end");
        memcpy(before, m.state, p->state_bytes);
        if (ac_reset(p, &m) != AC_OK) fail("reset fails");
        expect(p, &m, before, "the last rollback does not end in the model");
    }
    (void)ac_store_wear(&s);
    free(image);
    free(m.state);
    free(m.arena);
    free(before);
    free(scratch);
}

static void try_mutant(const ac_program *p, const seeds *of, uint8_t *scratch) {
    (void)scratch;
    try_image(p, of, below(3) ? 1 + below(3) : 1 + below(20));
}

static void try_seed(const ac_program *p, const seeds *of) { try_image(p, of, 0); }
