/* Which pages of a mapping are in the page table, or are copies of their own, by pagemap. */
#define _GNU_SOURCE
#include "bits.h"
#include "pagemap.h"
#include "qmigrate.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define REGIONS 512 /* taken from the kernel in one call */
#define WORDS_AT_ONCE 4096
/* Bytes of the mapping that one call looks at, so that a cancelled job is noticed. */
#define SCANNED_AT_ONCE ((uint64_t)1 << 30)

/* A part of a mapping, and the bitmap of its block. */
struct looking {
    qm_job *job;
    const struct qm_mapped_block *block;
    uint64_t *bits;
    int changed; /* only copies of its own */
};

/* The bits of the pages that bytes [from, to) of the block are in. */
static void mark(const struct looking *l, uint64_t from, uint64_t to)
{
    uint64_t page = l->block->page_size, npages = l->block->len / page;
    uint64_t first = from / page, end = (to + page - 1) / page;
    if (end > npages)
        end = npages;
    for (uint64_t k = first; k < end;) {
        if (k % 64 == 0 && end - k >= 64) {
            l->bits[k / 64] = ~(uint64_t)0;
            k += 64;
        } else {
            bit_set(l->bits, k++);
        }
    }
}

/* Bytes [off, end) of the block. */
static int look_by_scan(const struct looking *l, uint64_t off, uint64_t end)
{
    struct pagemap_region found[REGIONS];
    uint64_t address = l->block->address;
    for (uint64_t at = address + off, stop = address + end; at < stop;) {
        if (qm_job_cancelled(l->job))
            return -ECANCELED;
        uint64_t until = stop - at > SCANNED_AT_ONCE ? at + SCANNED_AT_ONCE : stop;
        struct pagemap_scan scan = {
            .size = sizeof(scan),
            .start = at,
            .end = until,
            .vec = (uintptr_t)found,
            .vec_len = REGIONS,
            .inverted = l->changed ? PAGEMAP_IS_FILE : 0,
            .all_of = l->changed ? PAGEMAP_IS_FILE : 0,
            .any_of = PAGEMAP_IS_PRESENT | (l->changed ? PAGEMAP_IS_SWAPPED : 0),
        };
        int n = ioctl(l->block->pagemap, PAGEMAP_SCAN, &scan);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        for (int i = 0; i < n; i++)
            mark(l, found[i].start - address, found[i].end - address);
        if (scan.walk_end <= at)
            return -EIO;
        at = scan.walk_end;
    }
    return 0;
}

static int is_wanted(const struct looking *l, uint64_t word)
{
    if (!l->changed)
        return (word & PAGEMAP_WORD_PRESENT) != 0;
    return (word & PAGEMAP_WORD_SWAPPED) ||
           ((word & PAGEMAP_WORD_PRESENT) && !(word & PAGEMAP_WORD_FILE));
}

static int look_by_words(const struct looking *l, uint64_t off, uint64_t end)
{
    uint64_t words[WORDS_AT_ONCE];
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    while (off < end) {
        if (qm_job_cancelled(l->job))
            return -ECANCELED;
        size_t wanted = (size_t)((end - off + page - 1) / page);
        if (wanted > WORDS_AT_ONCE)
            wanted = WORDS_AT_ONCE;
        ssize_t got = pread(l->block->pagemap, words, wanted * sizeof(words[0]),
                            (off_t)((l->block->address + off) / page * sizeof(words[0])));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < (ssize_t)sizeof(words[0]))
            return got < 0 ? -errno : -ESRCH;
        for (size_t k = 0; k < (size_t)got / sizeof(words[0]); k++, off += page)
            if (is_wanted(l, words[k]))
                mark(l, off, off + page);
    }
    return 0;
}

static int look(const struct looking *l, uint64_t first, uint64_t npages)
{
    const struct qm_mapped_block *b = l->block;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), size = b->page_size;
    if (size < QM_MIN_PAGE || size > QM_MAX_PAGE || (size & (size - 1)) || b->len % size ||
        b->address % page || first % 64 || first > b->len / size ||
        npages > b->len / size - first || first * size % page)
        return -EINVAL;
    uint64_t off = first * size, end = off + npages * size;
    return b->has_scan ? look_by_scan(l, off, (end + page - 1) / page * page)
                       : look_by_words(l, off, end);
}

int qm_find_changed(qm_job *job, const struct qm_mapped_block *block, uint64_t *bits,
                    uint64_t first, uint64_t npages)
{
    struct looking l = {.job = job, .block = block, .bits = bits, .changed = 1};
    return look(&l, first, npages);
}

int qm_find_present(qm_job *job, const struct qm_mapped_block *block, uint64_t *bits,
                    uint64_t first, uint64_t npages)
{
    struct looking l = {.job = job, .block = block, .bits = bits};
    return look(&l, first, npages);
}

uint64_t qm_add_bits(uint64_t *seen, const uint64_t *now, uint64_t *fresh, uint64_t npages)
{
    uint64_t count = 0;
    for (uint64_t w = 0; w < (npages + 63) / 64; w++) {
        uint64_t added = now[w] & ~seen[w];
        if (fresh && fresh[w] != added)
            fresh[w] = added;
        if (!added)
            continue;
        seen[w] |= added;
        count += (uint64_t)__builtin_popcountll(added);
    }
    return count;
}

uint64_t qm_list_runs(const uint64_t *bits, uint64_t first, uint64_t end, uint64_t *runs,
                      uint64_t max_runs, uint64_t *next)
{
    uint64_t n = 0, k = next_set(bits, first, end);
    for (; k < end && n < max_runs; n++) {
        uint64_t stop = next_clear(bits, k, end);
        runs[2 * n] = k;
        runs[2 * n + 1] = stop - k;
        k = next_set(bits, stop, end);
    }
    *next = k;
    return n;
}
