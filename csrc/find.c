/* Search bytes in memory: occurrences of a pattern, and runs of printable characters. */
#define _GNU_SOURCE
#include "qmigrate.h"

#include <errno.h>
#include <string.h>

#define LANES 16u
#define STRIDE (4 * LANES)

typedef uint8_t lanes __attribute__((vector_size(LANES), may_alias));
typedef lanes loose __attribute__((aligned(1)));
typedef uint64_t halves __attribute__((vector_size(LANES), may_alias));

/* ---- a pattern ------------------------------------------------------------------------------ */

/* Lower is rarer in guest memory, where zeros are everywhere, and then small numbers and text. */
static unsigned commonness(unsigned char byte)
{
    if (byte == 0)
        return 5;
    if (byte == 0xff)
        return 4;
    if (byte < 16)
        return 3;
    return byte == ' ' || (byte >= 'a' && byte <= 'z') ? 2 : 1;
}

/* Choose two positions of the pattern, with rare bytes that differ if possible. */
static void choose_probes(const unsigned char *pattern, size_t len, size_t *a, size_t *b)
{
    *a = 0;
    for (size_t i = 1; i < len; i++)
        if (commonness(pattern[i]) < commonness(pattern[*a]))
            *a = i;
    *b = *a ? 0 : len - 1;
    unsigned best = 99;
    for (size_t i = 0; i < len; i++) {
        unsigned cost = commonness(pattern[i]) + (pattern[i] == pattern[*a] ? 8 : 0);
        if (i != *a && cost < best) {
            best = cost;
            *b = i;
        }
    }
}

static inline lanes equal(const unsigned char *bytes, lanes value)
{
    return (lanes)(*(const loose *)bytes == value);
}

static inline uint64_t any(lanes v)
{
    halves h = (halves)v;
    return h[0] | h[1];
}

/* Return the first position from `at` on, below `to`, where both probes match; `to` if there is
 * none. */
static size_t next_candidate(const unsigned char *bytes, size_t at, size_t to, size_t a, size_t b,
                             unsigned char value_a, unsigned char value_b)
{
    lanes va = (lanes){0} + value_a, vb = (lanes){0} + value_b;
    for (; to - at >= STRIDE; at += STRIDE) {
        lanes hits = {0};
        for (size_t k = 0; k < STRIDE; k += LANES)
            hits |= equal(bytes + at + a + k, va) & equal(bytes + at + b + k, vb);
        if (any(hits))
            break;
    }
    for (; at < to; at++)
        if (bytes[at + a] == value_a && bytes[at + b] == value_b)
            return at;
    return to;
}

int64_t qm_find(const void *memory, size_t len, size_t from, size_t to, const void *pattern,
                size_t pattern_len, uint32_t *found, size_t most, size_t *next)
{
    const unsigned char *bytes = memory, *wanted = pattern;
    if (pattern_len == 0 || from > to || to > len || len > UINT32_MAX)
        return -EINVAL;
    size_t count = 0, at = from, a, b;
    *next = to;
    if (len < pattern_len)
        return 0;
    if (to > len - pattern_len + 1)
        to = len - pattern_len + 1;
    choose_probes(wanted, pattern_len, &a, &b);
    while (at < to) {
        at = next_candidate(bytes, at, to, a, b, wanted[a], wanted[b]);
        if (at == to)
            break;
        if (memcmp(bytes + at, wanted, pattern_len) != 0) {
            at++;
            continue;
        }
        found[count++] = (uint32_t)at;
        at += pattern_len;
        if (count == most) {
            if (at < *next)
                *next = at;
            break;
        }
    }
    return (int64_t)count;
}

/* ---- strings -------------------------------------------------------------------------------- */

static inline int printable(unsigned char byte)
{
    return byte == '\t' || (byte >= ' ' && byte <= '~');
}

static inline int is_char(const unsigned char *bytes, size_t at, size_t len, size_t width)
{
    return at + width <= len && printable(bytes[at]) && (width == 1 || bytes[at + 1] == 0);
}

/* Return where the first run of at least `min` characters, or of any number at an edge, may start,
 * from `at` on. Bytes before the last one of a shortest run are skipped if that is not printable. */
static size_t skip_short(const unsigned char *bytes, size_t at, size_t end, size_t min)
{
    while (at + min <= end) {
        size_t k = at + min;
        while (k > at && printable(bytes[k - 1]))
            k--;
        if (k == at)
            break;
        at = k;
    }
    return at;
}

int64_t qm_strings(const void *memory, size_t len, size_t from, size_t to, size_t min, size_t width,
                   uint32_t *found, size_t most, size_t *next)
{
    const unsigned char *bytes = memory;
    if ((width != 1 && width != 2) || min == 0 || from > to || to > len || len > UINT32_MAX)
        return -EINVAL;
    size_t count = 0, at = from, head = from + width;
    *next = to;
    while (at < to) {
        if (width == 1 && at >= head)
            at = skip_short(bytes, at, to, min);
        size_t end = at;
        while (end < to && is_char(bytes, end, len, width))
            end += width;
        if (end == at) {
            at++;
            continue;
        }
        if ((end - at) / width >= min || at < head || end >= to) {
            found[2 * count] = (uint32_t)at;
            found[2 * count + 1] = (uint32_t)end;
            if (++count == most) {
                *next = end < to ? end : to;
                break;
            }
        }
        at = end;
    }
    return (int64_t)count;
}
