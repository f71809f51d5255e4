#include <stdint.h>
typedef void *TaskHandle_t;
uint32_t uxTaskGetStackHighWaterMark(TaskHandle_t task);
void vTaskDelay(uint32_t ticks);
