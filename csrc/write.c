/* Chunks of guest memory -> file: plan the runs of a chunk, write them. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"
#include "chunk.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define ZEROS_ALIGN 4096u

static const unsigned char zeros[QM_MAX_PAGE] __attribute__((aligned(ZEROS_ALIGN)));

struct writer {
    const struct qm_transfer *transfer;
    struct qm_source source;
    int fd;
    size_t unit;      /* granularity of positions and lengths; 1 when buffered */
    size_t mem_align; /* of addresses; 1 when buffered */
};

/* A writer through the buffered descriptor. */
static struct writer make_writer(const struct qm_transfer *t, qm_channel *channel,
                                 struct qm_fault *fault)
{
    return (struct writer){
        .transfer = t,
        .fd = t->file->fd,
        .unit = 1,
        .mem_align = 1,
        .source =
            {
                .transfer = t,
                .channel = channel,
                .fault = fault,
                .longest_gap = t->policy->everything ? UINT64_MAX : t->policy->max_gap,
                .look_for_holes = 1,
                .pagemap = -1,
            },
    };
}

/* ---- run -> file ---------------------------------------------------------------------------- */

static int write_fault(struct writer *w, off_t bad, int rc)
{
    if (rc == -EFAULT)
        return memory_fault(w->source.fault, (uint64_t)(bad - w->transfer->block->pages_offset),
                            rc);
    return rc ? file_fault(w->source.fault, bad, rc) : 0;
}

static int drain(struct writer *w)
{
    off_t bad;
    int rc = qm_queue_drain(&w->source.channel->queue, w->transfer->job, &bad);
    return write_fault(w, bad, rc);
}

/* `buffer` as in qm_queue_write. */
static int put(struct writer *w, struct iovec *iov, int n, uint64_t off, int buffer)
{
    off_t bad, at = w->transfer->block->pages_offset + (off_t)off;
    int rc = w->unit > 1 ? qm_queue_write(&w->source.channel->queue, w->transfer->job, w->fd, iov,
                                          n, at, w->unit, buffer, &bad)
                         : qm_pwritev(w->transfer->job, w->fd, iov, n, at, w->unit, &bad);
    return write_fault(w, bad, rc);
}

/* Copy [from, from + len) of the chunk to an aligned place, holes as zeros, and write it. */
static int put_copy(struct writer *w, const struct chunk *c, size_t from, size_t len)
{
    int number = c->buffer;
    if (number < 0) {
        number = qm_channel_next(w->source.channel, w->transfer->job);
    } else {
        /* The chunk is in this very buffer; runs ascend, so the bytes overwritten were written. */
        int rc = drain(w);
        if (rc)
            return rc;
    }
    unsigned char *buffer = qm_channel_buffer(w->source.channel, number);
    if (!buffer)
        return -ENOMEM;
    size_t page = w->transfer->block->page_size;
    if (!c->has_holes) {
        memmove(buffer, c->bytes + from, len);
    } else {
        for (size_t at = 0; at < len; at += page) {
            if (bit_get(c->resident, (from + at) / page))
                memcpy(buffer + at, c->bytes + from + at, page);
            else
                memset(buffer + at, 0, page);
        }
    }
    struct iovec iov = {.iov_base = buffer, .iov_len = len};
    int rc = put(w, &iov, 1, c->off + from, number);
    return rc || number != c->buffer ? rc : drain(w);
}

/* Write pages with holes among them: the holes from `zeros`, the rest from guest memory. */
static int put_around_holes(struct writer *w, const struct chunk *c, size_t from, size_t len)
{
    struct iovec iov[QM_MAX_IOV];
    int n = 0;
    size_t page = w->transfer->block->page_size;
    size_t end = (from + len) / page;
    uint64_t at = c->off + from;
    size_t pending = 0;
    for (size_t k = from / page; k < end;) {
        int real = bit_get(c->resident, k);
        size_t stop = real ? next_clear(c->resident, k, end) : k + 1;
        iov[n].iov_base =
            real ? (void *)(uintptr_t)(c->bytes + k * page) : (void *)(uintptr_t)zeros;
        iov[n].iov_len = (stop - k) * page;
        pending += iov[n].iov_len;
        n++;
        k = stop;
        if (n == QM_MAX_IOV || k == end) {
            int rc = put(w, iov, n, at, -1);
            if (rc)
                return rc;
            at += pending;
            pending = 0;
            n = 0;
        }
    }
    return 0;
}

static int put_range(struct writer *w, const struct chunk *c, size_t from, size_t len)
{
    size_t page = w->transfer->block->page_size;
    int aligned = (uintptr_t)(c->bytes + from) % w->mem_align == 0;
    int holes = c->has_holes &&
                next_clear(c->resident, from / page, (from + len) / page) < (from + len) / page;
    if (holes && aligned && page % w->unit == 0 && page % w->mem_align == 0 &&
        w->mem_align <= ZEROS_ALIGN)
        return put_around_holes(w, c, from, len);

    if (holes || !aligned)
        return put_copy(w, c, from, len);
    struct iovec iov = {.iov_base = (void *)(uintptr_t)(c->bytes + from), .iov_len = len};
    return put(w, &iov, 1, c->off + from, c->buffer);
}

static int put_run(struct writer *w, const struct chunk *c, size_t from, size_t to)
{
    size_t grain =
        w->unit > w->transfer->block->page_size ? w->unit : w->transfer->block->page_size;
    while (from < to) {
        size_t len = qm_job_piece(w->transfer->job, grain);
        if (w->unit > 1 && len > qm_queue_piece(&w->source.channel->queue))
            len = qm_queue_piece(&w->source.channel->queue);
        if (len > to - from)
            len = to - from;
        int rc = put_range(w, c, from, len);
        if (rc)
            return rc;
        from += len;
    }
    return 0;
}

/* ---- chunk -> runs -------------------------------------------------------------------------- */

/* Return the longest gap (in grains) to bridge: up to max_gap, as long as all gaps up to that length
 * together hold at most gap_share of the data. Short gaps first: they save the most calls per
 * byte. */
static size_t plan_gap(const struct writer *w, const uint64_t *want, size_t n, size_t grain)
{
    size_t longest = (size_t)(w->transfer->policy->max_gap / grain);
    if (longest == 0)
        return 0;
    if (longest >= n)
        longest = n - 1;
    uint32_t seen[MAX_PAGES];
    memset(seen, 0, (longest + 1) * sizeof(seen[0]));

    uint64_t data = 0;
    size_t at = next_set(want, 0, n);
    while (at < n) {
        size_t stop = next_clear(want, at, n);
        data += stop - at;
        at = next_set(want, stop, n);
        if (at < n && at - stop <= longest)
            seen[at - stop]++;
    }
    uint64_t budget = data * w->transfer->policy->gap_share / 100;
    uint64_t spent = 0;
    size_t gap = 0;
    for (size_t len = 1; len <= longest; len++) {
        spent += (uint64_t)seen[len] * len;
        if (spent > budget)
            break;
        gap = len;
    }
    return gap;
}

/* Make one bit of every `pages` bits of `want`. */
static void widen(const uint64_t *want, size_t npages, size_t pages, uint64_t *wide)
{
    memset(wide, 0, WORDS * sizeof(wide[0]));
    for (size_t k = next_set(want, 0, npages); k < npages;) {
        bit_set(wide, k / pages);
        k = next_set(want, (k / pages + 1) * pages, npages);
    }
}

static int write_runs(struct writer *w, const struct chunk *c, const uint64_t *want)
{
    size_t grain = w->transfer->block->page_size, n = c->npages;
    uint64_t wide[WORDS];
    if (w->unit > grain) {
        /* Runs are rounded outward to units: plan in units. */
        widen(want, n, w->unit / grain, wide);
        want = wide;
        n = c->len / w->unit;
        grain = w->unit;
    }
    size_t gap = plan_gap(w, want, n, grain);
    for (size_t at = next_set(want, 0, n); at < n;) {
        size_t from = at, to;
        do {
            to = next_clear(want, at, n);
            at = next_set(want, to, n);
        } while (at < n && at - to <= gap);
        int rc = put_run(w, c, from * grain, to * grain);
        if (rc)
            return rc;
    }
    return 0;
}

/* Copy the pages [from, to) of the chunk to their place in `buffer`, zero pages as zeros. */
static void copy_pages(const struct chunk *c, size_t page, size_t from, size_t to,
                       unsigned char *buffer)
{
    while (from < to) {
        size_t stop = next_set(c->data, from, to);
        memset(buffer + from * page, 0, (stop - from) * page);
        from = next_clear(c->data, stop, to);
        if (c->bytes != buffer)
            memcpy(buffer + stop * page, c->bytes + stop * page, (from - stop) * page);
    }
}

/* Call the hook for `len` bytes at `off` of the block. */
static int call_hook(struct writer *w, uint64_t off, const unsigned char *bytes, size_t len)
{
    const struct qm_file *file = w->transfer->file;
    off_t at = w->transfer->block->pages_offset + (off_t)off;
    int rc = file->hook(file->hook_arg, at, bytes, len);
    return rc ? file_fault(w->source.fault, at, rc) : 0;
}

/* Write a chunk from a bounce buffer, which does not change, and call the hook for each piece just
 * before the piece is written, so that the disk does not wait for all digests of the chunk. */
static int write_copied(struct writer *w, const struct chunk *c, const uint64_t *want)
{
    struct chunk copy = *c;
    if (copy.buffer < 0)
        copy.buffer = qm_channel_next(w->source.channel, w->transfer->job);
    unsigned char *buffer = qm_channel_buffer(w->source.channel, copy.buffer);
    if (!buffer)
        return -ENOMEM;
    copy.bytes = buffer;
    copy.has_holes = 0;
    size_t page = w->transfer->block->page_size, pages = QM_PIECE / page;
    for (size_t k = next_set(want, 0, c->npages); k < c->npages;) {
        size_t from = k / pages * pages;
        size_t to = from + pages < c->npages ? from + pages : c->npages;
        copy_pages(c, page, from, to, buffer);
        int rc = call_hook(w, c->off + from * page, buffer + from * page, (to - from) * page);
        if (rc)
            return rc;
        uint64_t part[WORDS] = {0};
        for (; k < to; k = next_set(want, k + 1, c->npages))
            bit_set(part, k);
        rc = write_runs(w, &copy, part);
        if (rc)
            return rc;
    }
    return 0;
}

/* Direct writes of scattered pages are split at the device's limit of segments; a buffer on huge pages
 * is written in one piece. Few pages are few segments anyway. */
static int is_scattered(struct writer *w, const struct chunk *c, uint64_t data_pages)
{
    return w->unit > 1 && c->buffer < 0 && data_pages >= c->npages / 8 && data_pages > 0 &&
           qm_is_scattered(w->source.pagemap, c->bytes, c->len);
}

/* Write a chunk from a bounce buffer. */
static int write_gathered(struct writer *w, const struct chunk *c, const uint64_t *want)
{
    struct chunk copy = *c;
    copy.buffer = qm_channel_next(w->source.channel, w->transfer->job);
    unsigned char *buffer = qm_channel_buffer(w->source.channel, copy.buffer);
    if (!buffer)
        return -ENOMEM;
    copy.bytes = buffer;
    copy.has_holes = 0;
    copy_pages(c, w->transfer->block->page_size, 0, c->npages, buffer);
    return write_runs(w, &copy, want);
}

/* Call the hook for each piece of the chunk that is about to change. */
static int announce_changes(struct writer *w, const struct chunk *c, const uint64_t *want)
{
    size_t page = w->transfer->block->page_size, pages = QM_PIECE / page;
    for (size_t k = next_set(want, 0, c->npages); k < c->npages;) {
        size_t from = k / pages * pages;
        size_t to = from + pages < c->npages ? from + pages : c->npages;
        int rc = call_hook(w, c->off + from * page, NULL, (to - from) * page);
        if (rc)
            return rc;
        k = next_set(want, to, c->npages);
    }
    return 0;
}

static int write_chunk(struct writer *w, const struct chunk *c)
{
    const struct qm_transfer *t = w->transfer;
    uint64_t *data = t->data;
    uint64_t want[WORDS];
    uint64_t data_pages = 0, selected_pages = 0;
    size_t base = (size_t)(c->first / 64);
    for (size_t i = 0; i * 64 < c->npages; i++) {
        uint64_t chosen = bits_below(i, c->npages);
        if (t->selection)
            chosen &= t->selection[base + i];
        uint64_t filled = t->policy->mark_zero ? chosen : c->data[i] & chosen;
        uint64_t word = (data[base + i] & ~chosen) | filled;
        if (data[base + i] != word) /* a bitmap uses memory only where bits are set */
            data[base + i] = word;
        want[i] = t->policy->everything ? chosen : filled;
        data_pages += (uint64_t)__builtin_popcountll(filled);
        selected_pages += (uint64_t)__builtin_popcountll(chosen);
    }
    w->source.look_for_holes = data_pages == 0;
    if (t->file->fd >= 0) {
        int rc = t->file->hook && t->selection ? announce_changes(w, c, want) : 0;
        if (rc == 0 && t->file->hook && !t->selection)
            rc = write_copied(w, c, want);
        else if (rc == 0 && is_scattered(w, c, data_pages))
            rc = write_gathered(w, c, want);
        else if (rc == 0)
            rc = write_runs(w, c, want);
        if (rc)
            return rc;
    }
    qm_job_count_pages(t->job, selected_pages * t->block->page_size, data_pages,
                       selected_pages - data_pages);
    return 0;
}

static int write_range(struct writer *w, uint64_t first, uint64_t end)
{
    struct chunk c;
    const uint64_t *selection = w->transfer->selection;
    uint64_t most = QM_CHUNK / w->transfer->block->page_size;
    for (uint64_t at = first; at < end; at += c.npages) {
        if (qm_job_cancelled(w->transfer->job))
            return -ECANCELED;
        c.npages = end - at < most ? (size_t)(end - at) : (size_t)most;
        if (selection && next_set(selection, at, at + c.npages) == at + c.npages)
            continue; /* nothing of it is read */
        int rc = qm_chunk_load(&w->source, &c, at, end);
        if (rc == 0)
            rc = write_chunk(w, &c);
        if (rc)
            return rc;
    }
    return 0;
}

/* Return how many pages of the block direct writes may cover. */
static uint64_t direct_pages(const struct qm_transfer *t)
{
    return t->block->len / t->file->off_align * t->file->off_align / t->block->page_size;
}

static int is_direct(const struct qm_transfer *t)
{
    return t->file->fd >= 0 && t->file->fd_direct >= 0 &&
           (uint64_t)t->block->pages_offset % t->file->off_align == 0;
}

int qm_write(const struct qm_transfer *t, qm_channel *channel, uint64_t first, uint64_t npages,
             struct qm_fault *fault)
{
    int rc = qm_transfer_check(t, first, npages);
    if (rc)
        return rc;
    struct writer w = make_writer(t, channel, fault);
    uint64_t end = first + npages;
    if (is_direct(t)) {
        w.fd = t->file->fd_direct;
        w.unit = t->file->off_align;
        w.mem_align = t->file->mem_align;
        w.source.direct = 1;
        if (t->memory->base)
            w.source.pagemap = qm_pagemap_open();
        if (end > direct_pages(t))
            end = direct_pages(t);
    }
    rc = write_range(&w, first, end);
    if (w.source.pagemap >= 0)
        close(w.source.pagemap);
    off_t bad = 0;
    int late = qm_queue_drain(&channel->queue, t->job, &bad);
    return rc ? rc : write_fault(&w, bad, late);
}

/* Copy one page of guest memory. */
static int load_page(struct writer *w, uint64_t off, unsigned char *page)
{
    const struct qm_memory *memory = w->transfer->memory;
    size_t len = w->transfer->block->page_size;
    if (memory->base && memory->fd < 0) {
        memcpy(page, memory->base + off, len);
        return 0;
    }
    ssize_t got = qm_memory_fill(memory, page, off, len);
    if (got < 0)
        return memory_fault(w->source.fault, off, (int)got);
    if ((size_t)got < len)
        return memory_fault(w->source.fault, off + (size_t)got, -EFAULT);
    return 0;
}

int qm_write_tail(const struct qm_transfer *t, qm_channel *channel, struct qm_fault *fault)
{
    size_t len = t->block->page_size;
    uint64_t pages = t->block->len / len;
    int rc = qm_transfer_check(t, 0, pages);
    if (rc || !is_direct(t))
        return rc;
    struct writer w = make_writer(t, channel, fault);
    unsigned char page[QM_MAX_PAGE];
    for (uint64_t k = direct_pages(t); k < pages; k++) {
        if (t->selection && !bit_get(t->selection, k))
            continue;
        uint64_t off = k * len;
        rc = load_page(&w, off, page);
        if (rc)
            return rc;
        int zero = !t->policy->mark_zero && qm_is_zero(page, len);
        if (zero)
            bit_clear(t->data, k);
        else
            bit_set(t->data, k);
        if (t->file->hook && (!zero || !t->selection || t->policy->everything)) {
            rc = call_hook(&w, off, t->selection ? NULL : page, len);
            if (rc)
                return rc;
        }
        if (!zero || t->policy->everything) {
            struct iovec iov = {.iov_base = page, .iov_len = len};
            rc = put(&w, &iov, 1, off, -1);
            if (rc)
                return rc;
        }
        qm_job_count_pages(t->job, len, !zero, (uint64_t)zero);
    }
    return 0;
}
