/* Guest memory -> chunk: which of its pages are zero, and where the others can be read. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"
#include "chunk.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Bytes read and scanned at a time, while they are still in the cache. */
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

/* Whether the file behind the memory still has the chunk: past its end all would look like a
 * hole. */
static int still_there(struct qm_source *s, const struct chunk *c)
{
    if (s->memory->fill)
        return 0;
    /* Not fstat: built on a new glibc it would need glibc 2.33. */
    off_t size = lseek(s->memory->fd, 0, SEEK_END);
    if (size < 0)
        return memory_fault(s->fault, c->off, -errno);
    uint64_t end = (uint64_t)s->memory->fd_offset + c->off + c->len;
    if ((uint64_t)size < end)
        return memory_fault(s->fault, c->off, -EFAULT);
    return 0;
}

/* Byte of the chunk where the hole at `at` ends, in steps that keep pages and units whole;
 * -errno. */
static int64_t skip_hole(struct qm_source *s, const struct chunk *c, size_t at)
{
    int rc = still_there(s, c);
    if (rc)
        return rc;
    uint64_t end = c->off + c->len;
    const struct qm_memory *m = s->memory;
    uint64_t data = (uint64_t)(m->fill ? m->next(m->fill_arg, c->off + at, end)
                                       : qm_next_data(m, c->off + at, end));
    if (data == end)
        return (int64_t)c->len;
    size_t next = (size_t)(data - c->off) / QM_MAX_PAGE * QM_MAX_PAGE;
    return (int64_t)(next > at ? next : at);
}

/* Memory without an address: copied into the bounce buffer; where zeros are met, holes are
 * sought. */
static int fill_chunk(struct qm_source *s, struct chunk *c)
{
    int number = qm_channel_next(s->channel, s->job);
    unsigned char *buffer = qm_channel_buffer(s->channel, number);
    if (!buffer)
        return -ENOMEM;
    c->bytes = buffer;
    c->buffer = number;

    size_t page = s->block->page_size;
    int look = s->look_for_holes;
    for (size_t at = 0; at < c->len;) {
        if (look && (!s->memory->fill || s->memory->next)) {
            int64_t next = skip_hole(s, c, at);
            if (next < 0)
                return (int)next;
            if ((size_t)next > at) {
                /* Nobody reads what stands there, unless it is written as part of a run. */
                if ((size_t)next - at <= s->longest_gap)
                    memset(buffer + at, 0, (size_t)next - at);
                at = (size_t)next;
                continue;
            }
        }
        size_t step = c->len - at < SCAN_STEP ? c->len - at : SCAN_STEP;
        ssize_t got = qm_memory_fill(s->memory, buffer + at, c->off + at, step);
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

/* A mapping whose holes must stay holes. */
static void scan_extents(struct qm_source *s, struct chunk *c)
{
    size_t page = s->block->page_size;
    uint64_t end = c->off + c->len;
    uint64_t at = c->off;
    c->has_holes = 1;
    while (at < end) {
        uint64_t stop = qm_channel_data_until(s->channel, s->memory, at, end);
        if (stop == at) {
            int64_t data = qm_next_data(s->memory, at, end);
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

/* Whether holes of the mapping can be told apart page by page. */
static int holes_are_pages(const struct qm_source *s)
{
    long page = sysconf(_SC_PAGESIZE);
    return s->block->page_size <= (uint64_t)page && s->memory->fd_offset % page == 0;
}

int qm_chunk_load(struct qm_source *s, struct chunk *c, uint64_t first, uint64_t end)
{
    const struct qm_memory *m = s->memory;
    size_t most = QM_CHUNK / s->block->page_size;
    c->first = first;
    c->npages = end - first < most ? (size_t)(end - first) : most;
    c->off = first * s->block->page_size;
    c->len = c->npages * s->block->page_size;
    memset(c->data, 0, sizeof(c->data));
    c->buffer = -1;
    c->has_holes = 0;
    if (!m->base || (m->fd >= 0 && !holes_are_pages(s)))
        return fill_chunk(s, c);
    c->bytes = m->base + c->off;
    if (m->fd >= 0) {
        memset(c->resident, 0, sizeof(c->resident));
        scan_extents(s, c);
    } else {
        qm_scan(c->bytes, c->npages, s->block->page_size, c->data);
    }
    return 0;
}
