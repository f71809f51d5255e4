/* Runs every Program of a corpus on data that a counter makes, and prints a checksum of state and arena for each:
 * the same text from every compiler and processor.
 *
 *     bits CORPUS STEPS
 *
 * CORPUS: records of (uint32 size, bytes), as fuzz/seeds.py writes them. The entry "step" is run STEPS times on new
 * data, others once. A NaN counts as one value: the sign and payload of a NaN are the processor's choice. */
#include "acclimate.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t random_state;

static uint32_t any(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

static uint32_t checksum(uint32_t crc, const void *block, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 4) {
        uint32_t word;
        memcpy(&word, (const char *)block + at, 4);
        if ((word & 0x7F800000u) == 0x7F800000u && (word & 0x007FFFFFu)) word = 0x7FC00000u;
        crc = ac_crc32(crc, &word, 4);
    }
    return crc;
}

static void feed(const ac_program *p, const ac_memory *m, const ac_entry *e) {
    for (uint32_t i = e->first_binding; i < e->end_binding; i++) {
        ac_binding b;
        if (ac_binding_at(p, i, &b) != AC_OK) exit(3);
        if (b.is_output || b.tensor->area != AC_ARENA) continue;
        uint8_t *to = ac_address(p, m, b.tensor);
        for (uint32_t k = 0; k < b.tensor->size; k++) {
            float value = strcmp(b.name, "lr") ? (float)(int32_t)any() * 2.4e-7f - 2.0f : 0.01f;
            uint32_t small = any() % 3;
            switch (b.tensor->dtype) {
            case AC_F32: memcpy(to + 4 * (size_t)k, &value, 4); break;
            case AC_I32: memcpy(to + 4 * (size_t)k, &small, 4); break;
            case AC_U16: memcpy(to + 2 * (size_t)k, &small, 2); break;
            case AC_BIT: to[k / 8] = (uint8_t)any(); break;
            default: to[k] = (uint8_t)small; break;
            }
        }
    }
}

static void run_all(const void *bytes, size_t size, uint32_t steps) {
    ac_program p;
    ac_status status = ac_load(&p, bytes, size);
    if (status != AC_OK) {
        fprintf(stderr, "refused: %s\n", ac_status_text(status));
        exit(3);
    }
    ac_memory m = {malloc(p.state_bytes + 4), malloc(p.arena_bytes + 4), NULL};
    if (!m.state || !m.arena || ac_reset(&p, &m) != AC_OK) exit(3);
    memset(m.arena, 0, p.arena_bytes);
    uint32_t crc = 0, refused = 0;
    for (uint32_t i = 0; i < p.n_entries; i++) {
        ac_entry e;
        if (ac_entry_at(&p, i, &e) != AC_OK) exit(3);
        for (uint32_t n = strcmp(e.name, "step") ? 1 : steps; n; n--) {
            feed(&p, &m, &e);
            refused += ac_run(&p, &m, &e) != AC_OK;
            crc = checksum(crc, m.arena, p.arena_bytes);
        }
    }
    printf("%08x %08x %u\n", (unsigned)crc, (unsigned)checksum(0, m.state, p.state_bytes), (unsigned)refused);
    free(m.state);
    free(m.arena);
}

int main(int argc, char **argv) {
    FILE *f = argc == 3 ? fopen(argv[1], "rb") : NULL;
    uint32_t size;
    if (!f) return 2;
    while (fread(&size, 4, 1, f) == 1) {
        size_t room = ((size_t)size + 3) / 4 * 4;
        void *bytes = malloc(room);
        if (!bytes || fread(bytes, 1, room, f) != room) return 3;
        random_state = size;
        run_all(bytes, size, (uint32_t)strtoul(argv[2], NULL, 10));
        free(bytes);
    }
    fclose(f);
    return 0;
}
