/* Guest memory -> the page records of a sequential stream. */
#define _GNU_SOURCE
#include "bits.h"
#include "chunk.h"
#include "records.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

/* Bytes written at a time; few enough to stay in the processor's cache on their way to the kernel. */
#define OUT_LEN ((size_t)2 << 20)
#define RECORD_MAX (WORD_LEN + 1 + UINT8_MAX + QM_MAX_PAGE)

struct qm_encoder {
    int fd;      /* -1: bytes are only counted */
    int forward; /* fd has no positions */
    off_t at;    /* file position of the buffer's first byte */
    size_t have;
    const struct qm_name *current; /* the block of the last record */
    unsigned char buffer[OUT_LEN];
};

static unsigned char *put_word(unsigned char *out, uint64_t word)
{
    word = __builtin_bswap64(word);
    memcpy(out, &word, WORD_LEN);
    return out + WORD_LEN;
}

size_t qm_encode(struct qm_encoding *e, unsigned char *out, size_t len)
{
    const struct qm_name *name = e->name;
    uint32_t page_size = e->page_size;
    unsigned char *at = out;
    size_t k = next_set(e->want, e->next, e->npages);
    for (; k < e->npages; k = next_set(e->want, k + 1, e->npages)) {
        int filled = bit_get(e->data, k);
        size_t body = filled ? page_size : 1;
        size_t front = e->named ? 0 : 1 + (size_t)name->len;
        if (len - (size_t)(at - out) < WORD_LEN + front + body)
            break;
        uint64_t flags = (filled ? RECORD_PAGE : RECORD_ZERO) | (e->named ? RECORD_CONTINUE : 0);
        at = put_word(at, (e->first + k) * page_size | flags);
        if (!e->named) {
            *at++ = name->len;
            memcpy(at, name->bytes, name->len);
            at += name->len;
            e->named = 1;
        }
        if (filled)
            memcpy(at, e->pages + k * page_size, page_size);
        else
            *at = 0;
        at += body;
    }
    e->next = k;
    return (size_t)(at - out);
}

qm_encoder *qm_encoder_create(int fd, off_t at)
{
    qm_encoder *e = malloc(sizeof(*e));
    if (!e)
        return NULL;
    e->fd = fd;
    e->forward = 0;
    e->at = at;
    e->have = 0;
    e->current = NULL;
    return e;
}

void qm_encoder_destroy(qm_encoder *encoder)
{
    free(encoder);
}

void qm_encoder_go_forward(qm_encoder *encoder)
{
    encoder->forward = 1;
}

off_t qm_encoder_position(const qm_encoder *encoder)
{
    return encoder->at + (off_t)encoder->have;
}

void qm_encoder_forget_block(qm_encoder *encoder)
{
    encoder->current = NULL;
}

int qm_encoder_flush(qm_job *job, qm_encoder *e, struct qm_fault *fault)
{
    size_t done = 0;
    while (e->fd >= 0 && done < e->have) {
        size_t len = qm_job_piece(job, 4096);
        if (len > e->have - done)
            len = e->have - done;
        off_t at = e->at + (off_t)done, bad;
        int rc;
        if (e->forward) {
            size_t put;
            rc = qm_write_forward(job, e->fd, e->buffer + done, len, &put);
            bad = at + (off_t)put;
        } else {
            struct iovec iov = {.iov_base = e->buffer + done, .iov_len = len};
            rc = qm_pwritev(job, e->fd, &iov, 1, at, 1, &bad);
        }
        if (rc)
            return file_fault(fault, bad, rc);
        done += len;
    }
    e->at += (off_t)e->have;
    e->have = 0;
    return 0;
}

int qm_encoder_put(qm_job *job, qm_encoder *e, const unsigned char *bytes, size_t len,
                   struct qm_fault *fault)
{
    while (len > 0) {
        size_t room = OUT_LEN - e->have;
        if (room == 0) {
            int rc = qm_encoder_flush(job, e, fault);
            if (rc)
                return rc;
            continue;
        }
        size_t step = len < room ? len : room;
        memcpy(e->buffer + e->have, bytes, step);
        e->have += step;
        bytes += step;
        len -= step;
    }
    return 0;
}

static int put_chunk(qm_job *job, qm_encoder *e, struct qm_encoding *chunk, struct qm_fault *fault)
{
    while (chunk->next < chunk->npages) {
        if (OUT_LEN - e->have < RECORD_MAX) {
            int rc = qm_encoder_flush(job, e, fault);
            if (rc)
                return rc;
        }
        e->have += qm_encode(chunk, e->buffer + e->have, OUT_LEN - e->have);
        if (chunk->named)
            e->current = chunk->name;
    }
    return 0;
}

int qm_encode_pages(const struct qm_transfer *t, qm_channel *channel, qm_encoder *encoder,
                    const struct qm_name *name, uint64_t first, uint64_t npages,
                    struct qm_fault *fault)
{
    int rc = qm_transfer_check(t, first, npages);
    if (rc)
        return rc;
    struct qm_source source = {
        .transfer = t,
        .channel = channel,
        .fault = fault,
        .look_for_holes = 1,
    };
    uint32_t page_size = t->block->page_size;
    uint64_t end = first + npages, most = QM_CHUNK / page_size;
    struct chunk c;
    for (uint64_t at = first; at < end; at += most) {
        if (qm_job_cancelled(t->job))
            return -ECANCELED;
        uint64_t want[WORDS];
        uint64_t n = end - at < most ? end - at : most;
        uint64_t selected = 0, filled = 0;
        for (size_t i = 0; i * 64 < n; i++) {
            want[i] = bits_below(i, (size_t)n);
            if (t->selection)
                want[i] &= t->selection[at / 64 + i];
            selected += (uint64_t)__builtin_popcountll(want[i]);
        }
        if (selected == 0)
            continue;
        rc = qm_chunk_load(&source, &c, at, end);
        if (rc)
            return rc;
        struct qm_encoding records = {
            .name = name,
            .named = encoder->current == name,
            .page_size = page_size,
            .pages = c.bytes,
            .first = c.first,
            .npages = c.npages,
            .want = want,
            .data = c.data,
        };
        rc = put_chunk(t->job, encoder, &records, fault);
        if (rc)
            return rc;
        for (size_t i = 0; i * 64 < n; i++)
            filled += (uint64_t)__builtin_popcountll(want[i] & c.data[i]);
        source.look_for_holes = filled == 0;
        qm_job_count_pages(t->job, selected * page_size, filled, selected - filled);
    }
    return 0;
}
