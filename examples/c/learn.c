/* Learning without Python: a Program and a file of samples in, falling loss and rising accuracy out.
 *
 *     learn digits.acp digits.acd [--epochs N] [--steps N] [--lr X] [--state FILE]
 *
 * It measures the accuracy on the held-out samples, trains on the others, measures again, writes what it learned to
 * FILE (default: learned.acu), forgets everything as a power cut would, reads FILE back and measures once more.
 * With --state naming a file that is there already, learning goes on from it; Python's Learner.save may have written it.
 *
 * All memory is the three static blocks below; on a board the Program stays in flash (compile with
 * -DEMBEDDED='"digits.h"', then the first argument falls away) and the file is a page of flash.
 */
#define _POSIX_C_SOURCE 200809L /* fsync */
#include "acclimate.h"
#ifdef THREADS /* of the installed library: fast kernels need its workers, even where THREADS is 1 */
#include "ac_threads.h"
#endif

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PROGRAM_BYTES = 256 << 10, STATE_BYTES = 64 << 10, ARENA_BYTES = 256 << 10 };

static uint32_t state[STATE_BYTES / 4], arena[ARENA_BYTES / 4];

#ifdef EMBEDDED
#include EMBEDDED /* static const uint32_t program_words[] */
enum { FIRST_FILE = 1 };
#else
static uint32_t program_words[PROGRAM_BYTES / 4];
enum { FIRST_FILE = 2 };
#endif

/* What one entry of the Program reads and writes. */
typedef struct {
    ac_entry entry;
    ac_binding x, y, lr, result;
} job;

/* The samples: a header of four words (magic, samples, floats a sample, of which held out at the end), then for each
 * sample its label (int32) and its floats. Only one sample is in memory at a time. */
typedef struct {
    FILE *file;
    uint32_t count, floats, held_out;
} samples;

enum { SAMPLES_MAGIC = 0x53444341 }; /* "ACDS" */

static int complain(const char *what, const char *why) {
    fprintf(stderr, "learn: %s: %s\n", what, why);
    return 1;
}

static long read_file(const char *path, void *to, size_t room) {
    FILE *f = fopen(path, "rb");
    if (!f) return -1;
    size_t n = fread(to, 1, room, f);
    int more = fgetc(f) != EOF;
    fclose(f);
    return more ? -1 : (long)n;
}

/* ---- samples ----------------------------------------------------------------------------------------------------- */

static int open_samples(samples *s, const char *path) {
    uint32_t h[4];
    s->file = fopen(path, "rb");
    if (!s->file) return complain(path, "cannot be opened");
    if (fread(h, 4, 4, s->file) != 4 || h[0] != SAMPLES_MAGIC || h[1] > 1u << 15 || h[2] > 1u << 15 || h[3] > h[1])
        return complain(path, "is not a file of samples; make_program.py writes one");
    s->count = h[1];
    s->floats = h[2];
    s->held_out = h[3];
    return 0;
}

static int read_sample(const samples *s, uint32_t index, int32_t *label, float *x) {
    long at = 16 + (long)index * (long)(4 + 4 * s->floats);
    return fseek(s->file, at, SEEK_SET) == 0 && fread(label, 4, 1, s->file) == 1
           && fread(x, 4, s->floats, s->file) == s->floats;
}

/* ---- the Program's entries --------------------------------------------------------------------------------------- */

static int find_job(const ac_program *p, const char *name, int trains, job *j) {
    memset(j, 0, sizeof *j);
    return ac_find_entry(p, name, &j->entry) == AC_OK && ac_find_binding(p, &j->entry, "x", &j->x) == AC_OK
           && ac_find_binding(p, &j->entry, trains ? "loss" : "output", &j->result) == AC_OK
           && (!trains || (ac_find_binding(p, &j->entry, "y", &j->y) == AC_OK
                           && ac_find_binding(p, &j->entry, "lr", &j->lr) == AC_OK));
}

/* Share of the held-out samples whose largest output is the label. The batch has `n` places; all take one sample. */
static float accuracy(const ac_program *p, const ac_memory *m, const job *predict, const samples *s, uint32_t n) {
    uint32_t right = 0, classes = predict->result.tensor->size / n;
    for (uint32_t i = s->count - s->held_out; i < s->count; i++) {
        int32_t label;
        float *x = ac_address(p, m, predict->x.tensor);
        memset(x, 0, 4 * (size_t)predict->x.tensor->size);
        if (!read_sample(s, i, &label, x) || ac_run(p, m, &predict->entry) != AC_OK) return -1;
        const float *output = ac_address(p, m, predict->result.tensor);
        uint32_t best = 0;
        for (uint32_t c = 1; c < classes; c++)
            if (output[c] > output[best]) best = c;
        right += (int32_t)best == label;
    }
    return s->held_out ? (float)right / (float)s->held_out : 0;
}

/* `steps` steps on batches of `n` samples, in the order of the file, again from its start where it ends. */
static int train(const ac_program *p, const ac_memory *m, const job *step, const samples *s, uint32_t n, uint32_t steps,
                 float lr) {
    uint32_t next = 0, known = s->count - s->held_out;
    float sum = 0;
    for (uint32_t i = 0; i < steps; i++) {
        if (next + n > known) next = 0;
        for (uint32_t k = 0; k < n; k++) {
            int32_t *y = ac_address(p, m, step->y.tensor);
            float *x = ac_address(p, m, step->x.tensor);
            if (!read_sample(s, next + k, y + k, x + (size_t)k * s->floats)) return complain("samples", "cannot be read");
        }
        next += n;
        *(float *)ac_address(p, m, step->lr.tensor) = lr;
        ac_status status = ac_run(p, m, &step->entry);
        if (status != AC_OK) return complain("step", ac_status_text(status));
        sum += *(float *)ac_address(p, m, step->result.tensor);
        if ((i + 1) % 100 == 0 || i + 1 == steps) {
            printf("step %5u  mean loss %.4f\n", (unsigned)(i + 1), (double)(sum / (float)(i % 100 + 1)));
            sum = 0;
        }
    }
    return 0;
}

/* ---- keeping what was learned ------------------------------------------------------------------------------------ */

static int to_file(void *file, const void *bytes, size_t size) { return fwrite(bytes, 1, size, file) != size; }

/* Beside the old file, synced, then renamed over it: a power cut leaves the one or the other. */
static int save(const ac_program *p, const ac_memory *m, const char *path) {
    char beside[512];
    if (strlen(path) + 6 > sizeof beside) return complain(path, "is too long a name");
    strcpy(beside, path);
    strcat(beside, ".part");
    FILE *f = fopen(beside, "wb");
    if (!f) return complain(beside, "cannot be written");
    ac_status status = ac_delta_save(p, m, 0, to_file, f, NULL);
    int good = status == AC_OK && fflush(f) == 0 && fsync(fileno(f)) == 0;
    if (fclose(f) == 0 && good && rename(beside, path) == 0) return 0;
    remove(beside);
    return complain(path, status == AC_OK ? "cannot be written" : ac_status_text(status));
}

/* What was learned before, read into the arena, which is free between runs; AC_E_NAME where there is no such file. */
static ac_status load(const ac_program *p, const ac_memory *m, const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) return AC_E_NAME;
    fclose(f);
    long n = read_file(path, arena, sizeof arena);
    return n < 0 ? AC_E_TRUNCATED : ac_delta_load(p, m, arena, (size_t)n, NULL);
}

/* ---- the command ------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
    uint32_t epochs = 10, steps = 0;
    float lr = 0.005f;
    const char *kept = "learned.acu";
    if (argc < FIRST_FILE + 1)
        return complain("usage", "learn PROGRAM SAMPLES [--epochs N] [--steps N] [--lr X] [--state FILE]");
    for (int i = FIRST_FILE + 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--epochs")) epochs = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        if (!strcmp(argv[i], "--steps")) steps = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        if (!strcmp(argv[i], "--lr")) lr = strtof(argv[i + 1], NULL);
        if (!strcmp(argv[i], "--state")) kept = argv[i + 1];
    }

    /* 1. The Program: checked once, whoever sent it. */
    ac_program program;
#ifdef EMBEDDED
    long size = (long)sizeof program_words;
#else
    long size = read_file(argv[1], program_words, sizeof program_words);
    if (size < 0) return complain(argv[1], "cannot be read, or is too large for PROGRAM_BYTES");
#endif
    ac_status status = ac_load(&program, program_words, (size_t)size);
    if (status != AC_OK) return complain("this Program cannot be run", ac_status_text(status));

    /* 2. Memory: the Program says how much. */
    if (program.state_bytes > sizeof state || program.arena_bytes > sizeof arena)
        return complain("memory", "STATE_BYTES or ARENA_BYTES is too small for this Program");
    ac_memory memory = {state, arena, NULL};
#ifdef THREADS
    memory.workers = ac_workers_open(THREADS);
    if (!memory.workers) return complain("threads", "cannot be started");
#endif
    if (ac_reset(&program, &memory) != AC_OK) return complain("memory", "is not aligned");

    /* 3. What it can do. */
    job predict, step;
    if (!find_job(&program, "predict", 0, &predict) || !find_job(&program, "step", 1, &step))
        return complain("this Program", "has no entries called predict and step");
    samples data;
    if (open_samples(&data, argv[FIRST_FILE])) return 1;
    uint32_t batch = step.y.tensor->size;
    if (step.y.tensor->dtype != AC_I32 || step.x.tensor->size != batch * data.floats
        || predict.x.tensor->size != step.x.tensor->size || data.count - data.held_out < batch)
        return complain(argv[FIRST_FILE], "does not fit the Program: other shape, or too few samples");
    if (!steps) steps = epochs * ((data.count - data.held_out) / batch);
    printf("Program of %ld bytes: state %u bytes, arena %u bytes, batches of %u\n", size, (unsigned)program.state_bytes,
           (unsigned)program.arena_bytes, (unsigned)batch);

    /* 4. Learn. */
    ac_status found = load(&program, &memory, kept);
    if (found != AC_OK && found != AC_E_NAME) return complain(kept, ac_status_text(found));
    printf("%s\naccuracy before   %.4f\n", found == AC_OK ? "going on from what was learned before" : "starting from the model",
           (double)accuracy(&program, &memory, &predict, &data, batch));
    if (train(&program, &memory, &step, &data, batch, steps, lr)) return 1;
    float after = accuracy(&program, &memory, &predict, &data, batch);
    printf("accuracy after    %.4f\n", (double)after);

    /* 5. Keep it, lose power, and take it up again. */
    if (save(&program, &memory, kept)) return 1;
    memset(state, 0xFF, sizeof state);
    memset(arena, 0xFF, sizeof arena);
    if (load(&program, &memory, kept) != AC_OK) return complain(kept, "was not read back");
    float again = accuracy(&program, &memory, &predict, &data, batch);
    printf("after power cycle %.4f\n", (double)again);
    fclose(data.file);
#ifdef THREADS
    ac_workers_close(memory.workers);
#endif
    return again == after ? 0 : complain("what was kept", "differs from what was learned");
}
