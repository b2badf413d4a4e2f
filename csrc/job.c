/* What channels share (job), what each has (channel), and whole transfers that obey the job. */
#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct qm_job {
    atomic_int cancelled;
    _Atomic uint64_t rate;     /* bytes a second; 0: no limit */
    _Atomic uint64_t rate_set; /* counts the changes of rate */
    _Atomic uint64_t next_free; /* when the next transfer may start, in ns of CLOCK_MONOTONIC */
    _Atomic uint64_t bytes_done;
    _Atomic uint64_t data_pages;
    _Atomic uint64_t zero_pages;
    _Atomic uint64_t bytes_moved;
    _Atomic uint64_t calls;
};

#define NS ((uint64_t)1000000000)
/* Longest sleep between two looks at the job. */
#define NAP_NS ((uint64_t)20000000)
/* Room for a chunk that is rounded outward at both ends. */
#define BUFFER_LEN (QM_CHUNK + 2 * (size_t)QM_MAX_PAGE)
#define BUFFER_ALIGN ((size_t)2 << 20)

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * NS + (uint64_t)t.tv_nsec;
}

static void nap(uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / NS), .tv_nsec = (long)(ns % NS)};
    nanosleep(&t, NULL);
}

qm_job *qm_job_create(void)
{
    return calloc(1, sizeof(qm_job));
}

void qm_job_destroy(qm_job *job)
{
    free(job);
}

void qm_job_cancel(qm_job *job)
{
    atomic_store(&job->cancelled, 1);
}

int qm_job_cancelled(const qm_job *job)
{
    return atomic_load(&job->cancelled);
}

void qm_job_set_rate(qm_job *job, uint64_t bytes_per_second)
{
    atomic_store(&job->rate, bytes_per_second);
    atomic_store(&job->next_free, now_ns());
    atomic_fetch_add(&job->rate_set, 1);
}

void qm_job_totals(const qm_job *job, struct qm_totals *out)
{
    out->bytes_done = atomic_load(&job->bytes_done);
    out->data_pages = atomic_load(&job->data_pages);
    out->zero_pages = atomic_load(&job->zero_pages);
    out->bytes_moved = atomic_load(&job->bytes_moved);
    out->calls = atomic_load(&job->calls);
}

void qm_job_add_moved(qm_job *job, uint64_t len)
{
    atomic_fetch_add(&job->bytes_moved, len);
}

void qm_job_moved(qm_job *job, uint64_t len)
{
    atomic_fetch_add(&job->bytes_moved, len);
    atomic_fetch_add(&job->calls, 1);
}

void qm_job_did(qm_job *job, uint64_t bytes, uint64_t data_pages, uint64_t zero_pages)
{
    atomic_fetch_add(&job->bytes_done, bytes);
    atomic_fetch_add(&job->data_pages, data_pages);
    atomic_fetch_add(&job->zero_pages, zero_pages);
}

int qm_job_admit(qm_job *job, uint64_t len)
{
    if (qm_job_cancelled(job))
        return -ECANCELED;
    uint64_t set = atomic_load(&job->rate_set);
    uint64_t rate = atomic_load(&job->rate);
    if (rate == 0)
        return 0;

    /* Take a place in the queue of transfers: it ends when the bytes are paid for. */
    uint64_t cost = (uint64_t)((double)len / (double)rate * (double)NS);
    uint64_t free_at = atomic_load(&job->next_free);
    uint64_t start;
    do {
        uint64_t now = now_ns();
        start = free_at > now ? free_at : now;
    } while (!atomic_compare_exchange_weak(&job->next_free, &free_at, start + cost));

    for (;;) {
        uint64_t now = now_ns();
        if (qm_job_cancelled(job))
            return -ECANCELED;
        if (now >= start || atomic_load(&job->rate_set) != set)
            return 0;
        nap(start - now < NAP_NS ? start - now : NAP_NS);
    }
}

size_t qm_job_piece(const qm_job *job, size_t unit)
{
    uint64_t rate = atomic_load(&job->rate);
    if (rate == 0 || rate / 20 >= QM_CHUNK)
        return QM_CHUNK;
    size_t piece = (size_t)(rate / 20) / unit * unit;
    return piece ? piece : unit;
}

qm_channel *qm_channel_create(void)
{
    return calloc(1, sizeof(qm_channel));
}

unsigned char *qm_channel_buffer(qm_channel *channel, int k)
{
    if (channel->buffers[k])
        return channel->buffers[k];
    void *buffer;
    if (posix_memalign(&buffer, BUFFER_ALIGN, BUFFER_LEN))
        return NULL;
    /* A child that is forked while direct I/O runs must not make these pages copy-on-write. */
    madvise(buffer, BUFFER_LEN, MADV_DONTFORK);
    madvise(buffer, BUFFER_LEN, MADV_HUGEPAGE);
    channel->buffers[k] = buffer;
    return buffer;
}

int qm_channel_next(qm_channel *channel, qm_job *job)
{
    channel->current = (channel->current + 1) % QM_BUFFERS;
    qm_queue_wait_for(&channel->queue, job, channel->current);
    return channel->current;
}

void qm_channel_destroy(qm_channel *channel)
{
    if (!channel)
        return;
    qm_queue_close(&channel->queue);
    for (int k = 0; k < QM_BUFFERS; k++) {
        if (!channel->buffers[k])
            continue;
        /* The allocator may hand this memory to somebody who does fork. */
        madvise(channel->buffers[k], BUFFER_LEN, MADV_DOFORK);
        free(channel->buffers[k]);
    }
    free(channel);
}

/* Drops the first `done` bytes of the array; returns how many of its entries are used up. */
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

/* 0 to try again, -errno to give up. */
static int retry(qm_job *job, int error)
{
    if (error != EINTR && error != EAGAIN)
        return -error;
    if (qm_job_cancelled(job))
        return -ECANCELED;
    if (error == EAGAIN)
        nap(NS / 1000);
    return 0;
}

int qm_pwritev(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit, off_t *bad)
{
    *bad = at;
    int rc = qm_job_admit(job, total_len(iov, n));
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
        qm_job_moved(job, (uint64_t)put);
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
    int rc = qm_job_admit(job, len);
    while (rc == 0 && *done < len) {
        ssize_t put = send(fd, bytes + *done, len - *done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (put < 0 && errno == ENOTSOCK)
            put = write(fd, bytes + *done, len - *done);
        if (put < 0) {
            rc = retry(job, errno);
        } else {
            qm_job_moved(job, (uint64_t)put);
            *done += (size_t)put;
        }
    }
    return rc;
}

ssize_t qm_preadv(qm_job *job, int fd, struct iovec *iov, int n, off_t at, size_t unit, off_t *bad)
{
    *bad = at;
    int rc = qm_job_admit(job, total_len(iov, n));
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
        qm_job_moved(job, (uint64_t)got);
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
        /* ENXIO: nothing but a hole up to the end. Anything else: no such notion here. */
        return errno == ENXIO ? (int64_t)end : (int64_t)off;
    pos -= memory->fd_offset;
    return (uint64_t)pos < end ? (int64_t)pos : (int64_t)end;
}

uint64_t qm_channel_data_until(qm_channel *channel, const struct qm_memory *memory, uint64_t off,
                               uint64_t end)
{
    if (channel->memory != memory || off < channel->data_from || off >= channel->data_to) {
        if (qm_next_data(memory, off, off + 1) != (int64_t)off)
            return off;
        off_t hole = lseek(memory->fd, memory->fd_offset + (off_t)off, SEEK_HOLE);
        channel->memory = memory;
        channel->data_from = off;
        channel->data_to = hole < 0 ? UINT64_MAX : (uint64_t)(hole - memory->fd_offset);
    }
    return channel->data_to < end ? channel->data_to : end;
}

static int power_of_two(uint64_t n)
{
    return n != 0 && (n & (n - 1)) == 0;
}

int qm_block_check(const struct qm_block *block, const struct qm_file *file, uint64_t first,
                   uint64_t npages)
{
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
    if (file->fd_direct >= 0 &&
        (!power_of_two(file->mem_align) || !power_of_two(file->off_align) ||
         file->mem_align > QM_MAX_PAGE || file->off_align > QM_MAX_PAGE))
        return -EINVAL;
    return 0;
}
