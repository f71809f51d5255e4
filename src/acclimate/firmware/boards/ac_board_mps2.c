/* Start-up and machine layer of Arm's MPS boards, as QEMU and `acclimate emulate` have them: Cortex-M0+ to M55.
 *
 * For another board keep Reset_Handler, and give ac_board_open a serial port and a counter of its own. Where things lie
 * says the linker script; RAM starts with the stack, so that one which grows too far leaves RAM and faults.
 */
#ifndef AC_UART /* addresses of the CMSDK UART and of the timer */
#define AC_UART 0x40004000u
#endif
#ifndef AC_TIMER
#define AC_TIMER 0x40000000u
#endif
#define AC_FLASH (AC_TIMER + 0x800u) /* nothing there but in the emulator */

#include "ac_board_flash.h"

#define AT(address) (*(volatile uint32_t *)(uintptr_t)(address))
#define PAINT 0xA5A5A5A5u

extern uint32_t ac_stack_bottom[], ac_stack_top[], ac_data_from[], ac_data_start[], ac_data_end[], ac_bss_start[],
    ac_bss_end[];
int main(void);
void Reset_Handler(void);

/* No debugger, no operating system: an emulator is told to end by semihosting, a real board stays here. */
static void fault(void) {
    static const uint32_t reason[2] = {0x20026u /* ADP_Stopped_ApplicationExit */, 70};
    register uint32_t r0 __asm__("r0") = 0x20u; /* SYS_EXIT_EXTENDED */
    register const uint32_t *r1 __asm__("r1") = reason;
    __asm__ volatile("bkpt 0xAB" : : "r"(r0), "r"(r1) : "memory");
    for (;;) {
    }
}

typedef union {
    uint32_t *stack;
    void (*handler)(void);
} vector;

__attribute__((used, section(".vectors"))) static const vector vectors[16] = {
    {.stack = ac_stack_top}, {.handler = Reset_Handler}, {.handler = fault}, {.handler = fault},
    {.handler = fault},      {.handler = fault},         {.handler = fault}, {.handler = fault},
    {.handler = fault},      {.handler = fault},         {.handler = fault}, {.handler = fault},
    {.handler = fault},      {.handler = fault},         {.handler = fault}, {.handler = fault}};

/* Loops, not memcpy: nothing that it might call has its memory yet, and the stack below is painted. */
void Reset_Handler(void) {
#if defined(__ARM_FP)
    AT(0xE000ED88u) |= 0xFu << 20; /* the FPU, which also is MVE's */
    __asm__ volatile("dsb\n isb" : : : "memory");
#endif
    uint32_t *here = (uint32_t *)__builtin_frame_address(0) - 16;
    for (volatile uint32_t *p = ac_stack_bottom; p < here; p++) *p = PAINT;
    const uint32_t *from = ac_data_from;
    for (volatile uint32_t *p = ac_data_start; p < ac_data_end; p++) *p = *from++;
    for (volatile uint32_t *p = ac_bss_start; p < ac_bss_end; p++) *p = 0;
    main();
    fault();
}

static int read(void *user, uint8_t *bytes, int max) {
    int n = 0;
    (void)user;
    while (n < max && (AT(AC_UART + 4) & 2u)) bytes[n++] = (uint8_t)AT(AC_UART);
    return n;
}

static int write(void *user, const uint8_t *bytes, int n) {
    (void)user;
    for (int i = 0; i < n; i++) {
        while (AT(AC_UART + 4) & 1u) {
        }
        AT(AC_UART) = bytes[i];
    }
    return n;
}

static uint32_t counter(void *user) {
    (void)user;
#ifdef AC_SYSTEM_COUNTER /* the M55's board has no CMSDK timer: AC_TIMER reads its system counter */
    return AT(AC_TIMER + 8);
#else
    return 0xFFFFFFFFu - AT(AC_TIMER + 4);
#endif
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
    AT(AC_UART + 16) = 16; /* the fastest rate */
    AT(AC_UART + 8) = 3;   /* transmit, receive */
#ifdef AC_SYSTEM_COUNTER
    AT(AC_TIMER) = 1;
#else
    AT(AC_TIMER + 8) = 0xFFFFFFFFu;
    AT(AC_TIMER + 4) = 0xFFFFFFFFu;
    AT(AC_TIMER) = 1;
#endif
    board.flash = flash_open();
    return &board;
}

void ac_board_restart(void) {
    __asm__ volatile("dsb" : : : "memory");
    AT(0xE000ED0Cu) = 0x05FA0004u;
    for (;;) {
    }
}
