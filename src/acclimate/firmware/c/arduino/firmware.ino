// The app on the board's serial port; acclimate.firmware.link.Board is the other end.
#include <ac_app.h>
#include <ac_project.h>

static ac_app app;
static uint32_t state[AC_PROJECT_STATE_BYTES / 4], arena[AC_PROJECT_ARENA_BYTES / 4];
#if AC_PROJECT_SLOT_BYTES
static uint32_t slot[AC_PROJECT_SLOT_BYTES / 4];
#endif

static int serial_read(void *, uint8_t *bytes, int max) {
    int n = 0;
    while (n < max && Serial.available() > 0) bytes[n++] = (uint8_t)Serial.read();
    return n;
}

static int serial_write(void *, const uint8_t *bytes, int n) { return (int)Serial.write(bytes, (size_t)n); }

static uint32_t microseconds(void *) { return (uint32_t)micros(); }

static ac_board board;

void setup() {
    Serial.begin(115200);
    board.read = serial_read;
    board.write = serial_write;
    board.counter = microseconds;
    board.receive_bytes = 64;  // what cores keep at least; a message at a time is under way then
    ac_app_init(&app, &board, ac_project_program, AC_PROJECT_PROGRAM_BYTES, state, sizeof state, arena, sizeof arena);
#if AC_PROJECT_SLOT_BYTES
    ac_app_slot(&app, slot, sizeof slot);
#endif
}

void loop() {
    if (ac_app_poll(&app) < 0) setup();
}
