/* The firmware of a board: memory blocks of exactly the Program's sizes, and the loop. */
#include "ac_app.h"
#include "ac_project.h"

static ac_app app;
static uint32_t state[AC_PROJECT_STATE_BYTES / 4], arena[AC_PROJECT_ARENA_BYTES / 4];
#if AC_PROJECT_SLOT_BYTES
static uint32_t slot[AC_PROJECT_SLOT_BYTES / 4];
#endif

int main(void) {
    const ac_board *board = ac_board_open();
    ac_app_init(&app, board, ac_project_program, AC_PROJECT_PROGRAM_BYTES, state, AC_PROJECT_STATE_BYTES, arena,
                AC_PROJECT_ARENA_BYTES);
#if AC_PROJECT_SLOT_BYTES
    ac_app_slot(&app, slot, sizeof slot);
#endif
    for (;;)
        if (ac_app_poll(&app) < 0) ac_board_restart();
}
