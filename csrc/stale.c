/* Old bytes in the file under clear bits: from earlier passes, or from an earlier snapshot. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/uio.h>
#include <unistd.h>

/* Set pages read along with the clear ones around them, to have fewer and larger reads. */
#define BRIDGED 8

struct cleaner {
    const struct qm_transfer *transfer;
    unsigned char *buffer;
    uint64_t *stale; /* NULL: stale pages become zeros in the file */
    struct qm_fault *fault;
};

static int fail(struct cleaner *c, off_t at, int rc)
{
    c->fault->in_memory = 0;
    c->fault->at = at;
    return rc;
}

/* Zero the file positions [from, to), by punching a hole if the file system supports it. */
static int make_zero(struct cleaner *c, off_t from, off_t to)
{
    static const unsigned char zeros[QM_MAX_PAGE];
    int punched;
    do
        punched = fallocate(c->transfer->file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from,
                            to - from);
    while (punched < 0 && errno == EINTR);
    if (punched == 0)
        return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS)
        return fail(c, from, -errno);
    while (from < to) {
        struct iovec iov = {.iov_base = (void *)(uintptr_t)zeros, .iov_len = sizeof(zeros)};
        if ((off_t)iov.iov_len > to - from)
            iov.iov_len = (size_t)(to - from);
        off_t len = (off_t)iov.iov_len, bad;
        int rc = qm_pwritev(c->transfer->job, c->transfer->file->fd, &iov, 1, from, 1, &bad);
        if (rc)
            return fail(c, bad, rc);
        from += len;
    }
    return 0;
}

static int make_pages_zero(struct cleaner *c, off_t at, size_t from, size_t to)
{
    return to > from && !c->stale ? make_zero(c, at + (off_t)from, at + (off_t)to) : 0;
}

/* Check the clear pages among `npages` pages from page `first` on; returns how many were not
 * zero. */
static int64_t clean_piece(struct cleaner *c, uint64_t first, size_t npages)
{
    size_t page = c->transfer->block->page_size;
    off_t at = c->transfer->block->pages_offset + (off_t)(first * page);
    struct iovec iov = {.iov_base = c->buffer, .iov_len = npages * page};
    off_t bad;
    ssize_t got = qm_preadv(c->transfer->job, c->transfer->file->fd, &iov, 1, at, 1, &bad);
    if (got < 0)
        return fail(c, bad, (int)got);
    int64_t found = 0;
    size_t from = 0, to = 0; /* pending run of stale pages */
    for (size_t p = 0; p < (size_t)got; p += page) {
        uint64_t k = first + p / page;
        size_t have = (size_t)got - p < page ? (size_t)got - p : page;
        if (bit_get(c->transfer->data, k) || qm_is_zero(c->buffer + p, have))
            continue;
        found++;
        if (c->stale)
            bit_set(c->stale, k);
        if (p != to) {
            int rc = make_pages_zero(c, at, from, to);
            if (rc)
                return rc;
            from = p;
        }
        to = p + have;
    }
    int rc = make_pages_zero(c, at, from, to);
    return rc ? rc : found;
}

/* Return the end, at most `end`, of the piece that starts with the clear page k. */
static uint64_t piece_end(const uint64_t *data, uint64_t k, uint64_t end)
{
    uint64_t stop = next_set(data, k, end);
    while (stop < end) {
        uint64_t clear = next_clear(data, stop, end);
        if (clear == end || clear - stop > BRIDGED)
            break;
        stop = next_set(data, clear, end);
    }
    return stop;
}

static int64_t clean(struct cleaner *c, qm_channel *channel, uint64_t first, uint64_t npages)
{
    const struct qm_block *block = c->transfer->block;
    const uint64_t *data = c->transfer->data;
    int fd = c->transfer->file->fd;
    int rc = qm_transfer_check(c->transfer, first, npages);
    if (rc)
        return rc;
    c->buffer = qm_channel_buffer(channel, 0);
    if (!c->buffer)
        return -ENOMEM;
    size_t page = block->page_size;
    uint64_t end = first + npages;
    int64_t found = 0;
    for (uint64_t k = next_clear(data, first, end); k < end;) {
        off_t at = lseek(fd, block->pages_offset + (off_t)(k * page), SEEK_DATA);
        if (at < 0 && errno == ENXIO)
            break;
        if (at > block->pages_offset) {
            uint64_t next = (uint64_t)(at - block->pages_offset) / page;
            if (next >= end)
                break;
            if (next > k && bit_get(data, next)) {
                k = next_clear(data, next, end);
                continue;
            }
            if (next > k)
                k = next;
        }
        uint64_t most = k + QM_CHUNK / page;
        uint64_t stop = piece_end(data, k, most < end ? most : end);
        int64_t n = clean_piece(c, k, (size_t)(stop - k));
        if (n < 0)
            return n;
        found += n;
        k = next_clear(data, stop, end);
    }
    return found;
}

int64_t qm_stale_punch(const struct qm_transfer *t, qm_channel *channel, uint64_t first,
                       uint64_t npages, struct qm_fault *fault)
{
    struct cleaner c = {.transfer = t, .fault = fault};
    return clean(&c, channel, first, npages);
}

int64_t qm_find_stale(const struct qm_transfer *t, qm_channel *channel, uint64_t *stale,
                      uint64_t first, uint64_t npages, struct qm_fault *fault)
{
    struct cleaner c = {.transfer = t, .stale = stale, .fault = fault};
    return clean(&c, channel, first, npages);
}
