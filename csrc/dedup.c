/* Pages of a snapshot -> which of them a store has, and the others, gathered. */
#include "blake3.h"
#include "page_class.h"

#include <errno.h>
#include <string.h>

#define PAGE QM_STORE_PAGE

typedef uint64_t word __attribute__((may_alias, aligned(1)));

/* ---- kinds of pages ------------------------------------------------------------------------- */

static int is_set(const uint64_t *bits, uint64_t k)
{
    return (int)(bits[k / 64] >> k % 64 & 1);
}

/* Zeroes the parts of a store page whose bits are clear; returns whether any bit is set. */
static int clear_page(const struct qm_block *block, const uint64_t *bits, uint64_t off,
                      unsigned char *page)
{
    uint32_t size = block->page_size;
    if (size >= PAGE) {
        if (is_set(bits, off / size))
            return 1;
        memset(page, 0, PAGE);
        return 0;
    }
    int any = 0;
    for (uint32_t at = 0; at < PAGE; at += size) {
        if (is_set(bits, (off + at) / size))
            any = 1;
        else
            memset(page + at, 0, size);
    }
    return any;
}

/* Data pages that wait for their digests. */
struct waiting {
    struct qm_blake3_key key;
    const unsigned char *pages[QM_BLAKE3_GROUP];
    unsigned char *digests[QM_BLAKE3_GROUP];
    unsigned n;
};

static void digest_waiting(struct waiting *w)
{
    unsigned char unused[QM_DIGEST];
    if (w->n == 0)
        return;
    for (unsigned i = w->n; i < QM_BLAKE3_GROUP; i++) {
        w->pages[i] = w->pages[0];
        w->digests[i] = unused;
    }
    qm_blake3_group(&w->key, w->pages, w->digests);
    w->n = 0;
}

int qm_examine_pages(const unsigned char *key, const struct qm_block *block, const uint64_t *bits,
                     uint64_t off, unsigned char *bytes, uint64_t npages, unsigned char *kinds,
                     unsigned char *digests)
{
    uint32_t size = block->page_size;
    if (size < QM_MIN_PAGE || size > QM_MAX_PAGE || (size & (size - 1)))
        return -EINVAL;
    if (off % PAGE || off > block->len || npages > (block->len - off) / PAGE)
        return -EINVAL;
    struct waiting w = {.n = 0};
    qm_blake3_key_init(&w.key, key, 0);
    for (uint64_t k = 0; k < npages; k++, bytes += PAGE, digests += QM_DIGEST, off += PAGE) {
        if (bits && !clear_page(block, bits, off, bytes)) {
            kinds[k] = QM_PAGE_ZERO;
            continue;
        }
        if (page_filled(bytes, PAGE)) {
            memcpy(digests, bytes, sizeof(uint64_t));
            kinds[k] = *(const word *)bytes ? QM_PAGE_FILLED : QM_PAGE_ZERO;
            continue;
        }
        kinds[k] = QM_PAGE_DATA;
        w.pages[w.n] = bytes;
        w.digests[w.n++] = digests;
        if (w.n == QM_BLAKE3_GROUP)
            digest_waiting(&w);
    }
    digest_waiting(&w);
    return 0;
}

/* ---- pages that are known ------------------------------------------------------------------- */

/* The slot of the digest, or the empty one where it belongs. Digests are keyed: a guest cannot choose
 * pages whose slots collide. */
static uint32_t *find_slot(const struct qm_known *known, const unsigned char *digest)
{
    uint64_t mask = known->nslots - 1;
    uint64_t at = *(const word *)digest & mask;
    while (known->slots[at]) {
        const unsigned char *other = known->digests + (known->slots[at] - 1) * QM_DIGEST;
        if (memcmp(other, digest, QM_DIGEST) == 0)
            break;
        at = (at + 1) & mask;
    }
    return &known->slots[at];
}

/* More than half full, searches would take long. */
static int has_slots(const struct qm_known *known, uint64_t npages)
{
    uint64_t n = known->nslots;
    return n && (n & (n - 1)) == 0 && npages <= n / 2 && npages < UINT32_MAX;
}

int qm_known_index(struct qm_known *known, uint64_t first, uint64_t npages)
{
    if (npages > known->room || first > npages)
        return -EINVAL;
    if (!has_slots(known, npages))
        return -ENOSPC;
    for (uint64_t k = first; k < npages; k++) {
        uint32_t *slot = find_slot(known, known->digests + k * QM_DIGEST);
        if (!*slot)
            *slot = (uint32_t)(k + 1);
    }
    known->npages = npages;
    return 0;
}

static void add_run(struct qm_page_run *runs, uint64_t *nruns, uint64_t page, uint64_t number)
{
    if (*nruns) {
        struct qm_page_run *last = &runs[*nruns - 1];
        if (last->first + last->npages == page && last->number + last->npages == number) {
            last->npages++;
            return;
        }
    }
    runs[(*nruns)++] = (struct qm_page_run){page, 1, number};
}

static void add_fill(struct qm_page_run *fills, uint64_t *nfills, uint64_t page, uint64_t filler)
{
    if (*nfills) {
        struct qm_page_run *last = &fills[*nfills - 1];
        if (last->first + last->npages == page && last->number == filler) {
            last->npages++;
            return;
        }
    }
    fills[(*nfills)++] = (struct qm_page_run){page, 1, filler};
}

/* The word as a little-endian number. */
static uint64_t filler_of(const unsigned char *bytes)
{
    uint64_t w = *(const word *)bytes;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    w = __builtin_bswap64(w);
#endif
    return w;
}

int qm_find_pages(struct qm_known *known, struct qm_found *found, const unsigned char *bytes,
                  uint64_t page, uint64_t npages, const unsigned char *kinds,
                  const unsigned char *digests)
{
    if (npages > found->room || npages > known->room - known->npages)
        return -EINVAL;
    if (!has_slots(known, known->npages + npages))
        return -ENOSPC;
    found->nruns = found->nfills = found->nfresh = 0;
    for (uint64_t k = 0; k < npages; k++, bytes += PAGE, digests += QM_DIGEST) {
        if (kinds[k] == QM_PAGE_ZERO)
            continue;
        if (kinds[k] == QM_PAGE_FILLED) {
            add_fill(found->fills, &found->nfills, page + k, filler_of(digests));
            continue;
        }
        uint32_t *slot = find_slot(known, digests);
        if (!*slot) {
            memcpy(known->digests + known->npages * QM_DIGEST, digests, QM_DIGEST);
            *slot = (uint32_t)++known->npages;
            memcpy(found->fresh + found->nfresh * PAGE, bytes, PAGE);
            found->places[found->nfresh++] = page + k;
        }
        add_run(found->runs, &found->nruns, page + k, (uint64_t)*slot - 1);
    }
    return 0;
}

int64_t qm_split_runs(const struct qm_page_run *runs, uint64_t nruns, const uint64_t *starts,
                      uint64_t nstarts, struct qm_page_run *parts, uint32_t *groups)
{
    int64_t n = 0;
    uint64_t group = 0;
    for (uint64_t k = 0; k < nruns; k++) {
        struct qm_page_run run = runs[k];
        if (nstarts < 2 || run.number < starts[0] || run.number >= starts[nstarts - 1] ||
            run.npages > starts[nstarts - 1] - run.number)
            return -EINVAL;
        if (run.number < starts[group] || run.number >= starts[group + 1]) {
            uint64_t low = 0, high = nstarts - 1; /* starts[low] <= number < starts[high] */
            while (high - low > 1) {
                uint64_t middle = low + (high - low) / 2;
                if (starts[middle] <= run.number)
                    low = middle;
                else
                    high = middle;
            }
            group = low;
        }
        while (run.npages) {
            while (run.number >= starts[group + 1])
                group++;
            uint64_t left = starts[group + 1] - run.number;
            uint64_t part = run.npages < left ? run.npages : left;
            if (parts) {
                parts[n] = (struct qm_page_run){run.first, part, run.number - starts[group]};
                groups[n] = (uint32_t)group;
            }
            n++;
            run.first += part;
            run.number += part;
            run.npages -= part;
        }
    }
    return n;
}

void qm_xor(void *bytes, const void *other, size_t len)
{
    unsigned char *to = bytes;
    const unsigned char *from = other;
    for (size_t i = 0; i < len; i++)
        to[i] ^= from[i];
}
