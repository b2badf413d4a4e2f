/* Copy pages of guest memory to the same offsets of a mapping, while the guest is stopped. */
#define _GNU_SOURCE
#include "bits.h"
#include "chunk.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

/* Bytes that one call copies at most: a larger process_vm_readv takes longer a byte. */
#define PIECE ((size_t)1 << 20)
#define POPULATE_WRITE 23 /* MADV_POPULATE_WRITE, Linux 5.14 */
/* Parts of a block that channels take in turn: so many at most. */
#define UNITS_MAX 4096

struct batch {
    const struct qm_process *process;
    struct iovec to[QM_MAX_IOV], from[QM_MAX_IOV];
    size_t n, len;
};

static uint64_t unit_pages(const struct qm_stash *s)
{
    uint64_t pages = QM_CHUNK / s->page_size;
    uint64_t least = (s->npages + UNITS_MAX - 1) / UNITS_MAX;
    return (least + pages - 1) / pages * pages;
}

/* Take the next part of the block; 0 when all are taken. */
static int take_unit(struct qm_stash *s, uint64_t *first, uint64_t *end)
{
    uint64_t step = unit_pages(s);
    uint64_t at = __atomic_fetch_add(&s->next, step, __ATOMIC_RELAXED);
    if (at >= s->npages)
        return 0;
    *first = at;
    *end = s->npages - at < step ? s->npages : at + step;
    return 1;
}

/* ---- from another process ------------------------------------------------------------------- */

/* Copy what the batch has; if the kernel stops early, one entry after the other. */
static int flush(struct batch *b, const struct qm_stash *s, struct qm_fault *fault)
{
    const struct qm_process *p = b->process;
    size_t n = b->n, len = b->len;
    b->n = b->len = 0;
    if (n == 0)
        return 0;
    ssize_t got = process_vm_readv(p->pid, b->to, n, b->from, n, 0);
    if (got == (ssize_t)len)
        return 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t off = (uint64_t)(uintptr_t)b->from[i].iov_base - p->address;
        got = qm_process_fill((void *)(uintptr_t)p, s->base + off, off, b->from[i].iov_len);
        if (got < 0)
            return memory_fault(fault, off, (int)got);
        if ((size_t)got < b->from[i].iov_len)
            return memory_fault(fault, off + (uint64_t)got, -EFAULT);
    }
    return 0;
}

static int copy_from_process(struct batch *b, const struct qm_stash *s, uint64_t off, size_t len,
                             struct qm_fault *fault)
{
    while (len) {
        size_t part = len < PIECE - b->len ? len : PIECE - b->len;
        b->to[b->n] = (struct iovec){.iov_base = s->base + off, .iov_len = part};
        b->from[b->n] = (struct iovec){
            .iov_base = (void *)(uintptr_t)(b->process->address + off),
            .iov_len = part,
        };
        b->n++;
        b->len += part;
        off += part;
        len -= part;
        if (b->len == PIECE || b->n == QM_MAX_IOV) {
            int rc = flush(b, s, fault);
            if (rc)
                return rc;
        }
    }
    return 0;
}

/* ---- from any memory ------------------------------------------------------------------------ */

/* Return the next byte that has to be copied: the stash has zeros already. -errno. */
static int64_t next_data(const struct qm_memory *m, uint64_t off, uint64_t end)
{
    if (m->fill)
        return m->next ? m->next(m->fill_arg, off, end) : (int64_t)off;
    if (m->fd < 0)
        return (int64_t)off;
    /* Past the end of a file that shrank all would look like a hole. */
    off_t size = lseek(m->fd, 0, SEEK_END);
    if (size < 0)
        return -errno;
    if ((uint64_t)size < (uint64_t)m->fd_offset + end)
        return -EFAULT;
    return qm_next_data(m, off, end);
}

static int copy_from_memory(const struct qm_stash *s, uint64_t off, uint64_t end,
                            struct qm_fault *fault)
{
    const struct qm_memory *m = s->memory;
    while (off < end) {
        int64_t data = next_data(m, off, end);
        if (data < 0)
            return memory_fault(fault, off, (int)data);
        off = (uint64_t)data / s->page_size * s->page_size;
        if ((uint64_t)data >= end)
            return 0;
        size_t len = end - off < PIECE ? (size_t)(end - off) : PIECE;
        if (m->base && m->fd < 0) {
            memcpy(s->base + off, m->base + off, len);
        } else {
            ssize_t got = qm_memory_fill(m, s->base + off, off, len);
            if (got < 0)
                return memory_fault(fault, off, (int)got);
            if ((size_t)got < len)
                return memory_fault(fault, off + (uint64_t)got, -EFAULT);
        }
        off += len;
    }
    return 0;
}

/* ---- the stash ------------------------------------------------------------------------------ */

static int copy_unit(qm_job *job, const struct qm_stash *s, struct batch *b, uint64_t first,
                     uint64_t end, struct qm_fault *fault)
{
    uint64_t page = s->page_size, copied = 0;
    for (uint64_t k = next_set(s->bits, first, end); k < end;) {
        uint64_t stop = next_clear(s->bits, k, end);
        size_t len = (size_t)((stop - k) * page);
        /* In a long run there may be pages that need not be read. */
        int look = !b->process || (!s->changed && s->memory->next && len >= PIECE);
        int rc = look ? copy_from_memory(s, k * page, stop * page, fault)
                      : copy_from_process(b, s, k * page, len, fault);
        if (rc)
            return rc;
        copied += stop - k;
        k = next_set(s->bits, stop, end);
    }
    int rc = flush(b, s, fault);
    if (rc == 0)
        qm_job_count_pages(job, copied * page, copied, 0);
    return rc;
}

static int check(const struct qm_stash *s)
{
    uint32_t page = s->page_size;
    if (page < QM_MIN_PAGE || page > QM_MAX_PAGE || (page & (page - 1)))
        return -EINVAL;
    if (s->changed &&
        (s->changed->page_size != page || s->changed->len / page != s->npages || !s->process))
        return -EINVAL;
    return 0;
}

int qm_stash_copy(qm_job *job, struct qm_stash *s, struct qm_fault *fault)
{
    int rc = check(s);
    if (rc)
        return rc;
    struct batch b;
    b.process = s->process;
    b.n = b.len = 0;
    uint64_t first, end;
    while (take_unit(s, &first, &end)) {
        if (qm_job_cancelled(job))
            return -ECANCELED;
        if (s->changed) {
            rc = qm_find_changed(job, s->changed, s->bits, first, end - first);
            if (rc)
                return memory_fault(fault, first * s->page_size, rc);
        }
        rc = copy_unit(job, s, &b, first, end, fault);
        if (rc)
            return rc;
    }
    /* A process that is ending loses its pages before it is gone, and then none of them is found. */
    unsigned char byte;
    if (s->changed && qm_process_fill((void *)(uintptr_t)s->process, &byte, 0, 1) != 1)
        return memory_fault(fault, 0, -ESRCH);
    return 0;
}

/* Make bytes [from, to) of the mapping resident. */
static int populate(const struct qm_stash *s, uint64_t from, uint64_t to)
{
    uint64_t unit = (uint64_t)sysconf(_SC_PAGESIZE);
    from = from / unit * unit;
    to = (to + unit - 1) / unit * unit;
    int rc;
    do
        rc = madvise(s->base + from, (size_t)(to - from), POPULATE_WRITE);
    while (rc && errno == EINTR);
    if (rc == 0)
        return 0;
    if (errno != EINVAL)
        return -errno;
    /* An older kernel: the pages are zero, and no other thread writes them. */
    for (; from < to; from += unit)
        *(volatile unsigned char *)(s->base + from) = 0;
    return 0;
}

int qm_stash_populate(qm_job *job, struct qm_stash *s)
{
    int rc = check(s);
    if (rc)
        return rc;
    uint64_t first, end, page = s->page_size;
    while (take_unit(s, &first, &end)) {
        for (uint64_t k = next_set(s->bits, first, end); k < end;) {
            if (qm_job_cancelled(job))
                return -ECANCELED;
            uint64_t stop = next_clear(s->bits, k, end);
            rc = populate(s, k * page, stop * page);
            if (rc)
                return rc;
            k = next_set(s->bits, stop, end);
        }
    }
    return 0;
}
