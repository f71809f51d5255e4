/* Runs every Program of a corpus with plain and with fast kernels on the same data, and compares what comes out.
 *
 *     fast CORPUS
 *
 * Prints the number of Programs and of those whose bits differ; the exit status is 1 where some output differs by more
 * than rounding. CORPUS: records of (uint32 size, bytes) whose one entry is "run". */
#include "ac_kernel.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const float TOLERANCE = 1e-5f; /* of the largest value */

static float *run(const void *bytes, size_t size, int fast, uint32_t *count) {
    ac_program p;
    ac_workers workers = {1, NULL, NULL, NULL};
    if (ac_load_with(&p, bytes, size, ac_table_of("auto", fast)) != AC_OK) exit(3);
    ac_memory m = {malloc(p.state_bytes + 4), malloc(p.arena_bytes + 4), fast ? &workers : NULL};
    workers.scratch = aligned_alloc(64, AC_SCRATCH_BYTES);
    if (!m.state || !m.arena || !workers.scratch || ac_reset(&p, &m) != AC_OK) exit(3);
    memset(workers.scratch, 0xFF, AC_SCRATCH_BYTES);
    ac_entry e;
    ac_binding b;
    if (ac_find_entry(&p, "run", &e) != AC_OK) exit(3);
    uint32_t random = 1;
    for (uint32_t i = e.first_binding; i < e.end_binding; i++) {
        if (ac_binding_at(&p, i, &b) != AC_OK) exit(3);
        float *to = ac_address(&p, &m, b.tensor);
        for (uint32_t k = 0; !b.is_output && k < b.tensor->size; k++) {
            random = random * 1664525u + 1013904223u;
            to[k] = (float)(int32_t)(random >> 8) * 2.4e-7f - 2.0f;
        }
    }
    if (ac_run(&p, &m, &e) != AC_OK || ac_find_binding(&p, &e, "o", &b) != AC_OK) exit(3);
    *count = b.tensor->size;
    float *out = malloc(4 * (size_t)*count);
    if (!out) exit(3);
    memcpy(out, ac_address(&p, &m, b.tensor), 4 * (size_t)*count);
    free(m.state);
    free(m.arena);
    free(workers.scratch);
    return out;
}

int main(int argc, char **argv) {
    FILE *f = argc == 2 ? fopen(argv[1], "rb") : NULL;
    uint32_t size, programs = 0, differ = 0, wrong = 0;
    if (!f) return 2;
    while (fread(&size, 4, 1, f) == 1) {
        size_t room = ((size_t)size + 3) / 4 * 4;
        uint32_t count = 0;
        void *bytes = malloc(room);
        if (!bytes || fread(bytes, 1, room, f) != room) return 3;
        float *plain = run(bytes, size, 0, &count), *fast = run(bytes, size, 1, &count), most = 1, apart = 0;
        for (uint32_t k = 0; k < count; k++) {
            most = fmaxf(most, fabsf(plain[k]));
            apart = fast[k] - plain[k] == fast[k] - plain[k] ? fmaxf(apart, fabsf(fast[k] - plain[k])) : INFINITY;
        }
        differ += memcmp(plain, fast, 4 * (size_t)count) != 0;
        if (apart > TOLERANCE * most) {
            wrong++;
            printf("Program %u: %g of %g\n", (unsigned)programs, (double)apart, (double)most);
        }
        programs++;
        free(plain);
        free(fast);
        free(bytes);
    }
    printf("%u programs, %u differ, %u wrong\n", (unsigned)programs, (unsigned)differ, (unsigned)wrong);
    return wrong != 0;
}
