/* What main.c uses of ESP-IDF's UART driver, as its reference declares it. */
#include <stddef.h>
#include <stdint.h>
typedef int uart_port_t;
typedef int esp_err_t;
typedef uint32_t TickType_t;
typedef struct {
    int baud_rate, data_bits, parity, stop_bits, flow_ctrl;
} uart_config_t;
enum { UART_NUM_0, UART_DATA_8_BITS = 3, UART_PARITY_DISABLE = 0, UART_STOP_BITS_1 = 1, UART_HW_FLOWCTRL_DISABLE = 0 };
esp_err_t uart_driver_install(uart_port_t port, int rx, int tx, int queue_size, void *queue, int flags);
esp_err_t uart_param_config(uart_port_t port, const uart_config_t *config);
int uart_read_bytes(uart_port_t port, void *to, uint32_t length, TickType_t wait);
int uart_write_bytes(uart_port_t port, const void *from, size_t size);
