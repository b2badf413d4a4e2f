/* A memory source that searches for a pattern in what is read through it. */
#include "qmigrate.h"

static int matches(const struct qm_search *w, const unsigned char *bytes)
{
    for (size_t i = 0; i < w->len; i++)
        if ((bytes[i] & w->mask[i]) != w->head[i])
            return 0;
    return 1;
}

ssize_t qm_search_fill(void *arg, void *buf, uint64_t off, size_t len)
{
    struct qm_search *w = arg;
    ssize_t got = w->fill(w->arg, buf, off, len);
    uint64_t end = got < (ssize_t)w->len ? off : off + (uint64_t)got - w->len + 1;
    uint64_t best = __atomic_load_n(&w->found, __ATOMIC_RELAXED);
    if (end > best)
        end = best; /* only a lower offset counts */
    for (uint64_t at = (off + w->step - 1) / w->step * w->step; at < end; at += w->step) {
        if (!matches(w, (const unsigned char *)buf + (at - off)))
            continue;
        while (at < best && !__atomic_compare_exchange_n(&w->found, &best, at, 0, __ATOMIC_RELAXED,
                                                         __ATOMIC_RELAXED))
            ;
        break;
    }
    return got;
}

int64_t qm_search_next(void *arg, uint64_t off, uint64_t end)
{
    const struct qm_search *w = arg;
    return w->next(w->arg, off, end);
}
