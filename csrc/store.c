/* Bytes -> guest memory: copied, written to the file that the memory is, zeroed. */
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
    /* Never touched through the mapping: the file may have become shorter. */
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
    /* One by one is how it is done without a file, and what finds out where a call failed. */
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
        /* What is zero already is not written: it may be memory that nobody has touched. */
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

int qm_store_clear(const struct qm_memory *m, uint32_t page_size, const uint64_t *bits,
                   uint64_t first, uint64_t end, struct qm_fault *fault)
{
    for (uint64_t at = next_clear(bits, first, end); at < end;) {
        uint64_t stop = next_set(bits, at, end);
        int rc = qm_store_zeros(m, page_size, at * page_size, stop * page_size, fault);
        if (rc)
            return rc;
        at = next_clear(bits, stop, end);
    }
    return 0;
}

int qm_zero_clear(qm_job *job, const struct qm_block *block, const struct qm_memory *memory,
                  const uint64_t *bits, struct qm_fault *fault)
{
    uint64_t end = block->len / block->page_size;
    struct qm_file none = {.fd = -1, .fd_direct = -1};
    int rc = qm_block_check(block, &none, 0, end);
    uint64_t most = QM_CHUNK / block->page_size;
    for (uint64_t from = 0; from < end && rc == 0; from += most) {
        if (qm_job_cancelled(job))
            return -ECANCELED;
        uint64_t to = end - from < most ? end : from + most;
        int64_t last;
        uint64_t clear = to - from - qm_count(bits + from / 64, to - from, &last);
        rc = qm_store_clear(memory, block->page_size, bits, from, to, fault);
        if (rc == 0)
            qm_job_count_pages(job, clear * block->page_size, 0, clear);
    }
    return rc;
}
