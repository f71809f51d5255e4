/* What the harnesses of deltas and of flash share: seeds, a command line, and findings that name their mutant.
 * Who includes it has try_mutant, which draws a mutant of a pair and tries it, and try_seed, which counts the pair as
 * it is in `total`; `scratch` has room for two times MAX_BYTES. */
#ifndef PAIRS_H
#define PAIRS_H

#include "acclimate.h"
#include "draw.h"
#include "seeds.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_BYTES = 1 << 18, HANG_SECONDS = 20 };

static struct {
    uint64_t seed, index;
    const char *save;
    const void *bytes;
    size_t size;
    int saved;
} now;

const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "abort_on_error=1:detect_leaks=1"; }
const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void) { return "abort_on_error=1:print_stacktrace=1"; }

static void write_mutant(void) {
    FILE *f = now.save ? fopen(now.save, "wb") : NULL;
    if (!f) return;
    fwrite(now.bytes, 1, now.size, f);
    fclose(f);
}

static void report_death(void) {
    if (now.saved++) return;
    fprintf(stderr, "FINDING: mutant %" PRIu64 " (--seed %" PRIu64 "); to see it again: --only %" PRIu64 "\n", now.index,
            now.seed, now.index);
    write_mutant();
}

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    report_death();
    exit(1);
}

static void on_signal(int number) {
    if (number == SIGALRM) fputs("a load does not end\n", stderr);
    report_death();
    _exit(1);
}

static uint32_t get(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static void set(uint8_t *p, uint32_t v) { memcpy(p, &v, 4); }

static uint32_t nudged(uint32_t v) {
    static const uint32_t words[] = {0, 1, 2, 255, 0xFFFF, 0x10000, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000,
                                     0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF};
    switch (below(6)) {
    case 0: return v + 1;
    case 1: return v - 1;
    case 2: return v ^ 1u << below(32);
    case 3: return below(8);
    case 4: return v * 2;
    default: return words[below(sizeof words / sizeof *words)];
    }
}

static struct {
    uint64_t mutants, accepted, changed, refused[AC_E_FLASH + 1];
} total;

static void try_mutant(const ac_program *p, const seeds *of, uint8_t *scratch);
static void try_seed(const ac_program *p, const seeds *of);

static void one_mutant(uint64_t index, uint32_t pairs, uint8_t *scratch) {
    ac_program p;
    now.index = index;
    random_state = (now.seed + 1) * 0x9E3779B97F4A7C15ull ^ (index + 1) * 0xD1B54A32D192ED03ull;
    for (int i = 0; i < 4; i++) any();
    uint32_t k = below(pairs);
    if (ac_load(&p, pair[k].program, pair[k].program_size) != AC_OK) fail("a seed's Program is refused");
    alarm(HANG_SECONDS);
    try_mutant(&p, pair + k, scratch);
}

int main(int argc, char **argv) {
    uint64_t count = UINT64_MAX;
    double seconds = 1e9, passed = 0;
    int64_t only = -1;
    struct timespec start, at;
    for (int i = 2; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--count")) count = strtoull(argv[i + 1], NULL, 10);
        if (!strcmp(argv[i], "--seconds")) seconds = strtod(argv[i + 1], NULL);
        if (!strcmp(argv[i], "--seed")) now.seed = strtoull(argv[i + 1], NULL, 10);
        if (!strcmp(argv[i], "--only")) only = strtoll(argv[i + 1], NULL, 10);
        if (!strcmp(argv[i], "--save")) now.save = argv[i + 1];
    }
    uint32_t pairs = argc > 1 ? read_pairs(argv[1]) : 0;
    if (!pairs) {
        fprintf(stderr, "usage: %s PAIRS [--count N] [--seconds S] [--seed K] [--only I] [--save FILE]\n", argv[0]);
        return 2;
    }
    signal(SIGALRM, on_signal);
    signal(SIGABRT, on_signal);
    uint8_t *scratch = malloc(2 * MAX_BYTES);
    for (uint32_t k = 0; k < pairs; k++) {
        ac_program p;
        if (pair[k].delta_size > MAX_BYTES / 2 || ac_load(&p, pair[k].program, pair[k].program_size) != AC_OK) return 2;
        try_seed(&p, pair + k);
        if (total.accepted != k + 1) fail("a seed is refused");
    }
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (uint64_t i = 0; only < 0 && i < count && passed < seconds; i++) {
        one_mutant(i, pairs, scratch);
        clock_gettime(CLOCK_MONOTONIC, &at);
        passed = (double)(at.tv_sec - start.tv_sec) + 1e-9 * (double)(at.tv_nsec - start.tv_nsec);
    }
    if (only >= 0) {
        one_mutant((uint64_t)only, pairs, scratch);
        write_mutant();
    }
    printf("{\"seed\": %" PRIu64 ", \"mutants\": %" PRIu64 ", \"accepted\": %" PRIu64 ", \"accepted_changed\": %" PRIu64
           ", \"seconds\": %.1f, \"refused\": {", now.seed, total.mutants, total.accepted, total.changed, passed);
    for (int i = 1; i <= AC_E_FLASH; i++)
        printf("%s\"%s\": %" PRIu64, i > 1 ? ", " : "", ac_status_text((ac_status)i), total.refused[i]);
    printf("}}\n");
    for (uint32_t k = 0; k < pairs; k++) {
        free(pair[k].program);
        free(pair[k].delta);
    }
    free(scratch);
    return 0;
}

#endif
