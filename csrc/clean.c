/* What stands in the file under clear bits: bytes of earlier passes, or of an earlier snapshot. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/uio.h>
#include <unistd.h>

struct cleaner {
    qm_job *job;
    unsigned char *buffer;
    const struct qm_file *file;
    const struct qm_block *block;
    struct qm_fault *fault;
};

static int fail(struct cleaner *c, off_t at, int rc)
{
    c->fault->in_memory = 0;
    c->fault->at = at;
    return rc;
}

/* File positions [from, to) become zeros, by a hole where the file system makes one. */
static int make_zero(struct cleaner *c, off_t from, off_t to)
{
    static const unsigned char zeros[QM_MAX_PAGE];
    if (fallocate(c->file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from, to - from) == 0)
        return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS)
        return fail(c, from, -errno);
    while (from < to) {
        struct iovec iov = {.iov_base = (void *)(uintptr_t)zeros, .iov_len = sizeof(zeros)};
        if ((off_t)iov.iov_len > to - from)
            iov.iov_len = (size_t)(to - from);
        off_t len = (off_t)iov.iov_len, bad;
        int rc = qm_pwritev(c->job, c->file->fd, &iov, 1, from, 1, &bad);
        if (rc)
            return fail(c, bad, rc);
        from += len;
    }
    return 0;
}

/* Looks at `len` bytes (whole pages) at file position `at`; returns how many pages were not zero. */
static int64_t clean_piece(struct cleaner *c, off_t at, size_t len)
{
    size_t page = c->block->page_size;
    struct iovec iov = {.iov_base = c->buffer, .iov_len = len};
    off_t bad;
    ssize_t got = qm_preadv(c->job, c->file->fd, &iov, 1, at, 1, &bad);
    if (got < 0)
        return fail(c, bad, (int)got);
    int64_t found = 0;
    size_t from = 0, to = 0; /* pending stretch of stale pages */
    for (size_t p = 0; p < (size_t)got; p += page) {
        size_t have = (size_t)got - p < page ? (size_t)got - p : page;
        if (qm_is_zero(c->buffer + p, have))
            continue;
        found++;
        if (p != to) {
            int rc = to > from ? make_zero(c, at + (off_t)from, at + (off_t)to) : 0;
            if (rc)
                return rc;
            from = p;
        }
        to = p + have;
    }
    int rc = to > from ? make_zero(c, at + (off_t)from, at + (off_t)to) : 0;
    return rc ? rc : found;
}

int64_t qm_clean(qm_job *job, qm_channel *channel, const struct qm_file *file,
                 const struct qm_block *block, const uint64_t *data, uint64_t first,
                 uint64_t npages, struct qm_fault *fault)
{
    int rc = qm_block_check(block, file, first, npages);
    if (rc)
        return rc;
    struct cleaner c = {
        .job = job, .buffer = qm_channel_buffer(channel, 0), .file = file, .block = block,
        .fault = fault,
    };
    if (!c.buffer)
        return -ENOMEM;
    size_t page = block->page_size;
    uint64_t end = first + npages;
    int64_t found = 0;
    for (uint64_t k = next_clear(data, first, end); k < end;) {
        uint64_t stop = next_set(data, k, end);
        off_t at = lseek(file->fd, block->pages_offset + (off_t)(k * page), SEEK_DATA);
        if (at < 0 && errno == ENXIO)
            break;
        if (at > block->pages_offset) {
            uint64_t next = (uint64_t)(at - block->pages_offset) / page;
            if (next >= stop) {
                k = next_clear(data, next < end ? next : end, end);
                continue;
            }
            if (next > k)
                k = next;
        }
        uint64_t most = QM_CHUNK / page;
        uint64_t len = stop - k < most ? stop - k : most;
        int64_t n = clean_piece(&c, block->pages_offset + (off_t)(k * page), (size_t)len * page);
        if (n < 0)
            return n;
        found += n;
        k = next_clear(data, k + len, end);
    }
    return found;
}
