// What firmware.ino uses of Arduino's core, as its reference declares it.
#include <stddef.h>
#include <stdint.h>
struct Stream {
    void begin(unsigned long baud);
    int available();
    int read();
    size_t write(const uint8_t *bytes, size_t size);
};
extern Stream Serial;
unsigned long micros();
