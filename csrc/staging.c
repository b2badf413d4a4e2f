/* Write a staged part of a block to its place in the file. */
#define _GNU_SOURCE
#include "bits.h"
#include "chunk.h"

#include <errno.h>
#include <string.h>

#define STAGING_WORDS (QM_STAGING_MAX / QM_MIN_PAGE / 64)

static uint64_t count(const uint64_t *bits, size_t npages)
{
    int64_t last;
    return qm_count(bits, npages, &last);
}

/* Clear the bits of `gone` in `data`; returns how many were set. A bitmap uses memory where it is
 * written to. */
static uint64_t drop(uint64_t *data, const uint64_t *gone, size_t words)
{
    uint64_t dropped = 0;
    for (size_t i = 0; i < words; i++) {
        uint64_t both = data[i] & gone[i];
        if (both)
            data[i] &= ~both;
        dropped += (uint64_t)__builtin_popcountll(both);
    }
    return dropped;
}

/* Zero the pages that are not filled: they may be written along. */
static void blank(const struct qm_staging *staging, size_t page, size_t npages)
{
    for (size_t k = next_clear(staging->filled, 0, npages); k < npages;) {
        size_t stop = next_set(staging->filled, k, npages);
        memset(staging->base + k * page, 0, (stop - k) * page);
        k = next_clear(staging->filled, stop, npages);
    }
}

int64_t qm_write_staging(const struct qm_transfer *whole, qm_channel *channel,
                         const struct qm_staging *staging, struct qm_fault *fault)
{
    const struct qm_block *block = whole->block;
    size_t page = block->page_size;
    if (staging->len > QM_STAGING_MAX || staging->off % QM_CHUNK || staging->off > block->len ||
        staging->len > block->len - staging->off)
        return -EINVAL;
    struct qm_block part = {
        .len = staging->len,
        .pages_offset = block->pages_offset + (off_t)staging->off,
        .page_size = block->page_size,
    };
    struct qm_memory memory = {.base = staging->base, .fd = -1};
    uint64_t *bits = whole->data + staging->off / page / 64;
    struct qm_transfer t = *whole;
    t.block = &part;
    t.memory = &memory;
    t.selection = NULL;
    t.data = bits;

    size_t npages = (size_t)staging->len / page, words = (npages + 63) / 64;
    int64_t lost = (int64_t)drop(bits, staging->zeroed, words);
    int first = lost == 0 && count(bits, npages) == 0;
    uint64_t filled = count(staging->filled, npages);
    if (filled == 0 && !(first && t.policy->everything))
        return lost;
    if (first) {
        blank(staging, page, npages);
        return qm_write(&t, channel, 0, npages, fault);
    }
    uint64_t before[STAGING_WORDS];
    memcpy(before, bits, words * sizeof(before[0]));
    struct qm_policy exact = {.everything = t.policy->everything};
    t.policy = &exact;
    t.selection = staging->filled;
    int rc = qm_write(&t, channel, 0, npages, fault);
    for (size_t i = 0; i < words; i++)
        lost += __builtin_popcountll(before[i] & ~bits[i]);
    return rc ? rc : lost;
}
