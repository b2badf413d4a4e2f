/* Bytes -> guest memory: copy, write to the file behind it, zero. */
#define _GNU_SOURCE
#include "bits.h"
#include "chunk.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

int qm_store(const struct qm_memory *m, uint64_t off, const unsigned char *bytes, size_t len,
             struct qm_fault *fault)
{
    if (m->fd < 0) {
        memcpy(m->base + off, bytes, len);
        return 0;
    }
    /* Never through the mapping: the file may have become shorter. */
    while (len > 0) {
        ssize_t put = pwrite(m->fd, bytes, len, m->fd_offset + (off_t)off);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return memory_fault(fault, off, put < 0 ? -errno : -EIO);
        bytes += put;
        off += (uint64_t)put;
        len -= (size_t)put;
    }
    return 0;
}

int qm_storev(const struct qm_memory *m, uint64_t off, const struct iovec *iov, int n,
              struct qm_fault *fault)
{
    if (m->fd >= 0) {
        size_t len = 0;
        for (int i = 0; i < n; i++)
            len += iov[i].iov_len;
        if (pwritev(m->fd, iov, n, m->fd_offset + (off_t)off) == (ssize_t)len)
            return 0;
    }
    /* One by one for memory that is not a file, and to find out where the call failed. */
    for (int i = 0; i < n; i++) {
        int rc = qm_store(m, off, iov[i].iov_base, iov[i].iov_len, fault);
        if (rc)
            return rc;
        off += iov[i].iov_len;
    }
    return 0;
}

static int write_zeros(const struct qm_memory *m, uint64_t off, uint64_t end,
                       struct qm_fault *fault)
{
    static const unsigned char zeros[QM_MAX_PAGE];
    while (off < end) {
        size_t len = end - off < sizeof(zeros) ? (size_t)(end - off) : sizeof(zeros);
        int rc = qm_store(m, off, zeros, len, fault);
        if (rc)
            return rc;
        off += len;
    }
    return 0;
}

int qm_store_zeros(const struct qm_memory *m, uint32_t page_size, uint64_t off, uint64_t end,
                   struct qm_fault *fault)
{
    if (m->fd < 0) {
        /* Zero pages are not written: they may be untouched memory. */
        for (; off < end; off += page_size)
            if (!qm_is_zero(m->base + off, page_size))
                memset(m->base + off, 0, page_size);
        return 0;
    }
    off = (uint64_t)qm_next_data(m, off, end);
    if (off >= end)
        return 0;
    off_t at = m->fd_offset + (off_t)off;
    int rc;
    do
        rc = fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, (off_t)(end - off));
    while (rc < 0 && errno == EINTR);
    if (rc == 0)
        return 0;
    if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL)
        return write_zeros(m, off, end, fault);
    return memory_fault(fault, off, -errno);
}

int qm_store_clear(const struct qm_transfer *t, uint64_t first, uint64_t end,
                   struct qm_fault *fault)
{
    uint32_t page = t->block->page_size;
    for (uint64_t k = next_clear(t->data, first, end); k < end;) {
        uint64_t stop = next_set(t->data, k, end);
        int rc = qm_store_zeros(t->memory, page, k * page, stop * page, fault);
        if (rc)
            return rc;
        k = next_clear(t->data, stop, end);
    }
    return 0;
}

int qm_zero_clear(const struct qm_transfer *t, struct qm_fault *fault)
{
    uint32_t page = t->block->page_size;
    uint64_t end = t->block->len / page, most = QM_CHUNK / page;
    int rc = qm_transfer_check(t, 0, end);
    for (uint64_t from = 0; from < end && rc == 0; from += most) {
        if (qm_job_cancelled(t->job))
            return -ECANCELED;
        uint64_t to = end - from < most ? end : from + most;
        int64_t last;
        uint64_t clear = to - from - qm_count(t->data + from / 64, to - from, &last);
        rc = qm_store_clear(t, from, to, fault);
        if (rc == 0)
            qm_job_count_pages(t->job, clear * page, 0, clear);
    }
    return rc;
}
