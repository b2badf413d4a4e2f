/* Find the pages that are zero. */
#include "qmigrate.h"

#include <errno.h>
#include <string.h>

/* Bytes examined between two decisions: a typical data page is left after one stride. */
#define STRIDE 256u
#define LINE 64u
/* Prefetch distance: processors do not prefetch past the end of a 4 KiB page. */
#define AHEAD 4096u

typedef uint64_t word __attribute__((may_alias, aligned(1)));

static inline uint64_t any_bit(const word *w)
{
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (unsigned i = 0; i < STRIDE / sizeof(word); i += 4) {
        a |= w[i];
        b |= w[i + 1];
        c |= w[i + 2];
        d |= w[i + 3];
    }
    return a | b | c | d;
}

static inline int zero_page(const unsigned char *page, size_t len)
{
    for (size_t i = 0; i < len; i += STRIDE) {
        for (size_t line = 0; line < STRIDE; line += LINE)
            __builtin_prefetch(page + i + AHEAD + line);
        if (any_bit((const word *)(page + i)))
            return 0;
    }
    return 1;
}

int qm_is_zero(const void *bytes, size_t len)
{
    const unsigned char *p = bytes;
    size_t whole = len / STRIDE * STRIDE;
    if (!zero_page(p, whole))
        return 0;
    unsigned char rest = 0;
    for (size_t i = whole; i < len; i++)
        rest |= p[i];
    return rest == 0;
}

int64_t qm_scan(const void *bytes, uint64_t npages, uint32_t page_size, uint64_t *bits)
{
    if (page_size < QM_MIN_PAGE || page_size > QM_MAX_PAGE || (page_size & (page_size - 1)))
        return -EINVAL;
    const unsigned char *page = bytes;
    int64_t set = 0;
    for (uint64_t k = 0; k < npages;) {
        uint64_t end = npages - k < 64 ? npages - k : 64;
        uint64_t w = 0;
        for (uint64_t i = 0; i < end; i++, page += page_size) {
            /* Each data page is a cache miss that no hardware prefetcher predicts. */
            __builtin_prefetch(page + 2 * (size_t)page_size);
            w |= (uint64_t)!zero_page(page, page_size) << i;
        }
        bits[k / 64] = w;
        set += __builtin_popcountll(w);
        k += end;
    }
    return set;
}

uint64_t qm_sum(const void *bytes, size_t len)
{
    const word *w = bytes;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    size_t n = len / sizeof(word);
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        a += w[i];
        b += w[i + 1];
        c += w[i + 2];
        d += w[i + 3];
    }
    for (; i < n; i++)
        a += w[i];
    return a + b + c + d;
}
