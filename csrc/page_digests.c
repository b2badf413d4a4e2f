/* Guest memory -> a table with a digest for each page; and which pages differ from such a table. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"
#include "chunk.h"
#include "xxh3.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Bytes read and digested at a time, while they are still in the cache. */
#define STEP ((size_t)256 << 10)
#define STEP_PAGES (STEP / QM_MIN_PAGE)

struct digester {
    qm_job *job;
    qm_channel *channel;
    const struct qm_block *block;
    const struct qm_memory *memory;
    const uint64_t *selection; /* NULL: all pages */
    unsigned char *table;
    uint64_t *changed; /* NULL: the table is filled, not compared with */
    int update;
    const struct qm_copies *copies; /* NULL: pages that differ are not copied */
    struct qm_fault *fault;
    int in_place;  /* memory has an address, and every page of it may be touched */
    int extents;   /* memory has an address, but its holes must stay holes */
    int residency; /* which of it is resident can be asked, at little cost */
    int look;      /* for a hole, before the next pages are read */
    unsigned char zero[QM_DIGEST];
};

static int is_selected(const struct digester *d, uint64_t page)
{
    return !d->selection || bit_get(d->selection, page);
}

/* Copies page `k`, NULL for zeros, and enters the digest of the copy. */
static void copy_page(struct digester *d, uint64_t k, const unsigned char *bytes)
{
    size_t page = d->block->page_size;
    unsigned char *copy = d->copies->base + k * page;
    if (__atomic_fetch_sub(d->copies->room, (int64_t)page, __ATOMIC_RELAXED) < (int64_t)page)
        return;
    if (bytes)
        memcpy(copy, bytes, page);
    else if (!qm_is_zero(copy, page)) /* a page that was never touched stays so */
        memset(copy, 0, page);
    qm_xxh3_pages(copy, 1, page, d->table + k * QM_DIGEST);
    bit_set(d->changed, k);
}

/* Enters the digests of pages [first, end), whose bytes are `bytes`, NULL for zeros. */
static void enter(struct digester *d, uint64_t first, uint64_t end, const unsigned char *digests,
                  const unsigned char *bytes)
{
    uint64_t zero_pages = 0;
    size_t page = d->block->page_size;
    for (uint64_t k = first; k < end; k++, digests += QM_DIGEST) {
        unsigned char *entry = d->table + k * QM_DIGEST;
        int zero = memcmp(digests, d->zero, QM_DIGEST) == 0;
        zero_pages += (uint64_t)zero;
        if (memcmp(entry, digests, QM_DIGEST) == 0)
            continue;
        if (d->copies) {
            copy_page(d, k, zero || !bytes ? NULL : bytes + (k - first) * page);
            continue;
        }
        if (d->changed)
            bit_set(d->changed, k);
        if (!d->changed || d->update)
            memcpy(entry, digests, QM_DIGEST);
    }
    uint64_t npages = end - first;
    qm_job_count_pages(d->job, npages * d->block->page_size, npages - zero_pages, zero_pages);
    d->look = zero_pages == npages;
}

/* Pages [first, end) are known to be zero. */
static void enter_zeros(struct digester *d, uint64_t first, uint64_t end)
{
    for (uint64_t k = first; k < end; k++)
        if (is_selected(d, k))
            enter(d, k, k + 1, d->zero, NULL);
}

/* Selected pages [first, end), at most STEP bytes. */
static int digest_step(struct digester *d, uint64_t first, uint64_t end)
{
    unsigned char digests[STEP_PAGES * QM_DIGEST];
    size_t page = d->block->page_size, len = (size_t)(end - first) * page;
    uint64_t off = first * page;
    const unsigned char *bytes;
    if (d->in_place || d->extents) {
        bytes = d->memory->base + off;
    } else {
        unsigned char *buffer = qm_channel_buffer(d->channel, 0);
        if (!buffer)
            return -ENOMEM;
        ssize_t got = qm_memory_fill(d->memory, buffer, off, len);
        if (got < 0)
            return memory_fault(d->fault, off, (int)got);
        if ((size_t)got < len)
            return memory_fault(d->fault, off + (uint64_t)got, -EFAULT);
        bytes = buffer;
    }
    qm_xxh3_pages(bytes, end - first, page, digests);
    enter(d, first, end, digests, bytes);
    return 0;
}

/* The page where the hole at page `first` ends, `first` itself where there is data; -errno. */
static int64_t hole_end(struct digester *d, uint64_t first, uint64_t end)
{
    const struct qm_memory *m = d->memory;
    size_t page = d->block->page_size;
    uint64_t off = first * page, limit = end * page;
    int64_t data;
    if (m->fill) {
        data = m->next ? m->next(m->fill_arg, off, limit) : (int64_t)off;
    } else {
        /* Past the end of a file that shrank all would look like a hole. */
        off_t size = lseek(m->fd, 0, SEEK_END);
        if (size < 0)
            return memory_fault(d->fault, off, -errno);
        if ((uint64_t)size < (uint64_t)m->fd_offset + limit)
            return memory_fault(d->fault, off, -EFAULT);
        data = qm_next_data(m, off, limit);
    }
    if (data < 0)
        return memory_fault(d->fault, off, (int)data);
    return data == (int64_t)limit ? (int64_t)end : data / (int64_t)page;
}

/* The page up to which data goes on, without a hole that would have to be left alone. */
static uint64_t data_end(struct digester *d, uint64_t first, uint64_t end)
{
    if (!d->extents)
        return end;
    size_t page = d->block->page_size;
    uint64_t stop = qm_channel_data_until(d->channel, d->memory, first * page, end * page);
    uint64_t to = (stop + page - 1) / page;
    return to > first ? to : first + 1;
}

/* The page up to which all that is mapped is resident, and can be touched; `first` where it is not.
 * Where an extent ends costs ten times as much: SEEK_HOLE looks at every page up to there. */
static uint64_t resident_end(struct digester *d, uint64_t first, uint64_t end)
{
    size_t unit = (size_t)sysconf(_SC_PAGESIZE), page = d->block->page_size;
    unsigned char resident[QM_CHUNK / 4096 + 1];
    uintptr_t base = (uintptr_t)d->memory->base;
    uintptr_t from = (base + first * page) / unit * unit;
    size_t len = (size_t)(base + end * page - from), n = (len + unit - 1) / unit;
    if (mincore((void *)from, len, resident))
        return first;
    size_t k = 0;
    while (k < n && (resident[k] & 1))
        k++;
    uint64_t to = (from + k * unit - base) / page;
    return k == n || to > end ? end : to < first ? first : to;
}

/* Whether mincore can be trusted for a file: without write permission it reports every page as
 * resident. */
static int tells_residency(int fd)
{
    char name[32];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    return faccessat(AT_FDCWD, name, W_OK, AT_EACCESS) == 0;
}

/* Pages [first, end) of at most a chunk. */
static int digest_chunk(struct digester *d, uint64_t first, uint64_t end)
{
    size_t most = STEP / d->block->page_size;
    for (uint64_t k = first; k < end;) {
        uint64_t stop = end;
        if (d->selection) {
            k = next_set(d->selection, k, end);
            if (k == end)
                break;
            stop = next_clear(d->selection, k, end);
        }
        uint64_t resident = d->residency ? resident_end(d, k, stop) : k;
        if (resident > k) {
            stop = resident;
        } else if (!d->in_place && (d->extents || d->look)) {
            int64_t data = hole_end(d, k, stop);
            if (data < 0)
                return (int)data;
            if ((uint64_t)data > k) {
                enter_zeros(d, k, (uint64_t)data);
                k = (uint64_t)data;
                continue;
            }
        }
        if (resident == k)
            stop = data_end(d, k, stop);
        while (k < stop) {
            uint64_t to = stop - k < most ? stop : k + most;
            int rc = digest_step(d, k, to);
            if (rc)
                return rc;
            k = to;
            if (d->look && !d->in_place && !d->extents)
                break;
        }
    }
    return 0;
}

static int is_page_size(uint32_t size)
{
    return size >= QM_MIN_PAGE && size <= QM_MAX_PAGE && (size & (size - 1)) == 0;
}

static int check(const struct qm_block *block, uint64_t first, uint64_t npages)
{
    uint32_t page = block->page_size;
    if (!is_page_size(page) || block->len % page)
        return -EINVAL;
    uint64_t all = block->len / page;
    return first % 64 || first > all || npages > all - first ? -EINVAL : 0;
}

static int digest_range(struct digester *d, uint64_t first, uint64_t npages)
{
    int rc = check(d->block, first, npages);
    if (rc)
        return rc;
    static const unsigned char zeros[QM_MAX_PAGE];
    const struct qm_memory *m = d->memory;
    long page = sysconf(_SC_PAGESIZE);
    qm_xxh3_pages(zeros, 1, d->block->page_size, d->zero);
    d->in_place = m->base && m->fd < 0;
    /* Otherwise a page may be part hole, part data, and the file is read. */
    d->extents =
        m->base && m->fd >= 0 && d->block->page_size <= (uint64_t)page && m->fd_offset % page == 0;
    /* Only when comparing: an earlier pass has mapped the pages. For pages that are not mapped mincore
     * is slow. */
    d->residency = d->extents && d->changed && tells_residency(m->fd);
    d->look = 1;
    uint64_t most = QM_CHUNK / d->block->page_size;
    for (uint64_t k = first, end = first + npages; k < end;) {
        if (qm_job_cancelled(d->job))
            return -ECANCELED;
        uint64_t to = end - k < most ? end : k + most;
        rc = digest_chunk(d, k, to);
        if (rc)
            return rc;
        k = to;
    }
    return 0;
}

int qm_digest_pages(qm_job *job, qm_channel *channel, const struct qm_block *block,
                    const struct qm_memory *memory, const uint64_t *selection, unsigned char *table,
                    uint64_t first, uint64_t npages, struct qm_fault *fault)
{
    struct digester d = {
        .job = job,
        .channel = channel,
        .block = block,
        .memory = memory,
        .selection = selection,
        .table = table,
        .fault = fault,
    };
    return digest_range(&d, first, npages);
}

int qm_compare_pages(qm_job *job, qm_channel *channel, const struct qm_block *block,
                     const struct qm_memory *memory, const uint64_t *selection,
                     unsigned char *table, int update, uint64_t *changed, uint64_t first,
                     uint64_t npages, struct qm_fault *fault)
{
    struct digester d = {
        .job = job,
        .channel = channel,
        .block = block,
        .memory = memory,
        .selection = selection,
        .table = table,
        .changed = changed,
        .update = update,
        .fault = fault,
    };
    return digest_range(&d, first, npages);
}

int qm_copy_changed(const struct qm_transfer *t, qm_channel *channel,
                    const struct qm_copies *copies, uint64_t first, uint64_t npages,
                    struct qm_fault *fault)
{
    struct digester d = {
        .job = t->job,
        .channel = channel,
        .block = t->block,
        .memory = t->memory,
        .selection = t->selection,
        .table = copies->table,
        .changed = copies->copied,
        .copies = copies,
        .fault = fault,
    };
    return digest_range(&d, first, npages);
}

int qm_digest_zeros(uint64_t npages, uint32_t page_size, unsigned char *table)
{
    static const unsigned char zeros[QM_MAX_PAGE];
    if (!is_page_size(page_size))
        return -EINVAL;
    unsigned char zero[QM_DIGEST];
    qm_xxh3_pages(zeros, 1, page_size, zero);
    for (uint64_t k = 0; k < npages; k++)
        memcpy(table + k * QM_DIGEST, zero, QM_DIGEST);
    return 0;
}

/* Digests the pages of `block` among the `len` bytes that are written to `at`. */
static int enter_written(const struct qm_digested_block *block, int64_t at,
                         const unsigned char *bytes, size_t len)
{
    int64_t off = at - block->pages_offset;
    size_t page = block->page_size;
    if (off < 0 || (uint64_t)off >= block->len)
        return 0;
    if ((uint64_t)off % page || len % page || len > block->len - (uint64_t)off)
        return -EINVAL;
    unsigned char *entries = block->table + (uint64_t)off / page * QM_DIGEST;
    if (bytes)
        qm_xxh3_pages(bytes, len / page, page, entries);
    else
        memset(entries, 0, len / page * QM_DIGEST);
    return 1;
}

int qm_digest_written(void *arg, int64_t at, const void *bytes, size_t len)
{
    const struct qm_written_digests *w = arg;
    for (size_t i = 0; i < w->nblocks; i++) {
        int rc = enter_written(&w->blocks[i], at, bytes, len);
        if (rc < 0)
            return rc;
        if (rc)
            break;
    }
    return w->next ? w->next(w->next_arg, at, bytes, len) : 0;
}

int qm_digest_bytes(const void *bytes, uint64_t npages, uint32_t page_size, unsigned char *table)
{
    if (!is_page_size(page_size))
        return -EINVAL;
    qm_xxh3_pages(bytes, npages, page_size, table);
    return 0;
}
