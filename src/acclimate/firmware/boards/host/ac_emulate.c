/* Runs on the host, inside the emulator: counts instructions, and is the board's serial port and its clock.
 *
 * A block is known by its address in flash; how many instructions it has is decoded once. Each count goes to the total,
 * to the block's place in flash (a profile of functions), and to the op that runs. An op starts where the interpreter
 * (ac_run_range) has just been left for the first instruction of a kernel.
 */
#include <stdint.h>

enum { INTERPRETER = 1, KERNEL = 2 };
enum { GOES_ON, WAITS_FOR_BYTES, WANTS_RESET, RAN_TOO_LONG, SAID_MUCH, LOST_POWER }; /* why the emulator was stopped */

typedef struct {
    uint64_t total, limit;
    const uint8_t *code; /* bytes of flash, host address */
    uint64_t base;       /* where they lie on the board */
    uint64_t bytes;
    uint32_t *known;       /* of each place (two bytes): size of the block << 16 | its instructions, 0: not yet */
    const uint8_t *marks;  /* of each place: INTERPRETER or KERNEL */
    uint64_t *by_place;    /* instructions of blocks that start there */
    uint64_t *by_op;       /* [0]: before the first op */
    uint64_t ops, op, left; /* room in by_op; the op that runs; whether the last block was the interpreter's */
    uint64_t is_thumb;
    uint64_t why; /* it shall stop, before the next block */
    int (*stop)(void *engine);
    /* the serial port */
    const uint8_t *in;
    uint64_t in_at, in_end;
    uint8_t *out;
    uint64_t out_end, out_room, polls; /* polls: in a row for bytes that are not there */
    /* NOR flash for what was learned */
    uint8_t *kept;
    uint64_t kept_bytes, kept_at;                 /* where a word is programmed next */
    uint32_t *erases;                             /* of each page */
    uint64_t operations, power_until, torn_state; /* power is lost in that operation, 0: never; random numbers for it */
} ac_watch;

enum { POLLS = 2 };

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
    if (w->why) { /* the block runs, and is counted, when the emulator goes on */
        w->stop(engine);
        return;
    }
    if (address < w->base || at + size > w->bytes) return;
    const uint64_t place = at / 2;
    if (w->known[place] >> 16 != size) w->known[place] = size << 16 | instructions(w, at, size);
    const uint32_t count = w->known[place] & 0xFFFFu;
    if (w->left && w->marks[place] == KERNEL && w->op + 1 < w->ops) w->op++;
    w->left = w->marks[place] == INTERPRETER;
    w->total += count;
    w->by_place[place] += count;
    w->by_op[w->op] += count;
    if (w->total > w->limit) w->why = RAN_TOO_LONG;
}

static uint32_t take(ac_watch *w) { return w->in_at < w->in_end ? w->in[w->in_at++] : 0; }

static uint32_t is_waiting(ac_watch *w) {
    if (w->in_at < w->in_end) {
        w->polls = 0;
        return 1;
    }
    if (++w->polls >= POLLS) w->why = WAITS_FOR_BYTES;
    return 0;
}

static void give(ac_watch *w, uint64_t byte) {
    w->polls = 0; /* the state was read for this */
    if (w->out_end < w->out_room) w->out[w->out_end++] = (uint8_t)byte;
    if (w->out_end + 64 > w->out_room && !w->why) w->why = SAID_MUCH; /* a block has fewer stores left than that */
}

/* CMSDK UART of Arm's MPS boards: data at 0, state at 4 (bit 1: a byte waits; never full). */
uint64_t ac_uart_read(void *engine, uint64_t offset, unsigned size, void *user) {
    (void)engine, (void)size;
    return offset == 0 ? take(user) : offset == 4 ? is_waiting(user) << 1 : 0;
}

void ac_uart_write(void *engine, uint64_t offset, unsigned size, uint64_t value, void *user) {
    (void)engine, (void)size;
    if (offset == 0) give(user, value);
}

/* 16550 of RISC-V's virt board: data at 0, state at 5 (bit 0: a byte waits; bits 5 and 6: never full). */
uint64_t ac_16550_read(void *engine, uint64_t offset, unsigned size, void *user) {
    (void)engine, (void)size;
    return offset == 0 ? take(user) : offset == 5 ? is_waiting(user) | 0x60 : 0;
}

void ac_16550_write(void *engine, uint64_t offset, unsigned size, uint64_t value, void *user) {
    ac_uart_write(engine, offset, size, value, user);
}

/* The controller of ac_board_flash.h, 0x800 behind other registers. Erasing sets bits and programming clears them; an
 * operation in which power is lost does so to some of them. */
enum { FLASH = 0x800, FLASH_PAGE = 4096 };

static uint32_t torn(ac_watch *w) {
    w->torn_state = w->torn_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(w->torn_state >> 33) ^ (uint32_t)(w->torn_state >> 12);
}

static void change(ac_watch *w, uint64_t at, uint64_t bytes, uint32_t word, int set) {
    if (w->why == LOST_POWER || at % 4 || at > w->kept_bytes || bytes > w->kept_bytes - at) return;
    const int whole = ++w->operations != w->power_until;
    if (set) w->erases[at / FLASH_PAGE]++;
    for (uint64_t i = 0; i < bytes; i++) {
        const uint8_t byte = (uint8_t)(word >> i % 4 * 8), random = whole ? 0 : (uint8_t)torn(w);
        if (set) w->kept[at + i] |= byte & (uint8_t)~random;
        else w->kept[at + i] &= byte | random;
    }
    if (!whole) w->why = LOST_POWER;
}

static uint64_t flash_read(uint64_t offset) { return offset == FLASH ? 0x4C464341u : 0; }

static void flash_write(ac_watch *w, uint64_t offset, uint64_t value) {
    if (offset == FLASH + 4) w->kept_at = value;
    if (offset == FLASH + 8) {
        change(w, w->kept_at, 4, (uint32_t)value, 0);
        w->kept_at += 4;
    }
    if (offset == FLASH + 12) change(w, value * FLASH_PAGE, FLASH_PAGE, 0xFFFFFFFFu, 1);
}

/* CMSDK timer: value at 4, counting down; here an instruction each. */
uint64_t ac_timer_read(void *engine, uint64_t offset, unsigned size, void *user) {
    (void)engine, (void)size;
    if (offset >= FLASH) return flash_read(offset);
    return offset == 4 ? 0xFFFFFFFFu - (uint32_t)((ac_watch *)user)->total : 0;
}

void ac_timer_write(void *engine, uint64_t offset, unsigned size, uint64_t value, void *user) {
    (void)engine, (void)size;
    flash_write(user, offset, value);
}

/* CLINT of virt: mtime at 0xBFF8 of its block, mapped from 0xB000 on; here an instruction each. */
uint64_t ac_clint_read(void *engine, uint64_t offset, unsigned size, void *user) {
    const uint64_t total = ((ac_watch *)user)->total;
    (void)engine, (void)size;
    return offset == 0xFF8 ? (uint32_t)total : offset == 0xFFC ? total >> 32 : 0;
}

/* System control of a Cortex-M: a reset is asked for by 0x05FA0004 at 0xD0C. */
void ac_control_write(void *engine, uint64_t offset, unsigned size, uint64_t value, void *user) {
    (void)engine, (void)size;
    if (offset == 0xD0C && (value & 0xFFFF0004u) == 0x05FA0004u) ((ac_watch *)user)->why = WANTS_RESET;
}

/* The test device of virt: 0x7777 asks for a reset. */
uint64_t ac_finisher_read(void *engine, uint64_t offset, unsigned size, void *user) {
    (void)engine, (void)size, (void)user;
    return flash_read(offset);
}

void ac_finisher_write(void *engine, uint64_t offset, unsigned size, uint64_t value, void *user) {
    (void)engine, (void)size;
    if (offset == 0 && (value & 0xFFFFu) == 0x7777u) ((ac_watch *)user)->why = WANTS_RESET;
    flash_write(user, offset, value);
}

uint64_t ac_nothing_read(void *engine, uint64_t offset, unsigned size, void *user) {
    (void)engine, (void)offset, (void)size, (void)user;
    return 0;
}

void ac_nothing_write(void *engine, uint64_t offset, unsigned size, uint64_t value, void *user) {
    (void)engine, (void)offset, (void)size, (void)value, (void)user;
}
