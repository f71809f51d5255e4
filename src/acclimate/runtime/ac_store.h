/* What was learned, in a board's flash: slots that hold one delta each, of which a power cut can spoil only the one
 * being written. docs/format.md has the bytes; Python's acclimate.store reads an image of the same flash.
 *
 *     ac_store store;
 *     ac_store_open(&store, &flash, 2);                                     // after ac_load and ac_reset
 *     ac_store_load(&store, &program, &memory, arena, sizeof arena, NULL);   // AC_E_EMPTY: nothing was kept yet
 *     ... learn ...
 *     ac_store_save(&store, &program, &memory, 0);
 *
 * A save erases and writes another slot than the one that was loaded or saved last, and the last thing that it writes
 * makes the slot valid: whenever power goes, the next ac_store_load finds the old state or the new one. It only reads,
 * so power may go again. The slot to be written is one that is of no use, or else the oldest, so wear spreads evenly.
 *
 * No unit of the flash is programmed twice between two erases, so flash with error correction will do.
 */
#ifndef ACCLIMATE_STORE_H
#define ACCLIMATE_STORE_H

#include "acclimate.h"

#ifdef __cplusplus
extern "C" {
#endif
#ifdef AC_EXPORT
#pragma GCC visibility push(default)
#endif

#define AC_STORE_FORMAT 1
#define AC_STORE_SLOTS 8  /* at most */
#define AC_STORE_UNIT 256 /* write_bytes, at most */

/* The part of the board's flash that is for this. Addresses start at its first byte. Its functions return 0, or
 * anything else where they failed. NOR: `erase` sets a page to 0xFF, `program` can only clear bits. */
typedef struct {
    void *argument; /* passed to the functions */
    int (*read)(void *argument, uint32_t address, void *to, uint32_t bytes);
    int (*erase)(void *argument, uint32_t page);
    int (*program)(void *argument, uint32_t address, const void *from,
                   uint32_t bytes); /* whole units */
    const void *mapped;   /* where the processor sees it as memory; NULL: only through `read` */
    uint32_t page_bytes;  /* what `erase` takes at once: a multiple of write_bytes */
    uint32_t write_bytes; /* the unit of `program`: a power of two */
    uint32_t pages;
} ac_flash;

/* Owned by the caller, as the flash is, which must stay where it is. */
typedef struct {
    const ac_flash *flash;
    uint32_t slots, slot_bytes;
    uint32_t current; /* the slot that was loaded or saved last; `slots` for none */
    ac_status
        refused; /* of the last load: why the newest slot that it passed over was refused; AC_OK: none was */
} ac_store;

/* What a slot's header says, for as much of it as could be read. */
typedef struct {
    uint32_t sequence, bytes, model; /* of the delta, which starts at `address` */
    uint32_t address;
    uint32_t erases
        [AC_STORE_SLOTS]; /* of each slot's first page; its other pages have as many or fewer */
} ac_slot;

/* Share the pages evenly among 2 to AC_STORE_SLOTS slots. Nothing is read or written. AC_E_ROOM: a size that cannot
 * be, or slots without room for an empty delta. */
ac_status ac_store_open(ac_store *store, const ac_flash *flash, uint32_t slots);

/* Check one slot. AC_OK: it holds a whole delta; AC_E_EMPTY: erased; AC_E_MAGIC: something else; AC_E_VERSION: another
 * format; AC_E_OFFSET: written for another division of the flash; AC_E_TRUNCATED: its save was cut off;
 * AC_E_CHECKSUM: bytes were changed; AC_E_RETIRED: rolled back; AC_E_FLASH. */
ac_status ac_store_slot(const ac_store *store, uint32_t index, ac_slot *slot);

/* Take up the newest slot whose delta fits the Program, as ac_delta_load does. `scratch`: room for the delta, such as
 * the arena, which is free between runs; not used where the flash is mapped. AC_E_EMPTY: no slot holds anything; else
 * the status of the newest one, if none fits; on any error the state is as it was. */
ac_status ac_store_load(ac_store *store, const ac_program *program, const ac_memory *memory,
                        void *scratch, size_t scratch_bytes, uint32_t *pending);

/* Keep what was learned, as ac_delta_save does. On any error the slot that was valid still is. AC_E_ROOM: the delta
 * is larger than a slot, and nothing was touched; AC_E_FLASH: erasing or writing failed, or what is read back differs. */
ac_status ac_store_save(ac_store *store, const ac_program *program, const ac_memory *memory,
                        uint32_t pending);

/* Give up the slot that was loaded or saved last, for good, and take up the one before it. AC_E_EMPTY or another status
 * of ac_store_load: there is no other, and the state is the model's as it was trained. AC_E_FLASH: nothing changed. */
ac_status ac_store_rollback(ac_store *store, const ac_program *program, const ac_memory *memory,
                            void *scratch, size_t scratch_bytes, uint32_t *pending);

/* Erases of the most worn page, as far as they were counted: those of saves that were cut off while erasing are not. */
uint32_t ac_store_wear(const ac_store *store);

/* Stack of each of these: under 2 KiB, what it calls of acclimate.h included. */

#ifdef AC_EXPORT
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
