/* The app on ESP-IDF: the first serial port, which boards connect to USB, is the line. */
#include "ac_app.h"
#include "ac_project.h"

#include "driver/uart.h"
#include "esp_cpu.h"
#include "esp_system.h"
#include "freertos/FreeRTOS.h"
#include "freertos/task.h"

enum { RECEIVE_BYTES = 8192, BAUD = 115200 };

static ac_app app;
static uint32_t state[AC_PROJECT_STATE_BYTES / 4], arena[AC_PROJECT_ARENA_BYTES / 4];
#if AC_PROJECT_SLOT_BYTES
static uint32_t slot[AC_PROJECT_SLOT_BYTES / 4];
#endif

static int line_read(void *user, uint8_t *bytes, int max) {
    (void)user;
    return uart_read_bytes(UART_NUM_0, bytes, (uint32_t)max, 0);
}

static int line_write(void *user, const uint8_t *bytes, int n) {
    (void)user;
    return uart_write_bytes(UART_NUM_0, bytes, (size_t)n);
}

static uint32_t counter(void *user) {
    (void)user;
    return (uint32_t)esp_cpu_get_cycle_count();
}

/* FreeRTOS says how much was never used, in bytes here. */
static uint32_t stack_used(void *user) {
    (void)user;
    return (uint32_t)(CONFIG_ESP_MAIN_TASK_STACK_SIZE - uxTaskGetStackHighWaterMark(NULL));
}

static const ac_board board = {.read = line_read,
                               .write = line_write,
                               .counter = counter,
                               .stack_used = stack_used,
                               .receive_bytes = RECEIVE_BYTES};

void app_main(void) {
    const uart_config_t how = {.baud_rate = BAUD,
                               .data_bits = UART_DATA_8_BITS,
                               .parity = UART_PARITY_DISABLE,
                               .stop_bits = UART_STOP_BITS_1,
                               .flow_ctrl = UART_HW_FLOWCTRL_DISABLE};
    uart_driver_install(UART_NUM_0, RECEIVE_BYTES, 0, 0, NULL, 0);
    uart_param_config(UART_NUM_0, &how);
    ac_app_init(&app, &board, ac_project_program, AC_PROJECT_PROGRAM_BYTES, state, sizeof state, arena, sizeof arena);
#if AC_PROJECT_SLOT_BYTES
    ac_app_slot(&app, slot, sizeof slot);
#endif
    for (;;) {
        int done = ac_app_poll(&app);
        if (done < 0) esp_restart();
        if (done == 0) vTaskDelay(1);
    }
}
