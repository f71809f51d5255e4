#pragma once
/* What main.c uses of Zephyr, as its reference declares it. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
struct device {
    int unused;
};
extern const struct device zephyr_console_device;
#define DT_CHOSEN(name) name##_device
#define DEVICE_DT_GET(node) (&node)
bool device_is_ready(const struct device *dev);
