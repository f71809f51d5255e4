/* The app on Zephyr: the serial port that the board calls zephyr,console is the line. */
#include "ac_app.h"
#include "ac_project.h"

#include <zephyr/device.h>
#include <zephyr/drivers/uart.h>
#include <zephyr/kernel.h>
#include <zephyr/sys/reboot.h>
#include <zephyr/sys/ring_buffer.h>

enum { RECEIVE_BYTES = 2048 };

static const struct device *const line = DEVICE_DT_GET(DT_CHOSEN(zephyr_console));
RING_BUF_DECLARE(received, RECEIVE_BYTES);

static ac_app app;
static uint32_t state[AC_PROJECT_STATE_BYTES / 4], arena[AC_PROJECT_ARENA_BYTES / 4];
#if AC_PROJECT_SLOT_BYTES
static uint32_t slot[AC_PROJECT_SLOT_BYTES / 4];
#endif

static void on_interrupt(const struct device *device, void *user) {
    uint8_t bytes[32];
    (void)user;
    while (uart_irq_update(device) && uart_irq_rx_ready(device)) {
        int n = uart_fifo_read(device, bytes, sizeof bytes);
        if (n <= 0) break;
        ring_buf_put(&received, bytes, (uint32_t)n);
    }
}

static int line_read(void *user, uint8_t *bytes, int max) {
    (void)user;
    return (int)ring_buf_get(&received, bytes, (uint32_t)max);
}

static int line_write(void *user, const uint8_t *bytes, int n) {
    (void)user;
    for (int i = 0; i < n; i++) uart_poll_out(line, bytes[i]);
    return n;
}

static uint32_t counter(void *user) {
    (void)user;
    return k_cycle_get_32();
}

static const ac_board board = {
    .read = line_read, .write = line_write, .counter = counter, .receive_bytes = RECEIVE_BYTES};

int main(void) {
    if (!device_is_ready(line)) return -1;
    uart_irq_callback_user_data_set(line, on_interrupt, NULL);
    uart_irq_rx_enable(line);
    ac_app_init(&app, &board, ac_project_program, AC_PROJECT_PROGRAM_BYTES, state, sizeof state, arena, sizeof arena);
#if AC_PROJECT_SLOT_BYTES
    ac_app_slot(&app, slot, sizeof slot);
#endif
    for (;;) {
        int done = ac_app_poll(&app);
        if (done < 0) sys_reboot(SYS_REBOOT_COLD);
        if (done == 0) k_yield();
    }
}
