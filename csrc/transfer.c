/* Complete transfers that obey the job, and the check of their arguments. */
#define _GNU_SOURCE
#include "core_internal.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define RETRY_NS ((uint64_t)1000000)

/* Drop the first `done` bytes of the array; returns the number of entries that are consumed. */
static int advance(struct iovec *iov, int n, size_t done)
{
    int used = 0;
    while (used < n && done >= iov[used].iov_len)
        done -= iov[used++].iov_len;
    if (used < n) {
        iov[used].iov_base = (unsigned char *)iov[used].iov_base + done;
        iov[used].iov_len -= done;
    }
    return used;
}

static size_t total_len(const struct iovec *iov, int n)
{
    size_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    return len;
}

/* Return 0 to try again, -errno to give up. */
static int retry(qm_job *job, int error)
{
    if (error != EINTR && error != EAGAIN)
        return -error;
    if (qm_job_cancelled(job))
        return -ECANCELED;
    if (error == EAGAIN)
        qm_nap(RETRY_NS);
    return 0;
}

int qm_pwritev(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit, off_t *bad)
{
    *bad = at;
    int rc = qm_job_throttle(job, total_len(iov, n));
    if (rc)
        return rc;
    while (n > 0) {
        ssize_t put = pwritev(fd, iov, n, at);
        if (put < 0) {
            *bad = at;
            if ((rc = retry(job, errno)))
                return rc;
            continue;
        }
        qm_job_count_io(job, (uint64_t)put, 1);
        size_t whole = (size_t)put == total_len(iov, n) ? (size_t)put : (size_t)put / unit * unit;
        if (whole == 0) {
            *bad = at + put;
            return -EIO;
        }
        at += (off_t)whole;
        int used = advance(iov, n, whole);
        iov += used;
        n -= used;
    }
    return 0;
}

int qm_write_forward(qm_job *job, int fd, const unsigned char *bytes, size_t len, size_t *done)
{
    *done = 0;
    int rc = qm_job_throttle(job, len);
    while (rc == 0 && *done < len) {
        ssize_t put = send(fd, bytes + *done, len - *done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (put < 0 && errno == ENOTSOCK)
            put = write(fd, bytes + *done, len - *done);
        if (put < 0) {
            rc = retry(job, errno);
        } else {
            qm_job_count_io(job, (uint64_t)put, 1);
            *done += (size_t)put;
        }
    }
    return rc;
}

ssize_t qm_preadv(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit, off_t *bad)
{
    *bad = at;
    int rc = qm_job_throttle(job, total_len(iov, n));
    if (rc)
        return rc;
    ssize_t have = 0;
    while (n > 0) {
        ssize_t got = preadv(fd, iov, n, at);
        if (got < 0) {
            *bad = at;
            if ((rc = retry(job, errno)))
                return rc;
            continue;
        }
        if (got == 0)
            break;
        qm_job_count_io(job, (uint64_t)got, 1);
        size_t whole = (size_t)got == total_len(iov, n) ? (size_t)got : (size_t)got / unit * unit;
        if (whole == 0) /* less than a unit: the file ends within it */
            return have + got;
        have += (ssize_t)whole;
        at += (off_t)whole;
        int used = advance(iov, n, whole);
        iov += used;
        n -= used;
    }
    return have;
}

int64_t qm_next_data(const struct qm_memory *memory, uint64_t off, uint64_t end)
{
    off_t pos = lseek(memory->fd, memory->fd_offset + (off_t)off, SEEK_DATA);
    if (pos < 0)
        /* ENXIO: a hole up to the end. Anything else: SEEK_DATA is not supported. */
        return errno == ENXIO ? (int64_t)end : (int64_t)off;
    pos -= memory->fd_offset;
    return (uint64_t)pos < end ? (int64_t)pos : (int64_t)end;
}

static int power_of_two(uint64_t n)
{
    return n != 0 && (n & (n - 1)) == 0;
}

int qm_transfer_check(const struct qm_transfer *t, uint64_t first, uint64_t npages)
{
    const struct qm_block *block = t->block;
    const struct qm_file *file = t->file;
    if (!power_of_two(block->page_size) || block->page_size < QM_MIN_PAGE ||
        block->page_size > QM_MAX_PAGE)
        return -EINVAL;
    uint64_t pages = block->len / block->page_size;
    if (block->len % block->page_size || block->len > (uint64_t)INT64_MAX ||
        block->pages_offset < 0 ||
        block->pages_offset > INT64_MAX - 2 * (int64_t)QM_MAX_PAGE - (int64_t)block->len)
        return -EINVAL;
    if (first > pages || npages > pages - first || first % (QM_CHUNK / block->page_size))
        return -EINVAL;
    if (file && file->fd_direct >= 0 &&
        (!power_of_two(file->mem_align) || !power_of_two(file->off_align) ||
         file->mem_align > QM_MAX_PAGE || file->off_align > QM_MAX_PAGE))
        return -EINVAL;
    return 0;
}
