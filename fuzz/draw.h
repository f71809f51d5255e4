/* Random numbers that both harnesses draw from: a finding is named by its seed. */
#ifndef DRAW_H
#define DRAW_H

#include <stdint.h>

static uint64_t random_state;

static uint32_t any(void) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(random_state * 0x2545F4914F6CDD1Dull >> 32);
}

static uint32_t below(uint32_t n) { return (uint32_t)((uint64_t)any() * n >> 32); }

#endif
