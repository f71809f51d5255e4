#include <stdint.h>
uint32_t k_cycle_get_32(void);
void k_yield(void);
