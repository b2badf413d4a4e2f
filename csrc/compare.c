/* Two memories -> the pages in which they differ. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"
#include "chunk.h"

#include <errno.h>
#include <string.h>

/* Bytes of each memory that are read and compared at a time. */
#define STEP ((size_t)512 << 10)

struct comparer {
    struct qm_comparison *comparison;
    struct qm_fault *fault;
    unsigned char *bytes[2];
};

static int fail(struct comparer *c, int side, uint64_t off, int rc)
{
    c->fault->in_memory = 1;
    c->fault->at = (int64_t)off;
    c->fault->block = side;
    return rc;
}

/* The page of the first data in either memory among [first, end), `end` without any; -errno. */
static int64_t data_start(struct comparer *c, uint64_t first, uint64_t end)
{
    size_t page = c->comparison->page_size;
    uint64_t found = end * page;
    for (int side = 0; side < 2; side++) {
        const struct qm_memory *m = c->comparison->memory[side];
        int64_t data =
            m->next ? m->next(m->fill_arg, first * page, found) : (int64_t)(first * page);
        if (data < 0)
            return fail(c, side, first * page, (int)data);
        if ((uint64_t)data < found)
            found = (uint64_t)data;
    }
    return found == end * page ? (int64_t)end : (int64_t)(found / page);
}

/* Pages [first, end), at most STEP bytes. */
static int compare_step(struct comparer *c, uint64_t first, uint64_t end)
{
    struct qm_comparison *comparison = c->comparison;
    size_t page = comparison->page_size, len = (size_t)(end - first) * page;
    for (int side = 0; side < 2; side++) {
        const struct qm_memory *m = comparison->memory[side];
        ssize_t got = m->fill(m->fill_arg, c->bytes[side], first * page, len);
        if (got < 0)
            return fail(c, side, first * page, (int)got);
        if ((size_t)got < len)
            return fail(c, side, first * page + (uint64_t)got, -ENODATA);
    }
    for (uint64_t k = first; k < end; k++) {
        const unsigned char *a = c->bytes[0] + (k - first) * page;
        const unsigned char *b = c->bytes[1] + (k - first) * page;
        if (memcmp(a, b, page) == 0)
            continue;
        bit_set(comparison->differing, k);
        for (int side = 0; side < 2; side++)
            if (qm_is_zero(side ? b : a, page))
                __atomic_fetch_add(&comparison->zero[side], 1, __ATOMIC_RELAXED);
    }
    qm_job_count_pages(comparison->job, len, end - first, 0);
    qm_job_count_io(comparison->job, len, 1);
    return 0;
}

/* Selected pages [first, end), without a gap. */
static int compare_run(struct comparer *c, uint64_t first, uint64_t end)
{
    struct qm_comparison *comparison = c->comparison;
    size_t page = comparison->page_size, most = STEP / page;
    while (first < end) {
        if (qm_job_cancelled(comparison->job))
            return -ECANCELED;
        int64_t data = data_start(c, first, end);
        if (data < 0)
            return (int)data;
        uint64_t skipped = (uint64_t)data - first;
        qm_job_count_pages(comparison->job, skipped * page, 0, skipped);
        first = (uint64_t)data;
        if (first == end)
            break;
        uint64_t to = end - first < most ? end : first + most;
        int rc = compare_step(c, first, to);
        if (rc)
            return rc;
        first = to;
    }
    return 0;
}

int qm_compare_memories(struct qm_comparison *comparison, qm_channel *channel, uint64_t first,
                        uint64_t npages, struct qm_fault *fault)
{
    uint32_t page = comparison->page_size;
    if (page < QM_MIN_PAGE || page > QM_MAX_PAGE || (page & (page - 1)) || first % 64 ||
        first > comparison->npages || npages > comparison->npages - first)
        return -EINVAL;
    struct comparer c = {.comparison = comparison, .fault = fault};
    for (int side = 0; side < 2; side++) {
        if (!comparison->memory[side]->fill)
            return -EINVAL;
        c.bytes[side] = qm_channel_buffer(channel, side);
        if (!c.bytes[side])
            return -ENOMEM;
    }
    const uint64_t *selection = comparison->selection;
    uint64_t end = first + npages;
    while (first < end) {
        uint64_t stop = end;
        if (selection) {
            first = next_set(selection, first, end);
            if (first == end)
                break;
            stop = next_clear(selection, first, end);
        }
        int rc = compare_run(&c, first, stop);
        if (rc)
            return rc;
        first = stop;
    }
    return 0;
}
