/* File -> guest memory: read the set pages of a chunk in few, large calls; zero the clear ones. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"
#include "chunk.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE /* Linux 5.14 */
#define MADV_POPULATE_WRITE 23
#endif
#define HUGE_PAGE ((uint64_t)2 << 20)
/* How far memory is made present before it is read into: the kernel zeroes it while the device works, and
 * a device that serves its queue in bursts finds the next reads ready. Twice as far was slower: what was
 * zeroed has left the caches before it is read into. */
#define AHEAD QM_CHUNK

struct reader {
    const struct qm_transfer *transfer;
    qm_channel *channel;
    struct qm_fault *fault;
    int fd;
    size_t unit;      /* granularity of positions and lengths; 1 when buffered */
    int aligned;      /* positions and addresses satisfy the descriptor */
    int small;        /* the memory is a file of small pages */
    int pagemap;      /* for direct reads into plain memory; -1 if there is none */
    int straight;     /* this chunk needs no bounce buffer */
    uint64_t present; /* make_present() has succeeded up to this page */
};

static int read_fault(struct reader *r, off_t bad, int rc)
{
    if (rc == -EFAULT)
        return memory_fault(r->fault, (uint64_t)(bad - r->transfer->block->pages_offset), rc);
    return rc ? file_fault(r->fault, bad, rc) : 0;
}

/* Read at file position `at` into the array; the file must have `need` of the bytes. */
static int get(struct reader *r, struct iovec *iov, off_t at, size_t need)
{
    off_t bad;
    ssize_t got = qm_preadv(r->transfer->job, r->fd, iov, 1, at, r->unit, &bad);
    if (got >= 0 && (size_t)got < need)
        return file_fault(r->fault, at + got, -ENODATA);
    return read_fault(r, bad, got < 0 ? (int)got : 0);
}

/* ---- set pages ------------------------------------------------------------------------------ */

/* Read pages [from, to) of the block through the bounce buffer. */
static int read_bounced(struct reader *r, uint64_t from, uint64_t to)
{
    const uint64_t *data = r->transfer->data;
    unsigned char *buffer = qm_channel_buffer(r->channel, 0);
    if (!buffer)
        return -ENOMEM;
    size_t page = r->transfer->block->page_size;
    off_t start = r->transfer->block->pages_offset + (off_t)(from * page);
    size_t need = (size_t)(to - from) * page;
    size_t head = (size_t)start % r->unit;
    size_t len = (head + need + r->unit - 1) / r->unit * r->unit;
    struct iovec iov = {.iov_base = buffer, .iov_len = len};
    int rc = get(r, &iov, start - (off_t)head, head + need);
    for (uint64_t k = next_set(data, from, to); k < to && rc == 0;) {
        uint64_t stop = next_clear(data, k, to);
        rc = qm_store(r->transfer->memory, k * page, buffer + head + (k - from) * page,
                      (size_t)(stop - k) * page, r->fault);
        k = next_set(data, stop, to);
    }
    return rc;
}

static int read_now(struct reader *r, struct iovec *iov, int n, off_t at, size_t len, off_t *bad)
{
    ssize_t got = qm_preadv(r->transfer->job, r->fd, iov, n, at, r->unit, bad);
    if (got >= 0 && (size_t)got < len) {
        *bad = at + got;
        return -ENODATA;
    }
    return got < 0 ? (int)got : 0;
}

/* Read pages [from, to) of the block into memory without a copy; the clear ones among them go to the
 * bounce buffer. */
static int read_straight(struct reader *r, uint64_t from, uint64_t to)
{
    const uint64_t *data = r->transfer->data;
    struct iovec iov[QM_MAX_IOV];
    size_t page = r->transfer->block->page_size;
    int n = 0;
    for (uint64_t k = from; k < to;) {
        int set = bit_get(data, k);
        uint64_t stop = set ? next_clear(data, k, to) : next_set(data, k, to);
        iov[n].iov_len = (size_t)(stop - k) * page;
        if (set) {
            iov[n].iov_base = r->transfer->memory->base + k * page;
        } else {
            unsigned char *buffer = qm_channel_buffer(r->channel, 0);
            if (!buffer)
                return -ENOMEM;
            iov[n].iov_base = buffer;
        }
        n++;
        k = stop;
        if (n == QM_MAX_IOV || k == to) {
            off_t bad, at = r->transfer->block->pages_offset + (off_t)(from * page);
            int rc = r->unit > 1 ? qm_queue_read(&r->channel->queue, r->transfer->job, r->fd, iov,
                                                 n, at, r->unit, &bad)
                                 : read_now(r, iov, n, at, (size_t)(k - from) * page, &bad);
            if (rc)
                return read_fault(r, bad, rc);
            from = k;
            n = 0;
        }
    }
    return 0;
}

static int read_run(struct reader *r, uint64_t from, uint64_t to)
{
    size_t page = r->transfer->block->page_size;
    size_t most = qm_job_piece(r->transfer->job, page);
    if (r->straight && r->unit > 1 && most > qm_queue_piece(&r->channel->queue))
        most = qm_queue_piece(&r->channel->queue);
    if (!r->straight && r->unit > 1 && most > QM_QUEUE_PIECE)
        most = QM_QUEUE_PIECE; /* it is copied while it is in the cache */
    most /= page;
    for (uint64_t k = from; k < to;) {
        uint64_t stop = to - k < most ? to : k + most;
        int rc = r->straight ? read_straight(r, k, stop) : read_bounced(r, k, stop);
        if (rc)
            return rc;
        k = stop;
    }
    return 0;
}

static int read_set(struct reader *r, uint64_t first, uint64_t end)
{
    const uint64_t *data = r->transfer->data;
    uint64_t gap = r->transfer->policy->max_gap / r->transfer->block->page_size;
    for (uint64_t k = next_set(data, first, end); k < end;) {
        uint64_t from = k, to;
        do {
            to = next_clear(data, k, end);
            k = next_set(data, to, end);
        } while (k < end && k - to <= gap);
        int rc = read_run(r, from, to);
        if (rc)
            return rc;
    }
    return 0;
}

/* ---- chunks --------------------------------------------------------------------------------- */

/* Make the first page with data in each huge page of [from, to) present; the kernel takes a huge page for
 * it if it takes any there. -errno: an old kernel, or memory that cannot be written; a read reports
 * that. */
static int make_present(struct reader *r, uint64_t from, uint64_t to)
{
    const struct qm_transfer *t = r->transfer;
    uint32_t page = t->block->page_size;
    uintptr_t system_page = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (from < r->present)
        from = r->present;
    for (uint64_t k = next_set(t->data, from, to); k < to;) {
        uintptr_t bytes = (uintptr_t)(t->memory->base + k * page);
        if (madvise((void *)(bytes - bytes % system_page), system_page, MADV_POPULATE_WRITE))
            return -errno;
        k += (HUGE_PAGE - bytes % HUGE_PAGE + page - 1) / page;
        k = k < to ? next_set(t->data, k, to) : to;
    }
    if (to > r->present)
        r->present = to;
    return 0;
}

/* Return whether the pages [from, to), which are about to be read, are or will be in short pieces of
 * the machine's memory. */
static int is_scattered(struct reader *r, uint64_t from, uint64_t to)
{
    const struct qm_transfer *t = r->transfer;
    uint64_t first = next_set(t->data, from, to);
    if (first == to || make_present(r, from, to))
        return 0;
    uint32_t page = t->block->page_size;
    unsigned char *bytes = t->memory->base + first * page;
    uint64_t len = (to - first) * page, rest = HUGE_PAGE - (uintptr_t)bytes % HUGE_PAGE;
    return qm_is_scattered(r->pagemap, bytes, (size_t)(len < rest ? len : rest));
}

/* Return whether the pages [from, to) are read without a copy. A device takes a few hundred pieces of
 * memory in a request: a direct read into scattered pages becomes several requests, and takes longer than
 * one into a bounce buffer with a copy. */
static int choose_straight(struct reader *r, uint64_t from, uint64_t to)
{
    if (!r->aligned || r->unit == 1)
        return r->aligned;
    return r->transfer->memory->fd >= 0 ? !r->small : !is_scattered(r, from, to);
}

/* Check that the file behind the memory contains the pages up to `to`: pwrite would make it longer. */
static int check_memory(const struct reader *r, uint64_t from, uint64_t to)
{
    const struct qm_memory *m = r->transfer->memory;
    uint64_t page = r->transfer->block->page_size;
    off_t size = lseek(m->fd, 0, SEEK_END);
    if (size < 0 || (uint64_t)size < (uint64_t)m->fd_offset + to * page)
        return memory_fault(r->fault, from * page, size < 0 ? -errno : -EFAULT);
    return 0;
}

static int read_range(struct reader *r, uint64_t first, uint64_t end)
{
    const struct qm_transfer *t = r->transfer;
    uint32_t page = t->block->page_size;
    for (uint64_t from = first; from < end;) {
        if (qm_job_cancelled(t->job))
            return -ECANCELED;
        uint64_t most = QM_CHUNK / page;
        uint64_t to = end - from < most ? end : from + most;
        r->straight = choose_straight(r, from, to);
        int rc = t->memory->fd >= 0 && !r->straight ? check_memory(r, from, to) : 0;
        if (rc == 0)
            rc = read_set(r, from, to);
        if (rc == 0 && r->pagemap >= 0 && r->straight)
            make_present(r, to, end - to < AHEAD / page ? end : to + AHEAD / page);
        if (rc == 0 && t->policy->zero_clear)
            rc = qm_store_clear(t, from, to, r->fault);
        if (rc)
            return rc;
        int64_t last;
        uint64_t set = qm_count(t->data + from / 64, to - from, &last);
        qm_job_count_pages(t->job, (to - from) * page, set, to - from - set);
        from = to;
    }
    return 0;
}

/* Return whether a file has pages of the usual size. Those of hugetlbfs have no pwrite. */
static int has_small_pages(int fd)
{
    struct statfs info;
    return fstatfs(fd, &info) == 0 && (uint64_t)info.f_bsize <= QM_MAX_PAGE;
}

int qm_read(const struct qm_transfer *t, qm_channel *channel, uint64_t first, uint64_t npages,
            struct qm_fault *fault)
{
    const struct qm_file *file = t->file;
    int rc = qm_transfer_check(t, first, npages);
    if (rc)
        return rc;
    struct reader r = {
        .transfer = t,
        .channel = channel,
        .fault = fault,
        .fd = file->fd,
        .unit = 1,
        .aligned = t->memory->base != NULL,
        .small = t->memory->fd >= 0 && has_small_pages(t->memory->fd),
        .pagemap = -1,
    };
    if (file->fd_direct >= 0) {
        r.fd = file->fd_direct;
        r.unit = file->off_align;
        r.aligned = r.aligned && (uintptr_t)t->memory->base % file->mem_align == 0 &&
                    t->block->page_size % file->mem_align == 0 &&
                    t->block->page_size % file->off_align == 0 &&
                    (uint64_t)t->block->pages_offset % file->off_align == 0;
    }
    if (r.unit > 1 && r.aligned && t->memory->fd < 0)
        r.pagemap = qm_pagemap_open();
    rc = read_range(&r, first, first + npages);
    if (r.pagemap >= 0)
        close(r.pagemap);
    off_t bad;
    int late = qm_queue_drain(&channel->queue, t->job, &bad);
    return rc ? rc : read_fault(&r, bad, late);
}
