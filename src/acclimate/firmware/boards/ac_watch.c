/* Runs on the host, inside the emulator: counts the instructions of every block that the emulated processor runs.
 *
 * A block is known by its address in flash; how many instructions it has is decoded once. Each count goes to the total,
 * to the block's place in flash (a profile of functions), and to the op that runs. An op starts where the interpreter
 * (ac_run_range) has just been left for the first instruction of a kernel.
 */
#include <stdint.h>

enum { INTERPRETER = 1, KERNEL = 2 };

typedef struct {
    uint64_t total;
    const uint8_t *code; /* bytes of flash, host address */
    uint64_t base;       /* where they lie on the board */
    uint64_t bytes;
    uint32_t *known;       /* of each place (two bytes): size of the block << 16 | its instructions, 0: not yet */
    const uint8_t *marks;  /* of each place: INTERPRETER or KERNEL */
    uint64_t *by_place;    /* instructions of blocks that start there */
    uint64_t *by_op;       /* [0]: before the first op */
    uint64_t ops, op, left; /* room in by_op; the op that runs; whether the last block was the interpreter's */
    uint64_t is_thumb;
} ac_watch;

static uint32_t instructions(const ac_watch *w, uint64_t at, uint32_t size) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < size; count++) {
        const uint32_t low = w->code[at + i] | (uint32_t)w->code[at + i + 1] << 8;
        i += (w->is_thumb ? low >= 0xE800u : (low & 3) == 3) ? 4 : 2;
    }
    return count;
}

void ac_watch_block(void *engine, uint64_t address, uint32_t size, void *user) {
    ac_watch *w = user;
    const uint64_t at = address - w->base;
    (void)engine;
    if (address < w->base || at + size > w->bytes) return;
    const uint64_t place = at / 2;
    if (w->known[place] >> 16 != size) w->known[place] = size << 16 | instructions(w, at, size);
    const uint32_t count = w->known[place] & 0xFFFFu;
    if (w->left && w->marks[place] == KERNEL && w->op + 1 < w->ops) w->op++;
    w->left = w->marks[place] == INTERPRETER;
    w->total += count;
    w->by_place[place] += count;
    w->by_op[w->op] += count;
}
