/* Guest memory -> file: scan a chunk, plan its runs, write them. */
#define _GNU_SOURCE
#include "bits.h"
#include "channel.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_PAGES (QM_CHUNK / QM_MIN_PAGE)
#define WORDS (MAX_PAGES / 64)
/* Bytes read and scanned at a time, while they are still in the cache. */
#define SCAN_STEP ((size_t)256 << 10)
#define ZEROS_ALIGN 4096u

static const unsigned char zeros[QM_MAX_PAGE] __attribute__((aligned(ZEROS_ALIGN)));

struct writer {
    qm_job *job;
    qm_channel *channel;
    const struct qm_file *file;
    const struct qm_block *block;
    const struct qm_memory *memory;
    const struct qm_sparse *sparse;
    struct qm_fault *fault;
    int fd;
    size_t unit;      /* granularity of positions and lengths; 1 when buffered */
    size_t mem_align; /* of addresses; 1 when buffered */
    int look_for_holes;
};

struct chunk {
    uint64_t first; /* page of the block */
    size_t npages;
    uint64_t off; /* byte of the block */
    size_t len;
    const unsigned char *bytes; /* the chunk in memory; only resident pages may be touched */
    int buffer;                 /* the bounce buffer it was copied into, or -1 */
    int has_holes;
    uint64_t resident[WORDS];
    uint64_t data[WORDS]; /* pages that are not zero */
};

static int memory_fault(struct writer *w, uint64_t off, int rc)
{
    w->fault->in_memory = 1;
    w->fault->at = (int64_t)off;
    return rc;
}

/* ---- memory -> chunk ------------------------------------------------------------------------ */

static ssize_t fill(const struct writer *w, void *buf, uint64_t off, size_t len)
{
    const struct qm_memory *m = w->memory;
    if (m->fill)
        return m->fill(m->fill_arg, buf, off, len);
    size_t have = 0;
    while (have < len) {
        ssize_t got = pread(m->fd, (unsigned char *)buf + have, len - have,
                            m->fd_offset + (off_t)(off + have));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        if (got == 0)
            break;
        have += (size_t)got;
    }
    return (ssize_t)have;
}

/* Whether the file behind the memory still has the chunk: past its end all would look like a hole. */
static int still_there(struct writer *w, const struct chunk *c)
{
    struct stat st;
    if (fstat(w->memory->fd, &st) < 0)
        return memory_fault(w, c->off, -errno);
    uint64_t end = (uint64_t)w->memory->fd_offset + c->off + c->len;
    if (S_ISREG(st.st_mode) && (uint64_t)st.st_size < end)
        return memory_fault(w, c->off, -EFAULT);
    return 0;
}

/* Byte of the chunk where the hole at `at` ends, in steps that keep pages and units whole; -errno. */
static int64_t skip_hole(struct writer *w, const struct chunk *c, size_t at)
{
    int rc = still_there(w, c);
    if (rc)
        return rc;
    uint64_t end = c->off + c->len;
    uint64_t data = (uint64_t)qm_next_data(w->memory, c->off + at, end);
    if (data == end)
        return (int64_t)c->len;
    size_t next = (size_t)(data - c->off) / QM_MAX_PAGE * QM_MAX_PAGE;
    return (int64_t)(next > at ? next : at);
}

/* Memory without an address: copied into the bounce buffer; where zeros are met, holes are sought. */
static int fill_chunk(struct writer *w, struct chunk *c)
{
    int number = qm_channel_next(w->channel, w->job);
    unsigned char *buffer = qm_channel_buffer(w->channel, number);
    if (!buffer)
        return -ENOMEM;
    c->bytes = buffer;
    c->buffer = number;

    size_t page = w->block->page_size;
    int look = w->look_for_holes;
    for (size_t at = 0; at < c->len;) {
        if (look && !w->memory->fill) {
            int64_t next = skip_hole(w, c, at);
            if (next < 0)
                return (int)next;
            if ((size_t)next > at) {
                /* Nobody reads what stands there, unless it is written as part of a run. */
                if (w->sparse->everything || (size_t)next - at <= w->sparse->max_gap)
                    memset(buffer + at, 0, (size_t)next - at);
                at = (size_t)next;
                continue;
            }
        }
        size_t step = c->len - at < SCAN_STEP ? c->len - at : SCAN_STEP;
        ssize_t got = fill(w, buffer + at, c->off + at, step);
        if (got < 0)
            return memory_fault(w, c->off + at, (int)got);
        if ((size_t)got < step)
            return memory_fault(w, c->off + at + (size_t)got, -EFAULT);
        look = 1;
        for (size_t p = 0; p < step; p += page) {
            if (!qm_is_zero(buffer + at + p, page)) {
                bit_set(c->data, (at + p) / page);
                look = 0;
            }
        }
        at += step;
    }
    return 0;
}

/* A mapping whose holes must stay holes. */
static void scan_extents(struct writer *w, struct chunk *c)
{
    size_t page = w->block->page_size;
    uint64_t end = c->off + c->len;
    uint64_t at = c->off;
    c->has_holes = 1;
    while (at < end) {
        uint64_t stop = qm_channel_data_until(w->channel, w->memory, at, end);
        if (stop == at) {
            int64_t data = qm_next_data(w->memory, at, end);
            at = (uint64_t)data;
            continue;
        }
        size_t from = (size_t)((at - c->off) / page);
        size_t to = (size_t)((stop - c->off + page - 1) / page);
        for (size_t k = from; k < to; k++) {
            bit_set(c->resident, k);
            if (!qm_is_zero(c->bytes + k * page, page))
                bit_set(c->data, k);
        }
        at = stop;
    }
}

/* Whether holes of the mapping can be told apart page by page. */
static int holes_are_pages(const struct writer *w)
{
    long page = sysconf(_SC_PAGESIZE);
    return w->block->page_size <= (uint64_t)page && w->memory->fd_offset % page == 0;
}

static int load_chunk(struct writer *w, struct chunk *c)
{
    const struct qm_memory *m = w->memory;
    memset(c->data, 0, sizeof(c->data));
    c->buffer = -1;
    c->has_holes = 0;
    if (!m->base || (m->fd >= 0 && !holes_are_pages(w)))
        return fill_chunk(w, c);
    c->bytes = m->base + c->off;
    if (m->fd >= 0) {
        memset(c->resident, 0, sizeof(c->resident));
        scan_extents(w, c);
    } else {
        qm_scan(c->bytes, c->npages, w->block->page_size, c->data);
    }
    return 0;
}

/* ---- run -> file ---------------------------------------------------------------------------- */

static int write_fault(struct writer *w, off_t bad, int rc)
{
    if (rc == -EFAULT)
        return memory_fault(w, (uint64_t)(bad - w->block->pages_offset), rc);
    if (rc) {
        w->fault->in_memory = 0;
        w->fault->at = bad;
    }
    return rc;
}

static int drain(struct writer *w)
{
    off_t bad;
    int rc = qm_queue_drain(&w->channel->queue, w->job, &bad);
    return write_fault(w, bad, rc);
}

/* `buffer` as in qm_queue_write. */
static int put(struct writer *w, struct iovec *iov, int n, uint64_t off, int buffer)
{
    off_t bad, at = w->block->pages_offset + (off_t)off;
    int rc = w->unit > 1 ? qm_queue_write(&w->channel->queue, w->job, w->fd, iov, n, at, w->unit,
                                          buffer, &bad)
                         : qm_pwritev(w->job, w->fd, iov, n, at, w->unit, &bad);
    return write_fault(w, bad, rc);
}

/* Copies [from, from + len) of the chunk to an aligned place, holes as zeros, and writes it. */
static int put_copy(struct writer *w, const struct chunk *c, size_t from, size_t len)
{
    int number = c->buffer;
    if (number < 0) {
        number = qm_channel_next(w->channel, w->job);
    } else {
        /* The chunk stands in this very buffer; runs ascend, so what is overwritten was written. */
        int rc = drain(w);
        if (rc)
            return rc;
    }
    unsigned char *buffer = qm_channel_buffer(w->channel, number);
    if (!buffer)
        return -ENOMEM;
    size_t page = w->block->page_size;
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
    size_t page = w->block->page_size;
    size_t end = (from + len) / page;
    uint64_t at = c->off + from;
    size_t pending = 0;
    for (size_t k = from / page; k < end;) {
        int real = bit_get(c->resident, k);
        size_t stop = real ? next_clear(c->resident, k, end) : k + 1;
        iov[n].iov_base = real ? (void *)(uintptr_t)(c->bytes + k * page)
                               : (void *)(uintptr_t)zeros;
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
    size_t page = w->block->page_size;
    int aligned = (uintptr_t)(c->bytes + from) % w->mem_align == 0;
    int holes = c->has_holes && next_clear(c->resident, from / page, (from + len) / page) <
                                    (from + len) / page;
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
    size_t grain = w->unit > w->block->page_size ? w->unit : w->block->page_size;
    while (from < to) {
        size_t len = qm_job_piece(w->job, grain);
        if (w->unit > 1 && len > qm_queue_piece(&w->channel->queue))
            len = qm_queue_piece(&w->channel->queue);
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
    size_t grain = w->block->page_size, n = c->npages;
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

static int write_chunk(struct writer *w, struct chunk *c, const uint64_t *selection, uint64_t *data)
{
    int rc = load_chunk(w, c);
    if (rc)
        return rc;

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
    w->look_for_holes = data_pages == 0;
    if (w->file->fd >= 0) {
        rc = write_runs(w, c, want);
        if (rc)
            return rc;
    }
    qm_job_did(w->job, selected_pages * w->block->page_size, data_pages,
               selected_pages - data_pages);
    return 0;
}

static int write_range(struct writer *w, const uint64_t *selection, uint64_t *data, uint64_t first,
                       uint64_t end)
{
    struct chunk c;
    for (c.first = first; c.first < end; c.first += c.npages) {
        if (qm_job_cancelled(w->job))
            return -ECANCELED;
        uint64_t left = end - c.first;
        size_t most = QM_CHUNK / w->block->page_size;
        c.npages = left < most ? (size_t)left : most;
        c.off = c.first * w->block->page_size;
        c.len = c.npages * w->block->page_size;
        int rc = write_chunk(w, &c, selection, data);
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
        .job = job, .channel = channel, .file = file, .block = block, .memory = memory,
        .sparse = sparse, .fault = fault, .fd = file->fd, .unit = 1, .mem_align = 1,
        .look_for_holes = 1,
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
        .job = job, .channel = channel, .file = file, .block = block, .memory = memory,
        .sparse = sparse, .fault = fault, .fd = file->fd, .unit = 1, .mem_align = 1,
    };
    unsigned char page[QM_MAX_PAGE];
    for (uint64_t k = direct_pages(block, file); k < pages; k++) {
        if (selection && !bit_get(selection, k))
            continue;
        uint64_t off = k * block->page_size;
        if (memory->base && memory->fd < 0) {
            memcpy(page, memory->base + off, block->page_size);
        } else {
            ssize_t got = fill(&w, page, off, block->page_size);
            if (got < 0)
                return memory_fault(&w, off, (int)got);
            if ((size_t)got < block->page_size)
                return memory_fault(&w, off + (size_t)got, -EFAULT);
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
        qm_job_did(job, block->page_size, !zero, (uint64_t)zero);
    }
    return 0;
}
