/* A part of a block on its way from records to its place in a file. */
#define _GNU_SOURCE
#include "bits.h"
#include "chunk.h"

#include <errno.h>
#include <string.h>

#define STAGE_WORDS (QM_STAGING_MAX / QM_MIN_PAGE / 64)

static uint64_t count(const uint64_t *bits, size_t npages)
{
    int64_t last;
    return qm_count(bits, npages, &last);
}

/* Takes the bits of `gone` out of `data`; returns how many were there. Bitmaps cost memory where
 * they
 * are written to. */
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

/* Other pages than the filled ones become zeros: they may be written along. */
static void blank(const struct qm_staging *stage, size_t page, size_t npages)
{
    for (size_t k = next_clear(stage->filled, 0, npages); k < npages;) {
        size_t stop = next_set(stage->filled, k, npages);
        memset(stage->base + k * page, 0, (stop - k) * page);
        k = next_clear(stage->filled, stop, npages);
    }
}

int64_t qm_write_staging(qm_job *job, qm_channel *channel, const struct qm_file *file,
                         const struct qm_block *block, const struct qm_staging *stage,
                         const struct qm_sparse *sparse, uint64_t *data, struct qm_fault *fault)
{
    size_t page = block->page_size;
    if (stage->len > QM_STAGING_MAX || stage->off % QM_CHUNK || stage->off > block->len ||
        stage->len > block->len - stage->off)
        return -EINVAL;
    struct qm_block part = {
        .len = stage->len,
        .pages_offset = block->pages_offset + (off_t)stage->off,
        .page_size = block->page_size,
    };
    size_t npages = (size_t)stage->len / page, words = (npages + 63) / 64;
    uint64_t *bits = data + stage->off / page / 64;
    int64_t lost = (int64_t)drop(bits, stage->zeroed, words);
    int first = lost == 0 && count(bits, npages) == 0;
    uint64_t filled = count(stage->filled, npages);
    if (filled == 0 && !(first && sparse->everything))
        return lost;
    struct qm_memory memory = {.base = stage->base, .fd = -1};
    if (first) {
        blank(stage, page, npages);
        return qm_write(job, channel, file, &part, &memory, sparse, NULL, bits, 0, npages, fault);
    }
    uint64_t before[STAGE_WORDS];
    memcpy(before, bits, words * sizeof(before[0]));
    struct qm_sparse exact = {.everything = sparse->everything};
    int rc =
        qm_write(job, channel, file, &part, &memory, &exact, stage->filled, bits, 0, npages, fault);
    for (size_t i = 0; i < words; i++)
        lost += __builtin_popcountll(before[i] & ~bits[i]);
    return rc ? rc : lost;
}
