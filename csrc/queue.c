/*
 * Asynchronous direct transfers: they run while the next ones are prepared.
 *
 * A direct write into a hole holds the inode's lock until the call returns: with pwritev until its
 * I/O is done, however many threads there are. With the kernel's native AIO the lock is released at
 * submission, and allocation, scan and I/O overlap. If AIO is not available (no contexts left, a
 * seccomp filter) transfers are synchronous.
 */
#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long io_setup(unsigned n, aio_context_t *context)
{
    return syscall(SYS_io_setup, n, context);
}

static long io_destroy(aio_context_t context)
{
    return syscall(SYS_io_destroy, context);
}

static long io_submit(aio_context_t context, long n, struct iocb **list)
{
    return syscall(SYS_io_submit, context, n, list);
}

static long io_getevents(aio_context_t context, long least, long most, struct io_event *events)
{
    return syscall(SYS_io_getevents, context, least, most, events, NULL);
}

static int is_open(struct qm_queue *q)
{
    if (!q->tried) {
        q->tried = 1;
        q->context = 0;
        q->open = io_setup(QM_QUEUE, &q->context) == 0;
        q->free = (1u << QM_QUEUE) - 1;
    }
    return q->open;
}

void qm_queue_close(struct qm_queue *q)
{
    if (q->tried && q->open)
        io_destroy(q->context);
    q->tried = q->open = 0;
}

static int transfer_now(qm_job *job, struct qm_slot *s, off_t *bad)
{
    if (s->opcode == IOCB_CMD_PWRITEV)
        return qm_pwritev(job, s->fd, s->iov, s->n, s->at, s->unit, bad);
    ssize_t got = qm_preadv(job, s->fd, s->iov, s->n, s->at, s->unit, bad);
    if (got >= 0 && (size_t)got < s->len) {
        *bad = s->at + got;
        return -ENODATA;
    }
    return got < 0 ? (int)got : 0;
}

static void record_error(struct qm_queue *q, int rc, off_t bad)
{
    if (rc && !q->error) {
        q->error = rc;
        q->bad = bad;
    }
}

static void finish(struct qm_queue *q, qm_job *job, struct qm_slot *s, int64_t result)
{
    if (s->buffer >= 0)
        q->busy[s->buffer]--;
    if (result == (int64_t)s->len) {
        qm_job_count_io(job, s->len, 1);
    } else if (!q->error) {
        /* Short or failed: do it again synchronously, which continues it or returns the error. */
        off_t bad = s->at;
        int rc = qm_job_cancelled(job) ? -ECANCELED : transfer_now(job, s, &bad);
        record_error(q, rc, bad);
    }
    q->free |= 1u << (s - q->slots);
}

/* Wait for at least one transfer. Not interruptible: the kernel uses the memory until the end. */
static void reap(struct qm_queue *q, qm_job *job)
{
    struct io_event events[QM_QUEUE];
    long n;
    do
        n = io_getevents(q->context, 1, QM_QUEUE, events);
    while (n < 0 && errno == EINTR);
    if (n < 0) {
        /* The results are lost, but io_destroy still waits for completion. */
        int rc = -errno;
        io_destroy(q->context);
        q->open = 0;
        q->free = (1u << QM_QUEUE) - 1;
        memset(q->busy, 0, sizeof(q->busy));
        record_error(q, rc, 0);
        return;
    }
    for (long i = 0; i < n; i++)
        finish(q, job, &q->slots[events[i].data], events[i].res);
}

int qm_queue_drain(struct qm_queue *q, qm_job *job, off_t *bad)
{
    if (!q->tried)
        return 0;
    while (q->open && q->free != (1u << QM_QUEUE) - 1)
        reap(q, job);
    int rc = q->error;
    *bad = q->bad;
    q->error = 0;
    return rc;
}

static int submit(struct qm_queue *q, qm_job *job, struct qm_slot *s)
{
    struct iocb cb;
    memset(&cb, 0, sizeof(cb));
    cb.aio_data = (uint64_t)(s - q->slots);
    cb.aio_lio_opcode = (uint16_t)s->opcode;
    cb.aio_fildes = (uint32_t)s->fd;
    cb.aio_buf = (uint64_t)(uintptr_t)s->iov;
    cb.aio_nbytes = (unsigned)s->n;
    cb.aio_offset = s->at;
    struct iocb *list = &cb;
    long rc;
    do
        rc = io_submit(q->context, 1, &list);
    while (rc < 0 && errno == EINTR && !qm_job_cancelled(job));
    return rc == 1 ? 0 : -1;
}

static int transfer(struct qm_queue *q, qm_job *job, int opcode, int fd, struct iovec *iov, int n,
                    off_t at, size_t unit, int buffer, off_t *bad)
{
    size_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    struct qm_slot now = {.opcode = opcode,
                          .fd = fd,
                          .n = n,
                          .iov = iov,
                          .at = at,
                          .unit = unit,
                          .len = len,
                          .buffer = -1};
    if (!is_open(q))
        return transfer_now(job, &now, bad);

    *bad = at;
    int rc = qm_job_throttle(job, len);
    if (rc)
        return rc;
    while (q->open && !q->free)
        reap(q, job);
    if (q->error) {
        *bad = q->bad;
        return q->error;
    }
    unsigned k = (unsigned)__builtin_ctz(q->free);
    struct qm_slot *s = &q->slots[k];
    *s = now;
    s->buffer = buffer;
    if (n <= QM_SLOT_IOV) {
        memcpy(s->own, iov, (size_t)n * sizeof(*iov));
        s->iov = s->own;
    }
    if (n > QM_SLOT_IOV || submit(q, job, s))
        return transfer_now(job, &now, bad);
    q->free &= ~(1u << k);
    if (buffer >= 0)
        q->busy[buffer]++;
    return 0;
}

int qm_queue_write(struct qm_queue *q, qm_job *job, int fd, struct iovec *iov, int n, off_t at,
                   size_t unit, int buffer, off_t *bad)
{
    return transfer(q, job, IOCB_CMD_PWRITEV, fd, iov, n, at, unit, buffer, bad);
}

int qm_queue_read(struct qm_queue *q, qm_job *job, int fd, struct iovec *iov, int n, off_t at,
                  size_t unit, off_t *bad)
{
    return transfer(q, job, IOCB_CMD_PREADV, fd, iov, n, at, unit, -1, bad);
}

void qm_queue_wait_for(struct qm_queue *q, qm_job *job, int buffer)
{
    while (q->busy[buffer])
        reap(q, job);
}

size_t qm_queue_piece(struct qm_queue *q)
{
    return is_open(q) ? QM_QUEUE_PIECE : QM_CHUNK;
}
