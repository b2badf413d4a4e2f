/* Memory sources: a block of a mapped-ram file, a slice of other memory. */
#define _GNU_SOURCE
#include "bits.h"
#include "core_internal.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

int qm_read_all(int fd, void *buf, size_t len, uint64_t at)
{
    size_t have = 0;
    while (have < len) {
        ssize_t got = pread(fd, (unsigned char *)buf + have, len - have, (off_t)(at + have));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -ENODATA;
        have += (size_t)got;
    }
    return 0;
}

ssize_t qm_mapped_fill(void *arg, void *buf, uint64_t off, size_t len)
{
    const struct qm_mapped *s = arg;
    uint64_t size = s->page_size, first = off / size, end = first + len / size;
    if (off % size || len % size || end > s->npages)
        return -EINVAL;
    for (uint64_t k = first; k < end;) {
        uint64_t stop = qm_run(s->data, k, end);
        unsigned char *out = (unsigned char *)buf + (k - first) * size;
        size_t bytes = (size_t)((stop - k) * size);
        if (s->data[k / 64] >> k % 64 & 1) {
            int rc = qm_read_all(s->fd, out, bytes, (uint64_t)s->pages_offset + k * size);
            if (rc)
                return rc;
        } else {
            memset(out, 0, bytes);
        }
        k = stop;
    }
    return (ssize_t)len;
}

int64_t qm_mapped_next(void *arg, uint64_t off, uint64_t end)
{
    const struct qm_mapped *s = arg;
    uint64_t size = s->page_size, k = off / size;
    uint64_t last = end / size + (end % size != 0);
    if (k >= last || s->data[k / 64] >> k % 64 & 1)
        return (int64_t)off;
    uint64_t at = qm_run(s->data, k, last) * size;
    return (int64_t)(at < end ? at : end);
}

ssize_t qm_slice_fill(void *arg, void *buf, uint64_t off, size_t len)
{
    const struct qm_slice *p = arg;
    return p->fill(p->arg, buf, p->offset + off, len);
}

int64_t qm_slice_next(void *arg, uint64_t off, uint64_t end)
{
    const struct qm_slice *p = arg;
    int64_t at = p->next(p->arg, p->offset + off, p->offset + end);
    return at < 0 ? at : at - (int64_t)p->offset;
}
