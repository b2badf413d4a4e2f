/* Whether memory of this process is in large contiguous pieces of the machine's memory. */
#define _GNU_SOURCE
#include "pagemap.h"
#include "chunk.h"

#include <fcntl.h>
#include <unistd.h>

/* Pieces shorter than this, on average, are scattered: a device takes a few hundred of them in a
 * request, so a direct write of scattered pages becomes several requests. */
#define LEAST_PIECE ((size_t)32 << 10)
#define WORDS_AT_ONCE 512

/* Return how many contiguous pieces the pages of `words` are in, 0 if the kernel does not say where
 * they are (it tells CAP_SYS_ADMIN only). */
static size_t count_pieces(const uint64_t *words, size_t n)
{
    size_t pieces = 0, known = 0;
    uint64_t next = 0;
    for (size_t k = 0; k < n; k++) {
        uint64_t frame = words[k] & PAGEMAP_WORD_FRAME;
        known += frame != 0;
        pieces += frame != next;
        next = frame + 1;
    }
    return known ? pieces : 0;
}

/* Return whether most of [address, end) is mapped by huge pages. */
static int is_huge(int pagemap, uint64_t address, uint64_t end)
{
    struct pagemap_region found[WORDS_AT_ONCE / 8];
    struct pagemap_scan scan = {
        .size = sizeof(scan),
        .start = address,
        .end = end,
        .vec = (uintptr_t)found,
        .vec_len = sizeof(found) / sizeof(found[0]),
        .all_of = PAGEMAP_IS_HUGE,
    };
    int n = ioctl(pagemap, PAGEMAP_SCAN, &scan);
    uint64_t huge = 0;
    for (int i = 0; i < n; i++)
        huge += found[i].end - found[i].start;
    return huge > (end - address) / 2;
}

int qm_pagemap_open(void)
{
    return open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
}

int qm_maps_huge(int pagemap, const unsigned char *byte)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), address = (uintptr_t)byte / page * page;
    (void)*(const volatile unsigned char *)byte; /* what is not mapped yet has no size */
    return is_huge(pagemap, address, address + page);
}

int qm_is_scattered(int pagemap, const unsigned char *bytes, size_t len)
{
    if (pagemap < 0)
        return 1;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint64_t from = (uintptr_t)bytes / page, end = ((uintptr_t)bytes + len + page - 1) / page;
    size_t pieces = 0;
    for (uint64_t at = from; at < end;) {
        uint64_t words[WORDS_AT_ONCE];
        size_t n = end - at < WORDS_AT_ONCE ? (size_t)(end - at) : WORDS_AT_ONCE;
        ssize_t got = pread(pagemap, words, n * sizeof(words[0]), (off_t)(at * sizeof(words[0])));
        size_t some = got == (ssize_t)(n * sizeof(words[0])) ? count_pieces(words, n) : 0;
        if (some == 0)
            return !is_huge(pagemap, from * page, end * page);
        pieces += some;
        at += n;
    }
    return len / pieces < LEAST_PIECE;
}
