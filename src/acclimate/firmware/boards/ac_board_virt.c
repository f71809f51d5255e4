/* Start-up and machine layer of RISC-V's virt board, as QEMU and `acclimate emulate` have it.
 *
 * For another board keep _start, and give ac_board_open a serial port and a counter of its own. Where things lie says
 * the linker script; RAM starts with the stack, so that one which grows too far leaves RAM.
 */
#define UART 0x10000000u     /* 16550 */
#define MTIME 0x0200BFF8u    /* CLINT */
#define FINISHER 0x00100000u /* of virt alone: ends or restarts the emulator */
#define AC_FLASH (FINISHER + 0x800u) /* nothing there but in the emulator */
#define BYTE(address) (*(volatile uint8_t *)(uintptr_t)(address))
#define WORD(address) (*(volatile uint32_t *)(uintptr_t)(address))
#define PAINT 0xA5A5A5A5u

#include "ac_board_flash.h"

extern uint32_t ac_stack_bottom[], ac_stack_top[], ac_data_from[], ac_data_start[], ac_data_end[], ac_bss_start[],
    ac_bss_end[];
int main(void);
void ac_start(void);
void ac_fault(void);

__asm__(".section .vectors, \"ax\"\n.globl _start\n_start:\n"
        "  la sp, ac_stack_top\n  la t0, ac_fault\n  csrw mtvec, t0\n  j ac_start\n.text\n");

__attribute__((aligned(4), used)) void ac_fault(void) {
    WORD(FINISHER) = 70u << 16 | 0x3333u;
    for (;;) {
    }
}

/* Loops, not memcpy: nothing that it might call has its memory yet, and the stack below is painted. */
__attribute__((used)) void ac_start(void) {
    uint32_t *here = (uint32_t *)__builtin_frame_address(0) - 16;
    for (volatile uint32_t *p = ac_stack_bottom; p < here; p++) *p = PAINT;
    const uint32_t *from = ac_data_from;
    for (volatile uint32_t *p = ac_data_start; p < ac_data_end; p++) *p = *from++;
    for (volatile uint32_t *p = ac_bss_start; p < ac_bss_end; p++) *p = 0;
    main();
    ac_fault();
}

static int read(void *user, uint8_t *bytes, int max) {
    int n = 0;
    (void)user;
    while (n < max && (BYTE(UART + 5) & 1u)) bytes[n++] = BYTE(UART);
    return n;
}

static int write(void *user, const uint8_t *bytes, int n) {
    (void)user;
    for (int i = 0; i < n; i++) {
        while (!(BYTE(UART + 5) & 0x20u)) {
        }
        BYTE(UART) = bytes[i];
    }
    return n;
}

static uint32_t counter(void *user) {
    (void)user;
    return WORD(MTIME);
}

static uint32_t stack_used(void *user) {
    const uint32_t *p = ac_stack_bottom;
    (void)user;
    while (p < ac_stack_top && *p == PAINT) p++;
    return (uint32_t)((const uint8_t *)ac_stack_top - (const uint8_t *)p);
}

const ac_board *ac_board_open(void) {
    static ac_board board = {.read = read, .write = write, .counter = counter, .stack_used = stack_used,
                             .slots = AC_FLASH_SLOTS, .receive_bytes = 1u << 16};
    board.flash = flash_open();
    return &board;
}

void ac_board_restart(void) {
    WORD(FINISHER) = 0x7777u;
    for (;;) {
    }
}
