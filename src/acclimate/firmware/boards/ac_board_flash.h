/* Flash of an emulated board, for what was learned: where it lies says the linker script, and it is erased and
 * programmed by a controller that `acclimate emulate` has in a page of registers, from AC_FLASH on. No real board has this
 * controller: for another board write these two functions by its manual. Reading needs none, flash is memory.
 */
#ifndef AC_BOARD_FLASH_H
#define AC_BOARD_FLASH_H

#include "ac_app.h"

enum { AC_FLASH_PAGE = 4096, AC_FLASH_UNIT = 4, AC_FLASH_SLOTS = 2 };

/* Registers: what the controller is, an address in this flash, a word that clears bits there, a page to be erased. */
#define AC_FLASH_REGISTER(i) (*(volatile uint32_t *)(uintptr_t)(AC_FLASH + 4u * (i)))
#define AC_FLASH_IS 0x4C464341u /* "ACFL" */

extern uint8_t ac_kept_start[], ac_kept_end[];

static int flash_read(void *user, uint32_t address, void *to, uint32_t bytes) {
    (void)user;
    for (uint32_t i = 0; i < bytes; i++) ((uint8_t *)to)[i] = ac_kept_start[address + i];
    return 0;
}

static int flash_erase(void *user, uint32_t page) {
    (void)user;
    AC_FLASH_REGISTER(3) = page;
    return 0;
}

static int flash_program(void *user, uint32_t address, const void *from, uint32_t bytes) {
    const uint8_t *p = from;
    (void)user;
    AC_FLASH_REGISTER(1) = address;
    for (uint32_t i = 0; i < bytes; i += 4)
        AC_FLASH_REGISTER(2) = p[i] | (uint32_t)p[i + 1] << 8 | (uint32_t)p[i + 2] << 16 | (uint32_t)p[i + 3] << 24;
    return 0;
}

/* NULL where the emulator has no such controller, or the linker script no flash for this. */
static const ac_flash *flash_open(void) {
    static ac_flash flash = {NULL, flash_read, flash_erase, flash_program, ac_kept_start, AC_FLASH_PAGE, AC_FLASH_UNIT, 0};
    if (AC_FLASH_REGISTER(0) != AC_FLASH_IS) return NULL;
    flash.pages = (uint32_t)((uintptr_t)ac_kept_end - (uintptr_t)ac_kept_start) / AC_FLASH_PAGE;
    return flash.pages ? &flash : NULL;
}

#endif
