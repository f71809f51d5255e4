/* The block: words seen, drawn, held | words seen and held of each class | words nearest and halves neighbour of each sample
 * (AC_REPLAY_DIVERSE) | halves labels | samples. Each part fills whole words. */
#include "ac_replay.h"

#include "ac_math.h"

#include <string.h>

enum { SEEN, DRAWN, HELD, COUNTS, MOST = 65535 };

/* Which chance a number is for: no two uses of one count share a number. */
enum { SALT_ADD = 1, SALT_OWN = 2, SALT_OTHER = 3, SALT_DRAW = 4 };

static uint32_t whole_words(uint32_t bytes) { return (bytes + 3) / 4 * 4; }

static uint32_t sample_bytes(const ac_replay_config *c) {
    if (c->code == AC_REPLAY_PQ)
        return c->parts;
    return c->elements * (c->code == AC_REPLAY_I8 ? 1 : c->element_bytes);
}

uint32_t ac_replay_bytes(const ac_replay_config *c) {
    if (c->code > AC_REPLAY_PQ || c->keep > AC_REPLAY_DIVERSE || c->elements == 0 ||
        c->elements > 1 << 20 || c->capacity == 0 || c->capacity > MOST || c->classes == 0 ||
        c->classes > MOST)
        return 0;
    if (c->element_bytes != 4 && (c->element_bytes != 1 || c->code != AC_REPLAY_RAW))
        return 0;
    if (c->code == AC_REPLAY_I8 && !(c->scale > 0 && c->scale < AC_INFINITY))
        return 0;
    if (c->code == AC_REPLAY_PQ &&
        (c->parts == 0 || c->elements % c->parts || c->codes < 2 || c->codes > 256 ||
         c->codebook == NULL || c->keep == AC_REPLAY_DIVERSE))
        return 0;
    const int bytewise = c->code == AC_REPLAY_I8 || c->element_bytes == 1;
    if (c->keep == AC_REPLAY_DIVERSE &&
        (!bytewise || c->elements > MOST)) /* squares of 255 must sum in 32 bits */
        return 0;
    const uint64_t each = sample_bytes(c) + 2 + (c->keep == AC_REPLAY_DIVERSE ? 6 : 0);
    const uint64_t all = 4 * (uint64_t)(COUNTS + 2 * c->classes) + each * c->capacity + 12;
    if (all > INT32_MAX)
        return 0;
    return 4 * (COUNTS + 2 * c->classes) +
           (c->keep == AC_REPLAY_DIVERSE ? 4 * c->capacity + whole_words(2 * c->capacity) : 0) +
           whole_words(2 * c->capacity) + whole_words(sample_bytes(c) * c->capacity);
}

static uint32_t *seen_of(const ac_replay *r, uint32_t label) { return r->counts + COUNTS + label; }

static uint32_t *held_of(const ac_replay *r, uint32_t label) {
    return r->counts + COUNTS + r->config->classes + label;
}

ac_status ac_replay_open(ac_replay *r, const ac_replay_config *c, void *block, size_t bytes) {
    const uint32_t need = ac_replay_bytes(c);
    memset(r, 0, sizeof *r);
    if (need == 0 || bytes < need)
        return AC_E_ROOM;
    if ((uintptr_t)block % 4)
        return AC_E_ALIGN;
    uint8_t *at = block;
    r->config = c;
    r->counts = block;
    at += 4 * (size_t)(COUNTS + 2 * c->classes);
    if (c->keep == AC_REPLAY_DIVERSE) {
        r->nearest = (uint32_t *)(void *)at;
        at += 4 * (size_t)c->capacity;
        r->neighbour = (uint16_t *)(void *)at;
        at += whole_words(2 * c->capacity);
    }
    r->labels = (uint16_t *)(void *)at;
    r->samples = at + whole_words(2 * c->capacity);
    r->sample_bytes = sample_bytes(c);
    const uint32_t held = r->counts[HELD];
    if (held > c->capacity || r->counts[SEEN] < held)
        return AC_E_VALUE;
    memset(held_of(r, 0), 0, 4 * (size_t)c->classes);
    for (uint32_t i = 0; i < held; i++) {
        if (r->labels[i] >= c->classes)
            return AC_E_VALUE;
        ++*held_of(r, r->labels[i]);
        if (c->code == AC_REPLAY_PQ)
            for (uint32_t k = 0; k < c->parts; k++)
                if (r->samples[(size_t)i * c->parts + k] >= c->codes)
                    return AC_E_VALUE;
        if (c->keep == AC_REPLAY_DIVERSE && held > 1 &&
            (r->neighbour[i] >= held || r->neighbour[i] == i))
            return AC_E_VALUE;
    }
    return AC_OK;
}

/* A whole number below `limit`, a pure function of count, salt and seed. */
static uint32_t chance(const ac_replay *r, uint32_t count, uint32_t salt, uint32_t limit) {
    const uint32_t key = ac_hash_u32(count * 0x9E3779B9u + (r->config->seed ^ salt * 0x85EBCA6Bu));
    return (uint32_t)((uint64_t)ac_hash_u32(ac_hash_u32(key) + key) * limit >> 32);
}

/* ---- codes of a sample --------------------------------------------------------------------------------------------- */

static uint8_t rounded(float x, float scale, int32_t zero) {
    const float q = x / scale;
    if (!(q > -512.0f)) /* NaN too */
        return (uint8_t)(int8_t)-128;
    const int32_t whole = q < 512.0f ? (int32_t)(q < 0 ? q - 0.5f : q + 0.5f) : 512;
    const int64_t v = (int64_t)whole + zero;
    return (uint8_t)(int8_t)(v < -128 ? -128 : v > 127 ? 127 : v);
}

/* The nearest code; of several the first. */
static uint8_t nearest_code(const float *x, const float *codes, uint32_t count, uint32_t size) {
    uint32_t best = 0;
    float least = AC_INFINITY;
    for (uint32_t k = 0; k < count; k++) {
        float sum = 0;
        for (uint32_t i = 0; i < size; i++) {
            const float d = x[i] - codes[(size_t)k * size + i];
            sum += d * d;
        }
        if (sum < least) {
            least = sum;
            best = k;
        }
    }
    return (uint8_t)best;
}

static void encode(const ac_replay *r, const void *sample, uint8_t *to) {
    const ac_replay_config *c = r->config;
    const float *x = sample;
    if (c->code == AC_REPLAY_RAW)
        memcpy(to, sample, r->sample_bytes);
    else if (c->code == AC_REPLAY_I8)
        for (uint32_t i = 0; i < c->elements; i++)
            to[i] = rounded(x[i], c->scale, c->zero);
    else {
        const uint32_t size = c->elements / c->parts;
        for (uint32_t i = 0; i < c->parts; i++)
            to[i] = nearest_code(x + i * size, c->codebook + (size_t)i * c->codes * size, c->codes,
                                 size);
    }
}

ac_status ac_replay_get(const ac_replay *r, uint32_t index, void *sample, uint32_t *label) {
    const ac_replay_config *c = r->config;
    const uint8_t *from = r->samples + (size_t)index * r->sample_bytes;
    float *x = sample;
    if (index >= r->counts[HELD])
        return AC_E_OFFSET;
    *label = r->labels[index];
    if (c->code == AC_REPLAY_RAW)
        memcpy(sample, from, r->sample_bytes);
    else if (c->code == AC_REPLAY_I8)
        for (uint32_t i = 0; i < c->elements; i++)
            x[i] = c->scale * (float)((int64_t)(int8_t)from[i] - c->zero);
    else {
        const uint32_t size = c->elements / c->parts;
        for (uint32_t i = 0; i < c->parts; i++)
            memcpy(x + i * size, c->codebook + ((size_t)i * c->codes + from[i]) * size,
                   4 * (size_t)size);
    }
    return AC_OK;
}

/* ---- what to keep -------------------------------------------------------------------------------------------------- */

static uint32_t distance(const uint8_t *a, const uint8_t *b, uint32_t size) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < size; i++) {
        const int32_t d = (int32_t)(int8_t)a[i] - (int8_t)b[i];
        sum += (uint32_t)(d * d);
    }
    return sum;
}

/* Any sample of a class; `salt` says for what. */
static uint32_t one_of(const ac_replay *r, uint32_t label, uint32_t salt) {
    uint32_t left = chance(r, r->counts[SEEN], salt, *held_of(r, label)), i = 0;
    while (r->labels[i] != label || left--)
        i++;
    return i;
}

/* Where a full buffer puts the next sample; -1: nowhere. */
static int32_t place(const ac_replay *r, uint32_t label) {
    const ac_replay_config *c = r->config;
    const uint32_t seen = r->counts[SEEN];
    if (c->keep == AC_REPLAY_RESERVOIR) {
        const uint32_t at = chance(r, seen, SALT_ADD, seen + 1);
        return at < c->capacity ? (int32_t)at : -1;
    }
    uint32_t largest = 0;
    for (uint32_t k = 1; k < c->classes; k++)
        if (*held_of(r, k) > *held_of(r, largest))
            largest = k;
    if (*held_of(r, label) < *held_of(r, largest))
        return (int32_t)one_of(r, largest, SALT_OTHER);
    if (chance(r, seen, SALT_ADD, *seen_of(r, label) + 1) >= *held_of(r, label))
        return -1;
    return (int32_t)one_of(r, label, SALT_OWN);
}

/* Find the nearest other sample of `index` anew. */
static void search(ac_replay *r, uint32_t index) {
    const uint8_t *own = r->samples + (size_t)index * r->sample_bytes;
    r->nearest[index] = UINT32_MAX;
    r->neighbour[index] = 0;
    for (uint32_t k = 0; k < r->counts[HELD]; k++) {
        const uint32_t d =
            k == index ? UINT32_MAX
                       : distance(own, r->samples + (size_t)k * r->sample_bytes, r->sample_bytes);
        if (d < r->nearest[index]) {
            r->nearest[index] = d;
            r->neighbour[index] = (uint16_t)k;
        }
    }
}

/* Tell all others that `index` holds another sample than before. */
static void moved(ac_replay *r, uint32_t index) {
    const uint8_t *own = r->samples + (size_t)index * r->sample_bytes;
    for (uint32_t k = 0; k < r->counts[HELD]; k++) {
        if (k == index)
            continue;
        const uint32_t d = distance(own, r->samples + (size_t)k * r->sample_bytes, r->sample_bytes);
        if (r->neighbour[k] == index && d > r->nearest[k])
            search(r, k);
        else if (d < r->nearest[k] || r->neighbour[k] == index) {
            r->nearest[k] = d;
            r->neighbour[k] = (uint16_t)index;
        }
    }
    search(r, index);
}

/* The sample of the closest pair that gives way, unless the new one is no further from what is there. */
static int32_t place_far(const ac_replay *r, const void *sample) {
    const ac_replay_config *c = r->config;
    uint32_t least = UINT32_MAX, closest = 0;
    for (uint32_t i = 0; i < c->capacity; i++)
        if (r->nearest[i] < r->nearest[closest])
            closest = i;
    for (uint32_t i = 0; i < c->capacity; i++) {
        const uint8_t *held = r->samples + (size_t)i * r->sample_bytes;
        uint32_t sum = 0;
        for (uint32_t k = 0; k < c->elements; k++) {
            const uint8_t *bytes = sample;
            const uint8_t code = c->code == AC_REPLAY_I8
                                     ? rounded(((const float *)sample)[k], c->scale, c->zero)
                                     : bytes[k];
            sum += distance(&code, held + k, 1);
        }
        if (sum < least)
            least = sum;
    }
    return least > r->nearest[closest] ? (int32_t)closest : -1;
}

int32_t ac_replay_add(ac_replay *r, const void *sample, uint32_t label) {
    const ac_replay_config *c = r->config;
    if (label >= c->classes || r->counts[SEEN] == UINT32_MAX)
        return -1;
    const int fresh = r->counts[HELD] < c->capacity;
    int32_t at = (int32_t)r->counts[HELD];
    if (fresh)
        r->counts[HELD]++;
    else
        at = c->keep == AC_REPLAY_DIVERSE ? place_far(r, sample) : place(r, label);
    r->counts[SEEN]++;
    ++*seen_of(r, label);
    if (at < 0)
        return at;
    if (!fresh)
        --*held_of(r, r->labels[at]);
    ++*held_of(r, label);
    encode(r, sample, r->samples + (size_t)at * r->sample_bytes);
    r->labels[at] = (uint16_t)label;
    if (c->keep == AC_REPLAY_DIVERSE)
        moved(r, (uint32_t)at);
    return at;
}

int32_t ac_replay_draw(ac_replay *r) {
    if (r->counts[HELD] == 0)
        return -1;
    return (int32_t)chance(r, r->counts[DRAWN]++, SALT_DRAW, r->counts[HELD]);
}
