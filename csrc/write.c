/* Chunks of guest memory -> file: plan their runs, write them. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"
#include "chunk.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

#define ZEROS_ALIGN 4096u

static const unsigned char zeros[QM_MAX_PAGE] __attribute__((aligned(ZEROS_ALIGN)));

struct writer {
    qm_job *job;
    const struct qm_file *file;
    const struct qm_sparse *sparse;
    struct qm_source source;
    int fd;
    size_t unit;      /* granularity of positions and lengths; 1 when buffered */
    size_t mem_align; /* of addresses; 1 when buffered */
};

/* ---- run -> file ---------------------------------------------------------------------------- */

static int write_fault(struct writer *w, off_t bad, int rc)
{
    if (rc == -EFAULT)
        return memory_fault(w->source.fault, (uint64_t)(bad - w->source.block->pages_offset), rc);
    return rc ? file_fault(w->source.fault, bad, rc) : 0;
}

static int drain(struct writer *w)
{
    off_t bad;
    int rc = qm_queue_drain(&w->source.channel->queue, w->job, &bad);
    return write_fault(w, bad, rc);
}

/* `buffer` as in qm_queue_write. */
static int put(struct writer *w, struct iovec *iov, int n, uint64_t off, int buffer)
{
    off_t bad, at = w->source.block->pages_offset + (off_t)off;
    int rc = w->unit > 1 ? qm_queue_write(&w->source.channel->queue, w->job, w->fd, iov, n, at,
                                          w->unit, buffer, &bad)
                         : qm_pwritev(w->job, w->fd, iov, n, at, w->unit, &bad);
    return write_fault(w, bad, rc);
}

/* Copies [from, from + len) of the chunk to an aligned place, holes as zeros, and writes it. */
static int put_copy(struct writer *w, const struct chunk *c, size_t from, size_t len)
{
    int number = c->buffer;
    if (number < 0) {
        number = qm_channel_next(w->source.channel, w->job);
    } else {
        /* The chunk stands in this very buffer; runs ascend, so what is overwritten was written. */
        int rc = drain(w);
        if (rc)
            return rc;
    }
    unsigned char *buffer = qm_channel_buffer(w->source.channel, number);
    if (!buffer)
        return -ENOMEM;
    size_t page = w->source.block->page_size;
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

/* Pages with holes among them: the holes come from `zeros`, the rest straight from memory. */
static int put_around_holes(struct writer *w, const struct chunk *c, size_t from, size_t len)
{
    struct iovec iov[QM_MAX_IOV];
    int n = 0;
    size_t page = w->source.block->page_size;
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
    size_t page = w->source.block->page_size;
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
    size_t grain = w->unit > w->source.block->page_size ? w->unit : w->source.block->page_size;
    while (from < to) {
        size_t len = qm_job_piece(w->job, grain);
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

/* The longest gap (in grains) to bridge: as long as allowed, while all gaps up to that length hold
 * no more than the share of the data. Short gaps come first: they save most calls a byte. */
static size_t plan_gap(const struct writer *w, const uint64_t *want, size_t n, size_t grain)
{
    size_t longest = (size_t)(w->sparse->max_gap / grain);
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
    uint64_t budget = data * w->sparse->gap_share / 100;
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

/* One bit for every `pages` bits of `want`. */
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
    size_t grain = w->source.block->page_size, n = c->npages;
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

/* Copies the pages [from, to) of the chunk to their place in `buffer`, zero pages as zeros. */
static void stage(const struct chunk *c, size_t page, size_t from, size_t to, unsigned char *buffer)
{
    while (from < to) {
        size_t stop = next_set(c->data, from, to);
        memset(buffer + from * page, 0, (stop - from) * page);
        from = next_clear(c->data, stop, to);
        if (c->bytes != buffer)
            memcpy(buffer + stop * page, c->bytes + stop * page, (from - stop) * page);
    }
}

/* Writes a chunk from a buffer of ours, where nobody changes it, and tells of it; piece by piece,
 * so
 * that the disk does not wait for the digests of all. */
static int write_told(struct writer *w, const struct chunk *c, const uint64_t *want)
{
    struct chunk own = *c;
    if (own.buffer < 0)
        own.buffer = qm_channel_next(w->source.channel, w->job);
    unsigned char *buffer = qm_channel_buffer(w->source.channel, own.buffer);
    if (!buffer)
        return -ENOMEM;
    own.bytes = buffer;
    own.has_holes = 0;
    size_t page = w->source.block->page_size, pages = QM_PIECE / page;
    off_t at = w->source.block->pages_offset + (off_t)c->off;
    for (size_t k = next_set(want, 0, c->npages); k < c->npages;) {
        size_t from = k / pages * pages;
        size_t to = from + pages < c->npages ? from + pages : c->npages;
        stage(c, page, from, to, buffer);
        int rc = w->file->hook(w->file->hook_arg, at + (off_t)(from * page), buffer + from * page,
                               (to - from) * page);
        if (rc)
            return file_fault(w->source.fault, at + (off_t)(from * page), rc);
        uint64_t part[WORDS] = {0};
        for (; k < to; k = next_set(want, k + 1, c->npages))
            bit_set(part, k);
        rc = write_runs(w, &own, part);
        if (rc)
            return rc;
    }
    return 0;
}

/* Tells which pieces of the chunk are about to change. */
static int tell_change(struct writer *w, const struct chunk *c, const uint64_t *want)
{
    size_t page = w->source.block->page_size, pages = QM_PIECE / page;
    off_t at = w->source.block->pages_offset + (off_t)c->off;
    for (size_t k = next_set(want, 0, c->npages); k < c->npages;) {
        size_t from = k / pages * pages;
        size_t to = from + pages < c->npages ? from + pages : c->npages;
        int rc =
            w->file->hook(w->file->hook_arg, at + (off_t)(from * page), NULL, (to - from) * page);
        if (rc)
            return file_fault(w->source.fault, at + (off_t)(from * page), rc);
        k = next_set(want, to, c->npages);
    }
    return 0;
}

static int write_chunk(struct writer *w, const struct chunk *c, const uint64_t *selection,
                       uint64_t *data)
{
    uint64_t want[WORDS];
    uint64_t data_pages = 0, selected_pages = 0;
    size_t base = (size_t)(c->first / 64);
    for (size_t i = 0; i * 64 < c->npages; i++) {
        uint64_t chosen = bits_below(i, c->npages);
        if (selection)
            chosen &= selection[base + i];
        uint64_t filled = w->sparse->mark_zero ? chosen : c->data[i] & chosen;
        uint64_t word = (data[base + i] & ~chosen) | filled;
        if (data[base + i] != word) /* a bitmap costs memory only where bits are set */
            data[base + i] = word;
        want[i] = w->sparse->everything ? chosen : filled;
        data_pages += (uint64_t)__builtin_popcountll(filled);
        selected_pages += (uint64_t)__builtin_popcountll(chosen);
    }
    w->source.look_for_holes = data_pages == 0;
    if (w->file->fd >= 0) {
        int rc = w->file->hook && selection ? tell_change(w, c, want) : 0;
        if (rc == 0)
            rc = w->file->hook && !selection ? write_told(w, c, want) : write_runs(w, c, want);
        if (rc)
            return rc;
    }
    qm_job_count_pages(w->job, selected_pages * w->source.block->page_size, data_pages,
                       selected_pages - data_pages);
    return 0;
}

static int write_range(struct writer *w, const uint64_t *selection, uint64_t *data, uint64_t first,
                       uint64_t end)
{
    struct chunk c;
    for (uint64_t at = first; at < end; at += c.npages) {
        if (qm_job_cancelled(w->job))
            return -ECANCELED;
        int rc = qm_chunk_load(&w->source, &c, at, end);
        if (rc == 0)
            rc = write_chunk(w, &c, selection, data);
        if (rc)
            return rc;
    }
    return 0;
}

/* Pages of the block that direct writes may cover. */
static uint64_t direct_pages(const struct qm_block *block, const struct qm_file *file)
{
    return block->len / file->off_align * file->off_align / block->page_size;
}

static int is_direct(const struct qm_block *block, const struct qm_file *file)
{
    return file->fd >= 0 && file->fd_direct >= 0 &&
           (uint64_t)block->pages_offset % file->off_align == 0;
}

int qm_write(qm_job *job, qm_channel *channel, const struct qm_file *file,
             const struct qm_block *block, const struct qm_memory *memory,
             const struct qm_sparse *sparse, const uint64_t *selection, uint64_t *data,
             uint64_t first, uint64_t npages, struct qm_fault *fault)
{
    int rc = qm_block_check(block, file, first, npages);
    if (rc)
        return rc;
    struct writer w = {
        .job = job,
        .file = file,
        .sparse = sparse,
        .fd = file->fd,
        .unit = 1,
        .mem_align = 1,
        .source =
            {
                .job = job,
                .channel = channel,
                .block = block,
                .memory = memory,
                .fault = fault,
                .longest_gap = sparse->everything ? UINT64_MAX : sparse->max_gap,
                .look_for_holes = 1,
            },
    };
    uint64_t end = first + npages;
    if (is_direct(block, file)) {
        w.fd = file->fd_direct;
        w.unit = file->off_align;
        w.mem_align = file->mem_align;
        if (end > direct_pages(block, file))
            end = direct_pages(block, file);
    }
    rc = write_range(&w, selection, data, first, end);
    off_t bad = 0;
    int late = qm_queue_drain(&channel->queue, job, &bad);
    return rc ? rc : write_fault(&w, bad, late);
}

int qm_write_tail(qm_job *job, qm_channel *channel, const struct qm_file *file,
                  const struct qm_block *block, const struct qm_memory *memory,
                  const struct qm_sparse *sparse, const uint64_t *selection, uint64_t *data,
                  struct qm_fault *fault)
{
    uint64_t pages = block->len / block->page_size;
    int rc = qm_block_check(block, file, 0, pages);
    if (rc || !is_direct(block, file))
        return rc;
    struct writer w = {
        .job = job,
        .file = file,
        .sparse = sparse,
        .fd = file->fd,
        .unit = 1,
        .mem_align = 1,
        .source =
            {
                .job = job,
                .channel = channel,
                .block = block,
                .memory = memory,
                .fault = fault,
            },
    };
    unsigned char page[QM_MAX_PAGE];
    for (uint64_t k = direct_pages(block, file); k < pages; k++) {
        if (selection && !bit_get(selection, k))
            continue;
        uint64_t off = k * block->page_size;
        if (memory->base && memory->fd < 0) {
            memcpy(page, memory->base + off, block->page_size);
        } else {
            ssize_t got = qm_memory_fill(memory, page, off, block->page_size);
            if (got < 0)
                return memory_fault(fault, off, (int)got);
            if ((size_t)got < block->page_size)
                return memory_fault(fault, off + (size_t)got, -EFAULT);
        }
        int zero = !sparse->mark_zero && qm_is_zero(page, block->page_size);
        if (zero)
            bit_clear(data, k);
        else
            bit_set(data, k);
        if (!zero || sparse->everything) {
            struct iovec iov = {.iov_base = page, .iov_len = block->page_size};
            rc = put(&w, &iov, 1, off, -1);
            if (rc)
                return rc;
        }
        qm_job_count_pages(job, block->page_size, !zero, (uint64_t)zero);
    }
    return 0;
}
