/* Memory made of two: a page comes from the upper or from the lower one, as a bitmap says. */
#define _GNU_SOURCE
#include "bits.h"
#include "core_internal.h"

#include <errno.h>
#include <string.h>

ssize_t qm_buffer_fill(void *base, void *buf, uint64_t off, size_t len)
{
    memcpy(buf, (const unsigned char *)base + off, len);
    return (ssize_t)len;
}

int64_t qm_buffer_next(void *base, uint64_t off, uint64_t end)
{
    (void)base;
    (void)end;
    return (int64_t)off;
}

ssize_t qm_layered_fill(void *arg, void *buf, uint64_t off, size_t len)
{
    const struct qm_layered *l = arg;
    uint64_t size = l->page_size, first = off / size, end = first + len / size;
    if (off % size || len % size || end > l->npages)
        return -EINVAL;
    for (uint64_t k = first; k < end;) {
        uint64_t stop = qm_run(l->upper, k, end);
        unsigned char *out = (unsigned char *)buf + (k - first) * size;
        size_t bytes = (size_t)((stop - k) * size);
        int up = bit_get(l->upper, k);
        ssize_t got = up ? l->upper_fill(l->upper_arg, out, k * size, bytes)
                         : l->lower_fill(l->lower_arg, out, k * size, bytes);
        if (got < 0)
            return got;
        if ((size_t)got < bytes)
            return -ENODATA;
        k = stop;
    }
    return (ssize_t)len;
}

int64_t qm_layered_next(void *arg, uint64_t off, uint64_t end)
{
    const struct qm_layered *l = arg;
    uint64_t size = l->page_size, last = end / size + (end % size != 0);
    while (off < end) {
        uint64_t k = off / size, stop = k < last ? qm_run(l->upper, k, last) : last;
        uint64_t limit = stop * size < end ? stop * size : end;
        int64_t data = bit_get(l->upper, k) ? l->upper_next(l->upper_arg, off, limit)
                                            : l->lower_next(l->lower_arg, off, limit);
        if (data < 0 || (uint64_t)data < limit)
            return data;
        off = limit;
    }
    return (int64_t)end;
}
