/* Integer sums of products and their way back to int8: see ac_dot.h. */
#include "ac_dot.h"

#if AC_DSP
/* 0.81 instructions a product, and 7 for each four sums. In registers: r0 sum, r1 rounds left, r2 columns, r3 w, r4-r7 the
 * four sums; on the stack from sp on: four times start, end, w, rounds of four groups, where the first round begins. */
__attribute__((naked)) void AC_KERNEL(dot_columns)(int32_t *sum __attribute__((unused)),
                                                   const int32_t *end __attribute__((unused)),
                                                   const uint32_t *columns __attribute__((unused)),
                                                   const int8_t *w __attribute__((unused)),
                                                   int groups __attribute__((unused)),
                                                   int32_t start __attribute__((unused))) {
#define GROUP /* 13 instructions of 4 bytes */                                                     \
    "ldr.w r12, [r3], #4\n\t"                                                                      \
    "ldmia.w r2!, {r8, r9, r10, r11}\n\t"                                                          \
    "sxtb16 lr, r12\n\t"                                                                           \
    "smlad r4, r8, lr, r4\n\t"                                                                     \
    "smlad r5, r9, lr, r5\n\t"                                                                     \
    "smlad r6, r10, lr, r6\n\t"                                                                    \
    "smlad r7, r11, lr, r7\n\t"                                                                    \
    "ldmia.w r2!, {r8, r9, r10, r11}\n\t"                                                          \
    "sxtb16 lr, r12, ror #8\n\t"                                                                   \
    "smlad r4, r8, lr, r4\n\t"                                                                     \
    "smlad r5, r9, lr, r5\n\t"                                                                     \
    "smlad r6, r10, lr, r6\n\t"                                                                    \
    "smlad r7, r11, lr, r7\n\t"
    AC_ASM("push {r4-r11, lr}\n\t"
           "ldrd r8, r4, [sp, #36]\n\t" /* groups, start */
           "mov r5, r4\n\t"
           "mov r6, r4\n\t"
           "mov r7, r4\n\t"
           "rsb r9, r8, #0\n\t"
           "and r9, r9, #3\n\t" /* groups that the first round leaves out */
           "add r8, r8, #3\n\t"
           "lsr r8, r8, #2\n\t"
           "mov r10, #52\n\t"
           "adr.w r11, 2f\n\t"
           "mla r9, r9, r10, r11\n\t"
           "orr r9, r9, #1\n\t"
           "push {r1, r3, r8, r9}\n\t"
           "push {r4-r7}\n\t"
           "1:\n\t"
           "ldm sp, {r4-r7}\n\t"
           "ldrd r3, r1, [sp, #20]\n\t"
           "ldr.w pc, [sp, #28]\n\t"
           ".balign 4\n"
           "2:\n\t" GROUP GROUP GROUP GROUP "subs r1, r1, #1\n\t"
           "bne 2b\n\t"
           "stmia r0!, {r4-r7}\n\t"
           "ldr r12, [sp, #16]\n\t"
           "cmp r0, r12\n\t"
           "bne 1b\n\t"
           "add sp, sp, #32\n\t"
           "pop {r4-r11, pc}");
#undef GROUP
}
#else
void AC_KERNEL(dot_columns)(int32_t *sum, const int32_t *end, const uint32_t *columns,
                            const int8_t *w, int groups, int32_t start) {
    for (; sum != end; sum += 4) {
        int32_t a = start, b = start, c = start, d = start;
        for (int g = 0; g < groups; g++, columns += 8) {
            int16_t x[16];
            AC_COPY(x, columns, sizeof x);
            for (int i = 0; i < 4; i++) {
                const int32_t by = w[4 * g + i];
                a += x[ac_in_group(i, 0)] * by;
                b += x[ac_in_group(i, 1)] * by;
                c += x[ac_in_group(i, 2)] * by;
                d += x[ac_in_group(i, 3)] * by;
            }
        }
        sum[0] = a;
        sum[1] = b;
        sum[2] = c;
        sum[3] = d;
    }
}
#endif

#if AC_DSP
/* 0.69 instructions a product. In registers: r1 columns, r2 rows, r4-r7 and r8-r11 the sums of both rows; on the stack from sp
 * on: sum, rows, end, bytes to the second sums, where the first round begins, end of rows. */
__attribute__((naked)) void AC_KERNEL(dot_pairs)(int32_t *sum __attribute__((unused)),
                                                 const uint32_t *columns __attribute__((unused)),
                                                 const uint32_t *rows __attribute__((unused)),
                                                 int pairs __attribute__((unused)),
                                                 const int32_t *end __attribute__((unused)),
                                                 int next __attribute__((unused))) {
#define PAIR /* 11 instructions of 4 bytes */   \
    "ldrd r3, r0, [r2], #16\n\t"                \
    "ldrd r12, lr, [r1], #8\n\t"                \
    "smlad r4, r12, r3, r4\n\t"                 \
    "smlad r5, lr, r3, r5\n\t"                  \
    "smlad r8, r12, r0, r8\n\t"                 \
    "smlad r9, lr, r0, r9\n\t"                  \
    "ldrd r12, lr, [r1], #8\n\t"                \
    "smlad r6, r12, r3, r6\n\t"                 \
    "smlad r7, lr, r3, r7\n\t"                  \
    "smlad r10, r12, r0, r10\n\t"               \
    "smlad r11, lr, r0, r11\n\t"
#define EIGHT PAIR PAIR PAIR PAIR PAIR PAIR PAIR PAIR
    AC_ASM("push {r4-r11, lr}\n\t"
           "ldrd r4, r5, [sp, #36]\n\t" /* end, next */
           "lsl r5, r5, #2\n\t"
           "rsb r6, r3, #0\n\t"
           "and r6, r6, #15\n\t" /* pairs that the first round leaves out */
           "mov r7, #44\n\t"
           "adr.w r8, 2f\n\t"
           "mla r6, r6, r7, r8\n\t"
           "orr r6, r6, #1\n\t"
           "add r7, r2, r3, lsl #4\n\t"
           "push {r0, r2, r4, r5, r6, r7}\n\t"
           "1:\n\t"
           "ldr r3, [sp, #12]\n\t"
           "ldm r0, {r4-r7}\n\t"
           "add r3, r3, r0\n\t"
           "ldm r3, {r8-r11}\n\t"
           "ldr r2, [sp, #4]\n\t"
           "ldr.w pc, [sp, #16]\n\t"
           ".balign 4\n"
           "2:\n\t" EIGHT EIGHT
           "ldr r3, [sp, #20]\n\t"
           "cmp r2, r3\n\t"
           "bne 2b\n\t"
           "ldr r0, [sp]\n\t"
           "stmia r0!, {r4-r7}\n\t"
           "str r0, [sp]\n\t"
           "ldrd r12, r3, [sp, #8]\n\t"
           "add r3, r3, r0\n\t"
           "stmdb r3, {r8-r11}\n\t"
           "cmp r0, r12\n\t"
           "bne 1b\n\t"
           "add sp, sp, #24\n\t"
           "pop {r4-r11, pc}");
#undef PAIR
#undef EIGHT
}

/* In registers: r0 to, r1 x, r2 two steps, r3 rounds of four pairs, r8 one step; 4 * size bytes of code make a pair. */
#define ZIP(type, name, shift, size, PAIR)                                                                                \
    __attribute__((naked)) void AC_KERNEL(name)(uint32_t *to __attribute__((unused)), const type *x __attribute__((unused)), \
                                                size_t step __attribute__((unused)), int pairs __attribute__((unused))) { \
        AC_ASM("push {r4-r8, lr}\n\t"                                                                                    \
               "lsl r8, r2, #" shift "\n\t"                                                                              \
               "lsl r2, r8, #1\n\t"                                                                                      \
               "rsb r4, r3, #0\n\t"                                                                                      \
               "and r4, r4, #3\n\t" /* pairs that the first round leaves out */                                          \
               "add r3, r3, #3\n\t"                                                                                      \
               "lsr r3, r3, #2\n\t"                                                                                      \
               "mov r5, #4 * " size "\n\t"                                                                               \
               "adr.w r6, 2f\n\t"                                                                                        \
               "mla r4, r4, r5, r6\n\t"                                                                                  \
               "orr r4, r4, #1\n\t"                                                                                      \
               "bx r4\n\t"                                                                                               \
               ".balign 4\n"                                                                                             \
               "2:\n\t" PAIR PAIR PAIR PAIR "subs r3, r3, #1\n\t"                                                       \
               "bne 2b\n\t"                                                                                              \
               "pop {r4-r8, pc}");                                                                                       \
    }
ZIP(int8_t, zip_bytes, "0", "13",
    "ldr.w r12, [r1]\n\t"
    "ldr.w lr, [r1, r8]\n\t"
    "add.w r1, r1, r2\n\t"
    "sxtb16 r4, r12\n\t"
    "sxtb16 r5, r12, ror #8\n\t"
    "sxtb16 r6, lr\n\t"
    "sxtb16 lr, lr, ror #8\n\t"
    "pkhtb r7, lr, r5, asr #16\n\t"
    "pkhbt r5, r5, lr, lsl #16\n\t"
    "pkhbt r12, r4, r6, lsl #16\n\t"
    "pkhtb r6, r6, r4, asr #16\n\t"
    "strd r12, r5, [r0], #8\n\t"
    "strd r6, r7, [r0], #8\n\t")
ZIP(int16_t, zip_halves, "1", "12",
    "ldr.w r4, [r1]\n\t"
    "ldr.w r6, [r1, #4]\n\t"
    "add.w r1, r1, r8\n\t"
    "ldr.w r5, [r1]\n\t"
    "ldr.w r7, [r1, #4]\n\t"
    "add.w r1, r1, r8\n\t"
    "pkhbt r12, r4, r5, lsl #16\n\t"
    "pkhtb lr, r5, r4, asr #16\n\t"
    "pkhbt r4, r6, r7, lsl #16\n\t"
    "pkhtb r5, r7, r6, asr #16\n\t"
    "strd r12, lr, [r0], #8\n\t"
    "strd r4, r5, [r0], #8\n\t")
#undef ZIP

__attribute__((naked)) uint32_t AC_KERNEL(or_of_fours)(const int32_t *sum __attribute__((unused)),
                                                       int fours __attribute__((unused))) {
#define ONE(v)                         \
    "eor r12, " v ", " v ", asr #31\n\t" \
    "sub r12, r12, " v ", asr #31\n\t" \
    "orr r2, r2, r12\n\t"
    AC_ASM("push {r4-r6, lr}\n\t"
           "mov r2, #0\n\t"
           "1:\n\t"
           "ldmia r0!, {r3-r6}\n\t" ONE("r3") ONE("r4") ONE("r5") ONE("r6")
           "subs r1, r1, #1\n\t"
           "bne 1b\n\t"
           "mov r0, r2\n\t"
           "pop {r4-r6, pc}");
#undef ONE
}

__attribute__((naked)) void AC_KERNEL(put_fours)(int16_t *to __attribute__((unused)), const int32_t *sum __attribute__((unused)),
                                                 int fours __attribute__((unused)), int32_t by __attribute__((unused))) {
#define ONE(v)                    \
    "qadd " v ", " v ", r8\n\t"   \
    "asr " v ", " v ", r3\n\t"    \
    "ssat " v ", #16, " v "\n\t"
#define TWO(a, b) /* what is -32768 becomes -32767 */ \
    "pkhbt " a ", " a ", " b ", lsl #16\n\t"          \
    "qsub16 " a ", " a ", r9\n\t"                     \
    "sadd16 " a ", " a ", r9\n\t"                     \
    "str " a ", [r0], #4\n\t"
    AC_ASM("push {r4-r9, lr}\n\t"
           "mov r8, #1\n\t"
           "lsl r8, r8, r3\n\t"
           "lsr r8, r8, #1\n\t"
           "mov r9, #0x00010001\n\t"
           "1:\n\t"
           "ldmia r1!, {r4-r7}\n\t" ONE("r4") ONE("r5") ONE("r6") ONE("r7") TWO("r4", "r5") TWO("r6", "r7")
           "subs r2, r2, #1\n\t"
           "bne 1b\n\t"
           "pop {r4-r9, pc}");
#undef ONE
#undef TWO
}

/* In registers: r0 sum, r1 bytes of a row, r2 x, r3 w, r4-r7 the four sums, r8-r11 words of x, r11 or r12 on words of w, lr v.
 * A row of four windows: each word of x is loaded once; what a window has alone at its first or last column is multiplied
 * by half a word. */
#define MULTIPLY(sum, x, w) "smlad " sum ", " x ", " w ", " sum "\n\t"
#define HIGH_LOW(sum, x, w) "smlatb " sum ", " x ", " w ", " sum "\n\t"
#define LOW_HIGH(sum, x, w) "smlabt " sum ", " x ", " w ", " sum "\n\t"
#define STEP_1(x0, x1, x2)                                                                         \
    "ldrd r11, r12, [r3], #8\n\t" MULTIPLY("r4", x0, "r11") MULTIPLY("r6", x1, "r11")              \
        MULTIPLY("r5", x1, "r12") MULTIPLY("r7", x2, "r12")
#define FIRST_1                                                                                    \
    "ldmia r2, {r8, r9, r10}\n\t" STEP_1("r8", "r9", "r10") HIGH_LOW("r5", "r8", "r11")            \
        HIGH_LOW("r7", "r9", "r11")
#define LAST_1(x1, x2) LOW_HIGH("r4", x1, "r12") LOW_HIGH("r6", x2, "r12")
#define ROW_3_1 FIRST_1 LAST_1("r9", "r10")
#define ROW_5_1 FIRST_1 "ldr r8, [r2, #12]\n\t" STEP_1("r9", "r10", "r8") LAST_1("r10", "r8")
#define ROW_7_1                                                                                    \
    FIRST_1 "ldr r8, [r2, #12]\n\t" STEP_1("r9", "r10", "r8") "ldr r9, [r2, #16]\n\t" STEP_1(      \
        "r10", "r8", "r9") LAST_1("r8", "r9")
#define ALL(what, x0, x1, x2, x3)                                                                  \
    what("r4", x0, "r12") what("r5", x1, "r12") what("r6", x2, "r12") what("r7", x3, "r12")
#define FIRST_2(next)                                                                              \
    "ldmia r2, {r8, r9, r10, r11}\n\tldr r12, [r3], #" next                                        \
    "\n\t" ALL(MULTIPLY, "r8", "r9", "r10", "r11") "ldr r8, [r2, #16]\n\t"
#define STEP_2(next, x0, x1, x2, x3) "ldr r12, [r3], #" next "\n\t" ALL(MULTIPLY, x0, x1, x2, x3)
#define LAST_2(x0, x1, x2, x3) "ldr r12, [r3], #4\n\t" ALL(LOW_HIGH, x0, x1, x2, x3)
#define ROW_3_2 FIRST_2("4") LAST_2("r9", "r10", "r11", "r8")
#define ROW_5_2                                                                                    \
    FIRST_2("8")                                                                                   \
    STEP_2("4", "r9", "r10", "r11", "r8") "ldr r9, [r2, #20]\n\t" LAST_2("r10", "r11", "r8", "r9")
#define ROW_7_2                                                                                    \
    FIRST_2("8")                                                                                   \
    STEP_2("8", "r9", "r10", "r11", "r8") "ldr r9, [r2, #20]\n\t" STEP_2(                          \
        "4", "r10", "r11", "r8", "r9") "ldr r10, [r2, #24]\n\t" LAST_2("r11", "r8", "r9", "r10")
#define NEXT "add r2, r2, r1\n\t"
#define TIMES_3(row) row NEXT row NEXT row NEXT
#define TIMES_5(row) TIMES_3(row) row NEXT row NEXT
#define TIMES_7(row) TIMES_5(row) row NEXT row NEXT
#define WINDOWS(width, step)                                                                       \
    __attribute__((naked)) static void windows_##width##_##step(                                   \
        int32_t *sum __attribute__((unused)), const int32_t *end __attribute__((unused)),          \
        const uint32_t *x __attribute__((unused)), const ac_windows *v __attribute__((unused))) {  \
        AC_ASM(                                                                                    \
            "push {r1, r4-r11, lr}\n\t"                                                            \
            "mov lr, r3\n\t"                                                                       \
            "ldr r1, [lr, #20]\n\t"                                                                \
            "1:\n\t"                                                                               \
            "ldmia lr, {r4-r7}\n\t"                                                                \
            "ldr r3, [lr, #16]\n\t" TIMES_##width(ROW_##width##_##step) "stmia r0!, {r4-r7}\n\t"   \
                                                                        "ldr r12, [lr, #24]\n\t"   \
                                                                        "sub r2, r2, r12\n\t"      \
                                                                        "ldr r12, [sp]\n\t"        \
                                                                        "cmp r0, r12\n\t"          \
                                                                        "bcc 1b\n\t"               \
                                                                        "pop {r1, r4-r11, pc}");   \
    }
#else
AC_INLINE void windows(int32_t *sum, const int32_t *end, const uint32_t *x, const ac_windows *v,
                       int width, int step) {
    for (; sum < end; sum += 4, x += 2 * step) {
        int32_t a = v->start[0], b = a, c = a, d = a;
        const uint32_t *line = x, *w = v->w;
        for (int i = 0; i < width; i++, line += v->pitch / 4, w += width - 1) {
            int16_t from[16];
            AC_COPY(from, line, sizeof *from * (size_t)(3 * step + width));
            for (int j = 0; j < width; j++) {
                const int32_t by = (int16_t)(uint16_t)(j + 1 < width ? w[j] : w[j - 1] >> 16);
                a += from[j] * by;
                b += from[step + j] * by;
                c += from[2 * step + j] * by;
                d += from[3 * step + j] * by;
            }
        }
        sum[0] = a;
        sum[1] = b;
        sum[2] = c;
        sum[3] = d;
    }
}
#define WINDOWS(width, step)                                                                       \
    static void windows_##width##_##step(int32_t *sum, const int32_t *end, const uint32_t *x,      \
                                         const ac_windows *v) {                                    \
        windows(sum, end, x, v, width, step);                                                      \
    }
#endif
WINDOWS(3, 1)
WINDOWS(3, 2)
WINDOWS(5, 1)
WINDOWS(5, 2)
WINDOWS(7, 1)
WINDOWS(7, 2)
ac_dot_windows *const AC_KERNEL(dot_windows)[3][2] = {
    {windows_3_1, windows_3_2}, {windows_5_1, windows_5_2}, {windows_7_1, windows_7_2}};

/* AC_KERNEL(requantize) of a multiple of four sums, where s->quick; full: low and high are int8's ends; keep: it returns
 * the bits of the last 32, the last on top. */
AC_INLINE uint32_t quick_run(int8_t *y, const int32_t *sum, int count, const ac_scaling *s,
                             int full, int keep) {
    const uint32_t low = ((uint32_t)s->low & 0xFFu) * 0x01010101u;
    const int32_t m = s->multiplier, offset = s->offset, right = -s->shift,
                  range = s->high - s->low;
    const int32_t *const end = sum + count;
    uint32_t within = 0;
    do {
        uint32_t word = 0;
        for (int k = 0; k < 4; k++) {
            const int32_t v = ac_add_high(offset + (sum[k] >> 31), sum[k], m) >> right;
            if (keep)
                within = ac_shift_in(within, v, range);
            word |= (uint32_t)(full ? ac_to_byte(v) : ac_clamped(v, 0, range)) << (8 * k);
        }
        word = ac_add_bytes(word, low);
        AC_COPY(y, &word, 4);
        y += 4;
        sum += 4;
    } while (sum != end);
    return within;
}

#if AC_DSP
/* In registers: r0 y, r1 sum, r2 its end, r3 255, r4 multiplier, r5 shift, r6 offset, r7 low in each byte, r8-r11 the four, lr
 * their bits. One sum: where it is between low and high, counted from low. */
#define PLACE(sum)                                                                                 \
    "add r12, r6, " sum ", asr #31\n\t"                                                            \
    "smmlar " sum ", " sum ", r4, r12\n\t"                                                         \
    "asr " sum ", " sum ", r5\n\t"
#define KEEP(sum) "cmp r3, " sum "\n\trrx lr, lr\n\t"
#define DROP(sum)
#define BYTE(sum) "usat " sum ", #8, " sum "\n\t"
#define FULL(name, keep)                                                                           \
    __attribute__((naked)) static uint32_t name(                                                   \
        int8_t *y __attribute__((unused)), const int32_t *sum __attribute__((unused)),             \
        int count __attribute__((unused)), const ac_scaling *s __attribute__((unused))) {          \
        AC_ASM("push {r4-r11, lr}\n\t"                                                             \
               "ldrd r4, r5, [r3, #4]\n\t"                                                         \
               "ldr r6, [r3, #28]\n\t"                                                             \
               "ldrb r7, [r3, #20]\n\t"                                                            \
               "rsb r5, r5, #0\n\t"                                                                \
               "orr r7, r7, r7, lsl #8\n\t"                                                        \
               "orr r7, r7, r7, lsl #16\n\t"                                                       \
               "mov r3, #255\n\t"                                                                  \
               "add r2, r1, r2, lsl #2\n\t"                                                        \
               "1:\n\t"                                                                            \
               "ldmia r1!, {r8, r9, r10, r11}\n\t" PLACE("r8") keep("r8") BYTE("r8") PLACE("r9")   \
                   keep("r9") BYTE("r9") PLACE("r10") keep("r10") BYTE("r10") PLACE("r11")         \
                       keep("r11") BYTE("r11") "orr r8, r8, r9, lsl #8\n\t"                        \
                                               "orr r10, r10, r11, lsl #8\n\t"                     \
                                               "orr r8, r8, r10, lsl #16\n\t"                      \
                                               "uadd8 r8, r8, r7\n\t"                              \
                                               "cmp r1, r2\n\t"                                    \
                                               "str r8, [r0], #4\n\t"                              \
                                               "bne 1b\n\t"                                        \
                                               "mov r0, lr\n\t"                                    \
                                               "pop {r4-r11, pc}");                                \
    }
FULL(full_run, DROP)
FULL(full_run_bits, KEEP)
#else
static uint32_t full_run(int8_t *y, const int32_t *sum, int count, const ac_scaling *s) {
    return quick_run(y, sum, count, s, 1, 0);
}
static uint32_t full_run_bits(int8_t *y, const int32_t *sum, int count, const ac_scaling *s) {
    return quick_run(y, sum, count, s, 1, 1);
}
#endif

AC_APART uint32_t part_run(int8_t *y, const int32_t *sum, int count, const ac_scaling *s) {
    return quick_run(y, sum, count, s, 0, 1);
}

/* AC_KERNEL(requantize) of any sums. */
AC_APART void exact_row(int8_t *y, const int32_t *sum, int count, const ac_scaling *s,
                        uint32_t *bits, size_t at) {
    const int32_t bias = s->quick ? 0 : s->bias, m = s->multiplier, shift = s->shift,
                  zero = s->zero, low = s->low, high = s->high;
    for (int i = 0; i < count; i++) {
        const int32_t v = ac_wrap_add(ac_scaled(ac_wrap_add(sum[i] / 2, bias), m, shift), zero);
        const int32_t clamped = ac_clamped(v, low, high);
        y[i] = (int8_t)clamped;
        if (bits && v == clamped)
            ac_add_bits(bits, at + (size_t)i, 1, 1);
    }
}

void AC_KERNEL(requantize)(int8_t *y, const int32_t *sum, int count, const ac_scaling *s,
                           uint32_t *bits, size_t at) {
    const int fours = s->quick ? count & ~3 : 0, full = s->high - s->low == 255;
    if (fours && full && !bits) {
        full_run(y, sum, fours, s);
    } else {
        for (int i = 0; i < fours; i += 32) {
            const int some = fours - i < 32 ? fours - i : 32;
            const uint32_t within = (full ? full_run_bits : part_run)(y + i, sum + i, some, s);
            if (bits)
                ac_add_bits(bits, at + (size_t)i, within >> (32 - some), some);
        }
    }
    if (fours < count)
        exact_row(y + fours, sum + fours, count - fours, s, bits, at + (size_t)fours);
}
