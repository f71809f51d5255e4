/* Power cuts at every byte of a save, on a simulated NOR flash; built with sanitizers by test_store.py.
 *
 *     power PROGRAM PAGE_BYTES WRITE_BYTES PAGES SLOTS MAPPED PAIRS
 *
 * The flash counts steps: one for each byte of `program`, ERASE_STEPS for each page of `erase`. A cut at step k does
 * what went before, leaves the unit or page at hand as physics might (KINDS ways), and fails every call from then on;
 * then the board boots again from what is in flash. Every k of a first save, of a save over older ones and of a
 * rollback is tried, and with PAIRS every k of a second save after every k of the first. A boot must find the bytes
 * of the state before or of the state after, and nothing else. Prints a JSON summary; a finding ends with status 1. */
#include "ac_store.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ERASE_STEPS = 6, KINDS = 4, MAX_PROGRAM = 1 << 20, NEVER = INT32_MAX };

static struct {
    uint8_t *bytes;
    uint32_t size, *erases;
    int32_t left; /* steps until the power goes */
    int kind, off;
} flash;

static uint32_t chance;

static uint8_t noise(void) {
    chance = chance * 1664525u + 1013904223u;
    return (uint8_t)(chance >> 24);
}

static void finding(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "FINDING: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static const ac_flash *geometry;

static int read_flash(void *argument, uint32_t address, void *to, uint32_t bytes) {
    (void)argument;
    if (address > flash.size || bytes > flash.size - address)
        finding("read beyond the flash");
    if (flash.off)
        return 1;
    memcpy(to, flash.bytes + address, bytes);
    return 0;
}

static int erase_flash(void *argument, uint32_t page) {
    (void)argument;
    if (page >= geometry->pages)
        finding("erase beyond the flash");
    if (flash.off)
        return 1;
    const uint32_t size = geometry->page_bytes;
    uint8_t *at = flash.bytes + (size_t)page * size;
    flash.erases[page]++;
    if (flash.left >= ERASE_STEPS) {
        flash.left -= ERASE_STEPS;
        memset(at, 0xFF, size);
        return 0;
    }
    for (uint32_t i = 0; i < size;
         i++) { /* step 0: untouched; the last: erased, but nobody was told */
        int far = flash.left * (int)size / (ERASE_STEPS - 1) > (int)i;
        switch (flash.left == 0 ? -1 : flash.left == ERASE_STEPS - 1 ? -2 : flash.kind) {
        case -1:
            break;
        case -2:
            at[i] = 0xFF;
            break;
        case 0:
            at[i] |= noise();
            break;
        case 1:
            at[i] = noise();
            break;
        case 2:
            at[i] = far ? 0xFF : at[i];
            break;
        default:
            at[i] = far ? 0xFF : noise();
            break;
        }
    }
    flash.off = 1;
    return 1;
}

static int program_flash(void *argument, uint32_t address, const void *from, uint32_t bytes) {
    (void)argument;
    const uint32_t unit = geometry->write_bytes;
    if (address > flash.size || bytes > flash.size - address)
        finding("program beyond the flash");
    if (address % unit || bytes % unit || !bytes)
        finding("%u bytes at %u are not whole units", bytes, address);
    if (flash.off)
        return 1;
    for (uint32_t i = 0; i < bytes; i++)
        if (flash.bytes[address + i] != 0xFF)
            finding("unit at %u is programmed twice", address + i);
    for (uint32_t i = 0; i < bytes; i++) {
        uint8_t *at = flash.bytes + address + i, wanted = ((const uint8_t *)from)[i];
        if (flash.left-- > 0) {
            *at &= wanted;
            continue;
        }
        const uint32_t rest = unit - i % unit; /* of the unit, whose bytes are written at once */
        for (uint32_t k = 0; k < rest; k++)
            switch (flash.kind) {
            case 0:
                at[k] &= k ? 0xFF : (uint8_t)(wanted | noise());
                break;
            case 1:
                at[k] &= (uint8_t)(((const uint8_t *)from)[i + k] | noise());
                break;
            case 2:
                at[k] &= noise();
                break;
            default:
                break;
            }
        flash.off = 1;
        return 1;
    }
    return 0;
}

/* ---- a board ----------------------------------------------------------------------------------------------------- */

static ac_program program;
static ac_memory memory;
static ac_store store;
static uint8_t *scratch;
static uint32_t scratch_bytes;

/* States that are told apart: number n changes every tensor that learns; 0 is the model as it was trained. */
static void learned(uint32_t n) {
    ac_entry state;
    ac_binding b;
    if (ac_reset(&program, &memory) != AC_OK || ac_find_entry(&program, "state", &state) != AC_OK)
        finding("no state");
    for (uint32_t i = state.first_binding; n && i < state.end_binding; i++) {
        if (ac_binding_at(&program, i, &b) != AC_OK || b.tensor->area != AC_STATE)
            continue;
        uint8_t *at = ac_address(&program, &memory, b.tensor);
        for (uint32_t k = 0; k < b.tensor->size; k++) {
            float value = (float)n + 0.25f * (float)k;
            if (b.tensor->dtype == AC_F32)
                memcpy(at + 4 * k, &value, 4);
            else if (b.tensor->dtype == AC_I32)
                memcpy(at + 4 * k, &n, 4);
            else if (b.tensor->dtype == AC_I8)
                at[k] = (uint8_t)(n + k);
        }
    }
}

static uint8_t *known[6]; /* the bytes of each state */

static int which(void) {
    for (int n = 0; n < 6; n++)
        if (memcmp(known[n], memory.state, program.state_bytes) == 0)
            return n;
    return -1;
}

/* Power comes: nothing is known but the flash. The number of the state that is found; -1: another one. */
static int boot(uint32_t slots) {
    uint32_t pending = 99;
    flash.off = 0;
    flash.left = NEVER;
    memset(memory.state, 0xEE, program.state_bytes);
    memset(&store, 0xEE, sizeof store);
    if (ac_reset(&program, &memory) != AC_OK || ac_store_open(&store, geometry, slots) != AC_OK)
        finding("cannot open");
    ac_status status = ac_store_load(&store, &program, &memory, scratch, scratch_bytes, &pending);
    if (status != AC_OK && which() != 0)
        finding("a refused load (%s) changed the state", ac_status_text(status));
    return which();
}

static void save(uint32_t n, int32_t cut, int kind) {
    flash.left = cut;
    flash.kind = kind;
    learned(n);
    ac_status status = ac_store_save(&store, &program, &memory, 0);
    if (status != (flash.off ? AC_E_FLASH : AC_OK))
        finding("a save says %s", ac_status_text(status));
    if (status == AC_OK && cut == NEVER && which() != (int)n)
        finding("a save changed the state");
}

typedef struct {
    uint8_t *bytes;
    uint32_t *erases;
} snapshot;

static snapshot keep(void) {
    snapshot s = {malloc(flash.size), malloc(4 * geometry->pages)};
    memcpy(s.bytes, flash.bytes, flash.size);
    memcpy(s.erases, flash.erases, 4 * geometry->pages);
    return s;
}

static void put_back(snapshot s) {
    memcpy(flash.bytes, s.bytes, flash.size);
    memcpy(flash.erases, s.erases, 4 * geometry->pages);
}

static void drop(snapshot s) {
    free(s.bytes);
    free(s.erases);
}

/* Wear that was counted: never more than there was, and at most `lost` less. */
static void check_wear(uint32_t lost) {
    uint32_t most = 0;
    for (uint32_t i = 0; i < geometry->pages; i++)
        most = flash.erases[i] > most ? flash.erases[i] : most;
    uint32_t counted = ac_store_wear(&store);
    if (counted > most || counted + lost < most)
        finding("wear is %u, counted as %u", most, counted);
}

static struct {
    uint64_t cuts, pairs, old, newer, rollbacks;
} total;

/* Steps of a save of state n from this image. */
static int32_t steps_of(snapshot from, uint32_t slots, uint32_t n) {
    put_back(from);
    boot(slots);
    save(n, NEVER, 0);
    return NEVER - flash.left;
}

/* Every cut of a save of state n over state `before`; with `pairs`, every cut of the save that follows. */
static void every_cut(snapshot from, uint32_t slots, uint32_t n, int before, int pairs) {
    const int32_t steps = steps_of(from, slots, n);
    for (int32_t k = 0; k <= steps; k++)
        for (int kind = 0; kind < KINDS; kind++) {
            put_back(from);
            if (boot(slots) != before)
                finding("the image does not hold state %d", before);
            save(n, k, kind);
            if (k == steps ? flash.off : !flash.off)
                finding("cut %d of %d did not happen", k, steps);
            int found = boot(slots);
            if (found != before && found != (int)n)
                finding("cut %d, kind %d of state %u: found %d", k, kind, n, found);
            if (k == steps && found != (int)n)
                finding("state %u was kept, found %d", n, found);
            if (boot(slots) != found)
                finding("a second boot finds another state");
            total.cuts++;
            found == (int)n ? total.newer++ : total.old++;
            check_wear(1);
            snapshot after = keep();
            save(n + 1, NEVER, 0); /* learning goes on */
            if (boot(slots) != (int)n + 1)
                finding("after cut %d, kind %d: a save is lost", k, kind);
            check_wear(1);
            const int32_t again = pairs ? steps_of(after, slots, n + 1) : -1;
            for (int32_t j = 0; j <= again; j++) {
                put_back(after);
                if (boot(slots) != found)
                    finding("an image changed");
                save(n + 1, j, (kind + j) % KINDS);
                int second = boot(slots);
                if (second != found && second != (int)n + 1)
                    finding("cuts %d and %d: found %d", k, j, second);
                total.pairs++;
            }
            drop(after);
        }
}

/* Every cut of a rollback from state `now` to state `before`. */
static void every_cut_of_rollback(snapshot from, uint32_t slots, int now, int before) {
    for (int kind = 0; kind < KINDS; kind++)
        for (int32_t k = 0;; k++) {
            put_back(from);
            if (boot(slots) != now)
                finding("the image does not hold state %d", now);
            flash.left = k;
            flash.kind = kind;
            ac_status status =
                ac_store_rollback(&store, &program, &memory, scratch, scratch_bytes, NULL);
            int cut = flash.off;
            if (cut && (status != AC_E_FLASH || which() != now))
                finding("a rollback says %s", ac_status_text(status));
            if (!cut && which() != before)
                finding("a rollback ends in state %d", which());
            int found = boot(slots);
            if (found != before && (found != now || !cut))
                finding("rollback cut at %d: found %d", k, found);
            total.rollbacks++;
            save(5, NEVER, 0);
            if (boot(slots) != 5)
                finding("a save after a rollback is lost");
            if (!cut)
                break;
        }
}

int main(int argc, char **argv) {
    static uint32_t raw[MAX_PROGRAM / 4];
    if (argc != 8)
        return 2;
    FILE *f = fopen(argv[1], "rb");
    size_t size = f ? fread(raw, 1, sizeof raw, f) : 0;
    if (f)
        fclose(f);
    if (ac_load(&program, raw, size) != AC_OK)
        return 2;
    ac_flash g = {NULL, read_flash, erase_flash, program_flash, NULL, 0, 0, 0};
    g.page_bytes = (uint32_t)atoi(argv[2]);
    g.write_bytes = (uint32_t)atoi(argv[3]);
    g.pages = (uint32_t)atoi(argv[4]);
    const uint32_t slots = (uint32_t)atoi(argv[5]);
    const int pairs = atoi(argv[7]);
    geometry = &g;
    flash.size = g.page_bytes * g.pages;
    flash.bytes = malloc(flash.size);
    flash.erases = calloc(g.pages, 4);
    if (atoi(argv[6]))
        g.mapped = flash.bytes;
    memory.state = malloc(program.state_bytes + 4);
    memory.arena = memory.state;
    for (uint32_t n = 0; n < 6; n++) {
        learned(n);
        known[n] = malloc(program.state_bytes);
        memcpy(known[n], memory.state, program.state_bytes);
    }
    if (ac_delta_save(&program, &memory, 0, NULL, NULL, &scratch_bytes) != AC_OK)
        return 2;
    scratch = malloc(scratch_bytes); /* not a byte too many */

    memset(flash.bytes, 0xFF, flash.size);
    snapshot blank = keep();
    every_cut(blank, slots, 1, 0, 0);
    for (uint32_t i = 0; i < flash.size; i++)
        flash.bytes[i] = noise(); /* as a factory may leave it */
    memset(flash.erases, 0, 4 * g.pages);
    snapshot garbage = keep();
    every_cut(garbage, slots, 1, 0, 0);

    put_back(blank);
    boot(slots);
    for (uint32_t n = 1; n <= slots; n++)
        save(n > 2 ? 2 : n, NEVER, 0); /* every slot is taken */
    check_wear(0);
    snapshot full = keep();
    every_cut(full, slots, 3, 2, pairs);
    if (slots == 2)
        every_cut_of_rollback(full, slots, 2, 1);

    put_back(full); /* many saves: the first pages of all slots wear alike */
    boot(slots);
    for (uint32_t i = 0; i < 20 * slots; i++)
        save(1 + i % 5, NEVER, 0);
    check_wear(0);
    for (uint32_t i = 1; i < slots; i++)
        if (flash.erases[i * (store.slot_bytes / g.page_bytes)] != flash.erases[0])
            finding("slots do not wear alike");
    printf("{\"cuts\": %llu, \"pairs\": %llu, \"rollbacks\": %llu, \"old\": %llu, \"new\": %llu}\n",
           (unsigned long long)total.cuts, (unsigned long long)total.pairs,
           (unsigned long long)total.rollbacks, (unsigned long long)total.old,
           (unsigned long long)total.newer);
    drop(blank);
    drop(garbage);
    drop(full);
    for (int n = 0; n < 6; n++)
        free(known[n]);
    free(flash.bytes);
    free(flash.erases);
    free(memory.state);
    free(scratch);
    return 0;
}
