/* A bounded memory of samples seen before, to be learned again beside new ones, so that what was known is not
 * forgotten. It keeps inputs of the model, or latents: what a Program's entry "features" makes of them, taken up by
 * "step_latent". All of it lies in one block of the caller's memory; src/acclimate/replay.py is the same in Python, byte
 * for byte.
 *
 *     ac_replay_open(&replay, &config, block, sizeof block);       // the block starts as zeros, or as it was kept
 *     ... ac_run "features"; learn from its output together with some of
 *         ac_replay_get(&replay, ac_replay_draw(&replay), to, &label); ac_run "step_latent" ...
 *     ac_replay_add(&replay, features, label);
 */
#ifndef ACCLIMATE_REPLAY_H
#define ACCLIMATE_REPLAY_H

#include "acclimate.h"

#ifdef __cplusplus
extern "C" {
#endif
#ifdef AC_EXPORT
#pragma GCC visibility push(default)
#endif

/* How a sample is kept. */
typedef enum {
    AC_REPLAY_RAW = 0, /* its bytes as they are: float32, or int8 of a quantised model */
    AC_REPLAY_I8 = 1,  /* float32 rounded to one byte an element: scale * (q - zero) */
    AC_REPLAY_PQ =
        2 /* product quantisation: one byte for each part of the float32 sample, the nearest of its codes
                        * (Jegou et al., "Product quantization for nearest neighbor search", 2011) */
} ac_replay_code;

/* What stays where not all fits. */
typedef enum {
    AC_REPLAY_RESERVOIR =
        0, /* each sample seen with equal chance (Vitter, "Random sampling with a reservoir", 1985) */
    AC_REPLAY_BALANCED =
        1, /* equally many of each class (Chrysakis and Moens, "Online continual learning from
                              * imbalanced data", 2020) */
    AC_REPLAY_DIVERSE =
        2 /* those far apart: a new one takes the place of one of the two that are closest to each
                              * other, unless it is as close to one that is there. Not with AC_REPLAY_PQ. */
} ac_replay_keep;

/* Constants of a buffer, in flash. */
typedef struct {
    uint32_t code, keep;
    uint32_t elements;      /* of a sample */
    uint32_t element_bytes; /* 4: float32; 1: int8, with AC_REPLAY_RAW */
    uint32_t capacity;      /* samples, 1 to 65535 */
    uint32_t classes;       /* labels are below this, 1 to 65535 */
    uint32_t seed;
    float scale; /* AC_REPLAY_I8 */
    int32_t zero;
    uint32_t parts, codes; /* AC_REPLAY_PQ: elements is a multiple of parts; 2 to 256 codes */
    const float *codebook; /* (parts, codes, elements / parts) */
} ac_replay_config;

typedef struct {
    const ac_replay_config *config;
    uint32_t *counts;    /* seen, drawn, held; then seen and held of each class */
    uint32_t *nearest;   /* AC_REPLAY_DIVERSE: squared distance to the nearest other sample */
    uint16_t *neighbour; /* and which that is */
    uint16_t *labels;
    uint8_t *samples; /* capacity times sample_bytes */
    uint32_t sample_bytes;
} ac_replay;

/* Bytes of the block that a buffer takes; 0 for a config that cannot be. */
uint32_t ac_replay_bytes(const ac_replay_config *config);

/* A buffer over a block, 4-byte aligned: of zeros, or as a buffer of the same config left it. Its content is checked:
 * AC_E_VALUE where counts, labels or neighbours cannot be; AC_E_ROOM: too few bytes, or a config that cannot be. */
ac_status ac_replay_open(ac_replay *replay, const ac_replay_config *config, void *block,
                         size_t bytes);

/* Offer a sample of config->elements. Returns where it is kept, below capacity, or -1 where it is not. Time: linear in
 * a sample and in the labels held, with AC_REPLAY_DIVERSE in all samples. A label out of range is not kept. */
int32_t ac_replay_add(ac_replay *replay, const void *sample, uint32_t label);

/* One of the samples held, each with equal chance; -1 where there are none. */
int32_t ac_replay_draw(ac_replay *replay);

/* A sample that is held, decoded to config->elements, and its label. AC_E_OFFSET: there is none at this index. */
ac_status ac_replay_get(const ac_replay *replay, uint32_t index, void *sample, uint32_t *label);

#ifdef AC_EXPORT
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
