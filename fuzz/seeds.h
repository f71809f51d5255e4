/* Pairs of a Program and a delta of it, as the tests write them to a file: records of a size and its bytes, in whole words. */
#ifndef SEEDS_H
#define SEEDS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_PAIRS = 256 };

typedef struct {
    uint8_t *program, *delta;
    size_t program_size, delta_size;
} seeds;

static seeds pair[MAX_PAIRS];

static uint32_t read_pairs(const char *path) {
    FILE *f = fopen(path, "rb");
    uint32_t n = 0, size;
    for (; f && n < 2 * MAX_PAIRS && fread(&size, 4, 1, f) == 1; n++) {
        size_t room = ((size_t)size + 3) / 4 * 4;
        uint8_t *bytes = malloc(room + 4);
        if (fread(bytes, 1, room, f) != room) return 0;
        if (n % 2) pair[n / 2].delta = bytes, pair[n / 2].delta_size = size;
        else pair[n / 2].program = bytes, pair[n / 2].program_size = size;
    }
    if (f) fclose(f);
    return n / 2;
}

#endif
