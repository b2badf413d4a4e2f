/* Guest memory -> chunk: classify its pages as zero or data, and make the data readable. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"
#include "chunk.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Bytes read and then scanned while they are still in the cache. */
#define SCAN_STEP ((size_t)256 << 10)

ssize_t qm_memory_fill(const struct qm_memory *m, void *buf, uint64_t off, size_t len)
{
    if (m->fill)
        return m->fill(m->fill_arg, buf, off, len);
    size_t have = 0;
    while (have < len) {
        ssize_t got = pread(m->fd, (unsigned char *)buf + have, len - have,
                            m->fd_offset + (off_t)(off + have));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        if (got == 0)
            break;
        have += (size_t)got;
    }
    return (ssize_t)have;
}

/* Check that the file behind the memory still contains the chunk: beyond its end everything looks
 * like a hole. */
static int check_size(struct qm_source *s, const struct chunk *c)
{
    const struct qm_memory *m = s->transfer->memory;
    if (m->fill)
        return 0;
    /* Not fstat: built on a new glibc it would need glibc 2.33. */
    off_t size = lseek(m->fd, 0, SEEK_END);
    if (size < 0)
        return memory_fault(s->fault, c->off, -errno);
    uint64_t end = (uint64_t)m->fd_offset + c->off + c->len;
    if ((uint64_t)size < end)
        return memory_fault(s->fault, c->off, -EFAULT);
    return 0;
}

/* Return the byte of the chunk where the hole at `at` ends, rounded down to a multiple of pages and
 * units; -errno. */
static int64_t skip_hole(struct qm_source *s, const struct chunk *c, size_t at)
{
    int rc = check_size(s, c);
    if (rc)
        return rc;
    uint64_t end = c->off + c->len;
    const struct qm_memory *m = s->transfer->memory;
    uint64_t data = (uint64_t)(m->fill ? m->next(m->fill_arg, c->off + at, end)
                                       : qm_next_data(m, c->off + at, end));
    if (data == end)
        return (int64_t)c->len;
    size_t next = (size_t)(data - c->off) / QM_MAX_PAGE * QM_MAX_PAGE;
    return (int64_t)(next > at ? next : at);
}

/* Copy memory without an address into a bounce buffer. Holes are looked for where zeros were
 * found. */
static int fill_chunk(struct qm_source *s, struct chunk *c)
{
    const struct qm_memory *m = s->transfer->memory;
    int number = qm_channel_next(s->channel, s->transfer->job);
    unsigned char *buffer = qm_channel_buffer(s->channel, number);
    if (!buffer)
        return -ENOMEM;
    c->bytes = buffer;
    c->buffer = number;

    size_t page = s->transfer->block->page_size;
    int look = s->look_for_holes;
    for (size_t at = 0; at < c->len;) {
        if (look && (!m->fill || m->next)) {
            int64_t next = skip_hole(s, c, at);
            if (next < 0)
                return (int)next;
            if ((size_t)next > at) {
                /* The bytes matter only if they are written as part of a run. */
                if ((size_t)next - at <= s->longest_gap)
                    memset(buffer + at, 0, (size_t)next - at);
                at = (size_t)next;
                continue;
            }
        }
        size_t step = c->len - at < SCAN_STEP ? c->len - at : SCAN_STEP;
        ssize_t got = qm_memory_fill(m, buffer + at, c->off + at, step);
        if (got < 0)
            return memory_fault(s->fault, c->off + at, (int)got);
        if ((size_t)got < step)
            return memory_fault(s->fault, c->off + at + (size_t)got, -EFAULT);
        look = 1;
        for (size_t p = 0; p < step; p += page) {
            if (!qm_is_zero(buffer + at + p, page)) {
                bit_set(c->data, (at + p) / page);
                look = 0;
            }
        }
        at += step;
    }
    return 0;
}

/* Scan a mapping, without touching its holes. */
static void scan_extents(struct qm_source *s, struct chunk *c)
{
    const struct qm_memory *m = s->transfer->memory;
    size_t page = s->transfer->block->page_size;
    uint64_t end = c->off + c->len;
    uint64_t at = c->off;
    c->has_holes = 1;
    while (at < end) {
        uint64_t stop = qm_channel_data_until(s->channel, m, at, end);
        if (stop == at) {
            int64_t data = qm_next_data(m, at, end);
            at = (uint64_t)data;
            continue;
        }
        size_t from = (size_t)((at - c->off) / page);
        size_t to = (size_t)((stop - c->off + page - 1) / page);
        for (size_t k = from; k < to; k++) {
            bit_set(c->resident, k);
            if (!qm_is_zero(c->bytes + k * page, page))
                bit_set(c->data, k);
        }
        at = stop;
    }
}

/* Return whether each page of the mapping is either data or a hole. */
static int holes_are_pages(const struct qm_transfer *t)
{
    long page = sysconf(_SC_PAGESIZE);
    return t->block->page_size <= (uint64_t)page && t->memory->fd_offset % page == 0;
}

/* Return whether a chunk of a mapped file is read through the mapping. For direct I/O small pages are
 * not: to map them takes as long as to copy them, and they are scattered. */
static int use_mapping(struct qm_source *s, const struct chunk *c)
{
    const struct qm_memory *m = s->transfer->memory;
    if (m->fd < 0 || !s->direct)
        return m->fd < 0 || holes_are_pages(s->transfer);
    uint64_t end = c->off + c->len;
    uint64_t data = (uint64_t)qm_next_data(m, c->off, end);
    return holes_are_pages(s->transfer) &&
           (data == end || qm_maps_huge(s->pagemap, m->base + data));
}

int qm_chunk_load(struct qm_source *s, struct chunk *c, uint64_t first, uint64_t end)
{
    const struct qm_memory *m = s->transfer->memory;
    uint32_t page = s->transfer->block->page_size;
    size_t most = QM_CHUNK / page;
    c->first = first;
    c->npages = end - first < most ? (size_t)(end - first) : most;
    c->off = first * page;
    c->len = c->npages * page;
    memset(c->data, 0, sizeof(c->data));
    c->buffer = -1;
    c->has_holes = 0;
    if (!m->base || !use_mapping(s, c))
        return fill_chunk(s, c);
    c->bytes = m->base + c->off;
    if (m->fd >= 0) {
        memset(c->resident, 0, sizeof(c->resident));
        scan_extents(s, c);
    } else {
        qm_scan(c->bytes, c->npages, page, c->data);
    }
    return 0;
}
