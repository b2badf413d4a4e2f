/* The page records of a sequential stream -> the sinks of their blocks. */
#define _GNU_SOURCE
#include "bits.h"
#include "chunk.h"
#include "records.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* Bytes read at a time; few enough to stay in the processor's cache until they are decoded. */
#define WINDOW ((size_t)1 << 20)
#define XBZRLE_HEAD 3u /* encoding, u16 length */
#define XBZRLE_ENCODING 1

/* What the next bytes of the stream are part of. */
enum step { AT_WORD, AT_NAME_LEN, AT_NAME, AT_FILL, AT_PAGE, AT_DELTA_HEAD, AT_DELTA };

/* Adjacent pages that one call moves to memory that is a file. */
struct pending {
    const struct qm_record_block *block; /* NULL: none */
    int zeros;
    uint64_t off;
    uint64_t end;
    struct iovec iov[QM_MAX_IOV]; /* into the bytes being decoded */
    int n;
};

struct qm_decoder {
    const struct qm_record_block *blocks;
    const struct qm_record_block **by_name; /* sorted */
    size_t nblocks;
    uint32_t page_size;
    int fresh; /* pages not mentioned before count as zero */

    enum step step;
    size_t need; /* bytes of this step */
    size_t have; /* how many of them are in `partial` */
    const struct qm_record_block *current;
    uint64_t word;
    uint64_t position; /* stream bytes consumed */
    struct qm_record_error error;
    struct pending pending;
    struct qm_staging *staging;
    const struct qm_record_block *staged;       /* the block that `staging` is a part of */
    uint64_t index_bytes;                       /* of all indexes together */
    uint64_t new_bytes, data_pages, zero_pages; /* not yet counted in the job */

    off_t window_at;
    size_t window_len;
    unsigned char partial[QM_MAX_PAGE];
    unsigned char page[QM_MAX_PAGE];
    unsigned char window[WINDOW];
};

static int name_order(const unsigned char *a, size_t a_len, const unsigned char *b, size_t b_len)
{
    if (a_len != b_len)
        return a_len < b_len ? -1 : 1;
    return memcmp(a, b, a_len);
}

static int block_order(const void *a, const void *b)
{
    const struct qm_record_block *x = *(const struct qm_record_block *const *)a;
    const struct qm_record_block *y = *(const struct qm_record_block *const *)b;
    return name_order(x->name.bytes, x->name.len, y->name.bytes, y->name.len);
}

static const struct qm_record_block *find_block(const qm_decoder *d, const unsigned char *name,
                                                size_t len)
{
    size_t low = 0, high = d->nblocks;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct qm_record_block *block = d->by_name[middle];
        int order = name_order(name, len, block->name.bytes, block->name.len);
        if (order == 0)
            return block;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

static void expect(qm_decoder *d, enum step step, size_t need)
{
    d->step = step;
    d->need = need;
    d->have = 0;
}

qm_decoder *qm_decoder_create(const struct qm_record_block *blocks, size_t nblocks,
                              uint32_t page_size, int fresh)
{
    if (page_size < QM_MIN_PAGE || page_size > QM_MAX_PAGE || (page_size & (page_size - 1)))
        return NULL;
    qm_decoder *d = malloc(sizeof(*d));
    if (!d)
        return NULL;
    d->by_name = calloc(nblocks ? nblocks : 1, sizeof(*d->by_name));
    if (!d->by_name) {
        free(d);
        return NULL;
    }
    for (size_t i = 0; i < nblocks; i++)
        d->by_name[i] = &blocks[i];
    qsort(d->by_name, nblocks, sizeof(*d->by_name), block_order);
    d->blocks = blocks;
    d->nblocks = nblocks;
    d->page_size = page_size;
    d->fresh = fresh;
    d->current = NULL;
    d->word = 0;
    d->position = 0;
    memset(&d->error, 0, sizeof(d->error));
    d->pending.block = NULL;
    d->staging = NULL;
    d->staged = NULL;
    d->index_bytes = 0;
    d->new_bytes = d->data_pages = d->zero_pages = 0;
    d->window_at = 0;
    d->window_len = 0;
    expect(d, AT_WORD, WORD_LEN);
    return d;
}

void qm_decoder_destroy(qm_decoder *decoder)
{
    if (!decoder)
        return;
    free(decoder->by_name);
    free(decoder);
}

void qm_decoder_error(const qm_decoder *decoder, struct qm_record_error *out)
{
    *out = decoder->error;
}

static int fail(qm_decoder *d, enum qm_record_fault what)
{
    d->error.what = what;
    d->error.word = d->word;
    d->error.block = d->current ? d->current - d->blocks : -1;
    return -EBADMSG;
}

static uint64_t offset_of(const qm_decoder *d)
{
    return d->word & ~(uint64_t)(d->page_size - 1);
}

/* ---- pages -> memory ------------------------------------------------------------------------ */

static int flush(qm_decoder *d, struct qm_fault *fault)
{
    struct pending *p = &d->pending;
    const struct qm_record_block *block = p->block;
    if (!block)
        return 0;
    p->block = NULL;
    fault->block = block - d->blocks;
    if (p->zeros)
        return qm_store_zeros(block->memory, d->page_size, p->off, p->end, fault);
    return qm_storev(block->memory, p->off, p->iov, p->n, fault);
}

/* Make room for one more page of `block` at `off` in the pending write. */
static int coalesce(qm_decoder *d, const struct qm_record_block *block, uint64_t off, int zeros,
                    struct qm_fault *fault)
{
    struct pending *p = &d->pending;
    if (p->block != block || p->zeros != zeros || p->end != off || p->n == QM_MAX_IOV) {
        int rc = flush(d, fault);
        if (rc)
            return rc;
        p->block = block;
        p->zeros = zeros;
        p->off = off;
        p->n = 0;
    }
    p->end = off + d->page_size;
    return 0;
}

/* Count a record and mark its page as seen. */
static void record_page(qm_decoder *d, uint64_t off, int zero)
{
    const struct qm_record_block *block = d->current;
    if (zero)
        d->zero_pages++;
    else
        d->data_pages++;
    if (bit_get(block->seen, off / d->page_size))
        return;
    bit_set(block->seen, off / d->page_size);
    d->new_bytes += d->page_size;
}

static int read_zero(qm_decoder *d, struct qm_fault *fault)
{
    const struct qm_record_block *block = d->current;
    uint64_t off = offset_of(d);
    record_page(d, off, 1);
    if (block->memory->fd >= 0)
        return coalesce(d, block, off, 1, fault);
    fault->block = block - d->blocks;
    return qm_store_zeros(block->memory, d->page_size, off, off + d->page_size, fault);
}

/* `lasting`: the bytes stay valid until the next flush. */
static int read_page(qm_decoder *d, const unsigned char *bytes, int lasting, struct qm_fault *fault)
{
    const struct qm_record_block *block = d->current;
    uint64_t off = offset_of(d);
    record_page(d, off, 0);
    if (block->memory->fd < 0) {
        memcpy(block->memory->base + off, bytes, d->page_size);
        return 0;
    }
    int rc = coalesce(d, block, off, 0, fault);
    if (rc)
        return rc;
    struct iovec *iov = &d->pending.iov[d->pending.n++];
    iov->iov_base = (void *)(uintptr_t)bytes;
    iov->iov_len = d->page_size;
    return lasting ? 0 : flush(d, fault);
}

static int read_fill(qm_decoder *d, unsigned char fill, struct qm_fault *fault)
{
    if (fill == 0)
        return read_zero(d, fault);
    memset(d->page, fill, d->page_size);
    return read_page(d, d->page, 0, fault);
}

/* ---- deltas --------------------------------------------------------------------------------- */

static int read_delta(qm_decoder *d, const unsigned char *delta, struct qm_fault *fault)
{
    const struct qm_record_block *block = d->current;
    uint64_t off = offset_of(d);
    const struct qm_memory *m = block->memory;
    int rc = flush(d, fault);
    if (rc)
        return rc;
    if (d->fresh && !bit_get(block->seen, off / d->page_size)) {
        memset(d->page, 0, d->page_size);
    } else if (m->fd < 0) {
        memcpy(d->page, m->base + off, d->page_size);
    } else {
        fault->block = block - d->blocks;
        ssize_t got = qm_memory_fill(m, d->page, off, d->page_size);
        if (got < 0)
            return memory_fault(fault, off, (int)got);
        if ((size_t)got < d->page_size)
            return memory_fault(fault, off + (size_t)got, -EFAULT);
    }
    if (qm_apply_delta(delta, d->need, d->page, d->page_size))
        return fail(d, QM_RECORD_DELTA);
    return read_page(d, d->page, 0, fault);
}

/* ---- places of pages ------------------------------------------------------------------------ */

/* An index and bitmaps may use a fixed amount of memory, and more in proportion to the bytes of the
 * stream that were read. */
#define INDEX_FLOOR ((uint64_t)64 << 20)
#define INDEX_SHARE 4u

static int charge_memory(qm_decoder *d, uint64_t bytes)
{
    d->index_bytes += bytes;
    if (d->index_bytes > INDEX_FLOOR && d->index_bytes - INDEX_FLOOR > d->position * INDEX_SHARE)
        return fail(d, QM_RECORD_SCATTERED);
    return 0;
}

static int record_place(qm_decoder *d, const unsigned char *bytes)
{
    qm_index *index = d->current->index;
    uint64_t page = offset_of(d) / d->page_size, before = qm_index_bytes(index);
    uint64_t at = d->position - d->need; /* of the first byte of the data */
    int rc, zero = 0;
    if (d->step == AT_FILL) {
        zero = bytes[0] == 0;
        rc = qm_index_fill_is(index, page, bytes[0]);
    } else if (d->step == AT_PAGE) {
        rc = qm_index_page_at(index, page, at);
    } else {
        if (qm_apply_delta(bytes, d->need, d->page, d->page_size))
            return fail(d, QM_RECORD_DELTA);
        rc = qm_index_changed(index, page, at, (uint16_t)d->need);
    }
    if (rc < 0)
        return rc == -EMLINK ? fail(d, QM_RECORD_CHANGES) : rc;
    if (charge_memory(d, qm_index_bytes(index) - before))
        return -EBADMSG;
    if (zero)
        d->zero_pages++;
    else
        d->data_pages++;
    if (rc)
        d->new_bytes += d->page_size;
    return 0;
}

/* ---- content bits --------------------------------------------------------------------------- */

#define MEMORY_WORDS ((size_t)512) /* words of a bitmap that the first bit in them allocates */

/* Count a record, and the memory of its bit: a bitmap uses memory where bits are set. */
static int record_bit(qm_decoder *d, int zero)
{
    const uint64_t *bits = d->current->seen;
    size_t k = (size_t)(offset_of(d) / d->page_size), i = k / 64 / MEMORY_WORDS * MEMORY_WORDS;
    size_t words = (size_t)((d->current->len / d->page_size + 63) / 64);
    size_t end = words - i < MEMORY_WORDS ? words : i + MEMORY_WORDS;
    if (bits[k / 64] == 0) {
        while (i < end && bits[i] == 0)
            i++;
        if (i == end && charge_memory(d, 2 * MEMORY_WORDS * sizeof(*bits)))
            return -EBADMSG;
    }
    record_page(d, offset_of(d), zero);
    return 0;
}

static int record_content(qm_decoder *d, const unsigned char *bytes)
{
    size_t k = (size_t)(offset_of(d) / d->page_size);
    int zero = d->step == AT_FILL && bytes[0] == 0;
    if (d->step == AT_DELTA && qm_apply_delta(bytes, d->need, d->page, d->page_size))
        return fail(d, QM_RECORD_DELTA);
    if (record_bit(d, zero))
        return -EBADMSG;
    if (!zero)
        bit_set(d->current->content, k);
    else if (bit_get(d->current->content, k))
        bit_clear(d->current->content, k);
    return 0;
}

/* ---- staging -------------------------------------------------------------------------------- */

static int is_staged(const qm_decoder *d)
{
    const struct qm_staging *s = d->staging;
    return d->staged == d->current && offset_of(d) >= s->off && offset_of(d) - s->off < s->len;
}

/* Give the page its content from before this record, unless the staged part has it. */
static int load_previous(qm_decoder *d, size_t k, unsigned char *page, struct qm_fault *fault)
{
    const struct qm_staging *s = d->staging;
    if (bit_get(s->filled, k))
        return 0;
    memset(page, 0, d->page_size);
    if (bit_get(s->zeroed, k) || !bit_get(s->data, k))
        return 0;
    size_t have = 0;
    while (have < d->page_size) {
        off_t at = s->at + (off_t)(k * d->page_size + have);
        ssize_t got = pread(s->fd, page + have, d->page_size - have, at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return memory_fault(fault, s->off + k * d->page_size, got ? -errno : -EIO);
        have += (size_t)got;
    }
    return 0;
}

static int stage_page(qm_decoder *d, const unsigned char *bytes, struct qm_fault *fault)
{
    struct qm_staging *s = d->staging;
    size_t k = (size_t)((offset_of(d) - s->off) / d->page_size);
    unsigned char *page = s->base + k * d->page_size;
    fault->block = d->current - d->blocks;
    if (record_bit(d, d->step == AT_FILL && bytes[0] == 0))
        return -EBADMSG;
    if (d->step == AT_FILL && bytes[0] == 0) {
        bit_set(s->zeroed, k);
        bit_clear(s->filled, k);
        return 0;
    }
    if (d->step == AT_FILL) {
        memset(page, bytes[0], d->page_size);
    } else if (d->step == AT_PAGE) {
        memcpy(page, bytes, d->page_size);
    } else {
        int rc = load_previous(d, k, page, fault);
        if (rc)
            return rc;
        if (qm_apply_delta(bytes, d->need, page, d->page_size))
            return fail(d, QM_RECORD_DELTA);
    }
    bit_set(s->filled, k);
    bit_clear(s->zeroed, k);
    return 0;
}

void qm_decoder_set_staging(qm_decoder *d, size_t block, struct qm_staging *staging)
{
    size_t words = (size_t)((staging->len / d->page_size + 63) / 64);
    memset(staging->filled, 0, words * sizeof(uint64_t));
    memset(staging->zeroed, 0, words * sizeof(uint64_t));
    d->staging = staging;
    d->staged = &d->blocks[block];
}

size_t qm_decoder_wants(const qm_decoder *d, uint64_t *off)
{
    *off = offset_of(d);
    return (size_t)(d->current - d->blocks);
}

void qm_decoder_seek(qm_decoder *d, uint64_t position)
{
    d->position = position;
}

/* ---- bytes -> records ----------------------------------------------------------------------- */

/* Expect the data of a record whose block is known. Returns 2 when another part of the block has to
 * be staged first. */
static int start_data(qm_decoder *d)
{
    if (offset_of(d) >= d->current->len)
        return fail(d, QM_RECORD_OUTSIDE);
    if (d->word & RECORD_ZERO)
        expect(d, AT_FILL, 1);
    else if (d->word & RECORD_PAGE)
        expect(d, AT_PAGE, d->page_size);
    else
        expect(d, AT_DELTA_HEAD, XBZRLE_HEAD);
    return d->current->sink == QM_SINK_STAGING && !is_staged(d) ? 2 : 0;
}

/* Return 1 at the end of the section. */
static int read_word(qm_decoder *d, const unsigned char *bytes)
{
    memcpy(&d->word, bytes, WORD_LEN);
    d->word = __builtin_bswap64(d->word);
    d->error.at = d->position - WORD_LEN;
    uint64_t flags = d->word & (d->page_size - 1);
    uint64_t kind = flags & ~(uint64_t)RECORD_CONTINUE;
    if (d->word == RECORD_EOS)
        return 1;
    if (d->word == RECORD_MULTIFD_FLUSH)
        return fail(d, QM_RECORD_MULTIFD);
    if (kind == RECORD_COMPRESS)
        return fail(d, QM_RECORD_COMPRESSED);
    if (kind != RECORD_ZERO && kind != RECORD_PAGE && kind != RECORD_XBZRLE)
        return fail(d, QM_RECORD_FLAGS);
    if (!(flags & RECORD_CONTINUE)) {
        expect(d, AT_NAME_LEN, 1);
        return 0;
    }
    return d->current ? start_data(d) : fail(d, QM_RECORD_NO_BLOCK);
}

static int read_name(qm_decoder *d, const unsigned char *name)
{
    d->current = find_block(d, name, d->need);
    if (d->current)
        return start_data(d);
    memcpy(d->error.name, name, d->need);
    d->error.name_len = (uint32_t)d->need;
    return fail(d, QM_RECORD_UNKNOWN);
}

static int read_delta_head(qm_decoder *d, const unsigned char *head)
{
    size_t len = (size_t)head[1] << 8 | head[2];
    if (head[0] != XBZRLE_ENCODING || len > d->page_size)
        return fail(d, QM_RECORD_DELTA);
    expect(d, AT_DELTA, len);
    return 0;
}

/* Check the data of a record that is dropped. */
static int check_data(qm_decoder *d, const unsigned char *bytes)
{
    if (d->step != AT_DELTA)
        return 0;
    memset(d->page, 0, d->page_size);
    return qm_apply_delta(bytes, d->need, d->page, d->page_size) ? fail(d, QM_RECORD_DELTA) : 0;
}

static int read_to_memory(qm_decoder *d, const unsigned char *bytes, int lasting,
                          struct qm_fault *fault)
{
    if (d->step == AT_FILL)
        return read_fill(d, bytes[0], fault);
    return d->step == AT_PAGE ? read_page(d, bytes, lasting, fault) : read_delta(d, bytes, fault);
}

static int read_data(qm_decoder *d, const unsigned char *bytes, int lasting, struct qm_fault *fault)
{
    switch (d->current->sink) {
    case QM_SINK_MEMORY:
        return read_to_memory(d, bytes, lasting, fault);
    case QM_SINK_INDEX:
        return record_place(d, bytes);
    case QM_SINK_STAGING:
        return stage_page(d, bytes, fault);
    case QM_SINK_CONTENT:
        return record_content(d, bytes);
    case QM_SINK_NONE:
        break;
    }
    return check_data(d, bytes);
}

/* Read all bytes of one step. Returns 1 at the end of the section, 2 as start_data does. */
static int read_step(qm_decoder *d, const unsigned char *bytes, int lasting, struct qm_fault *fault)
{
    int rc = 0;
    switch (d->step) {
    case AT_WORD:
        return read_word(d, bytes);
    case AT_NAME_LEN:
        expect(d, AT_NAME, bytes[0]);
        return 0;
    case AT_NAME:
        return read_name(d, bytes);
    case AT_DELTA_HEAD:
        return read_delta_head(d, bytes);
    case AT_FILL:
    case AT_PAGE:
    case AT_DELTA:
        rc = read_data(d, bytes, lasting, fault);
        break;
    }
    if (rc == 0)
        expect(d, AT_WORD, WORD_LEN);
    return rc;
}

static int decode(qm_decoder *d, const unsigned char *bytes, size_t len, size_t *used,
                  struct qm_fault *fault)
{
    int rc = 0;
    while (rc == 0) {
        size_t left = len - *used;
        const unsigned char *whole = bytes + *used;
        int lasting = d->have == 0 && left >= d->need;
        if (lasting) {
            *used += d->need;
        } else {
            size_t step = d->need - d->have < left ? d->need - d->have : left;
            memcpy(d->partial + d->have, whole, step);
            d->have += step;
            *used += step;
            if (d->have < d->need) {
                d->position += left;
                return 0;
            }
            whole = d->partial;
        }
        d->position += left - (len - *used);
        d->have = 0;
        rc = read_step(d, whole, lasting, fault);
    }
    return rc;
}

int qm_decode(qm_job *job, qm_decoder *d, const unsigned char *bytes, size_t len, size_t *used,
              struct qm_fault *fault)
{
    *used = 0;
    fault->block = -1;
    int rc = decode(d, bytes, len, used, fault);
    int rest = flush(d, fault); /* `bytes` is the caller's again after this */
    qm_job_count_pages(job, d->new_bytes, d->data_pages, d->zero_pages);
    d->new_bytes = d->data_pages = d->zero_pages = 0;
    return rc >= 0 && rest ? rest : rc;
}

int qm_decode_file(qm_job *job, qm_decoder *d, int fd, off_t *at, off_t end, struct qm_fault *fault)
{
    for (;;) {
        if (qm_job_cancelled(job))
            return -ECANCELED;
        if (*at < d->window_at || *at >= d->window_at + (off_t)d->window_len) {
            size_t len = qm_job_piece(job, 4096);
            if (len > WINDOW)
                len = WINDOW;
            if (end - *at < (off_t)len)
                len = end > *at ? (size_t)(end - *at) : 0;
            struct iovec iov = {.iov_base = d->window, .iov_len = len};
            off_t failed;
            ssize_t got = len ? qm_preadv(job, fd, &iov, 1, *at, 1, &failed) : 0;
            if (got <= 0)
                return file_fault(fault, got ? failed : *at, got ? (int)got : -ENODATA);
            d->window_at = *at;
            d->window_len = (size_t)got;
        }
        size_t skip = (size_t)(*at - d->window_at), used;
        d->position = (uint64_t)*at;
        int rc = qm_decode(job, d, d->window + skip, d->window_len - skip, &used, fault);
        *at += (off_t)used;
        if (rc)
            return rc;
    }
}
